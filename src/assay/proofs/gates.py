"""Certify: what switching parts off can do, bounded from above, beside the search from below.

For every kind, on every example: the gates outside a kept set move anywhere in their boxes, and
the traced network is bounded over the whole box (linear bounds with optimised slopes, arXiv
1811.00866 and 2011.13824, and boxes split, arXiv 2103.06624)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from assay.audit.adversary import exhaustive, worst_case
from assay.audit.faithfulness import Keep, kept_gates
from assay.bounds.levels import LEVELS
from assay.bounds.rounding import Interval
from assay.bounds.search.ball import least_anywhere
from assay.bounds.search.branch import least
from assay.bounds.search.leaves import Budget, Found
from assay.bounds.search.sweep import bound_rows, sweep
from assay.bounds.search.unfinished import Files, Store
from assay.bounds.trace import Traced, trace
from assay.core.mechanisms import Mechanisms
from assay.core.target import Target
from assay.errors import unknown
from assay.io.files import digest_of_tensors
from assay.progress import progress
from assay.proofs.answers import margins_of
from assay.proofs.boxed import Boxed, Low, boxed
from assay.proofs.bracket import Certified, Claim, Proved, Searched
from assay.proofs.gate_certificate import Evidence, require_writable, write_gates
from assay.proofs.problem import Problem, descend, hull_of, moving_of, pose

CORNERS = 12
"""Free gates up to which the search from below visits every corner of the box."""


def certify(
    mechanisms: Mechanisms,
    keep: Keep | None = None,
    *,
    low: Low | None = None,
    claim: Claim = "damage",
    budget: float | Budget = 10.0,
    level: str = "real",
    seed: int = 0,
    radius: float | None = None,
    domain: tuple[float, float] | None = None,
    references: Mechanisms | None = None,
    certificate: Path | str | None = None,
    work: Files | None = None,
) -> Certified:
    """Bound what the gates that are not kept can do, in any combination and at any strength, on
    every example, and search how much of it they do.

    keep: boolean masks by group, as for `worst_case`; groups left out are free. low: the lowest
    value of a free gate, a number or a tensor by group; by default the kind's own box. budget: CPU
    seconds an example, or a `Budget`. level: "real" (real arithmetic on the stored numbers),
    "float32" (as executed in float32) or "float64" (a search that proves nothing). A false claim
    comes back with the gates that break it.

    radius: how far every entry of the inputs moves beside the gates, cut to the domain (lowest,
    highest); damage then compares the gated with the untouched network on the same input.
    references: nodes at the same sites, whose gate-zero values over all their examples span the box
    in which those of the gates move. certificate: a `.json` file to be, with the proof of all
    brackets (level "real"), which `assay_check` verifies with code of its own. work: a run folder
    that keeps what was found and the open boxes, so that the same call goes on where it was
    stopped.

    Raises InputError for an unknown claim or level, a low above the box or NaN, masks that do not
    fit, inputs or references that cannot move, and a network with an operation that has no rule,
    which is named with its module."""
    if claim not in get_args(Claim):
        raise unknown("claim", str(claim), get_args(Claim))
    if level not in LEVELS:
        raise unknown("level", level, LEVELS)
    if certificate is not None:
        require_writable(certificate, level)
    spent = budget if isinstance(budget, Budget) else Budget(float(budget))
    mechanisms, moving = moving_of(mechanisms.in_memory(), radius, domain, references)
    narrowed = boxed(mechanisms, low)
    kept = kept_gates(mechanisms, keep or {})
    parts = [_one(narrowed, kept, index) for index in range(len(mechanisms.batch))]
    search = [_search(part, mask, claim, seed) for part, mask in parts]
    keeps = None if work is None else partial(_store, work, certificate is not None)
    found = [
        _prove(
            pose(part, mask, claim, hull_of(moving, index)),
            worst,
            spent,
            level,
            certificate is not None,
            keeps and partial(keeps, f"{claim}-{index}", (spent, level, seed)),
        )
        for index, ((part, mask), worst) in enumerate(
            zip(progress(parts, f"certify: {claim}"), search, strict=True)
        )
    ]
    free = [
        sum(float(((mask[name] == 0) & (low < 1)).sum()) for name, low in part.lows.items())
        for part, mask in parts
    ]
    if certificate is not None:
        write_gates(
            certificate,
            [replace(entry.evidence, number=i) for i, entry in enumerate(found) if entry.evidence],
            claim="damage over inputs" if claim == "damage" and radius is not None else claim,
            metric=mechanisms.target.name,
            model=mechanisms.target.model,
            examples=len(found),
        )
    return Certified(
        claim,
        Searched(
            torch.tensor([entry.found for entry in found], dtype=torch.float64),
            tuple(entry.gates for entry in found),
            sum(worst.evaluations for worst in search),
            tuple(entry.elsewhere for entry in found),
        ),
        Proved(
            torch.tensor([entry.proved for entry in found], dtype=torch.float64),
            level,
            (*_assumptions(level), *moving.words),
        ),
        torch.tensor([entry.full for entry in found], dtype=torch.float64),
        sum(free) / len(free),
        tuple(entry.boxes for entry in found),
        tuple(entry.seconds for entry in found),
        torch.tensor([entry.vacuous for entry in found]),
        torch.tensor([entry.allowed for entry in found], dtype=torch.float64),
        None if certificate is None else Path(certificate),
    )


@dataclass(frozen=True)
class _Bracket:
    full: float
    found: float
    proved: float
    gates: Mapping[str, Tensor]
    boxes: int
    seconds: float
    vacuous: bool
    allowed: float
    elsewhere: Mapping[str, Tensor]
    evidence: Evidence | None = None


def _one(whole: Boxed, kept: Mapping[str, Tensor], index: int) -> tuple[Boxed, dict[str, Tensor]]:
    """Return the mechanisms of one example, with its masks."""
    some = slice(index, index + 1)
    mask = {
        name: gate[some] if whole.group(name).per_example else gate for name, gate in kept.items()
    }
    return whole.take(some), mask


def _search(part: Boxed, mask: Mapping[str, Tensor], claim: Claim, seed: int) -> Any:
    """Search the damage, or the loss of the least margin, of one example from below."""
    if claim == "same-answer":
        margins = margins_of(part)
        target = Target(
            part.target.model,
            lambda output, batch: margins(output, batch).amin(-1),
            part.target.name,
            higher_is_right=True,
        )
        part = replace(part, target=target)
    keep = {name: gate != 0 for name, gate in mask.items()}
    free = sum(int(((gate == 0) & (part.lows[name] < 1)).sum()) for name, gate in mask.items())
    if free <= CORNERS:
        return exhaustive(part, keep)
    return worst_case(part, keep, flips=0, seed=seed)


def _store(
    files: Files, leaves: bool, name: str, asked: Any, traced: Traced, problem: Problem, row: int
) -> Store:
    """Return where the search of one number of one example is kept, and what it is good for."""
    points = {"low": problem.lows, "high": problem.highs, "point": problem.point}
    ends = {f"{key} {i}": x for key, xs in points.items() for i, x in enumerate(xs)}
    text = (
        f"{asked} {leaves} {row} {problem.sign} {traced.program.digest} {digest_of_tensors(ends)}"
    )
    key = hashlib.sha256(text.encode()).hexdigest()
    return Store(files, f"{name}-{row}.pt", key, leaves)


def _prove(
    problem: Problem,
    worst: Any,
    budget: Budget,
    level: str,
    keep: bool,
    store: Callable[[Traced, Problem, int], Store] | None,
) -> _Bracket:
    """Bound one example, and search it from below, from the gates that a first search found."""
    reached = {name: gate.detach() for name, gate in worst.gates.items()}
    began = time.process_time()
    full = problem.full()
    own = float(full.min())
    if not problem.moves:
        value = 0.0 if problem.offset else own
        return _Bracket(own, value, value, reached, 1, 0.0, False, value, {})
    regions = list(zip(problem.lows, problem.highs, strict=True))
    traced = trace(problem.function, *problem.point, regions=regions)
    rows = problem.rows(full)
    start = [reached[name] for name in problem.names] + list(problem.point[len(problem.names) :])
    starts = [start]
    if set(problem.kinds) != {"gates"}:  # the first search moved the gates alone
        starts += [descend(problem, rows[0], one) for one in (start, list(problem.point))]
    found, earlier = list[Found](), 0.0
    for index, row in enumerate(rows):
        before = time.process_time()
        left = max(budget.seconds - (before - began) - earlier, 0.0)
        mine = replace(budget, seconds=left if index + 1 == len(rows) else left / 2)
        if problem.answer and any(entry.value <= 0 for entry in found):  # false already
            mine = replace(budget, seconds=0.0, boxes=1, steps=(0, 0), whole=0)
        found.append(
            least(
                traced,
                problem.lows,
                problem.highs,
                row,
                level=level,
                above=0.0 if problem.answer else None,
                reference=float((row * full).sum()),
                start=starts,
                budget=mine,
                store=store and store(traced, problem, index),
            )
        )
        # What was spent on it before it was stopped counts too.
        earlier += max(found[-1].seconds - (time.process_time() - before), 0.0)
    worst_row = min(found, key=lambda entry: entry.value)
    count = len(problem.names)
    gates = reached | dict(zip(problem.names, worst_row.point, strict=False))
    by_leaves, value = min(entry.bound for entry in found), worst_row.value
    anywhere = [least_anywhere(traced.at(level), row) for row in rows]
    both = [(entry.bound, end) for entry, end in zip(found, anywhere, strict=True)]
    proved, allowed = min(max(ends) for ends in both), min(anywhere)
    boxes, seconds = sum(entry.boxes for entry in found), time.process_time() - began + earlier
    vacuous = not (problem.answer and value <= 0) and any(_is_vacuous(*ends) for ends in both)
    if not problem.answer:
        top, start_value = 0.0, 0.0
        if problem.offset:
            top = _top(traced, list(problem.point), problem.sign, level)
            start_value = problem.sign * own
        value = max(start_value - value, 0.0)
        proved, allowed, by_leaves = (max(top - x, 0.0) for x in (proved, allowed, by_leaves))
    evidence = None
    if keep:
        order = np.argsort(full.reshape(-1)).argsort()  # the leaves of every number in turn
        leaves = tuple(found[place] for place in order)
        evidence = Evidence(0, traced, problem, leaves, by_leaves)
    elsewhere = {
        f"{kind} {index}": x
        for index, (kind, x) in enumerate(zip(problem.kinds, worst_row.point, strict=True))
        if index >= count
    }
    return _Bracket(
        own, value, proved, gates, boxes, seconds, vacuous, allowed, elsewhere, evidence
    )


def _top(traced: Traced, ones: list[Tensor], sign: float, level: str) -> float:
    """Return an upper bound, at the level, of the right value of the untouched network."""
    at = traced.at(level)
    with np.errstate(all="ignore"):
        point = [Interval.exactly(one.double().numpy()[None]) for one in ones]
        known = sweep(at, point, refine=False)
        row = np.full((1, 1, *at.graph.nodes[-1].shape), -sign)
        return -float(bound_rows(at, known, row)[0, 0])


def _is_vacuous(bound: float, anywhere: float) -> bool:
    """Return whether a bound is no better than what the balls of the last norms allow, whatever the
    gates are.
    """
    return not np.isfinite(bound) or bound <= anywhere + 1e-6 * (1 + abs(anywhere))


def _assumptions(level: str) -> tuple[str, ...]:
    """Return what a bound of a level takes for granted."""
    if level == "float64":
        return ("a search in unproved arithmetic: nothing is proved",)
    taken = (
        "matrix products of float64 sum conventionally (any order, fused multiply-add allowed)",
        "the recorded operations are the network's on the whole region (compared at points)",
    )
    if level == "float32":
        return (*taken, "float32 functions are accurate to 4 units in the last place")
    return taken
