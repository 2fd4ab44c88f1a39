"""Laboratory tables: how often events occurred, and what is proved of their probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from assay.errors import InputError
from assay.guard.quantise import Quantiser
from assay.memory import require_memory


def lower_bound(count: int, total: int, delta: float) -> float:
    """Return the Clopper-Pearson lower bound of a probability: with confidence 1 - delta it is at
    least this, after `count` occurrences in `total` draws.
    """
    _require(count, total, delta)
    return float(stats.beta.ppf(delta, count, total - count + 1)) if count else 0.0


def upper_bound(count: int, total: int, delta: float) -> float:
    """Return the Clopper-Pearson upper bound of a probability."""
    _require(count, total, delta)
    return float(stats.beta.isf(delta, count + 1, total - count)) if count < total else 1.0


def interval(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return the two-sided Clopper-Pearson interval of a share; (0, 1) of nothing."""
    if total == 0:
        return 0.0, 1.0
    half = (1 - level) / 2
    return lower_bound(count, total, half), upper_bound(count, total, half)


def needed(total: int, theta: float, delta: float) -> int:
    """Return the fewest occurrences in `total` draws whose lower bound reaches theta; total + 1
    where even all of them do not.
    """
    counts = np.arange(1, total + 1)
    reached = stats.beta.ppf(delta, counts, total - counts + 1) >= theta
    return int(counts[reached][0]) if reached.any() else total + 1


def _require(count: int, total: int, delta: float) -> None:
    if not 0 <= count <= total or total < 1 or not 0 < delta < 1:
        raise InputError(
            f"a bound needs 0 <= count <= total, total >= 1 and 0 < delta < 1; got {count}, {total}"
            f" and {delta}"
        )


@dataclass(frozen=True)
class Tables:
    """Counts of events over laboratory inputs: of single bins (features, bins), of pairs (features,
    bins, features, bins), of root values (roots,), and of both (roots, features, bins).

    `sizes` (features,) are the numbers of bins that a feature has."""

    total: int
    sizes: Int[Tensor, " features"]
    single: Float[Tensor, "features bins"]
    pairs: Float[Tensor, "features bins features bins"]
    root: Float[Tensor, " roots"]
    rooted: Float[Tensor, "roots features bins"]

    @property
    def roots(self) -> int:
        return len(self.root)

    @property
    def candidates(self) -> int:
        """The number of cells of all explanations that could be made: what delta is spent over,
        whichever of them are admitted.
        """
        cells = int(self.sizes.sum())
        crossed = (cells**2 - int(self.sizes.square().sum())) // 2
        return cells + crossed + self.roots * (cells + 1)  # a root value is an event too

    def marginals(self) -> Float[Tensor, "features bins"]:
        """Return smoothed probabilities of bins, `(count + 1/bins) / (total + 1)`."""
        sizes = self.sizes[:, None].double()
        return (self.single.double() + 1 / sizes) / (self.total + 1)

    def joint(self, first: int, second: int) -> Float[Tensor, "bins bins"]:
        """Return smoothed probabilities of a pair, `(count + 1/(bins bins')) / (total + 1)`: their
        marginals are those of `marginals`.
        """
        cells = float(self.sizes[first] * self.sizes[second])
        return (self.pairs[first, :, second].double() + 1 / cells) / (self.total + 1)

    def given_root(self) -> Float[Tensor, "roots features bins"]:
        """Return smoothed probabilities of bins under each root value, `(count + 2 p) / (total of
        the value + 2)`.
        """
        p = self.marginals()
        return (self.rooted.double() + 2 * p) / (self.root.double()[:, None, None] + 2)

    def information(self) -> Float[Tensor, "features features"]:
        """Return the mutual information of every pair in nats, from the counts."""
        n, bins = self.single.shape
        cells = self.pairs.double().permute(0, 2, 1, 3) / self.total
        p = self.single.double() / self.total
        expected = (p[:, None, :, None] * p[None, :, None, :]).clamp_min(1e-300)
        terms = torch.where(cells > 0, cells * (cells / expected).clamp_min(1e-300).log(), 0.0)
        return terms.reshape(n, n, bins * bins).sum(2)

    def root_information(self) -> Float[Tensor, " features"]:
        """Return the mutual information of the root and every feature in nats."""
        cells = self.rooted.double() / self.total
        expected = self.root.double()[:, None, None] * self.single.double() / self.total**2
        terms = torch.where(
            cells > 0, cells * (cells / expected.clamp_min(1e-300)).clamp_min(1e-300).log(), 0.0
        )
        return terms.sum((0, 2))


def tabulate(
    bins: Int[Tensor, "inputs features"],
    quantiser: Quantiser,
    roots: Int[Tensor, " inputs"] | None = None,
    values: int = 0,
) -> Tables:
    """Count single events, pairs, and pairs with a root of `values` values (none without `roots`).

    Raises InputError when there are no inputs or values that are not finite, AssayError when the
    pairs do not fit the memory."""
    if not len(bins):
        raise InputError("no inputs to make tables of")
    if bool((bins < 0).any()):
        raise InputError("the features hold NaN or infinite values; a laboratory must be finite")
    n, size = bins.shape[1], quantiser.bins
    require_memory(8 * (n * size) ** 2 + 4 * len(bins) * n * size, f"tables of {n} features")
    flat = torch.nn.functional.one_hot(bins, size).float().flatten(1)
    root = torch.zeros(len(bins), 0)
    if roots is not None:
        root = torch.nn.functional.one_hot(roots, values).float()
    return Tables(
        len(bins),
        quantiser.sizes,
        flat.sum(0).reshape(n, size),
        (flat.T @ flat).reshape(n, size, n, size),
        root.sum(0),
        (root.T @ flat).reshape(-1, n, size),
    )
