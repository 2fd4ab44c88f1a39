"""Lines of steps and of choices of the largest, at the points where they are decided."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from assay.bounds.levels import arithmetic
from assay.bounds.rounding import Interval
from assay.bounds.rules import Choice, Jump, Largest


def kept(choice: Choice, x: np.ndarray, n: np.ndarray) -> np.ndarray:
    sizes = n * np.maximum(x, 0)
    if isinstance(choice, Jump):
        return np.where(sizes > choice.theta, np.maximum(x, 0), 0.0)
    assert isinstance(choice, Largest)
    order = np.argsort(-sizes, kind="stable")[: choice.count]
    found = np.zeros_like(x)
    found[order] = np.maximum(x, 0)[order]
    return found


@pytest.mark.parametrize("choice", [Jump(np.array([1.0, 0.5])), Largest(1)])
@pytest.mark.parametrize("slope", [0.0, 0.5, 3.0, -2.0])
def test_lines_hold_wherever_the_threshold_may_lie(choice, slope):
    x = Interval(np.array([-0.5, 0.25]), np.array([3.0, 1.5]))
    n = Interval(np.array([0.5, 1.0]), np.array([2.0, 1.5]))
    ar, slopes = arithmetic("real"), np.full(2, slope)
    asked = [choice.relax([x, n], ar), choice.relax_at([x, n], (slopes, slopes), ar)]
    ends = choice.interval([x, n], ar)
    grids = [np.linspace(x.lo[i], x.hi[i], 29) for i in range(2)]
    lengths = itertools.product(*([n.lo[i], n.hi[i]] for i in range(2)))
    touched = np.full((2, 2), np.inf)
    for row in lengths:
        for point in itertools.product(*grids):
            value = kept(choice, np.array(point), np.array(row))
            assert (ends.lo <= value).all()
            assert (value <= ends.hi).all()
            for lines in asked:
                below = lines.below_slope * point + lines.below
                above = lines.above_slope * point + lines.above
                assert (below <= value + 1e-12).all()
                assert (value <= above + 1e-12).all()
            touched = np.minimum(touched, [value - below, above - value])
    # Every line of these slopes comes near some point: none is lower or higher than it has to be.
    assert touched.max() < 0.3
