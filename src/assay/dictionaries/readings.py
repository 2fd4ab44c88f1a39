"""Other readings of a dictionary's file, and how much of the values at its site each explains."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from assay.dictionaries.base import Dictionary, Placed
from assay.dictionaries.linear import Linear

_SPARSE = 1 / 3
"""The share of active features up to which a scale is believed."""
_MOST_POSITIONS = 512
_POSITIONS_PER_SCALE = 64


def explained_variance(
    values: Float[Tensor, "*positions width"], rebuilt: Float[Tensor, "*positions width"]
) -> float:
    """Return `1 - sum ||y - yhat||^2 / sum ||y - mean||^2`, the sums and the mean over positions,
    in float64; minus infinity for constant values that are not rebuilt.
    """
    flat = values.detach().double().reshape(-1, values.shape[-1])
    missed = float((flat - rebuilt.detach().to(flat).reshape(flat.shape)).square().sum())
    total = float((flat - flat.mean(0)).square().sum())
    if total == 0:
        return 1.0 if missed == 0 else float("-inf")
    return 1 - missed / total


@torch.no_grad()
def likely_cause(placed: Placed, x: Tensor, y: Tensor) -> tuple[str | None, float]:
    """Return the reading under which a dictionary explains most, and how much."""
    y = y.to(x)
    first_left_out = None
    if x.ndim > 2 and x.shape[-2] > 1:
        first_left_out = x[..., 1:, :], y[..., 1:, :]
    flat_x, flat_y = _sample(x), _sample(y)
    found = [
        (explained_variance(target, rebuilt), cause)
        for cause, target, rebuilt in _readings(placed, flat_x, flat_y)
    ]
    if first_left_out is not None:
        later_x, later_y = (_sample(part) for part in first_left_out)
        explained = explained_variance(later_y, placed.dictionary(later_x))
        found.append((explained, "The first position alone is not explained: leave it out"))
    found = [(explained, cause) for explained, cause in found if explained == explained]
    if not found:
        return None, float("-inf")
    best, cause = max(found)
    return cause, best


def _sample(values: Tensor) -> Tensor:
    flat = values.reshape(-1, values.shape[-1])
    return flat[:: max(1, len(flat) // _MOST_POSITIONS)]


def _readings(placed: Placed, x: Tensor, y: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield other readings of a file: what would be wrong, the target, and what is rebuilt."""
    dictionary = placed.dictionary
    yield from _scales(dictionary, x, y)
    if isinstance(dictionary, Linear):
        yield from _other_weights(dictionary, x, y)
    mean = x.mean(-1, keepdim=True)
    if placed.writes == (placed.reads,):
        spread = x.std(-1, keepdim=True)
        yield (
            "Most likely values were normalised in training: normalize_activations = 'layer_norm'",
            y,
            dictionary((x - mean) / (spread + 1e-5)) * spread + mean,
        )
        size = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        yield (
            "Most likely values were normalised in training: normalize_activations ="
            " 'constant_norm_rescale'",
            y,
            dictionary(x / size) * size,
        )
        yield (
            "Most likely it was trained on a model whose residual stream is centred (each value"
            " less the mean of its coordinates)",
            y - mean,
            dictionary(x - mean),
        )


def _scales(dictionary: Dictionary, x: Tensor, y: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the readings at the scales of the input that explain most among their neighbours, with
    the best scale of the output at each.
    """
    few = slice(None, None, max(1, len(x) // _POSITIONS_PER_SCALE))

    def explained(power: float) -> float:
        rebuilt = dictionary(x[few] / 10**power)
        return explained_variance(y[few], _best_multiple(rebuilt, y[few]) * rebuilt)

    powers = [place / 6 for place in range(-24, 25)]
    found = [explained(power) for power in powers]
    for before, power, after in zip(powers, powers[1:], powers[2:], strict=False):
        middle = found[powers.index(power)]
        if middle < max(found[powers.index(before)], found[powers.index(after)]):
            continue
        scale = 10 ** _highest(explained, before, after)
        codes = dictionary.encode(x / scale)
        large = codes.abs() > 1e-2 * codes.abs().amax(-1, keepdim=True)
        # Any dictionary explains a good part where most of its features are active.
        if float(large.double().mean()) > _SPARSE:
            continue
        rebuilt = dictionary.decode(codes, x / scale)
        written = _best_multiple(rebuilt, y)
        both = abs(written / scale - 1) < 0.1
        yield (
            "Most likely the scale of training is not folded into the weights: values divided by"
            f" {scale:.4g}" + ("" if both else f" and what is rebuilt multiplied by {written:.4g}"),
            y,
            rebuilt * (scale if both else written),
        )


def _best_multiple(rebuilt: Tensor, y: Tensor) -> float:
    size = float(rebuilt.double().square().sum())
    return float((y * rebuilt).double().sum()) / size if size > 0 else 0.0


def _highest(function: Callable[[float], float], low: float, high: float, steps: int = 12) -> float:
    """Return where a function of one peak is highest between two points, by golden section."""
    ratio = (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(steps):
        if at_left > at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2


def _other_weights(
    dictionary: Linear, x: Tensor, y: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    if dictionary.d_in == dictionary.d_out:
        shifted = x + dictionary.b_dec if dictionary.subtract else x - dictionary.b_dec
        stated = "is not" if dictionary.subtract else "is"
        codes = dictionary.encode(shifted)
        yield (
            f"Most likely b_dec {stated} subtracted from the values before they are encoded"
            " (apply_b_dec_to_input)",
            y,
            dictionary.decode(codes, x),
        )
    state = dict(dictionary.state_dict())
    for key, matrix in (("W_enc", dictionary.W_enc), ("W_dec", dictionary.W_dec)):
        rows, columns = matrix.shape
        # Numbers that were read in the order of the transposed matrix.
        other = matrix.T if rows == columns else matrix.reshape(columns, rows).T
        rebuilt = torch.func.functional_call(dictionary, {**state, key: other}, (x,))
        yield f"Most likely {key} is transposed", y, rebuilt
