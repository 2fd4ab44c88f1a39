"""Prove how many points a network answers right, by every certificate, and count the operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from assay.errors import unknown
from assay.proofs.crosscoder.arithmetic import Array
from assay.proofs.crosscoder.baselines import (
    ball_margins,
    interval_margins,
    linear_propagation_margins,
)
from assay.proofs.crosscoder.certificates import (
    Sides,
    exact_margins,
    linear_margins,
)
from assay.proofs.crosscoder.groups import Round, grouped_margins, refine, split_groups
from assay.proofs.crosscoder.problem import Problem
from assay.proofs.crosscoder.sides import one_side, strongest_sides
from assay.proofs.max_of_k import operations


@dataclass(frozen=True)
class Strategy:
    """A certificate: what it is, the search for its advice (none for most), and the verifier that
    turns a problem and advice into lower bounds of margins.
    """

    about: str
    verify: Callable[[Problem, Sides | None], Array]
    search: Callable[[Problem], Sides] | None = None

    def advice(self, problem: Problem) -> Sides | None:
        return None if self.search is None else self.search(problem)


def _linear(problem: Problem, sides: Sides | None) -> Array:
    assert sides is not None
    return linear_margins(problem, sides)


def _compact(problem: Problem, sides: Sides | None) -> Array:
    assert sides is not None
    return linear_margins(problem, sides, compact=True)


def _groups(problem: Problem, sides: Sides | None) -> Array:
    assert sides is not None
    return grouped_margins(problem, sides.group)


STRATEGIES: Mapping[str, Strategy] = {
    "balls": Strategy("scalar error balls, layer by layer", lambda p, _: ball_margins(p)),
    "one_side": Strategy("one side per neuron, linear in the codes", _linear, one_side),
    "one_side_compact": Strategy(
        "as one_side, knowing of the error its norm alone",
        _compact,
        partial(one_side, compact=True),
    ),
    "strongest": Strategy(
        "one side per strongest feature and neuron, linear in the codes", _linear, strongest_sides
    ),
    "compact": Strategy(
        "as strongest, knowing of the error its norm alone",
        _compact,
        partial(strongest_sides, compact=True),
    ),
    "exact": Strategy("the interaction of features, exactly", lambda p, _: exact_margins(p)),
    "groups": Strategy(
        "one linear function per group of points, groups split until they pass",
        _groups,
        split_groups,
    ),
    "intervals": Strategy(
        "baseline: intervals propagated for every point", lambda p, _: interval_margins(p)
    ),
    "linear_propagation": Strategy(
        "baseline: linear relaxations propagated for every point",
        lambda p, _: linear_propagation_margins(p),
    ),
}
"""Every certificate by name."""


@dataclass(frozen=True)
class ProofResult:
    """How many points a certificate proves right. `margins` are lower bounds, (points,); at level
    float64 they are what a search found and prove nothing. `operations` are the verifier's.
    """

    strategy: str
    level: str
    margins: Float[Array, " points"]
    operations: int
    groups: int
    seconds: float

    @property
    def right(self) -> Array:
        """Whether each point is certified, (points,)."""
        return self.margins > 0

    @property
    def count(self) -> int:
        return int(self.right.sum())

    @property
    def share(self) -> float:
        return self.count / len(self.margins)

    @property
    def proved(self) -> bool:
        return self.level != "float64"

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without the margins."""
        plain = {key: value for key, value in asdict(self).items() if key != "margins"}
        total = len(self.margins)
        return plain | {
            "count": self.count,
            "total": total,
            "share": self.share,
            "proved": self.proved,
        }


def prove(problem: Problem, strategy: str = "strongest") -> ProofResult:
    """Return lower bounds of all margins by one certificate.

    Raises InputError for an unknown strategy."""
    if strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    chosen = STRATEGIES[strategy]
    began = time.process_time()
    advice = chosen.advice(problem)
    margins = chosen.verify(problem, advice)
    seconds = time.process_time() - began
    steps = operations.count(lambda: chosen.verify(counting(problem), advice))
    groups = len(problem.points) if advice is None else len(np.unique(advice.group))
    return ProofResult(strategy, problem.level, margins, steps, groups, seconds)


@dataclass(frozen=True)
class CurvePoint:
    """One round of refinement: points certified so far, groups, and operations spent so far."""

    about: str
    groups: int
    bounded: int
    operations: int
    round: Round

    @property
    def right(self) -> Array:
        return self.round.margins > 0


def curve(problem: Problem, depth: int = 1) -> list[CurvePoint]:
    """Return certified points against groups and operations, group by group finer; see
    `assay.proofs.crosscoder.groups.refine`.
    """
    rounds, replayed = refine(problem, depth), refine(counting(problem), depth)
    total, found = 0, []
    for one in rounds:
        # Both splits are the same: a group that fails by rounding alone is split in one and not in
        # the other, whose rounds then end earlier.
        total += operations.count(lambda: next(replayed, None))
        found.append(CurvePoint(one.about, one.groups, one.bounded, total, one))
    return found


def evaluation_operations(problem: Problem) -> int:
    """Return the operations of running the network on every point and comparing its logits."""
    plain = counting(problem)

    def run() -> None:
        n, x = plain.network, plain.points.inputs
        state = x @ n.E.T + n.b_e
        state = state + np.maximum(state @ n.W_in.T + n.b_in, 0) @ n.W_out.T + n.b_out
        (state @ n.U.T + n.b_u).max(1)

    return operations.count(run)


def counting(problem: Problem) -> Problem:
    """Return the problem at level float64 on arrays that count what is done to them."""
    network = operations.counting_fields(problem.network)
    features = operations.counting_fields(problem.features)
    points = replace(problem.points, inputs=operations.counting(problem.points.inputs))
    return Problem(network, points, features, "float64")
