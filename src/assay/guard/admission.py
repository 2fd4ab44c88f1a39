"""Admission of statistical explanations: by what they unblock, by description length, and by a
fresh split.

A marginal or a constant saves `N sum_b p_b ln(p_b / q_b)` over the shares q of bins for one who
knows only where the values lie, less `1/2 (B - 1) ln N + 2 ln n`. An edge is admitted if
`N I(i; j) > 1/2 (B_i - 1)(B_j - 1) ln N + 2 ln n` (nats; it is reported in bits), and if every
cell's Clopper-Pearson interval on the fresh split overlaps that of the table.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from assay.guard.explanations import Explanation, Forest, Refused
from assay.guard.tables import Tables

AGREEMENT = 0.05
"""The probability, over an explanation's cells together, that a true table is refused."""
SHOWN = 200  # refused explanations that are kept


@dataclass(frozen=True)
class Laboratory:
    """The tables of explanations, those of the fresh split that tries them, the bins that the
    tables count (inputs, features), their root values, the count that supports an event, and the
    shares of bins (features, bins) for one who knows nothing but where a feature's values lie.
    """

    tables: Tables
    fresh: Tables
    bins: Tensor
    roots: Tensor | None
    needed: int
    prior: Tensor

    def explained(self, explanation: Explanation) -> Tensor:
        """Return where a statement explains its features, (inputs,): its event there occurred often
        enough.
        """
        return self.support(explanation)[self._cells(explanation)]

    def support(self, explanation: Explanation) -> Tensor:
        """Return which events of a statement are supported: (bins,), (bins, bins) of parent and
        child, or (roots, bins).
        """
        return _cells_of(self.tables, explanation) >= self.needed

    def _cells(self, explanation: Explanation) -> tuple[Tensor, ...]:
        places = tuple(self.bins[:, feature] for feature in explanation.features)
        if explanation.form == "root":
            assert self.roots is not None
            return self.roots, *places
        return places


def candidates(laboratory: Laboratory, *, marginals: bool, added: bool) -> list[Explanation]:
    """Return the explanations that could be made, each with the bits that it saves: constants,
    marginals, and (with `added`) root tables and edges.
    """
    tables = laboratory.tables
    n, sizes, log_n = len(tables.sizes), tables.sizes.double(), math.log(max(tables.total, 2))
    found: list[Explanation] = []
    counts = tables.single.double()
    name = 2 * math.log(max(n, 2))
    known = (
        counts
        * (counts / tables.total / laboratory.prior.clamp_min(1e-300)).clamp_min(1e-300).log()
    )
    saved = torch.where(counts > 0, known, 0.0).sum(1)
    single = saved - (sizes - 1) / 2 * log_n - name
    for feature in range(n):
        constant = bool((counts[feature] == tables.total).any())
        if constant:
            found.append(_named("constant", (feature,), float(saved[feature]) - name))
        elif marginals:
            found.append(_named("marginal", (feature,), float(single[feature])))
    if not added:
        return found
    if tables.roots:
        cost = (sizes - 1) * (tables.roots - 1) / 2 * log_n + name
        gains = tables.total * tables.root_information() - cost
        found += [_named("root", (place,), float(gains[place])) for place in range(n)]
    cost = (sizes[:, None] - 1) * (sizes - 1) / 2 * log_n + name
    gains = tables.total * tables.information() - cost
    for first, second in zip(*np.triu_indices(n, 1), strict=True):
        if gains[first, second] > 0:
            pair = (int(first), int(second))
            found.append(_named("edge", pair, float(gains[pair])))
    return found


def _named(form: str, features: tuple[int, ...], nats: float) -> Explanation:
    return Explanation(form, features, bits=nats / math.log(2))  # type: ignore[arg-type]


def admit(
    laboratory: Laboratory,
    given: Iterable[Explanation],
    *,
    before: Iterable[Explanation] = (),
    most: int | None = None,
) -> tuple[list[Explanation], list[Refused]]:
    """Add explanations one by one, each time the one that explains most events of rejected
    laboratory inputs that nothing explains yet, ties by bits; return those admitted, in this order,
    and those refused.

    `before` are admitted already. An edge that would close a cycle is left out. `most` ends the
    search."""
    forest = Forest(len(laboratory.tables.sizes))
    explained = torch.zeros(laboratory.bins.shape, dtype=torch.bool)
    for one in before:
        if one.form == "edge":
            forest.join(*one.features)
        _mark(explained, laboratory, one)
    agreement = _Agreement(laboratory)
    admitted: list[Explanation] = []
    refused: list[Refused] = []
    waiting: list[tuple[int, float, int, Explanation]] = []
    for one in given:
        if one.bits <= 0:
            _keep(refused, one, f"it costs more than it saves ({one.bits:.0f} bits)")
            continue
        waiting.append((-_gain(explained, laboratory, one), -one.bits, len(waiting), one))
    heapq.heapify(waiting)
    while waiting and (most is None or len(admitted) < most):
        _, bits, order, one = heapq.heappop(waiting)
        if one.form == "edge" and forest.joined(*one.features):
            continue
        now = -_gain(explained, laboratory, one)
        if waiting and (now, bits, order) > waiting[0][:3]:  # gains only fall
            heapq.heappush(waiting, (now, bits, order, one))
            continue
        if (odds := agreement.worst(one)) is not None:
            _keep(refused, one, f"a fresh split contradicts its table: {odds}")
            continue
        if one.form == "edge":
            forest.join(*one.features)
        _mark(explained, laboratory, one)
        admitted.append(replace(one, explains=-now))
    return admitted, refused


def _keep(refused: list[Refused], one: Explanation, reason: str) -> None:
    if len(refused) < SHOWN:
        refused.append(Refused(one, reason))


def _gain(explained: Tensor, laboratory: Laboratory, one: Explanation) -> int:
    """Return how many events a statement explains that nothing explains yet."""
    new = laboratory.explained(one)[:, None] & ~explained[:, list(one.features)]
    return int(new.sum())


def _mark(explained: Tensor, laboratory: Laboratory, one: Explanation) -> None:
    for feature in one.features:
        explained[:, feature] |= laboratory.explained(one)


class _Agreement:
    """Whether the fresh split agrees with tables, with the ends of the intervals by count."""

    def __init__(self, laboratory: Laboratory):
        self.laboratory = laboratory
        self._ends: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def worst(self, one: Explanation) -> str | None:
        """Return the cell whose two intervals lie apart, in words; None where all overlap."""
        table, fresh = (
            _cells_of(tables, one) for tables in (self.laboratory.tables, self.laboratory.fresh)
        )
        cells = table.numel()
        low, high = self._interval(table, self.laboratory.tables.total, cells)
        fresh_low, fresh_high = self._interval(fresh, self.laboratory.fresh.total, cells)
        apart = (low > fresh_high) | (fresh_low > high)
        if not bool(apart.any()):
            return None
        place = int(apart.flatten().nonzero()[0, 0])
        return (
            f"{int(table.flatten()[place])} of {self.laboratory.tables.total} in the table,"
            f" {int(fresh.flatten()[place])} of {self.laboratory.fresh.total} there"
        )

    def _interval(self, counts: Tensor, total: int, cells: int) -> tuple[Tensor, Tensor]:
        if (total, cells) not in self._ends:
            level, every = AGREEMENT / (4 * cells), np.arange(total + 1)
            with np.errstate(all="ignore"):
                low = np.nan_to_num(stats.beta.ppf(level, every, total - every + 1), nan=0.0)
                high = np.nan_to_num(stats.beta.isf(level, every + 1, total - every), nan=1.0)
            self._ends[total, cells] = torch.from_numpy(low), torch.from_numpy(high)
        low_ends, high_ends = self._ends[total, cells]
        return low_ends[counts.long()], high_ends[counts.long()]


def _cells_of(tables: Tables, one: Explanation) -> Tensor:
    first, *rest = one.features
    match one.form:
        case "edge":
            return tables.pairs[first, :, rest[0]]
        case "root":
            return tables.rooted[:, first]
        case _:
            return tables.single[first]


def curve(laboratory: Laboratory, admitted: list[Explanation]) -> Iterator[tuple[int, float]]:
    """Yield, after each explanation, how many there are and the bits that they save together."""
    bits = 0.0
    for count, one in enumerate(admitted, 1):
        bits += one.bits
        yield count, bits
