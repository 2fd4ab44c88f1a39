"""Random small networks of mixed operations: no bound, pin or split loses their least value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mixed_networks import Case, draw_case

from assay.bounds.search.branch import least
from assay.bounds.search.leaves import Budget
from assay.bounds.search.pins import Derivatives
from assay.bounds.trace import Traced, trace

INSIDE = 100


def traced(case: Case) -> Traced:
    middle = [(low + high) / 2 for low, high in zip(case.lows, case.highs, strict=True)]
    return trace(case.function, *middle, regions=list(zip(case.lows, case.highs, strict=True)))


def pinned_by_mistake(case: Case, found: Traced, level: str, seed: int, slack: float) -> list[str]:
    """Return the pins that a derivative inside the box leads away from."""
    slopes = case.slopes(case.points(np.random.default_rng(seed), INSIDE))
    lows, highs = ([x.double().numpy()[None] for x in ends] for ends in (case.lows, case.highs))
    wrong = []
    for which, place, side in Derivatives(found, case.row, level).pins(lows, highs)[0].ends:
        # Random points only: at corners a kink has several derivatives.
        inner = slopes[which][-INSIDE:, place] * (1 if side == 0 else -1)
        if (inner < -slack * (1 + np.abs(slopes[which]).max())).any():
            wrong.append(f"{seed} ({case.words}): input {which}, entry {place}, side {side}")
    return wrong


def below_the_bound(case: Case, found: Traced, level: str, seed: int, slack: float) -> list[str]:
    """Return the searches whose bound lies above a value of the function."""
    low = case.lowest(np.random.default_rng(seed))
    wrong = []
    for pins in (12, 0):
        budget = Budget(boxes=8, steps=(3, 2), whole=1, pins=pins, seconds=1e9)
        bound = least(found, case.lows, case.highs, case.row, level=level, budget=budget).bound
        if bound > low + slack * (1 + abs(low)):
            wrong.append(f"{seed} ({case.words}), {pins} pins: {bound} above {low}")
    return wrong


def check(seed: int, dtype: torch.dtype, level: str) -> list[str]:
    case, slack = draw_case(seed, dtype), 1e-10 if dtype == torch.float64 else 1e-4
    found = traced(case)
    return [
        *pinned_by_mistake(case, found, level, seed, 10 * slack),
        *below_the_bound(case, found, level, seed, slack),
    ]


@pytest.mark.parametrize("seed", range(4))
def test_no_value_lies_below_a_bound(seed: int) -> None:
    assert check(seed, torch.float64, "real") == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_value_of_many_networks_lies_below_a_bound(dtype: torch.dtype) -> None:
    assert [line for seed in range(100, 125) for line in check(seed, dtype, "real")] == []


def test_the_networks_have_pins_and_kinks() -> None:
    """What is drawn reaches the code that it attacks."""
    words = {word for seed in range(40) for word in draw_case(seed).words.split()}
    assert {"relu", "softmax", "norm", "maximum", "skewed", "gated"} <= words
    case = draw_case(0)
    lows, highs = ([x.double().numpy()[None] for x in ends] for ends in (case.lows, case.highs))
    assert Derivatives(traced(case), case.row, "real").pins(lows, highs)[0].ends
