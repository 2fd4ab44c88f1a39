"""The least value of a function over a box, from both sides: linear bounds with optimised slopes
on boxes that are split where the relaxation loses most (branch and bound, arXiv 2103.06624).

The search runs at level float64; what it returns are boxes that cover the region, with slopes at
which any level can bound them again."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.bounds.engine import Late, never
from assay.bounds.rounding import Array
from assay.bounds.search.descent import descend, improve
from assay.bounds.search.goal import Goal, goal_of
from assay.bounds.search.leaves import (
    Budget,
    Found,
    Leaf,
    choose,
    ends_of,
    halves,
    stacked,
)
from assay.bounds.search.level import LevelBounds
from assay.bounds.search.pins import Derivatives, pinned
from assay.bounds.search.plain import bound_plainly
from assay.bounds.search.points import Least, Probe
from assay.bounds.search.ranges import as_interval
from assay.bounds.search.twin import State, Twin
from assay.bounds.search.unfinished import (
    Store,
    Work,
    found_again,
    packed,
    plain_found,
    unpacked,
)
from assay.bounds.trace.traced import Traced
from assay.errors import AssayError, InputError
from assay.memory import rows_within
from assay.progress import counted

EVERY = 5.0
"""CPU seconds after which open boxes are kept again, at the earliest."""

FIRST = 1.0
"""CPU seconds that linear bounds of the whole region may take, however small the budget is."""

FEW, MANY = 16, 64
"""Boxes that are bounded at once, with a descent on their slopes and without."""

HELD = 2048
"""Bytes that a leaf takes beside its numbers."""

COST = 20.0
"""Times what keeping them took, after which they are kept again at the earliest."""


def least(
    traced: Traced,
    lows: Sequence[Tensor],
    highs: Sequence[Tensor],
    row: Array | Goal,
    *,
    level: str = "real",
    above: float | None = None,
    reference: float | None = None,
    start: Sequence[Sequence[Tensor]] = (),
    budget: Budget | None = None,
    store: Store | None = None,
    probe: Probe | None = None,
) -> Found:
    """Bound the least value of `row . function` over a box from below, and search it from above.

    row: of the shape of the function's value. above: a claim that the value stays above this; the
    search stops once it is proved or broken. reference: the gap is relative to the distance from
    it. start: points to evaluate first, such as a worst case that was found before. Anytime: at the
    end of the budget the bound reached so far is returned, which is sound at the level. store:
    where the open boxes are kept, so that a search that was stopped goes on. probe: what looks for
    small values in the worst boxes, where no descent on slopes does."""
    spent = budget or Budget()
    goal = goal_of(row)
    search = _Search(traced, lows, highs, goal, level, above, reference, spent, store, probe)
    return search.run(start)


class _Search:
    def __init__(
        self,
        traced: Traced,
        lows: Sequence[Tensor],
        highs: Sequence[Tensor],
        goal: Goal,
        level: str,
        above: float | None,
        reference: float | None,
        budget: Budget,
        store: Store | None,
        probe: Probe | None,
    ) -> None:
        self.traced, self.level, self.above, self.budget = traced, level, above, budget
        self.reference, self.store, self.every = reference, store, EVERY
        self.lows = [low.detach().double().numpy() for low in lows]
        self.highs = [high.detach().double().numpy() for high in highs]
        self.region = [high - low for low, high in zip(self.lows, self.highs, strict=True)]
        self.goal, self.rows = goal, torch.from_numpy(goal.rows[None])
        self.best = Least(traced, goal, self.lows, self.highs, probe)
        self.twin = Twin(traced.at("float64"), budget.memory)
        self.plain = not any((*budget.steps, budget.whole))
        self.width = self.boxes_at_once()
        self.bounds = LevelBounds(traced, self.twin, goal, level, self.width)
        self.began = time.process_time()
        self.derivatives = Derivatives(traced, goal.rows[0], level)
        self.pins = budget.pins if goal.single else 0
        self.idle, self.round = 0, 0.0
        self.tie = itertools.count()

    @property
    def spent(self) -> float:
        return time.process_time() - self.began

    def run(self, start: Sequence[Sequence[Tensor]]) -> Found:
        held = None if self.store is None else self.store.read()
        if held is not None and held["finished"]:
            return found_again(held, self.lows, self.highs)
        begun = self.begin(start) if held is None else self.go_on(held)
        found = begun if isinstance(begun, Found) else self.finish(self.split(begun))
        if self.store is not None:
            self.store.write(plain_found(found, leaves=self.store.leaves))
        return found

    def begin(self, start: Sequence[Sequence[Tensor]]) -> Work | Found:
        """Bound the whole region."""
        self.best.offer(self.highs)
        for point in start:
            self.best.offer([entry.detach().double().numpy() for entry in point])
        root = Leaf(self.lows, self.highs, -np.inf, {}, {})
        if self.above is not None and self.best.value <= self.above:
            return self.broken(root)
        root, whole = self.face(root)
        if self.done(whole):
            bound = min(whole, self.best.value)
            return Found(
                bound,
                self.best.value,
                self.best.point,
                self.level,
                1,
                True,
                self.spent,
                bound,
                [root],
            )
        if self.spent + self.round <= max(self.budget.seconds, FIRST):
            try:
                root = self.evaluate([root], root=True)[0]
            except (AssayError, InputError):
                root = Leaf(root.lows, root.highs, -np.inf, {}, {}, None, root.path)
        first, rigorous = max(root.bound, whole), 0.0
        if self.level != "float64" and (root.after or self.plain):
            # The final recomputation costs about this much a box, and must fit the budget.
            before = time.process_time()
            whole = max(self.bounds.least([root], self.late), whole)
            rigorous = time.process_time() - before
        return Work([root], 1, whole, first, rigorous)

    def split(self, work: Work) -> Work:
        """Halve the worst boxes until the claim is decided, or the budget is spent."""
        heap = [(leaf.bound, next(self.tie), leaf) for leaf in work.leaves]
        heapq.heapify(heap)
        most, each, saved = self.most(work.leaves[0]), 0.0, time.process_time()
        with counted(None, "boxes") as bar:
            while heap and not self.done(heap[0][0]) and heap[0][0] > -np.inf:
                after = self.spent + (0.0 if self.plain else work.rigorous * len(heap))
                room = self.budget.seconds - after
                if room < 2 * each or work.boxes >= self.budget.boxes:
                    break
                if len(heap) + len(work.proved) > most:  # the leaves fill the memory
                    break
                saved = self.save(work, heap, saved)
                began, taken = self.spent, list[Leaf]()
                width = self.width if not each else min(self.width, int(room / (2 * each)))
                while heap and len(taken) < width and not self.done(heap[0][0]):
                    taken.append(heapq.heappop(heap)[2])
                children, kept = list[Leaf](), list[Leaf]()
                for leaf in taken:
                    both = halves(leaf)
                    (children if both else kept).extend(both or [leaf])
                if not children:
                    heap += [(leaf.bound, next(self.tie), leaf) for leaf in kept]
                    break
                try:
                    done = self.evaluate(self.faces(children))
                except (AssayError, InputError):  # an overflow that the whole box did not have
                    heap += [(leaf.bound, next(self.tie), leaf) for leaf in taken]
                    break
                if self.plain and self.level != "float64" and self.above is not None:
                    done = self.settle(work, done)
                for leaf in (*done, *kept):
                    heapq.heappush(heap, (leaf.bound, next(self.tie), leaf))
                work.boxes += len(children)
                bar.update(len(children))
                if not self.plain:
                    self.best.explore(self.twin, taken[0])
                each = (self.spent - began) / len(children)
                each += 0.0 if self.plain else work.rigorous  # to be bounded at the level later
        work.leaves = [entry[2] for entry in sorted(heap, key=lambda entry: entry[:2])]
        return work

    def settle(self, work: Work, leaves: list[Leaf]) -> list[Leaf]:
        """Bound at the level those leaves that are closed, and keep them apart; return the others,
        and those that are not closed there.
        """
        shut = [leaf for leaf in leaves if self.done(leaf.bound)]
        rest = [leaf for leaf in leaves if not self.done(leaf.bound)]
        if not shut or self.best.value <= (self.above or 0.0):
            return leaves
        began = time.process_time()
        for leaf, bound in zip(shut, self.bounds.each(shut), strict=True):
            leaf.bound = bound
            (work.proved if self.done(bound) else rest).append(leaf)
        work.rigorous = (time.process_time() - began) / len(shut)
        return rest

    def finish(self, work: Work) -> Found:
        """Bound what covers the region at the level."""
        searched = work.leaves[0].bound if work.leaves else np.inf
        if self.level == "float64":
            bound = max(searched, work.whole)
        else:  # the bound of the whole box holds for its parts too
            bound = work.whole
            # What is open stays open at the level, and may be many boxes.
            late = work.rigorous * len(work.leaves) > self.budget.seconds / 10
            if work.boxes > 1 and not (late and self.plain):
                for leaf, mine in zip(work.leaves, self.bounds.each(work.leaves), strict=True):
                    leaf.bound = mine
                leaves = [*work.proved, *work.leaves]
                bound = max(min(leaf.bound for leaf in leaves), work.whole)
        return Found(
            min(bound, self.best.value),
            self.best.value,
            self.best.point,
            self.level,
            work.boxes,
            self.done(searched),
            self.spent,
            min(work.first, self.best.value),
            [*work.proved, *work.leaves],
        )

    def save(self, work: Work, heap: list[tuple[float, int, Leaf]], saved: float) -> float:
        """Keep the open boxes now and then; return when they were last kept."""
        began = time.process_time()
        if self.store is None or began - saved < self.every:
            return saved
        leaves = [entry[2] for entry in sorted(heap, key=lambda entry: entry[:2])] + work.proved
        numbers = {name: getattr(work, name) for name in ("boxes", "whole", "first", "rigorous")}
        self.store.write(
            {
                "finished": False,
                "leaves": packed(leaves),
                "value": self.best.value,
                "point": list(self.best.point),
                "seconds": self.spent,
                "idle": self.idle,
                "proved": len(work.proved),
                **numbers,
            }
        )
        saved = time.process_time()
        self.every = max(EVERY, COST * (saved - began))
        return saved

    def go_on(self, held: Mapping[str, Any]) -> Work:
        """Return the work that a search left when it was stopped."""
        self.began -= held["seconds"]
        self.best.value, self.best.point = held["value"], tuple(held["point"])
        self.idle = held["idle"]
        numbers = {name: held[name] for name in ("boxes", "whole", "first", "rigorous")}
        leaves = unpacked(held["leaves"], self.lows, self.highs)
        open_ = len(leaves) - held["proved"]
        return Work(leaves[:open_], proved=leaves[open_:], **numbers)

    def broken(self, leaf: Leaf) -> Found:
        """Return that a claim is false, with a bound of intervals alone."""
        best, bound = self.best, min(self.bounds.by_intervals(leaf), self.best.value)
        return Found(bound, best.value, best.point, self.level, 1, True, self.spent, bound, [leaf])

    def done(self, bound: float) -> bool:
        """Return whether the claim is decided, or the ends are as close as asked."""
        if self.above is not None and (bound > self.above or self.best.value <= self.above):
            return True
        scale = abs(self.best.value if self.reference is None else self.reference - self.best.value)
        return bool(self.best.value - bound <= self.budget.gap * max(scale, 1e-12))

    def late(self) -> bool:
        """Return whether the whole region has had the budget."""
        return self.spent > max(self.budget.seconds, FIRST)

    def sixth(self) -> Callable[[], bool]:
        """Return what says, from now on, whether a sixth of the budget has passed."""
        until = self.spent + self.budget.seconds / 6
        return lambda: self.spent > until

    def boxes_at_once(self) -> int:
        """Return how many boxes are worked on at once within the memory."""
        sizes = [int(np.prod(node.shape)) for node in self.twin.graph.nodes]
        rows = max((2 * sizes[ref] for ref in self.twin.wanted), default=1)
        most = MANY if self.plain else FEW
        return rows_within(8 * 6 * rows * max(sizes), self.budget.memory, most=most)

    def most(self, leaf: Leaf) -> int:
        """Return how many leaves like this one the memory holds."""
        slopes = sum(p.numel() for ps in leaf.after.values() for p in ps)
        ends = sum(low.size + high.size for low, high in zip(leaf.lows, leaf.highs, strict=True))
        return rows_within(8 * (slopes + ends) + HELD, self.budget.memory, most=self.budget.boxes)

    def evaluate(self, leaves: list[Leaf], *, root: bool = False) -> list[Leaf]:
        """Bound boxes, all at once, after a descent on the slopes of the last rows."""
        if self.plain:
            self.best.look(leaves, bound_plainly(self.twin, leaves, self.goal, self.region))
            return leaves
        boxes = ends_of(leaves)
        ends = [*(low for low, _ in boxes), *(high for _, high in boxes)]
        twin, goal = self.twin, self.goal
        before = stacked([leaf.before for leaf in leaves]) or twin.rules.parameters(len(leaves))
        if root:
            before = twin.settled(boxes, before)
            # The first step only values the start: fewer than two in a sixth find nothing.
            steps = self.budget.whole if 2.5 * self.round <= self.budget.seconds / 6 else 0
            before = improve(twin, boxes, before, goal, steps, self.sixth())
        start = stacked([leaf.after for leaf in leaves]) or before
        splits = self.budget.boxes > 1
        for end in ends:
            end.requires_grad_(splits)
        state = twin.sweep(boxes, before, late=self.late if root else never)
        still = State([(lo.detach(), hi.detach()) for lo, hi in state.values], {})
        steps = self.budget.steps[0 if root else 1]
        late = self.sixth() if root else never
        after, best = descend(twin, still, start, goal, steps, late)
        live = goal.of(twin.bound(State(state.values, {}), after, self.rows))
        plain = goal.of(goal.least(*state.values[-1]))
        slopes: tuple[Tensor | None, ...] = (None,) * len(ends)
        if splits and live.requires_grad:
            slopes = torch.autograd.grad(live.sum(), ends, allow_unused=True)
        found = []
        bounds = torch.maximum(torch.maximum(live.detach(), best), plain.detach())
        for index, leaf in enumerate(leaves):
            leaf.bound = max(leaf.bound, float(bounds[index].nan_to_num(-torch.inf)))
            if root:  # its parts share them
                leaf.before = {ref: tuple(p[index] for p in ps) for ref, ps in before.items()}
            leaf.after = {ref: tuple(p[index] for p in ps) for ref, ps in after.items()}
            mine: list[Array | None] = [
                None if slope is None else slope[index].numpy() for slope in slopes
            ]
            leaf.split = choose(leaf, mine)
            found.append(leaf)
        return found

    def face(self, leaf: Leaf) -> tuple[Leaf, float]:
        """Return what is left of the whole region, and its plain bound at the level, after as many
        rounds as pin something: until the bound decides, within a quarter of the budget.
        """
        began = self.spent
        plain, round_ = self.bounds.least([leaf], self.late), 0.0
        self.round = self.spent - began
        for _ in range(self.pins):
            began = self.spent
            if self.done(plain) or began + round_ >= self.budget.seconds / 4:
                break
            before = len(leaf.path)
            leaf = self.faces([leaf], self.late)[0]
            if len(leaf.path) == before:
                break
            self.best.offer(leaf.lows)
            self.best.offer(
                [
                    np.clip(x.double().numpy(), low, high)
                    for x, low, high in zip(self.best.point, leaf.lows, leaf.highs, strict=True)
                ]
            )
            plain = max(plain, self.bounds.least([leaf], self.late))
            round_ = self.spent - began
        return leaf, plain

    def faces(self, leaves: list[Leaf], late: Late = never) -> list[Leaf]:
        """Return what is left of boxes when the inputs are pinned whose derivatives keep their
        sign; boxes on which nothing was pinned four times in a row are tried now and then.
        """
        if not self.pins:
            return leaves
        self.idle += 1
        if self.idle > 4 and self.idle % 4:
            return leaves
        boxes = [as_interval(ends) for ends in ends_of(leaves)]
        pins = self.derivatives.pins([box.lo for box in boxes], [box.hi for box in boxes], late)
        found = []
        for leaf, mine in zip(leaves, pins, strict=True):
            if mine.ends:
                self.idle = 0
                lows, highs = pinned(leaf.lows, leaf.highs, mine)
                path = (*leaf.path, mine)
                leaf = Leaf(lows, highs, leaf.bound, leaf.before, leaf.after, None, path)
            found.append(leaf)
        return found
