"""How much the sequences of a cell count."""

from __future__ import annotations

from math import comb
from typing import Any

import numpy as np

from assay_check.reader import need


class Measure:
    """A sequence counts as the product of its tokens' weights (null: 1) if its cell is listed (null: all are), else as 0.

    The cell (q, m, c) holds the sequences with query q (the last token), largest token m and exactly c other tokens below m: at
    most K - 2 of them if the query is below m, too, since m must stand somewhere. `tokens` (q, m, c, k) may stand in those c
    positions; with c = 0 there is one sequence, which is written as the set {0}.
    """

    def __init__(self, entry: Any, V: int, K: int):
        need(isinstance(entry, dict) and entry.keys() == {"name", "tokens", "cells"}, "measure needs name, tokens and cells")
        weights, cells = entry["tokens"], entry["cells"]
        lists = isinstance(weights, list) and len(weights) == K and all(isinstance(row, list) and len(row) == V for row in weights)
        natural = lists and all(type(n) is int and n >= 0 for row in weights for n in row)
        need(weights is None or natural, f"measure.tokens must be null or {K} lists of {V} natural numbers")
        q, m, c, k = np.ogrid[:V, :V, :K, :V]
        self.tokens = np.asarray((q <= m) & (c <= np.where(q == m, K - 1, K - 2)) & np.where(c == 0, k == 0, k < m))
        self.weights = None if weights is None else np.array(weights, object)
        self.counted = np.asarray(self.tokens.any(-1))
        if cells is not None:
            triples = isinstance(cells, list) and all(isinstance(cell, list) and len(cell) == 3 for cell in cells)
            inside = triples and all(type(i) is int and 0 <= i < n for cell in cells for i, n in zip(cell, (V, V, K), strict=True))
            need(inside, "measure.cells must be null or a list of [q, m, c]")
            listed = np.zeros_like(self.counted)
            listed[tuple(np.array(cells, int).reshape(-1, 3).T)] = True
            self.counted &= listed
        self.total = self.weigh(self.tokens[None], self.counted[None])

    def weigh(self, sets: np.ndarray, holds: np.ndarray) -> int:
        """Return the weight of the sequences in any of one or two families of sets (family, q, m, c, k), where they hold."""
        parts = [(1, part, held) for part, held in zip(sets, holds, strict=True)]
        parts += [(-1, sets[0] & sets[1], (sets[0] & sets[1]).any(-1) & holds.all(0))] if len(sets) == 2 else []
        return sum(sign * self._cell(part[q, m, c], q, m, c) for sign, part, held in parts for q, m, c in np.argwhere(held).tolist())

    def _cell(self, S: np.ndarray, q: int, m: int, c: int) -> int:
        places = self.tokens.shape[2] - 1
        if self.weights is None:
            return comb(places, c) * int(S.sum()) ** c
        ways = [1]  # by how many positions so far are below m
        for row in self.weights[:places]:
            below = 1 if c == 0 else row[S].sum()
            ways = [same * row[m] + fewer * below for same, fewer in zip([*ways, 0], [0, *ways], strict=True)]
        return int(self.weights[-1][q] * ways[c])
