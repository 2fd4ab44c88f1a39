"""The least value of a function over a box, from both sides: linear bounds with optimised slopes
on boxes that are split where the relaxation loses most (branch and bound, arXiv 2103.06624).

The search runs at level float64; what it returns are boxes that cover the region, with slopes at
which any level can bound them again."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.bounds.rounding import Array, Interval
from assay.bounds.search.leaves import Budget, Found, Leaf, choose, halves, slopes_of, stacked
from assay.bounds.search.pins import Derivatives, pinned
from assay.bounds.search.sweep import bound_rows, sweep
from assay.bounds.search.twin import Ends, Parameters, State, Twin
from assay.bounds.trace.traced import Traced
from assay.errors import AssayError, InputError
from assay.memory import rows_within

RATE = 0.1
"""Step of the descent on slopes, in units of half an interval."""


def least(
    traced: Traced,
    lows: Sequence[Tensor],
    highs: Sequence[Tensor],
    row: Array,
    *,
    level: str = "real",
    above: float | None = None,
    reference: float | None = None,
    start: Sequence[Sequence[Tensor]] = (),
    budget: Budget | None = None,
) -> Found:
    """Bound the least value of `row . function` over a box from below, and search it from above.

    row: of the shape of the function's value. above: a claim that the value stays above this; the
    search stops once it is proved or broken. reference: the gap is relative to the distance from
    it. start: points to evaluate first, such as a worst case that was found before. Anytime: at the
    end of the budget the bound reached so far is returned, which is sound at the level."""
    return _Search(traced, lows, highs, row, level, above, reference, budget or Budget()).run(start)


class _Search:
    def __init__(
        self,
        traced: Traced,
        lows: Sequence[Tensor],
        highs: Sequence[Tensor],
        row: Array,
        level: str,
        above: float | None,
        reference: float | None,
        budget: Budget,
    ) -> None:
        self.traced, self.level, self.above, self.budget = traced, level, above, budget
        self.reference = reference
        self.dtypes = [example.dtype for example in traced.program.examples]
        self.lows = [low.detach().double().numpy() for low in lows]
        self.highs = [high.detach().double().numpy() for high in highs]
        self.row = np.asarray(row, dtype=np.float64)
        self.twin = Twin(traced.at("float64"))
        self.began = time.process_time()
        self.derivatives = Derivatives(traced, self.row, level)
        self.idle = 0
        self.value, self.point = np.inf, tuple(traced.program.examples)
        self.tie = itertools.count()

    @property
    def spent(self) -> float:
        return time.process_time() - self.began

    def run(self, start: Sequence[Sequence[Tensor]]) -> Found:
        self.offer(self.highs)
        for point in start:
            self.offer([entry.detach().double().numpy() for entry in point])
        root = Leaf(self.lows, self.highs, -np.inf, {}, {})
        if self.above is not None and self.value <= self.above:
            return self.broken(root)
        root, whole = self.face(root)
        if self.done(whole):
            bound = min(whole, self.value)
            return Found(
                bound, self.value, self.point, self.level, 1, True, self.spent, bound, [root]
            )
        try:
            root = self.evaluate([root], root=True)[0]
        except (AssayError, InputError):
            root = Leaf(root.lows, root.highs, -np.inf, {}, {}, None, root.path)
        first, rigorous = root.bound, 0.0
        if self.level != "float64":
            # The final recomputation costs about this much a box, and must fit the budget.
            before = time.process_time()
            whole = max(self.sound([root]), whole)
            rigorous = time.process_time() - before
        heap = [(root.bound, next(self.tie), root)]
        boxes, width = 1, self.width()
        while heap and not self.done(heap[0][0]) and root.bound > -np.inf:
            if (
                self.spent + rigorous * len(heap) > self.budget.seconds
                or boxes >= self.budget.boxes
            ):
                break
            taken: list[Leaf] = []
            while heap and len(taken) < width and not self.done(heap[0][0]):
                taken.append(heapq.heappop(heap)[2])
            children, kept = list[Leaf](), list[Leaf]()
            for leaf in taken:
                both = halves(leaf)
                (children if both else kept).extend(both or [leaf])
            if not children:
                heap = [*heap, *((leaf.bound, next(self.tie), leaf) for leaf in kept)]
                heapq.heapify(heap)
                break
            try:
                done = self.evaluate(self.faces(children))
            except (AssayError, InputError):  # an overflow that the whole box did not have
                for leaf in taken:
                    heapq.heappush(heap, (leaf.bound, next(self.tie), leaf))
                break
            for leaf in (*done, *kept):
                heapq.heappush(heap, (leaf.bound, next(self.tie), leaf))
            boxes += len(children)
            self.explore(taken[0])
        leaves = [entry[2] for entry in heap]
        searched = heap[0][0] if heap else np.inf
        if self.level == "float64":
            bound = searched
        else:  # the bound of the whole box holds for its parts too
            bound = whole if boxes == 1 else max(self.sound(leaves), whole)
        bound = min(bound, self.value)
        return Found(
            bound,
            self.value,
            self.point,
            self.level,
            boxes,
            self.done(searched),
            self.spent,
            min(first, self.value),
            leaves,
        )

    def broken(self, leaf: Leaf) -> Found:
        """Return that a claim is false, with a bound of intervals alone."""
        at = self.traced.at(self.level)
        boxes = [
            Interval(low[None], high[None]) for low, high in zip(leaf.lows, leaf.highs, strict=True)
        ]
        with np.errstate(all="ignore"):
            try:
                known = sweep(at, boxes, refine=False)
                bound = float(bound_rows(at, known, self.row[None, None])[0, 0])
            except (AssayError, InputError):
                bound = -np.inf
        bound = min(bound if np.isfinite(bound) else -np.inf, self.value)
        return Found(bound, self.value, self.point, self.level, 1, True, self.spent, bound, [leaf])

    def done(self, bound: float) -> bool:
        """Return whether the claim is decided, or the ends are as close as asked."""
        if self.above is not None and (bound > self.above or self.value <= self.above):
            return True
        scale = abs(self.value if self.reference is None else self.reference - self.value)
        return bool(self.value - bound <= self.budget.gap * max(scale, 1e-12))

    def width(self) -> int:
        """Return how many boxes are worked on at once within the memory."""
        sizes = [int(np.prod(node.shape)) for node in self.twin.graph.nodes]
        rows = max((2 * sizes[ref] for ref in self.twin.wanted), default=1)
        return rows_within(8 * 6 * rows * max(sizes), self.budget.memory, most=16)

    def evaluate(self, leaves: list[Leaf], *, root: bool = False) -> list[Leaf]:
        """Bound boxes, all at once, after a descent on the slopes of the last rows."""
        lows, highs = (
            [torch.from_numpy(np.stack(x)) for x in zip(*ends, strict=True)]
            for ends in ([leaf.lows for leaf in leaves], [leaf.highs for leaf in leaves])
        )
        twin, row = self.twin, torch.from_numpy(self.row[None, None])
        before = stacked([leaf.before for leaf in leaves]) or twin.parameters(len(leaves))
        if root:
            before = self.improve(lows, highs, before, row)
        start = stacked([leaf.after for leaf in leaves]) or before
        splits = self.budget.boxes > 1
        for end in (*lows, *highs):
            end.requires_grad_(splits)
        boxes = list(zip(lows, highs, strict=True))
        state = twin.sweep(boxes, before)
        still = State([(lo.detach(), hi.detach()) for lo, hi in state.values], {})
        after, best = self.descend(still, start, row, self.budget.steps[0 if root else 1])
        live = twin.bound(State(state.values, {}), after, row)[:, 0]
        last = state.values[-1]
        plain = _least_of(row, last)
        slopes: tuple[Tensor | None, ...] = (None,) * (2 * len(lows))
        if splits and live.requires_grad:
            slopes = torch.autograd.grad(live.sum(), (*lows, *highs), allow_unused=True)
        found = []
        bounds = torch.maximum(torch.maximum(live.detach(), best), plain.detach())
        for index, leaf in enumerate(leaves):
            leaf.bound = max(leaf.bound, float(bounds[index].nan_to_num(-torch.inf)))
            leaf.before = {ref: tuple(p[index] for p in ps) for ref, ps in before.items()}
            leaf.after = {ref: tuple(p[index] for p in ps) for ref, ps in after.items()}
            mine: list[Array | None] = [
                None if slope is None else slope[index].numpy() for slope in slopes
            ]
            leaf.split = choose(leaf, mine)
            found.append(leaf)
        return found

    def descend(
        self, state: State, start: Parameters, row: Tensor, steps: int
    ) -> tuple[Parameters, Tensor]:
        """Return the parameters with the best bound of every box after a few steps."""
        moving = {
            ref: tuple(p.detach().clone().requires_grad_(True) for p in ps)
            for ref, ps in start.items()
        }
        flat = [p for ps in moving.values() for p in ps]
        samples = max(len(lo) for lo, _ in state.values)
        best = torch.full((samples,), -torch.inf, dtype=torch.float64)
        kept = {ref: tuple(p.detach().clone() for p in ps) for ref, ps in moving.items()}
        optimiser = torch.optim.Adam(flat, lr=RATE) if flat else None
        for step in range(steps + 1):
            if optimiser is not None:
                optimiser.param_groups[0]["lr"] = RATE * (1 - 0.9 * step / max(steps, 1))
            state.relaxed = {}
            bound = self.twin.bound(state, moving, row)[:, 0].expand(samples)
            better = bound.detach() > best
            best = torch.where(better, bound.detach(), best)
            for ref, ps in moving.items():
                for old, new in zip(kept[ref], ps, strict=True):
                    old[better] = new.detach()[better]
            if step == steps or optimiser is None or not bound.requires_grad:
                break
            optimiser.zero_grad()
            (-bound[bound.isfinite()].sum()).backward()
            optimiser.step()
            with torch.no_grad():
                for p in flat:
                    p.clamp_(-1, 1)
        return kept, best

    def improve(
        self, lows: list[Tensor], highs: list[Tensor], start: Parameters, row: Tensor
    ) -> Parameters:
        """Return parameters for the whole sweep after a descent through it, the intervals of every
        node included.
        """
        moving = {
            ref: tuple(p.detach().clone().requires_grad_(True) for p in ps)
            for ref, ps in start.items()
        }
        flat = [p for ps in moving.values() for p in ps]
        boxes = [(lo.detach(), hi.detach()) for lo, hi in zip(lows, highs, strict=True)]
        optimiser = torch.optim.Adam(flat, lr=RATE) if flat else None
        best, kept, until = -torch.inf, start, self.spent + self.budget.seconds / 6
        for _ in range(self.budget.whole if optimiser else 0):
            if self.spent > until:
                break
            state = self.twin.sweep(boxes, moving)
            bound = self.twin.bound(state, moving, row)[:, 0]
            if float(bound.detach()) > best:
                best = float(bound.detach())
                kept = {ref: tuple(p.detach().clone() for p in ps) for ref, ps in moving.items()}
            assert optimiser is not None
            if not bound.requires_grad or not bound.isfinite().all():
                break
            optimiser.zero_grad()
            (-bound.sum()).backward()
            optimiser.step()
            with torch.no_grad():
                for p in flat:
                    p.clamp_(-1, 1)
        return kept

    def face(self, leaf: Leaf) -> tuple[Leaf, float]:
        """Return what is left of the whole region, and its plain bound at the level, after as many
        rounds as pin something: until the bound decides, within a quarter of the budget.
        """
        plain = self.sound([leaf])
        for _ in range(self.budget.pins):
            if self.done(plain) or self.spent >= self.budget.seconds / 4:
                break
            before = len(leaf.path)
            leaf = self.faces([leaf])[0]
            if len(leaf.path) == before:
                break
            self.offer(leaf.lows)
            self.offer(
                [
                    np.clip(x.double().numpy(), low, high)
                    for x, low, high in zip(self.point, leaf.lows, leaf.highs, strict=True)
                ]
            )
            plain = max(plain, self.sound([leaf]))
        return leaf, plain

    def faces(self, leaves: list[Leaf]) -> list[Leaf]:
        """Return what is left of boxes when the inputs are pinned whose derivatives keep their
        sign; boxes on which nothing was pinned four times in a row are tried now and then.
        """
        if not self.budget.pins:
            return leaves
        self.idle += 1
        if self.idle > 4 and self.idle % 4:
            return leaves
        pins = self.derivatives.pins(
            [np.stack(low) for low in zip(*(leaf.lows for leaf in leaves), strict=True)],
            [np.stack(high) for high in zip(*(leaf.highs for leaf in leaves), strict=True)],
        )
        found = []
        for leaf, mine in zip(leaves, pins, strict=True):
            if mine.ends:
                self.idle = 0
                lows, highs = pinned(leaf.lows, leaf.highs, mine)
                path = (*leaf.path, mine)
                leaf = Leaf(lows, highs, leaf.bound, leaf.before, leaf.after, None, path)
            found.append(leaf)
        return found

    def explore(self, leaf: Leaf) -> None:
        """Evaluate the function where the linear bound of a box is least."""
        boxes = [
            (torch.from_numpy(lo)[None], torch.from_numpy(hi)[None])
            for lo, hi in zip(leaf.lows, leaf.highs, strict=True)
        ]
        row = torch.from_numpy(self.row[None, None])
        after = {ref: tuple(p[None] for p in ps) for ref, ps in leaf.after.items()}
        with torch.no_grad():
            state = self.twin.sweep(boxes, after, refine=False)
            _, passed = self.twin.carry(state, after, {self.twin.last: row})
        point = [
            np.where(passed[ref][0, 0].numpy() > 0, lo, hi) if ref in passed else lo
            for ref, lo, hi in zip(self.twin.graph.inputs, leaf.lows, leaf.highs, strict=True)
        ]
        self.offer(point)

    def offer(self, point: Sequence[Array]) -> None:
        """Evaluate the function itself at a point of the region, and keep it where it is least."""
        inputs = tuple(
            torch.from_numpy(np.clip(x, lo, hi)).to(dtype)
            for x, lo, hi, dtype in zip(point, self.lows, self.highs, self.dtypes, strict=True)
        )
        value = float((self.traced(*inputs).double().numpy() * self.row).sum())
        if value < self.value:
            self.value, self.point = value, inputs

    def sound(self, leaves: list[Leaf]) -> float:
        """Return the least bound of boxes at the level, with the slopes that were found."""
        at, worst, width = self.traced.at(self.level), np.inf, self.width()
        for start in range(0, len(leaves), width):
            part = leaves[start : start + width]
            boxes = [
                Interval(np.stack(lo), np.stack(hi))
                for lo, hi in zip(
                    zip(*(leaf.lows for leaf in part), strict=True),
                    zip(*(leaf.highs for leaf in part), strict=True),
                    strict=True,
                )
            ]
            try:
                with np.errstate(all="ignore"):
                    worst = min(worst, *self.bounds_at(at, part, boxes))
            except (AssayError, InputError):
                return -np.inf
        return worst

    def bounds_at(self, at: Any, part: list[Leaf], boxes: list[Interval]) -> list[float]:
        if not part[0].after:
            known = sweep(at, boxes)
            return [float(b) for b in bound_rows(at, known, self.row[None, None])[:, 0]]
        of_sweep, of_rows = slopes_of(self.twin, part)
        known = sweep(at, boxes, slopes=of_sweep)
        last = type(known)(known.values, known.errors, {}, of_rows)
        return [float(b) for b in bound_rows(at, last, self.row[None, None])[:, 0]]


def _least_of(row: Tensor, value: Ends) -> Tensor:
    flat = row.flatten(2)
    lo, hi = (end.reshape(len(end), -1, 1) for end in value)
    return (flat.clamp_min(0) @ lo + flat.clamp_max(0) @ hi)[:, 0, 0]
