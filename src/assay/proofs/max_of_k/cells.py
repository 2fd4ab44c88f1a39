"""Cells: the sets of sequences that proofs certify, and how many sequences (or how much weight)
they hold.

The cell (q, m, c) holds the sequences whose query token is q, whose largest token is m, and which
have exactly c non-query positions below m. For q < m the largest token must stand in a non-query
position, so c <= K - 2; for q = m, c <= K - 1. A set S of tokens below m selects the C(K-1, c)
|S|^c sequences whose c smaller non-query tokens are all in S. With c = 0 there is one sequence
whatever S is, so it is certified by S = {0} and left out by the empty set."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import comb
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from assay.errors import InputError

Sets = NDArray[np.bool_]  # (families, q, m, c, k)


@dataclass(frozen=True)
class Measure:
    """A performance measure: the share of correct answers, with inputs weighted by a product of
    integer token weights.

    `tokens` (K, V) weighs token t at position p by `tokens[p, t]` (None: one); `cells` (V, V, K)
    keeps the cells (q, m, c) where it is true (None: all). A predicate of the input is a measure
    with weights 0 and 1. Raises InputError for other weights, and where the name says accuracy of a
    measure that is not the uniform one over all inputs."""

    name: str = "accuracy"
    tokens: NDArray[np.int64] | None = None
    cells: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        weighted = self.tokens is not None or self.cells is not None
        letters = "".join(filter(str.isalpha, normalize("NFKC", self.name).casefold()))
        if weighted and "accuracy" in letters:
            raise InputError(
                f"measure {self.name!r}: accuracy is the name of the measure in which all inputs"
                " count the same; name these weights otherwise"
            )
        if self.tokens is not None and (
            self.tokens.ndim != 2 or self.tokens.dtype.kind not in "iu" or (self.tokens < 0).any()
        ):
            raise InputError(
                f"measure {self.name!r}: tokens must be a (positions, vocabulary) array of integers"
                " >= 0"
            )
        if self.cells is not None and (self.cells.ndim != 3 or self.cells.dtype != np.bool_):
            raise InputError(
                f"measure {self.name!r}: cells must be a boolean array (query, largest, count)"
            )

    def check(self, vocabulary: int, positions: int) -> None:
        """Raise InputError unless the weights fit a model."""
        for what, array, shape in (
            ("tokens", self.tokens, (positions, vocabulary)),
            ("cells", self.cells, (vocabulary, vocabulary, positions)),
        ):
            if array is not None and array.shape != shape:
                raise InputError(
                    f"measure {self.name!r}: {what} must have shape {shape}, got {array.shape}"
                )


ACCURACY = Measure()


@dataclass(frozen=True)
class CertifiedSets:
    """Certified cells as sets of tokens (families, q, m, c, k)."""

    sets: Sets

    def weigh(self, measure: Measure = ACCURACY) -> int:
        """Return the weight of the sequences in at least one family: an integer, exact."""
        return weigh(self.sets, measure)


def possible(vocabulary: int, positions: int) -> NDArray[np.bool_]:
    """Return which cells (q, m, c) hold any sequence, shape (V, V, K)."""
    q, m, c = np.ogrid[:vocabulary, :vocabulary, :positions]
    return (q <= m) & (c <= np.where(q == m, positions - 1, positions - 2)) & ((c == 0) | (m > 0))


def everything(vocabulary: int, positions: int) -> Sets:
    """Return the sets that hold all sequences, shape (1, V, V, K, V)."""
    k = np.arange(vocabulary)
    cells = possible(vocabulary, positions)[..., None]
    c = np.arange(positions)[None, None, :, None]
    return (cells & np.where(c == 0, k == 0, k < np.arange(vocabulary)[None, :, None, None]))[None]


def normal(sets: Sets) -> Sets:
    """Return the sets without impossible cells and tokens."""
    return sets & everything(sets.shape[1], sets.shape[3])


def weigh(sets: Sets, measure: Measure = ACCURACY) -> int:
    """Return the weight of the sequences in at least one family of sets: an integer, exact (by
    inclusion and exclusion).
    """
    if len(sets) == 1:
        return _weigh_one(sets[0], measure)
    if len(sets) == 2:
        return sum(_weigh_one(family, measure) for family in sets) - _weigh_one(
            _meet(sets), measure
        )
    raise InputError(f"at most two families of sets are counted, got {len(sets)}")


def total(vocabulary: int, positions: int, measure: Measure = ACCURACY) -> int:
    """Return the weight of all sequences."""
    if measure.tokens is None and measure.cells is None:
        return vocabulary**positions
    return weigh(everything(vocabulary, positions), measure)


def bound(sets: Sets, measure: Measure = ACCURACY) -> Fraction:
    """Return the certified share of the weight."""
    return Fraction(weigh(sets, measure), max(total(sets.shape[1], sets.shape[3], measure), 1))


def _meet(sets: Sets) -> NDArray[np.bool_]:
    return sets[0] & sets[1]


def _weigh_one(sets: NDArray[np.bool_], measure: Measure) -> int:
    vocabulary, positions = sets.shape[0], sets.shape[2]
    measure.check(vocabulary, positions)
    kept = sets if measure.cells is None else sets & measure.cells[..., None]
    if measure.tokens is None:
        return _count(kept)
    weights = measure.tokens.astype(object)
    value = 0
    for q, m, c in zip(*np.nonzero(kept.any(-1)), strict=True):
        inside = [1 if c == 0 else weights[p][kept[q, m, c]].sum() for p in range(positions - 1)]
        value += weights[-1][q] * _choose(
            inside, [weights[p][m] for p in range(positions - 1)], int(c)
        )
    return int(value)


def _count(sets: NDArray[np.bool_]) -> int:
    positions = sets.shape[2]
    sizes = sets.sum(-1)
    value = 0
    for c in range(positions):
        times = np.bincount(sizes[:, :, c].ravel())
        value += sum(
            comb(positions - 1, c) * size**c * int(n) for size, n in enumerate(times) if size
        )
    return value


def _choose(inside: list[int], outside: list[int], c: int) -> int:
    """Return the sum over position subsets of size c of prod(inside on the subset) prod(outside
    off it).
    """
    sums = [1] + [0] * c
    for small, large in zip(inside, outside, strict=True):
        sums = [sums[0] * large] + [sums[n] * large + sums[n - 1] * small for n in range(1, c + 1)]
    return sums[c]
