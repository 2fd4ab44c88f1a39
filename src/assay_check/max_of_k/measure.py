"""What the inputs of a max-of-K network weigh in a claim, and what those of a cell weigh."""

from fractions import Fraction
from math import comb, log10, prod
from typing import Any
from unicodedata import normalize

import numpy as np

from assay_check.reading import need

DIGITS = 4000  # of the numbers that a claim may have


class Measure:
    """A sequence counts as the product of its tokens' weights (null: 1) if its cell is listed
    (null: all are), else as 0.

    The cell (q, m, c) holds the sequences with query q (the last token), largest token m and
    exactly c other tokens below m (at most K - 2 if q < m). `tokens` (q, m, c, k) may stand in
    those c positions; the one sequence with c = 0 is written as {0}."""

    def __init__(self, entry: Any, V: int, K: int):
        need(
            isinstance(entry, dict)
            and entry.keys() == {"name", "tokens", "cells"}
            and isinstance(entry["name"], str),
            "measure needs a name, tokens and cells",
        )
        need(K * log10(V) < DIGITS, f"{V}^{K} inputs are too many to count")
        self.name, self.listed = entry["name"], entry["cells"] is not None
        self.plain, cells = entry["tokens"] is None, np.array(entry["cells"], object)
        self.weights = np.ones((K, V), object) if self.plain else np.array(entry["tokens"], object)
        good = self.weights.shape == (K, V) and all(
            type(n) is int and n >= 0 for n in self.weights.flat
        )
        need(good, f"measure.tokens must be null or {K} lists of {V} natural numbers")
        q, m, c, k = np.ogrid[:V, :V, :K, :V]
        self.tokens = np.asarray(
            (q <= m) & (c <= np.where(q == m, K - 1, K - 2)) & np.where(c == 0, k == 0, k < m)
        )
        self.counted = np.asarray(self.tokens.any(-1))
        if entry["cells"] is not None:
            good = cells.shape[1:] == (3,) and all(
                type(i) is int and 0 <= i < max(V, K) for i in cells.flat
            )
            need(
                good and (cells < (V, V, K)).all(),
                "measure.cells must be null or a list of [q, m, c]",
            )
            index = np.ravel_multi_index(tuple(cells.T.astype(int)), (V, V, K))
            self.counted &= np.isin(np.arange(V * V * K), index).reshape(V, V, K)
        self.total = self.weigh(self.tokens[None], self.counted[None])
        need(self.total < 10**DIGITS, f"the total weight has more than {DIGITS} digits")

    @property
    def uniform(self) -> bool:
        """Whether every input counts, and all count the same: what the word accuracy stands for."""
        return self.plain and not self.listed

    def describe(self) -> str:
        """Return in words which inputs count and how much, worked out from the weights: the name
        that a certificate gives its measure is only quoted, and not where it says accuracy.
        """
        inputs = self.inputs()
        if self.uniform:
            return f"accuracy, the share of all {inputs}"
        letters = "".join(filter(str.isalpha, normalize("NFKC", self.name).casefold()))
        label = "" if "accuracy" in letters else f" ({self.name[:80]!a})"
        if self.plain:
            return f"the share of {self.total:,} of the {inputs}{label}"
        some = [[int(n > 0) for n in row] for row in self.weights]
        counted = self._sum(np.array(some, object))
        heaviest = Fraction(prod(int(row.max()) for row in self.weights), max(self.total, 1))
        share = float(min(heaviest, Fraction(1)))
        return (
            f"weighted inputs{label}: {counted:,} of the {inputs} have a weight above zero, and no"
            f" input has more than {share:.3g} of the total weight"
        )

    def inputs(self) -> str:
        """Return in words how many inputs there are."""
        K, V = self.weights.shape
        return f"{V}^{K} = {V**K:,} inputs"

    def _sum(self, weights: np.ndarray) -> int:
        """Return the weight of all counted inputs under other weights of the tokens."""
        mine, self.weights = self.weights, weights
        try:
            return self.weigh(self.tokens[None], self.counted[None])
        finally:
            self.weights = mine

    def weigh(self, sets: np.ndarray, holds: np.ndarray) -> int:
        """Return the weight of the sequences in any of one or two families of sets (family, q,
        m, c, k), where they hold.
        """
        both = (-1, sets.all(0), sets.all(0).any(-1) & holds.all(0))
        parts = [*zip([1] * len(sets), sets, holds, strict=True), *[both][: len(sets) - 1]]
        return sum(
            sign * self._cell(part[q, m, c], q, m, c)
            for sign, part, held in parts
            for q, m, c in np.argwhere(held).tolist()
        )

    def _cell(self, S: np.ndarray, q: int, m: int, c: int) -> int:
        if self.plain:
            return comb(len(self.weights) - 1, c) * int(S.sum()) ** c
        ways = [1]  # by how many positions so far are below m
        for row in self.weights[:-1]:
            below = 1 if c == 0 else row[S].sum()
            ways = [
                same * row[m] + fewer * below
                for same, fewer in zip([*ways, 0], [0, *ways], strict=True)
            ]
        return int(self.weights[-1][q] * ways[c])
