"""Executions in float32 that use up what a bound allows for: biases that swallow products, and
subnormal numbers that are read as zeros.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from assay.bounds import Graph, bound, nonlinear
from assay.bounds import operations as ops
from assay.bounds.levels import arithmetic
from assay.bounds.propagate import METHODS
from assay.bounds.rounding import Interval

REAL = arithmetic("real")


def assert_allowed(operation: ops.Operation, xs: list[float], executed: float, true: Fraction):
    """Assert that an executed number is within the bounds, by the operation and by a graph."""
    boxes = [Interval.exactly(np.full((1, 1, 1), x)) for x in xs]
    value = operation.interval(boxes, REAL)
    error = Fraction(float(np.max(operation.error(boxes, value))))
    assert abs(Fraction(executed) - true) <= error
    graph = Graph()
    graph.add_node(operation, *(graph.input(1, 1) for _ in xs))
    for method in METHODS:
        found = bound(graph, boxes, method=method, level="float32")
        assert found.contain(np.full((1, 1, 1), executed))
        assert found.contain(np.full((1, 1, 1), float(true)))


@pytest.mark.parametrize("bias", [1.0, -1.0, 3.0, 1e6, -1e-6])
@pytest.mark.parametrize("kind", ["affine", "scale"])
@pytest.mark.parametrize("share", [0.51, -0.51, 0.26, 1.49])
def test_a_bias_that_dwarfs_the_products_is_rounded_too(
    bias: float, kind: str, share: float
) -> None:
    """A product of about half a unit of the bias is rounded to a whole unit, or to nothing."""
    bias = float(np.float32(bias))
    weight = float(np.float32(share * np.spacing(np.float32(bias))))
    executed = np.float32(weight) * np.float32(1) + np.float32(bias)
    assert executed.dtype == np.float32
    true = Fraction(weight) + Fraction(bias)
    assert Fraction(float(executed)) != true
    operation = (
        ops.Affine(np.array([[weight]]), np.array([bias]))
        if kind == "affine"
        else ops.Scale(np.array([weight]), np.array([bias]))
    )
    assert_allowed(operation, [1.0], float(executed), true)


@pytest.mark.parametrize("large", [1.0, 2.0**20, 2.0**100, 2.0**126])
@pytest.mark.parametrize("kind", ["affine", "scale", "multiply", "matmul"])
@pytest.mark.parametrize("swapped", [False, True])
def test_subnormal_numbers_may_be_read_as_zeros(large: float, kind: str, swapped: bool) -> None:
    """Of a number below 2^-126 and a large one the product may be executed as zero."""
    small = (2**23 - 1) * 2.0**-149
    true = Fraction(small) * Fraction(large)
    one, two = (large, small) if swapped else (small, large)
    operations = {
        "affine": lambda: (ops.Affine(np.array([[two]]), np.zeros(1)), [one]),
        "scale": lambda: (ops.Scale(np.array([two]), np.zeros(1)), [one]),
        "multiply": lambda: (nonlinear.Multiply(), [one, two]),
        "matmul": lambda: (nonlinear.MatMul(), [one, two]),
    }
    operation, xs = operations[kind]()
    assert_allowed(operation, xs, 0.0, true)


@pytest.mark.parametrize("terms", [128, 512])
@pytest.mark.parametrize("first", [True, False])
def test_a_softmax_may_lose_all_its_small_terms(terms: int, first: bool) -> None:
    """All but one exponential are half a unit of the largest: added to it they are lost, and added
    before it they are not.
    """
    x = np.full(terms, np.float32(np.log(0.499 * 2.0**-23)))
    x[0 if first else -1] = 0.0
    weights = np.exp(x - x.max())
    assert weights.dtype == np.float32
    total = np.add.accumulate(weights)[-1]
    executed = (weights / total).astype(np.float64)
    operation, box = nonlinear.Softmax(np.ones(terms)), Interval.exactly(x[None])
    value = operation.interval([box], REAL)
    error = np.asarray(operation.error([box], value))
    gap = np.maximum(value.lo - executed, executed - value.hi)
    assert np.all(gap <= error)
    assert not first or gap.max() > 0.4 * terms * 2.0**-24
    graph = Graph()
    graph.softmax(graph.input(terms))
    assert bound(graph, box, level="float32", method="interval").contain(executed[None])


@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("eps", [2.0**-60, 1e-6])
def test_a_norm_may_lose_all_its_small_squares(width: int, eps: float) -> None:
    """All but one square are half a unit of the largest, so that the sum of squares is short of
    hundreds of halves of a unit; the norm is then longer by half as many.
    """
    x = np.full(width, np.float32((0.499 * 2.0**-23) ** 0.5))
    x[0] = 1.0
    squares = np.add.accumulate(x * x)[-1]
    root = np.sqrt(squares / np.float32(width) + np.float32(eps))
    executed = (x / root).astype(np.float64)
    wide = x.astype(np.float64)
    true = wide / np.sqrt((wide * wide).mean() + eps)
    assert squares.dtype == root.dtype == np.float32
    assert squares == 1
    assert executed[0] / true[0] - 1 > 0.2 * width * 2.0**-24
    graph = Graph()
    graph.rms_norm(graph.input(width), None, float(np.float32(eps)))
    for method in METHODS:
        found = bound(graph, Interval.exactly(x[None]), level="float32", method=method)
        assert found.contain(executed[None])
        assert found.contain(true[None])
