"""Verify: whether a network meets a VNN-LIB property, over every input of its boxes.

The property names an unsafe set: it holds when no input gives an output in it. With the constraints
`g <= 0` of the unsafe set, each conjunction is impossible on a box where one of its g is positive
throughout; boxes are split until all conjunctions are impossible on every one (branch and bound,
arXiv 2103.06624), or an input is found that is unsafe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from assay.bounds.rounding import Array, Interval
from assay.bounds.search.attack import DRAWN, Attack
from assay.bounds.search.branch import least
from assay.bounds.search.goal import Goal
from assay.bounds.search.leaves import Budget, Found, Leaf
from assay.bounds.search.pins import Split
from assay.bounds.trace import Traced, trace
from assay.bounds.trace.traced import evaluate
from assay.errors import InputError
from assay.io.vnnlib import Case, Linear, Property
from assay.memory import require_memory, rows_within
from assay.proofs.unsafe_certificate import write_unsafe
from assay.targets.onnx_network import OnnxNetwork

LEVEL = "real"
ASSUMPTIONS = (
    "matrix products of float64 sum conventionally (any order, fused multiply-add allowed)",
    "the network is its formula in real arithmetic on the stored numbers",
)
PLAIN = Budget(steps=(0, 0), whole=0, pins=0)
"""Many boxes with the usual slopes: few inputs move."""

Verdict = Literal["holds", "violated", "open"]


@dataclass(frozen=True)
class Counterexample:
    """An input whose output is unsafe, by an enclosure of the network's value in real arithmetic.

    inputs: flat, inside the box of the case. outputs: as the network computes them, in its own
    precision, from the inputs rounded to it. case, conjunction: which of them it meets."""

    inputs: tuple[float, ...]
    outputs: tuple[float, ...]
    case: int
    conjunction: int


@dataclass(frozen=True)
class Verified:
    """What is known of a property.

    bound: a proved lower bound, over all boxes, of how far the output stays from the unsafe set
    (the least over its conjunctions of the largest constraint); value: the least evaluated.
    open_share: of the volume of the boxes, that is neither proved nor broken."""

    verdict: Verdict
    bound: float
    value: float
    boxes: int
    open_share: float
    seconds: float
    counterexample: Counterexample | None = None
    certificate: Path | None = None
    level: str = LEVEL
    assumptions: tuple[str, ...] = ASSUMPTIONS

    def plain(self) -> dict[str, Any]:
        """Return it as plain values."""
        found: dict[str, Any] = {
            "verdict": self.verdict,
            "bound": self.bound if math.isfinite(self.bound) else None,
            "least_found": self.value if math.isfinite(self.value) else None,
            "boxes": self.boxes,
            "open_share": self.open_share,
            "cpu_seconds": self.seconds,
            "level": self.level,
            "assumptions": list(self.assumptions),
        }
        if self.counterexample is not None:
            mine = self.counterexample
            found |= {
                "inputs": list(mine.inputs),
                "outputs": list(mine.outputs),
                "case": mine.case,
                "conjunction": mine.conjunction,
            }
        return found


@dataclass(frozen=True)
class Posed:
    """One case as a function of tensors: the constraints of its unsafe set, and the box, rounded
    so that both grow.

    at_once: points whose gradients fit the memory together."""

    function: Callable[[Tensor], Tensor]
    goal: Goal
    low: Tensor
    high: Tensor
    at_once: int

    def traced(self) -> Traced:
        """Return the graph of the constraints' values, (1, constraints)."""
        return trace(self.function, (self.low + self.high) / 2, regions=[(self.low, self.high)])


def pose(network: OnnxNetwork, case: Case) -> Posed:
    """Return one case of a property of a network; constraints that several conjunctions share
    stand once.
    """
    shape = network.shape
    low = torch.tensor([_rounded(x, -1) for x in case.low], dtype=torch.float64).reshape(shape)
    high = torch.tensor([_rounded(x, 1) for x in case.high], dtype=torch.float64).reshape(shape)
    numbers = dict[Linear, int]()
    groups = tuple(
        tuple(numbers.setdefault(one, len(numbers)) for one in group) for group in case.unsafe
    )
    count = len(numbers)
    require_memory(16 * count * max(count, network.outputs), f"a property of {count} constraints")
    rows = torch.zeros(count, network.outputs, dtype=torch.float64)
    divisors = torch.ones(count, dtype=torch.float64)
    for place, one in enumerate(numbers):
        divisor = _divisor(one)
        divisors[place] = divisor
        for (_, output), factor in one.terms.items():
            rows[place, output] = float(factor * divisor)
    constants = torch.tensor([_rounded(one.constant, -1) for one in numbers], dtype=torch.float64)
    turned, whole = rows.T.contiguous(), bool((divisors == 1).all())

    def function(x: Tensor) -> Tensor:
        found = network(x).reshape(1, -1) @ turned
        return (found if whole else found / divisors) + constants

    goal = Goal(np.eye(count).reshape(count, 1, count), groups)
    at_once = rows_within(32 * (network.entries + 4 * count), most=DRAWN // 4)
    return Posed(function, goal, low, high, at_once)


def verify(
    network: OnnxNetwork,
    claim: Property,
    *,
    seconds: float = 60.0,
    certificate: Path | str | None = None,
) -> Verified:
    """Prove that a network meets a property in real arithmetic, or find an input that breaks it.

    Anytime: after this many CPU seconds the bound that was reached is returned, and the share of
    the boxes' volume that is open. certificate: where the proof of a property that holds is
    written, for `assay_check`. Raises InputError where the property has other numbers of inputs
    and outputs than the network, or numbers beyond float64."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise InputError(f"--seconds must be a positive number, got {seconds}")
    size = math.prod(network.shape)
    if (claim.inputs, claim.outputs) != (size, network.outputs):
        raise InputError(
            f"{claim.path} is about {claim.inputs} inputs and {claim.outputs} outputs, and"
            f" {network.file.path} has {size} and {network.outputs}"
        )
    began = time.process_time()
    found, graphs = list[Found](), list[Traced]()
    posed = [pose(network, case) for case in claim.cases]
    for index, (case, mine) in enumerate(zip(claim.cases, posed, strict=True)):
        left = seconds - (time.process_time() - began)
        if found and left <= 0:
            break
        attack = Attack(mine.function, mine.goal, mine.low, mine.high, mine.at_once)
        one, traced = _searched(mine, attack, max(left, 0.0) / (len(posed) - index))
        found.append(one)
        graphs.append(traced)
        if one.value <= 0:
            broken = counterexample(network, case, one.point[0], index)
            if broken is not None:
                return _summed("violated", found, len(posed), began, broken)
    holds = len(found) == len(posed) and all(one.bound > 0 for one in found)
    if not holds or certificate is None:
        return _summed("holds" if holds else "open", found, len(posed), began)
    proofs = [
        (traced, mine.goal, mine.low, mine.high, one)
        for traced, mine, one in zip(graphs, posed, found, strict=True)
    ]
    files = (network.file.path, claim.path)
    name = f"{claim.path.name} on {network.file.path.name}"
    written = write_unsafe(certificate, proofs, name, files)
    return replace(_summed("holds", found, len(posed), began), certificate=written)


def _searched(posed: Posed, attack: Attack, seconds: float) -> tuple[Found, Traced]:
    """Bound one case and attack it, a tenth of the time before anything else."""
    until = time.process_time() + seconds / 10
    point, _ = attack.whole(late=lambda: time.process_time() > until)
    traced = posed.traced()

    def probe(points: Sequence[Tensor], widths: Sequence[Tensor]) -> list[Tensor]:
        return [attack.near(points[0], widths[0])]

    found = least(
        traced,
        [posed.low],
        [posed.high],
        posed.goal,
        above=0.0,
        start=[[point]],
        budget=replace(PLAIN, seconds=seconds),
        probe=probe,
    )
    return found, traced


def counterexample(
    network: OnnxNetwork, case: Case, point: Tensor, index: int
) -> Counterexample | None:
    """Return a point of the box as a counterexample if its output is surely unsafe, in real
    arithmetic: first as it is in the network's own precision. The outputs are enclosed, and the
    constraints of the enclosure exact.
    """
    at = trace(network, point).at(LEVEL)
    for x in (point.to(network.dtype).double(), point):
        box, inputs = _inside(case, x)
        value = evaluate(at, [Interval(*(e.reshape(1, *x.shape) for e in box))])
        ends = value.lo.reshape(-1), value.hi.reshape(-1)
        if not all(np.isfinite(end).all() for end in ends):
            continue
        for number, group in enumerate(case.unsafe):
            if all(_most(one, *ends) <= 0 for one in group):
                given = torch.tensor(inputs, dtype=torch.float64).reshape(network.shape)
                with torch.no_grad():
                    outputs = network(given.to(network.dtype)).reshape(-1).double().tolist()
                return Counterexample(tuple(inputs), tuple(outputs), index, number)
    return None


def _most(one: Linear, low: Array, high: Array) -> Fraction:
    """Return the largest value of a constraint where the outputs lie in intervals."""
    return one.constant + sum(
        factor * Fraction(float((high if factor > 0 else low)[output]))
        for (_, output), factor in one.terms.items()
    )


def _inside(case: Case, x: Tensor) -> tuple[tuple[Array, Array], list[float]]:
    """Return a point of the exact box next to x; where no float64 lies between the ends, the
    interval around them stands for the point.
    """
    lows, highs, inputs = [], [], []
    for low, high, value in zip(case.low, case.high, x.reshape(-1).tolist(), strict=True):
        first, last = _rounded(low, 1), _rounded(high, -1)
        if first <= last:
            inputs.append(min(max(value, first), last))
            lows.append(inputs[-1])
            highs.append(inputs[-1])
        else:
            inputs.append(float(low))
            lows.append(_rounded(low, -1))
            highs.append(_rounded(high, 1))
    return (np.array(lows), np.array(highs)), inputs


def _summed(
    verdict: Verdict,
    found: list[Found],
    count: int,
    began: float,
    broken: Counterexample | None = None,
) -> Verified:
    bound = min(one.bound for one in found) if len(found) == count else -math.inf
    shares = [sum(_share(leaf) for leaf in one.leaves if not leaf.bound > 0) for one in found]
    open_ = 0.0 if verdict == "holds" else (sum(shares) + count - len(found)) / count
    return Verified(
        verdict,
        bound,
        min(one.value for one in found),
        sum(one.boxes for one in found),
        open_,
        time.process_time() - began,
        broken,
    )


def _share(leaf: Leaf) -> float:
    """Return the share of the region's volume that a leaf has: every split halves it."""
    return 0.5 ** sum(isinstance(step, Split) for step in leaf.path)


def _rounded(x: Fraction, side: int) -> float:
    """Return the float64 nearest to x that is not above it (side -1), or not below (side 1)."""
    try:
        near = float(x)
    except OverflowError as error:
        raise InputError("a number of the property is beyond float64") from error
    if (Fraction(near) - x) * side < 0:
        near = math.nextafter(near, math.inf * side)
    if not math.isfinite(near):
        raise InputError("a number of the property is beyond float64")
    return near


def _divisor(one: Linear) -> int:
    """Return the least number, 1 or odd, times which float64 holds all coefficients exactly."""

    def fits(x: Fraction) -> bool:
        return abs(x) < 2**1000 and Fraction(float(x)) == x

    found, terms = 1, one.terms.values()
    if not all(map(fits, terms)):
        found = math.lcm(*(x.denominator for x in terms))
        found //= found & -found  # a power of two costs no digits
    if not (fits(Fraction(found)) and all(fits(found * x) for x in terms)):
        raise InputError("a coefficient of the property has more digits than float64 holds")
    return found
