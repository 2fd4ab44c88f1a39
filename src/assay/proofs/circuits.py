"""Circuits with a certificate: parts that suffice whatever the others do, and how small any such
set can be.

P(C) says that a claim holds with everything outside C free. The true P is monotone in C. The
shortest certified prefix of an order is found by bisection, then parts are deleted greedily from
the least important. A set of parts whose freedom breaks the claim (shown by gates at which the
network itself breaks it) is *blocking*: every such circuit has a part of it, so that a smallest set
that hits all of them is a lower bound of the size of any circuit (arXiv 2602.16823)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from assay.bounds.search.leaves import Budget
from assay.core.mechanisms import Mechanisms
from assay.errors import InputError
from assay.progress import progress
from assay.proofs.boxed import Low, boxed
from assay.proofs.bracket import Certified
from assay.proofs.gates import certify
from assay.proofs.problem import Moving, Problem, pose

SAMPLES = 32
"""Random points by which a circuit is found without a proof."""


@dataclass(frozen=True)
class Circuit:
    """A certified circuit of one example, and how small any can be.

    kept: boolean masks by group. size: how many parts it has; at_least: no circuit has fewer.
    prefix: the size of the shortest certified prefix of the order, before deletions. blocking: sets
    of parts (flat numbers over all groups in order) of which every circuit has one. sampled: the
    size of the shortest prefix that no random sample breaks; sampled_breaks: whether a search
    breaks that one. claim, most: what is claimed (`damage` at most that, or the same answer).
    level: of the proof."""

    kept: Mapping[str, Tensor]
    size: int
    at_least: int
    prefix: int
    blocking: tuple[tuple[int, ...], ...]
    sampled: int
    sampled_breaks: bool
    most: float | None
    level: str
    proofs: int


def certified_circuit(
    mechanisms: Mechanisms,
    scores: Mapping[str, Tensor],
    *,
    most: float | None = None,
    low: Low | None = None,
    budget: float | Budget = 2.0,
    level: str = "real",
    pairs: int = 32,
    deletions: int = 64,
    seed: int = 0,
) -> Circuit:
    """Return a certified circuit of one example, with a lower bound of the size of any.

    scores: (1, *axes) by group, larger |score| more important. most: the damage that the others may
    do; by default the claim is that the answer stays. budget: of each proof, CPU seconds. pairs:
    how many pairs of parts are tried as blocking sets. deletions: how many parts are tried for
    deletion, from the least important.

    Raises InputError for more than one example, for scores that do not fit, and as `certify`."""
    if len(mechanisms.batch) != 1:
        raise InputError(f"a circuit is that of one example, got {len(mechanisms.batch)}")
    if most is not None and not (np.isfinite(most) and most >= 0):
        raise InputError(f"most: the damage allowed must be a finite number >= 0, got {most}")
    finder = _Finder(mechanisms, scores, most, low, budget, level)
    prefix = _shortest(finder.total, lambda k: finder.holds(finder.order[:k]))
    kept = _deleted(finder, list(finder.order[:prefix]), deletions)
    finder.block(pairs)
    sampled = _shortest(finder.total, lambda k: finder.survives(finder.order[:k], seed))
    breaks = finder.breaks(finder.order[:sampled])
    blocking = _minimal(finder.blocking)
    return Circuit(
        finder.masks(kept),
        len(kept),
        smallest_hitting_set(blocking),
        prefix,
        tuple(tuple(sorted(entry)) for entry in blocking),
        sampled,
        breaks,
        most,
        level,
        finder.proofs,
    )


class _Finder:
    """The claim P(C) of one example, by proof, by search and by evaluation."""

    def __init__(
        self,
        mechanisms: Mechanisms,
        scores: Mapping[str, Tensor],
        most: float | None,
        low: Low | None,
        budget: float | Budget,
        level: str,
    ) -> None:
        self.mechanisms, self.most, self.low = mechanisms, most, low
        self.budget, self.level, self.proofs = budget, level, 0
        self.shapes = {name: gate.shape for name, gate in mechanisms.ones().items()}
        flat = []
        for name, shape in self.shapes.items():
            mine = scores.get(name)
            if mine is None or mine.shape != shape:
                got = None if mine is None else tuple(mine.shape)
                raise InputError(
                    f"scores of {name!r} must have the shape {tuple(shape)}, got {got}"
                )
            flat.append(mine.abs().reshape(-1).double())
        sizes = torch.cat(flat)
        self.total = len(sizes)
        self.order = sizes.argsort(descending=True, stable=True).tolist()
        narrowed = boxed(mechanisms, low)
        free = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
        claim = "same-answer" if most is None else "damage"
        self.problem: Problem = pose(narrowed, free, claim, Moving())  # type: ignore[arg-type]
        self.lows = torch.cat([narrowed.lows[name].reshape(-1).double() for name in self.shapes])
        self.full = self.problem.full()
        self.blocking: list[frozenset[int]] = []

    def masks(self, kept: Sequence[int]) -> dict[str, Tensor]:
        flat = torch.zeros(self.total, dtype=torch.bool)
        flat[list(kept)] = True
        parts = flat.split([int(np.prod(shape)) for shape in self.shapes.values()])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def prove(self, kept: Sequence[int]) -> Certified:
        self.proofs += 1
        claim = "same-answer" if self.most is None else "damage"
        found = certify(
            self.mechanisms,
            self.masks(kept),
            low=self.low,
            claim=claim,  # type: ignore[arg-type]
            budget=self.budget,
            level=self.level,
        )
        gates = torch.cat([found.found.gates[0][n].reshape(-1).double() for n in self.shapes])
        if self.is_broken(gates):
            self.add_blocking(gates)
        return found

    def holds(self, kept: Sequence[int]) -> bool:
        """Return whether the claim is proved with everything else free."""
        if set(kept) >= set(range(self.total)):
            return True
        if any(not entry & set(kept) for entry in self.blocking):
            return False
        found = self.prove(kept)
        if self.most is None:
            return bool(found.certified.all())
        return float(found.proved.values[0]) <= self.most

    def breaks(self, kept: Sequence[int]) -> bool:
        """Return whether a search, or a set that is known to block, breaks the claim."""
        if any(not entry & set(kept) for entry in self.blocking):
            return True
        if len(set(kept)) == self.total:
            return False
        before = len(self.blocking)
        self.prove(kept)
        return len(self.blocking) > before

    @torch.no_grad()
    def is_broken(self, flat: Tensor) -> bool:
        """Return whether the network itself breaks the claim at gates."""
        parts = flat.split([int(np.prod(shape)) for shape in self.shapes.values()])
        gates = {
            name: part.reshape(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        given = [
            gates[name].to(one)
            for name, one in zip(self.problem.names, self.problem.point, strict=True)
        ]
        value = self.problem.function(*given).double().numpy()
        if self.most is None:
            return bool(value.min() <= 0)
        return bool((self.problem.sign * (self.full - value)).max() > self.most)

    def add_blocking(self, flat: Tensor) -> None:
        """Note the parts that gates move, after putting back those that are not needed."""
        flat = flat.clone()
        for place in reversed(self.order):
            if flat[place] != 1:
                kept = float(flat[place])
                flat[place] = 1.0
                if not self.is_broken(flat):
                    flat[place] = kept
        self.blocking.append(frozenset((flat != 1).nonzero().flatten().tolist()))

    def block(self, pairs: int) -> None:
        """Find the single parts and the pairs, most important first, whose freedom alone breaks
        the claim.
        """
        single = [place for place in self.order if self._off([place])]
        self.blocking += [frozenset([place]) for place in single]
        others = [place for place in self.order if place not in single]
        some = sorted(
            itertools.combinations(range(min(len(others), 64)), 2), key=lambda pair: sum(pair)
        )
        for one, other in progress(some[:pairs], "pairs of parts"):
            if self._off([others[one], others[other]]):
                self.blocking.append(frozenset([others[one], others[other]]))

    def _off(self, places: list[int]) -> bool:
        flat = torch.ones(self.total, dtype=torch.float64)
        flat[places] = self.lows[places]
        return bool((flat != 1).any()) and self.is_broken(flat)

    def survives(self, kept: Sequence[int], seed: int) -> bool:
        """Return whether random gates outside the circuit leave the claim as it is."""
        generator = torch.Generator().manual_seed(seed)
        for sample in range(SAMPLES):
            share = torch.rand(self.total, generator=generator, dtype=torch.float64)
            flat = self.lows + (share.round() if sample % 2 else share) * (1 - self.lows)
            flat[list(kept)] = 1.0
            if self.is_broken(flat):
                return False
        return True


def _shortest(total: int, holds: Callable[[int], bool]) -> int:
    """Return the least k found by bisection for which the claim holds; all parts always do."""
    low, high = -1, total
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def _deleted(finder: _Finder, kept: list[int], tries: int) -> list[int]:
    """Return what is left after parts are deleted as long as the claim is proved without them."""
    for place in progress(kept[::-1][:tries], "deletions"):
        rest = [entry for entry in kept if entry != place]
        if finder.holds(rest):
            kept = rest
    return kept


def _minimal(sets: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """Return the sets that contain no other one."""
    distinct = sorted(set(sets), key=lambda entry: (len(entry), sorted(entry)))
    found: list[frozenset[int]] = []
    for entry in distinct:
        if not any(other <= entry for other in found):
            found.append(entry)
    return found


def smallest_hitting_set(sets: Sequence[frozenset[int]]) -> int:
    """Return a lower bound of how many parts hit every set: the least number, by a mixed-integer
    program, or its dual bound where it is not solved to the end.
    """
    if not sets:
        return 0
    names = sorted(set().union(*sets))
    place = {name: index for index, name in enumerate(names)}
    rows = [row for row, entry in enumerate(sets) for _ in entry]
    columns = [place[name] for entry in sets for name in sorted(entry)]
    matrix = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(sets), len(names)))
    found = milp(
        np.ones(len(names)),
        integrality=np.ones(len(names)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, lb=1),
        options={"time_limit": 20.0},
    )
    bound = found.fun if found.status == 0 else found.mip_dual_bound
    return int(np.ceil(float(bound) - 1e-6)) if bound is not None else 1
