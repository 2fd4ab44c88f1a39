"""Whether a dictionary fits the values at its site, and where it does not, what most likely went
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assay.dictionaries.base import Dictionary, DictionarySet, Placed
from assay.dictionaries.linear import Linear
from assay.dictionaries.load import name_of
from assay.errors import InputError
from assay.io.files import require_finite

_DOUBTFUL = 0.5
"""Below this explained variance other readings are tried."""
_CONVINCING = 0.3
"""The explained variance from which on a reading is named."""
_SPARSE = 1 / 3
"""The share of active features up to which a scale is believed."""
_MOST_POSITIONS = 512
_POSITIONS_PER_SCALE = 64


@dataclass(frozen=True)
class Fit:
    """How a dictionary fits a batch of values.

    `explained_variance` is `1 - sum ||y - yhat||^2 / sum ||y - mean||^2` over the `positions`,
    `active` the mean number of active features per position, `silent` the share of features that
    are active at none. `warning` says what would explain more, None where nothing was found."""

    name: str
    positions: int
    explained_variance: float
    active: float
    silent: float
    warning: str | None = None


def check_fit(
    dictionaries: Placed | DictionarySet, values: Tensor | Mapping[str, Tensor]
) -> dict[str, Fit]:
    """Check dictionaries on values at their sites, (*positions, width) by site, or the value itself
    where one autoencoder is checked; return a fit per dictionary.

    What dictionaries that write at several sites rebuild at a site is summed first, so that the
    layers of a cross-layer transcoder are checked together; each has the worst of its sites.
    Where features explain less than half, other readings of the file are tried: another scale, a
    bias that is subtracted or not, a transposed encoder, normalised or centred values, and the
    first position left out. Raises InputError, with the reading that explains most, when the
    explained variance is below 0 or no feature is active, and for values of another width."""
    placed_by_name = _by_name(dictionaries)
    if isinstance(values, Tensor):
        sites = {site for placed in placed_by_name.values() for site in _sites(placed)}
        if len(sites) > 1:
            raise InputError(f"values must be given by site, for {', '.join(sorted(sites))}")
        values = dict.fromkeys(sites, values)
    for name, placed in placed_by_name.items():
        _require_values(name, placed, values)
    shares = _crossing_shares(placed_by_name, values)
    return {name: _check(name, placed, values, shares) for name, placed in placed_by_name.items()}


def explained_variance(
    values: Float[Tensor, "*positions width"], rebuilt: Float[Tensor, "*positions width"]
) -> float:
    """Return `1 - sum ||y - yhat||^2 / sum ||y - mean||^2`, the sums and the mean over positions,
    in float64; minus infinity for constant values that are not rebuilt.
    """
    flat = values.detach().double().reshape(-1, values.shape[-1])
    missed = float((flat - rebuilt.detach().double().reshape(flat.shape)).square().sum())
    total = float((flat - flat.mean(0)).square().sum())
    if total == 0:
        return 1.0 if missed == 0 else float("-inf")
    return 1 - missed / total


def _by_name(dictionaries: Placed | DictionarySet) -> dict[str, Placed]:
    if isinstance(dictionaries, Placed):
        return {name_of(dictionaries.reads, dictionaries.writes): dictionaries}
    return dict(dictionaries)


def _sites(placed: Placed) -> tuple[str, ...]:
    return (placed.reads, *placed.writes)


def _require_values(name: str, placed: Placed, values: Mapping[str, Tensor]) -> None:
    for site, width, does in (
        (placed.reads, placed.dictionary.d_in, "reads"),
        *((site, placed.width, "writes") for site in placed.writes),
    ):
        if site not in values:
            raise InputError(f"values at {site!r} are needed to check the dictionary {name!r}")
        value = values[site]
        if value.ndim < 2 or not value.numel():
            raise InputError(f"values at {site!r} must be (positions, width), got none")
        if value.shape[-1] != width:
            raise InputError(
                f"the dictionary {name!r} {does} values of width {width}, and those at {site!r}"
                f" have width {value.shape[-1]}: it was trained on another model or site"
            )
        require_finite(value, f"the values at {site!r}")


@torch.no_grad()
def _crossing_shares(
    placed_by_name: Mapping[str, Placed], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what all dictionaries of several sites rebuild, by site."""
    found: dict[str, Tensor] = {}
    for placed in placed_by_name.values():
        if len(placed.writes) > 1 or _is_last_of_a_crossing(placed, placed_by_name):
            rebuilt = placed.dictionary(_read(placed, values))
            for site, share in zip(placed.writes, rebuilt.split(placed.width, -1), strict=True):
                found[site] = found[site] + share if site in found else share
    return found


def _is_last_of_a_crossing(placed: Placed, placed_by_name: Mapping[str, Placed]) -> bool:
    """Return whether a dictionary of one site shares it with one of several."""
    return len(placed.writes) == 1 and any(
        len(other.writes) > 1 and placed.writes[0] in other.writes
        for other in placed_by_name.values()
    )


def _read(placed: Placed, values: Mapping[str, Tensor]) -> Tensor:
    return values[placed.reads].to(placed.dictionary.W_dec)


@torch.no_grad()
def _check(
    name: str, placed: Placed, values: Mapping[str, Tensor], shares: Mapping[str, Tensor]
) -> Fit:
    x = _read(placed, values)
    active = placed.dictionary.encode(x) != 0
    crossing = all(site in shares for site in placed.writes)
    if crossing:
        explained = min(explained_variance(values[site], shares[site]) for site in placed.writes)
    else:
        explained = explained_variance(values[placed.writes[0]], placed.dictionary(x))
    dead = not bool(active.any())
    cause, best = None, explained
    if (explained < _DOUBTFUL or dead) and not crossing:
        cause, best = _likely_cause(placed, x, values[placed.writes[0]])
    told = cause is not None and best > max(_CONVINCING, explained + 0.1)
    reading = f"{cause} (explained variance {best:.3f})" if told else None
    if explained < 0 or dead:
        failing = (
            f"no feature is active at {active[..., 0].numel()} positions"
            if dead
            else f"the explained variance is {explained:.3g}"
        )
        raise InputError(
            f"the dictionary {name!r} does not fit the values at its site: {failing}."
            f" {reading or 'Most likely it was trained at another hook point or on another model'}"
        )
    flat = active.reshape(-1, active.shape[-1])
    return Fit(
        name,
        len(flat),
        explained,
        float(flat.sum(-1).double().mean()),
        float((~flat.any(0)).double().mean()),
        reading,
    )


def _likely_cause(placed: Placed, x: Tensor, y: Tensor) -> tuple[str | None, float]:
    """Return the reading under which a dictionary explains most, and how much."""
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
