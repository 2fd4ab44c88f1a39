"""The number of directions: refits on resampled inputs, against gradients without structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.mechanisms.directions.ascent import ascend
from assay.mechanisms.directions.factors import DenseFactors, Factors, normalise
from assay.mechanisms.directions.span import span
from assay.mechanisms.directions.token_factors import TokenFactors
from assay.progress import progress

SAME = 0.9
"""Two directions are the same when their |cosine| is at least this."""

BYTES = 2**27


@dataclass(frozen=True)
class Count:
    """How many directions the factors hold, as far as `k` directions can show it.

    `clear (k,)` marks the given directions that are among them and `count` is their number.
    `interval` is the 95 % range of the number over refits on resampled inputs, its upper end None
    when the data hold more than `k`. `threshold` is the dominance that a direction must exceed, and
    `strength` the summed dominance of the directions that count in the fit to all inputs."""

    clear: Tensor
    count: int
    interval: tuple[int, int | None]
    threshold: float
    strength: float


def count_directions(
    factors: Factors,
    directions: Tensor,
    *,
    generator: torch.Generator,
    refits: int = 20,
    nulls: int = 20,
    most: int = 500,
) -> Count:
    """Count the directions in trace-normalised factors, and say which of those given are among
    them.

    The power iteration is fitted with more directions than were given, once on all inputs and once
    on each of `refits` bootstrap samples of them. A direction counts when

    * its *dominance* `sum_s d_s^2 / sum_s d_s`, the share of an input's curvature that it holds
      where it is active, exceeds the largest dominance in any fit to `nulls` sets of independent
      factors with the same covariance and the same singular values in each sample, bootstrapped
      alike;
    * it comes back in at least half of the refits (|cosine| at least 0.9);
    * it is sparser than a Gaussian, `mean d^2 >= 3 (mean d)^2`, or holds more than half of the
      curvature where it is active.

    The upper end of the interval counts directions that fail the third condition alone: one that is
    moderately active everywhere, such as the mean gradient, is a direction of the gradients but not
    one of a few inputs. There is no upper end when more than k directions count, or when they do
    not end within the fit. At most `most` inputs are used."""
    if factors.samples > most:
        chosen = torch.randperm(factors.samples, generator=generator)[:most].sort().values
        factors = factors.scaled(chosen, torch.ones(most, dtype=factors.traces().dtype))
    flat, given = _coordinates(factors, directions)
    # What is compared are shares that differ by tenths; single precision halves the time.
    flat, given = DenseFactors(flat.values.float()), given.float()
    k = len(directions)
    room = min(k + max(6, min(k, 10)), flat.size)
    dtype = flat.values.dtype
    weights = torch.cat(
        [
            torch.ones(1, flat.samples, dtype=dtype),
            _resample(flat.samples, refits, dtype, generator),
        ]
    ).to(flat.values.device)
    fitted, first, second = _fit(flat, room, weights, generator)
    dominance = second / first
    threshold = _null_dominance(flat, room, nulls, generator)
    same = torch.einsum("kp,fjp->fkj", fitted[0], fitted[1:]).abs() >= SAME
    stable = same.any(2).double().mean(0) >= 0.5
    back = torch.cat([stable[None], (same & stable[None, :, None]).any(1)])
    structured = (dominance > threshold) & back
    clear = structured & ((second >= 3 * first.square()) | (dominance > 0.5))
    mine = _match(given, fitted[0], clear[0])
    count = int(mine.sum())
    low, high = _range(clear, structured)
    ended = room == flat.size or _ends(second[0], structured[0])
    bounded = ended and max(high, count) <= k
    interval = (min(low, count), max(high, count) if bounded else None)
    return Count(mine, count, interval, threshold, float(dominance[0][clear[0]].sum()))


def _coordinates(factors: Factors, directions: Tensor) -> tuple[DenseFactors, Tensor]:
    """Return factors and directions in coordinates of the span of the rows, where that is
    smaller.
    """
    if isinstance(factors, TokenFactors):
        inner = span(factors)
        return inner.factors, inner.place(directions)
    assert isinstance(factors, DenseFactors)
    rows = factors.values.flatten(0, 1)
    if rows.shape[1] <= rows.shape[0]:
        return factors, directions
    basis = torch.linalg.qr(rows.T).Q
    return DenseFactors(factors.values @ basis), directions @ basis


def _resample(samples: int, count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return how often each sample is drawn, `(count, samples)`, in draws with replacement."""
    drawn = torch.randint(samples, (count, samples), generator=generator)
    return torch.zeros(count, samples, dtype=dtype).scatter_add_(
        1, drawn, torch.ones(count, samples, dtype=dtype)
    )


def _fit(
    factors: DenseFactors, k: int, weights: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return directions `(fits, k, size)`, and `mean d` and `mean d^2` of each, `(fits, k)`."""
    tiny = torch.finfo(weights.dtype).tiny
    rows = factors.values[..., 0].numel()
    found, first, second = [], [], []
    for part in weights.split(max(1, BYTES // (3 * rows * k * weights.element_size()))):
        ended = ascend(factors, k, part, generator=generator, steps=60, gain=3e-4).directions
        shares = factors.dot(ended.flatten(0, 1)).unflatten(2, (len(part), k)).square().sum(1)
        total = part.sum(1, keepdim=True)
        found.append(ended)
        first.append((torch.einsum("fs,sfk->fk", part, shares) / total).clamp_min(tiny))
        second.append(torch.einsum("fs,sfk->fk", part, shares.square()) / total)
    return torch.cat(found), torch.cat(first), torch.cat(second)


def _null_dominance(factors: DenseFactors, k: int, count: int, generator: torch.Generator) -> float:
    """Return the largest dominance of any direction in fits to independent factors: every sample
    keeps its singular values, its directions are drawn with the covariance of all.
    """
    values = factors.values
    rows = values.flatten(0, 1).double()
    covariance = rows.T @ rows / rows.square().sum()
    covariance.diagonal().add_(1e-9)
    root = torch.linalg.cholesky(covariance).to(values.dtype)
    sizes = torch.linalg.svdvals(values)
    # What is left of a singular value of zero by rounding is not a row of its own.
    rounding = torch.finfo(values.dtype).eps * max(values.shape[1:])
    sizes = sizes.where(sizes > rounding * sizes[:, :1], 0)
    largest = 0.0
    for _ in progress(range(count), "draws without structure"):
        drawn = torch.randn(
            (factors.samples, sizes.shape[1], factors.size), generator=generator, dtype=values.dtype
        ).to(values.device)
        unit, _ = normalise(DenseFactors(sizes[:, :, None] * (drawn @ root.T)))
        assert isinstance(unit, DenseFactors)
        weights = _resample(unit.samples, 1, values.dtype, generator).to(values.device)
        _, first, second = _fit(unit, k, weights, generator)
        largest = max(largest, float((second / first).max()))
    return largest


def _match(given: Tensor, reference: Tensor, clear: Tensor) -> Tensor:
    """Mark the given directions that are a clear direction of the reference, one to one, in the
    order given.
    """
    unit = given / given.norm(dim=1, keepdim=True).clamp_min(torch.finfo(given.dtype).tiny)
    same = ((unit.to(reference.dtype) @ reference.T).abs() >= SAME) & clear
    marks = []
    for row in same:
        place = int(row.double().argmax())
        marks.append(bool(row[place]))
        if marks[-1]:
            same[:, place] = False
    return torch.tensor(marks)


def _range(clear: Tensor, structured: Tensor) -> tuple[int, int]:
    """Return the 95 % range over refits of the number of directions, `(fits, k)` each; the first
    fit, to all inputs, lies in it.
    """
    fewest, largest = clear.sum(1).double(), structured.sum(1).double()
    low = int(fewest[1:].quantile(0.025, interpolation="lower"))
    high = int(largest[1:].quantile(0.975, interpolation="higher"))
    return min(low, int(fewest[0])), max(high, int(fewest[0]))


def _ends(scores: Tensor, structured: Tensor) -> bool:
    """Say whether the directions that count end within the fit: one that does not count has less
    than half the score of all that do. Otherwise more of them may lie outside.
    """
    if not bool(structured.any()):
        return True
    return bool((scores[~structured] < 0.5 * scores[structured].min()).any())
