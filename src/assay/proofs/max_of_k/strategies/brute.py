"""Brute force over all V^K sequences, from the folded tables, with positions as vector lanes.

The margin of a sequence is a sum of table entries, so nothing is multiplied in the loop: one
addition and one maximum per sequence and competitor, in float32. Sums closer to zero than float32's
rounding error are formed again in float64 (rounded upward at the rigorous levels), so the answer
does not depend on the screening."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from assay import memory
from assay.bounds.rounding import Array
from assay.errors import InputError
from assay.progress import progress
from assay.proofs.max_of_k.cells import ACCURACY, Measure
from assay.proofs.max_of_k.strategies.base import Advice, Described, Problem
from assay.proofs.max_of_k.tables import FoldedTables
from assay.proofs.max_of_k.terms import position_terms, query_slices
from assay.targets.max_of_k import Weights

Place = tuple[int | slice, ...]
_ADDITIONS_PER_SECOND = 2e9
_LANES = 4096  # sums formed at a time, per competitor: 256 kB for 64 tokens
_PATIENCE = 3600.0  # seconds of work beyond which the table is refused


@dataclass(frozen=True)
class CertifiedTable:
    """Which sequences are right, as `table` returns it."""

    right: NDArray[np.bool_]

    def weigh(self, measure: Measure = ACCURACY) -> int:
        """Return the weight of the right sequences: an integer, exact."""
        return weigh(self.right, measure)


@dataclass(frozen=True)
class BruteForce(Described):
    """All sequences, one by one."""

    def search(self, problem: Problem) -> Advice:
        refuse(problem.weights.vocabulary, problem.weights.positions)
        return {}

    def verify(self, problem: Problem, advice: Advice) -> CertifiedTable:
        return CertifiedTable(table(problem.tables))

    def unexplained(self, weights: Weights) -> int:
        return weights.vocabulary ** (weights.positions + 1)


def table(tables: FoldedTables, *, budget: int | None = None) -> NDArray[np.bool_]:
    """Return which sequences are certainly answered right: a boolean array (q, t_0, ..., t_{K-2}),
    query token first.

    Raises InputError, with the estimate, when the table exceeds `budget` bytes (default: half of
    the free memory) or an hour."""
    V, K = tables.vocabulary, tables.positions
    refuse(V, K, budget=budget)
    right = np.zeros((V,) * K, bool)
    room = np.empty(V * max(_LANES, V), np.float32)
    for m in progress(range(V), "largest tokens"):
        for queries in query_slices(tables, m):
            terms, own = position_terms(tables, m, queries)
            terms, own = np.delete(terms, m, axis=-1), np.delete(own, m, axis=-1)
            for q in range(queries.start, queries.stop):
                _fill(
                    tables,
                    right[q],
                    m,
                    terms[:, :, q - queries.start],
                    own[q - queries.start],
                    q == m,
                    room,
                )
    return right


def refuse(vocabulary: int, positions: int, *, budget: int | None = None) -> None:
    """Raise InputError, with the estimate, when the V^K sequences are out of reach."""
    size, room = vocabulary**positions, memory.available() // 2 if budget is None else budget
    seconds = size * vocabulary / _ADDITIONS_PER_SECOND
    if size > room or seconds > _PATIENCE:
        raise InputError(
            f"brute force over {vocabulary}^{positions} = {size:.2e} sequences needs"
            f" {size / 2**30:.1f} GiB (there is room for {room / 2**30:.1f}) and about"
            f" {seconds:.0f} s; use another strategy, whose cost does not grow with V^K"
        )


def weigh(right: NDArray[np.bool_], measure: Measure = ACCURACY) -> int:
    """Return the weight of the right sequences: an integer, exact."""
    V, K = right.shape[0], right.ndim
    measure.check(V, K)
    if measure.cells is not None:
        right = right & _in_cells(right.shape, measure.cells)
    if measure.tokens is None:
        return int(np.count_nonzero(right))
    most = np.prod([int(row.sum()) for row in measure.tokens.astype(object)], dtype=object)
    weights = measure.tokens.astype(np.int64 if most < 2**62 else object)
    value: NDArray[np.generic] = right
    for p in range(K - 2, -1, -1):
        value = (value * weights[p]).sum(-1)
    return int((value * weights[-1]).sum())


def _fill(
    tables: FoldedTables,
    right: NDArray[np.bool_],
    m: int,
    terms: Array,
    own: Array,
    largest_query: bool,
    room: NDArray[np.float32],
) -> None:
    """Decide the sequences of one query token with largest token m: terms (K - 1, m + 1, X), own
    (X,).
    """
    count = len(terms)
    scale = max(np.abs(terms).max(initial=0.0), np.abs(own).max(initial=0.0))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        unit = 2.0 ** -np.ceil(np.log2(scale)) if 0 < scale < np.inf else 1.0
        narrow = np.ascontiguousarray((terms * unit).transpose(0, 2, 1), np.float32)
        start = (own * unit).astype(np.float32)
        # Each of the count + 1 conversions and count additions errs by 2^-24 of at most (count + 1)
        # * scale.
        doubt = np.float32(
            (count + 2) ** 2 * 2.0**-23 * float(scale * unit) + (count + 2) * 2.0**-140
        )
        for box in _boxes(count, m, own_is_largest=largest_query):
            for place, largest in _largest_sums(box, narrow, start, room):
                found = largest < -doubt
                if not found.all():
                    unsure = np.argwhere(~(found | (largest > doubt)))
                    found[tuple(unsure.T)] = _again(tables, terms, own, place, unsure)
                right[place] = found.reshape(right[place].shape)


def _largest_sums(
    box: list[range],
    narrow: NDArray[np.float32],
    start: NDArray[np.float32],
    room: NDArray[np.float32],
) -> Iterator[tuple[Place, NDArray[np.float32]]]:
    """Yield places in the table and the largest sum over competitors of their sequences, (rows,
    columns).

    The last two free positions are lanes of one vector (a few rows at a time, so that the sums stay
    in cache); the tokens of the other positions are looped over."""
    place: list[int | slice] = [lane.start if len(lane) == 1 else slice(None) for lane in box]
    free = [p for p, lane in enumerate(box) if len(lane) > 1]
    for p in set(range(len(box))) - set(free):
        start = start + narrow[p][:, box[p].start]
    lanes, outer = free[-2:], free[:-2]
    across = (
        narrow[lanes[-1]][:, : len(box[lanes[-1]])]
        if lanes
        else np.zeros((len(start), 1), np.float32)
    )
    rows = len(box[lanes[0]]) if len(lanes) == 2 else 1
    step = max(1, _LANES // across.shape[1])
    for first in range(0, rows, step):
        pairs = across[:, None] + start[:, None, None]
        if len(lanes) == 2:
            pairs = pairs + narrow[lanes[0]][:, first : min(first + step, rows), None]
            place[lanes[0]] = slice(first, first + pairs.shape[1])
        if lanes:
            place[lanes[-1]] = slice(0, across.shape[1])
        shape, pairs = pairs.shape[1:], pairs.reshape(len(start), -1)
        sums = room[: pairs.size].reshape(pairs.shape)
        for tokens in product(*[box[p] for p in outer]):
            if outer:
                column = narrow[outer[0]][:, tokens[0]]
                for p, token in zip(outer[1:], tokens[1:], strict=True):
                    column = column + narrow[p][:, token]
                np.add(pairs, column[:, None], out=sums)
            for p, token in zip(outer, tokens, strict=True):
                place[p] = token
            yield (
                tuple(place),
                np.maximum.reduce(sums if outer else pairs, axis=0, initial=-np.inf).reshape(shape),
            )


def _again(
    tables: FoldedTables, terms: Array, own: Array, place: Place, unsure: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Form the sums of single sequences again, in float64: `unsure` (n, 2) indexes the lanes of
    `place`.
    """
    margin, axis = (
        np.broadcast_to(own, (len(unsure), len(own))),
        2 - sum(isinstance(where, slice) for where in place),
    )
    for part, where in zip(terms, place, strict=True):
        if isinstance(where, slice):
            margin = tables.up(margin + part[unsure[:, axis] + where.start])
            axis += 1
        else:
            margin = tables.up(margin + part[where])
    return np.asarray((margin < 0).all(-1))


def _boxes(count: int, m: int, *, own_is_largest: bool) -> Iterator[list[range]]:
    """Cover the non-query tokens <= m (with at least one m, unless the query is m) by disjoint
    boxes.
    """
    if own_is_largest:
        yield [range(m + 1)] * count
        return
    for first in range(count):
        yield [range(m)] * first + [range(m, m + 1)] + [range(m + 1)] * (count - 1 - first)


def _in_cells(shape: tuple[int, ...], chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which sequences lie in chosen cells, in the layout of `table`."""
    tokens = np.meshgrid(*[np.arange(size) for size in shape], indexing="ij", sparse=True)
    largest = tokens[0]
    for other in tokens[1:]:
        largest = np.maximum(largest, other)
    below = sum((other < largest).astype(np.int64) for other in tokens[1:]) + np.zeros(
        shape, np.int64
    )
    return chosen[np.broadcast_to(tokens[0], shape), largest, below]
