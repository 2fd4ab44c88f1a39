"""Certify: what switching parts off can do, bounded from above, beside the search from below.

For every kind, on every example: the gates outside a kept set move anywhere in their boxes, and
the traced network is bounded over the whole box (linear bounds with optimised slopes, arXiv
1811.00866 and 2011.13824, and boxes split, arXiv 2103.06624)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from assay.audit.adversary import exhaustive, worst_case
from assay.audit.faithfulness import Keep, kept_gates
from assay.bounds.levels import LEVELS
from assay.bounds.rounding import Interval
from assay.bounds.search.branch import Budget, Found, least
from assay.bounds.search.sweep import bound_rows, sweep
from assay.bounds.trace import Traced, trace
from assay.bounds.trace.traced import always
from assay.core.mechanisms import Mechanisms
from assay.core.sites import run_edited
from assay.core.target import Batch, Target
from assay.errors import InputError, unknown
from assay.progress import progress
from assay.proofs.boxed import Boxed, Low, boxed
from assay.targets.metrics import last_logits

Claim = Literal["damage", "same-answer"]
CORNERS = 12
"""Free gates up to which the search from below visits every corner of the box."""


@dataclass(frozen=True)
class Searched:
    """What a search found, (examples,): a LOWER bound of the worst damage (an upper bound of the
    least margin), reached at `gates`. It proves nothing about other gates.
    """

    values: Tensor
    gates: tuple[Mapping[str, Tensor], ...]
    evaluations: int


@dataclass(frozen=True)
class Proved:
    """What was proved, (examples,): an UPPER bound of the worst damage (a lower bound of the least
    margin) over every combination of gates in the boxes, at `level`, under `assumptions`.

    Infinite where no bound was reached."""

    values: Tensor
    level: str
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class Certified:
    """The bracket [found, proved] of a claim, example by example.

    claim: "damage", how far the metric falls (or rises, where lower is right) from the untouched
    network; or "same-answer", the least margin of the answer over any rival. full: the metric, or
    the margin, of the untouched network. free: how many gates move, on average. boxes, seconds: the
    work spent (CPU). vacuous: where the proof excludes nothing: the bound is that of a box that no
    gate could leave, or none at all."""

    claim: Claim
    found: Searched
    proved: Proved
    full: Tensor
    free: float
    boxes: tuple[int, ...]
    seconds: tuple[float, ...]
    vacuous: Tensor

    @property
    def certified(self) -> Tensor:
        """Where the answer provably stays ("same-answer"); InputError for another claim."""
        return self._margins(self.proved.values)

    @property
    def broken(self) -> Tensor:
        """Where gates were found that change the answer ("same-answer")."""
        return ~self._margins(self.found.values)

    @property
    def open(self) -> Tensor:
        """Where neither is known ("same-answer")."""
        return ~self.certified & ~self.broken

    @property
    def ratio(self) -> float:
        """The mean found damage over the mean proved one: 1 where the worst case is known."""
        if self.claim != "damage":
            raise InputError(f"the ratio is that of damages, not of the claim {self.claim!r}")
        proved = float(self.proved.values.mean())
        return 1.0 if proved == 0 else float(self.found.values.mean()) / proved

    def _margins(self, values: Tensor) -> Tensor:
        if self.claim != "same-answer":
            raise InputError(
                f"answers are certified by the claim 'same-answer', not {self.claim!r}"
            )
        return values > 0

    def summary(self) -> dict[str, Any]:
        """Return plain numbers for JSON; a bound that was not reached is null."""
        finite = bool(self.proved.values.isfinite().all())
        plain: dict[str, Any] = {
            "claim": self.claim,
            "examples": len(self.full),
            "free_gates": self.free,
            "level": self.proved.level,
            "assumptions": list(self.proved.assumptions),
            "boxes": sum(self.boxes),
            "cpu_seconds": sum(self.seconds),
            "vacuous": int(self.vacuous.sum()),
        }
        if self.claim == "damage":
            return plain | {
                "found_mean": float(self.found.values.mean()),
                "proved_mean": float(self.proved.values.mean()) if finite else None,
                "ratio": self.ratio if finite else None,
            }
        return plain | {
            "certified": int(self.certified.sum()),
            "broken": int(self.broken.sum()),
            "open": int(self.open.sum()),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return one row an example: the bracket, and what it says."""
        rows = []
        for index in range(len(self.full)):
            proved = float(self.proved.values[index])
            row: dict[str, Any] = {
                "example": index,
                "full": float(self.full[index]),
                "found": float(self.found.values[index]),
                "proved": proved if np.isfinite(proved) else None,
                "vacuous": bool(self.vacuous[index]),
                "boxes": self.boxes[index],
            }
            if self.claim == "same-answer":
                certified, broken = bool(self.certified[index]), bool(self.broken[index])
                row["verdict"] = "certified" if certified else "broken" if broken else "open"
            rows.append(row)
        return rows


def certify(
    mechanisms: Mechanisms,
    keep: Keep | None = None,
    *,
    low: Low | None = None,
    claim: Claim = "damage",
    budget: float | Budget = 10.0,
    level: str = "real",
    seed: int = 0,
) -> Certified:
    """Bound what the gates that are not kept can do, in any combination and at any strength, on
    every example, and search how much of it they do.

    keep: boolean masks by group, as for `worst_case`; groups left out are free. low: the lowest
    value of a free gate, a number or a tensor by group; by default the kind's own box. budget: CPU
    seconds an example, or a `Budget`. level: "real" (real arithmetic on the stored numbers),
    "float32" (as executed in float32) or "float64" (a search that proves nothing). A false claim
    comes back with the gates that break it.

    Raises InputError for an unknown claim or level, a low above the box or NaN, masks that do not
    fit, and a network with an operation that has no rule, which is named with its module."""
    if claim not in get_args(Claim):
        raise unknown("claim", str(claim), get_args(Claim))
    if level not in LEVELS:
        raise unknown("level", level, LEVELS)
    spent = budget if isinstance(budget, Budget) else Budget(float(budget))
    narrowed = boxed(mechanisms, low)
    kept = kept_gates(mechanisms, keep or {})
    parts = [_one(narrowed, kept, index) for index in range(len(mechanisms.batch))]
    search = [_search(part, mask, claim, seed) for part, mask in parts]
    found = [
        _prove(part, mask, claim, worst, spent, level)
        for (part, mask), worst in zip(progress(parts, f"certify: {claim}"), search, strict=True)
    ]
    free = [
        sum(float(((mask[name] == 0) & (low < 1)).sum()) for name, low in part.lows.items())
        for part, mask in parts
    ]
    return Certified(
        claim,
        Searched(
            torch.tensor([entry.found for entry in found], dtype=torch.float64),
            tuple(entry.gates for entry in found),
            sum(worst.evaluations for worst in search),
        ),
        Proved(
            torch.tensor([entry.proved for entry in found], dtype=torch.float64),
            level,
            _assumptions(level),
        ),
        torch.tensor([entry.full for entry in found], dtype=torch.float64),
        sum(free) / len(free),
        tuple(entry.boxes for entry in found),
        tuple(entry.seconds for entry in found),
        torch.tensor([entry.vacuous for entry in found]),
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
        margins = _margins(part)
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


def _prove(
    part: Boxed, mask: Mapping[str, Tensor], claim: Claim, worst: Any, budget: Budget, level: str
) -> _Bracket:
    ones = part.ones()
    lows = {name: torch.where(mask[name] == 0, part.lows[name], ones[name]) for name in part.groups}
    names = [name for name in part.groups if bool((lows[name] < ones[name]).any())]
    began = time.process_time()
    if claim == "damage":
        sign = 1.0 if part.target.higher_is_right else -1.0
        function = _function(part, names)
        full = function(*(ones[name] for name in names)).detach().double().numpy()
    else:
        sign, margins = 1.0, _margins(part)
        function = _margin_function(part, names, margins)
        full = function(*(ones[name] for name in names)).detach().double().numpy()
    reached = {name: gate.detach() for name, gate in worst.gates.items()}
    if not names:
        value = 0.0 if claim == "damage" else float(full.min())
        own = float(full.reshape(-1)[0]) if claim == "damage" else value
        return _Bracket(own, value, value, reached, 1, 0.0, False)
    regions = [(lows[name], ones[name]) for name in names]
    traced = trace(function, *(ones[name] for name in names), regions=regions)
    start = [[reached[name] for name in names]]
    found = [
        least(
            traced,
            [low for low, _ in regions],
            [high for _, high in regions],
            row,
            level=level,
            above=None if claim == "damage" else 0.0,
            reference=float((row * full).sum()),
            start=start,
            budget=replace(
                budget, seconds=max(budget.seconds - (time.process_time() - began), 0.0)
            ),
        )
        for row in _rows(full, sign, claim)
    ]
    least_found = min(found, key=lambda entry: entry.value)
    gates = reached | dict(zip(names, least_found.point, strict=True))
    proved = min(entry.bound for entry in found)
    boxes, seconds = sum(entry.boxes for entry in found), time.process_time() - began
    vacuous = _is_vacuous(traced, found, _rows(full, sign, claim), level)
    if claim == "damage":
        own = float(full.reshape(-1)[0])
        top = _top(traced, [ones[name] for name in names], sign, level)
        return _Bracket(
            own,
            max(sign * own - least_found.value, 0.0),
            max(top - proved, 0.0),
            gates,
            boxes,
            seconds,
            vacuous,
        )
    return _Bracket(float(full.min()), least_found.value, proved, gates, boxes, seconds, vacuous)


def _rows(full: np.ndarray, sign: float, claim: Claim) -> list[np.ndarray]:
    """Return the linear functions of the traced value whose least values make the claim."""
    if claim == "damage":
        return [np.full(full.shape, sign)]
    rows = np.eye(full.size).reshape(full.size, *full.shape)
    return [rows[index] for index in np.argsort(full.reshape(-1))]


def _function(part: Mechanisms, names: list[str]) -> Callable[..., Tensor]:
    """Return the metric of one example as a plain function of the named gates."""
    return lambda *gates: part.values(dict(zip(names, gates, strict=True)))


def _margin_function(
    part: Boxed, names: list[str], margins: Callable[[Any, Batch], Tensor]
) -> Callable[..., Tensor]:
    def function(*gates: Tensor) -> Tensor:
        edits = part.inner.edits(dict(zip(names, gates, strict=True)))
        return margins(run_edited(part.target.model, part.batch.inputs, edits), part.batch)

    return function


@torch.no_grad()
def _margins(part: Mechanisms) -> Callable[[Any, Batch], Tensor]:
    """Return the function that gives, from a model's output, the margins of the untouched network's
    answer over its rivals, (examples, rivals).

    The answer is the largest logit of a classifier, and of a language model the larger of the
    labelled answers at the last position, or without labels the likeliest token there."""
    logits = _logits(run_edited(part.target.model, part.batch.inputs), part.batch)
    labels = part.batch.labels if isinstance(part.batch.labels, Mapping) else {}
    answers = labels.get("answers")
    chosen = torch.arange(logits.shape[1]) if answers is None else answers[0]
    seen = logits[0, chosen]
    best = int(seen.argmax())
    answer, rivals = int(chosen[best]), torch.cat([chosen[:best], chosen[best + 1 :]])
    if not len(rivals):
        raise InputError("same-answer: the model has one output, and its answer has no rival")

    def margins(output: Any, batch: Batch) -> Tensor:
        found = _logits(output, batch)
        return found[:, answer : answer + 1] - found.index_select(1, rivals)

    return margins


def _logits(output: Any, batch: Batch) -> Tensor:
    """Return the logits (examples, answers) that a model's output stands for."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    labels = batch.labels if isinstance(batch.labels, Mapping) else {}
    if labels.get("last") is None:
        raise InputError(
            "same-answer: the model's output must be logits (examples, classes), or the batch have"
            " the label 'last', the position of the answer"
        )
    return last_logits(output, labels["last"])


def _top(traced: Traced, ones: list[Tensor], sign: float, level: str) -> float:
    """Return an upper bound, at the level, of the right value of the untouched network."""
    at = traced.at(level)
    with np.errstate(all="ignore"):
        point = [Interval.exactly(one.double().numpy()[None]) for one in ones]
        known = sweep(at, point, refine=False)
        row = np.full((1, 1, *at.graph.nodes[-1].shape), -sign)
        return -float(bound_rows(at, known, row)[0, 0])


def _is_vacuous(traced: Traced, found: list[Found], rows: list[np.ndarray], level: str) -> bool:
    """Return whether the bound is no better than what holds whatever the gates are: that of the
    last norm's ball.
    """
    if any(not np.isfinite(entry.bound) for entry in found):
        return True
    whole = always(traced.at(level))
    if whole is None:
        return False
    ends = [
        float((np.maximum(row, 0) * whole.lo[0] + np.minimum(row, 0) * whole.hi[0]).sum())
        for row in rows
    ]
    return any(
        entry.bound <= end + 1e-6 * (1 + abs(end)) for entry, end in zip(found, ends, strict=True)
    )


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
