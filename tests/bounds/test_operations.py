"""One backward step of each operation is valid in exact arithmetic: tested on points, where no width hides a rounding error."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from flint import arb, ctx

from assay.bounds import operations as ops
from assay.bounds.levels import arithmetic
from assay.bounds.propagate import Known, _merge
from assay.bounds.rounding import Interval
from assay.errors import AssayError

REAL = arithmetic("real")
ROWS = 40
SCALES = [1.0, 1e-161, 1e140]


def exact(x: np.ndarray) -> np.ndarray:
    """The entries as fractions, in an object array that `@` and `*` handle exactly."""
    return np.array([Fraction(float(v)) for v in x.ravel()] + [None])[:-1].reshape(x.shape)


def affine(x: np.ndarray, rng: np.random.Generator) -> tuple[ops.Operation, np.ndarray]:
    W, b = rng.normal(size=(4, x.shape[-1])) * np.abs(x).max(), rng.normal(size=4)
    return ops.Affine(W, b), exact(x) @ exact(W).T + exact(b)


def scale(x: np.ndarray, rng: np.random.Generator) -> tuple[ops.Operation, np.ndarray]:
    w, b = rng.normal(size=x.shape[-1]), rng.normal(size=x.shape[-1])
    return ops.Scale(w, b), exact(x) * exact(w) + exact(b)


def square(x: np.ndarray, rng: np.random.Generator) -> tuple[ops.Operation, np.ndarray]:
    return ops.Square(), exact(x) * exact(x)


def relu(x: np.ndarray, rng: np.random.Generator) -> tuple[ops.Operation, np.ndarray]:
    return ops.Relu(), np.maximum(exact(x), Fraction(0))


def multiply(x: np.ndarray, y: np.ndarray) -> tuple[ops.Operation, np.ndarray]:
    return ops.Multiply(), exact(x) * exact(y)


def rescale(x: np.ndarray, y: np.ndarray) -> tuple[ops.Operation, np.ndarray]:
    return ops.Multiply(), exact(x) * exact(y[..., :1])


def matmul(x: np.ndarray, y: np.ndarray) -> tuple[ops.Operation, np.ndarray]:
    return ops.MatMul(), exact(x) @ exact(np.swapaxes(y, -1, -2))


def add(x: np.ndarray, y: np.ndarray) -> tuple[ops.Operation, np.ndarray]:
    return ops.Add(-1.0), exact(x) - exact(y)


def check_step(operation: ops.Operation, value: np.ndarray, xs: list[np.ndarray], rows: np.ndarray) -> None:
    """Assert `rows . value >= sum rows_p . x_p + c` exactly, and that it is tight up to rounding."""
    boxes = [Interval(x[None], x[None]) for x in xs]
    parts, constant = operation.backward(rows, boxes, operation.relax(boxes, REAL), 0.0, REAL)
    constant = np.broadcast_to(constant, (1, ROWS))
    whole = operation.interval(boxes, REAL)
    assert np.all(exact(whole.lo[0]) <= value)
    assert np.all(value <= exact(whole.hi[0]))
    for r in range(ROWS):
        left = (exact(rows[0, r]) * value).sum()
        size = (abs(exact(rows[0, r])) * abs(value)).sum()
        right = Fraction(float(constant[0, r]))
        for part, x in zip(parts, xs, strict=True):
            if part is not None:
                right += (exact(part[0, r]) * exact(x)).sum()
                size += (abs(exact(part[0, r])) * abs(exact(x))).sum()
        assert right <= left
        assert left - right <= size / 10**13 + Fraction(1e-250)


@pytest.mark.parametrize("size", SCALES)
@pytest.mark.parametrize("build", [affine, scale, square, relu])
def test_a_step_through_one_input(build: Callable[..., tuple[ops.Operation, np.ndarray]], size: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=7) * size
    operation, value = build(x, rng)
    rows = rng.normal(size=(1, ROWS, *value.shape)) * min(1.0, size)
    check_step(operation, value, [x], rows)


@pytest.mark.parametrize("size", SCALES)
@pytest.mark.parametrize("build", [multiply, rescale, matmul, add])
def test_a_step_through_two_inputs(build: Callable[..., tuple[ops.Operation, np.ndarray]], size: float) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(3, 7)) * size, rng.normal(size=(3, 7)) * size
    operation, value = build(x, y)
    second = {rescale: y[..., :1], matmul: y.T}.get(build, y)
    rows = rng.normal(size=(1, ROWS, *value.shape)) * min(1.0, size)
    check_step(operation, value, [x, second], rows)


def test_a_step_through_softmax() -> None:
    rng = np.random.default_rng(2)
    x, rows = rng.normal(size=6), rng.normal(size=(1, ROWS, 6))
    operation = ops.Softmax(np.ones(6))
    boxes = [Interval(x[None], x[None])]
    p, kept, rest = operation.relax(boxes, REAL)
    relaxed = (p, np.ones_like(kept), rest)
    # The interval at a point is as tight as the linear part, which is therefore forced here.
    at = Interval.exactly(p) * (Interval.exactly(x) - (Interval.exactly(p) * x).sum()[..., None])
    relaxed = (p, np.ones_like(kept), operation.interval(boxes, REAL) - at)
    (part,), constant = operation.backward(rows, boxes, relaxed, 0.0, REAL)
    assert part is not None
    with ctx.workprec(300):
        e = [arb(float(v)).exp() for v in x]
        total = sum(e, arb(0))
        for r in range(ROWS):
            left = sum((arb(float(a)) * v / total for a, v in zip(rows[0, r], e, strict=True)), arb(0))
            right = sum((arb(float(a)) * arb(float(v)) for a, v in zip(part[0, r], x, strict=True)), arb(float(constant[0, r])))
            assert right <= left
            assert left - right < 1e-13


def test_every_linear_form_is_a_lower_bound_over_its_box() -> None:
    rng = np.random.default_rng(3)
    for size in SCALES:
        rows, lo = rng.normal(size=(1, ROWS, 9)), rng.normal(size=(1, 9)) * size
        hi = lo + np.abs(rng.normal(size=(1, 9))) * size * np.array([0.0, 1.0, 1e-9])[rng.integers(0, 3, (1, 9))]
        wobble = np.abs(rng.normal(size=(1, 9))) * size * 1e-3
        for w in (0.0 * wobble, wobble):
            found = REAL.lower(rows, lo, hi, w)
            for r in range(ROWS):
                a = exact(rows[0, r])
                least = (np.where(a > 0, a * (exact(lo[0]) - exact(w[0])), a * (exact(hi[0]) + exact(w[0])))).sum()
                assert Fraction(float(found[0, r])) <= least
                assert least - Fraction(float(found[0, r])) < Fraction(size) / 10**12


def test_merging_rows_pays_for_its_rounding() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(1, 8))
    first, second = rng.normal(size=(1, ROWS, 8)), rng.normal(size=(1, ROWS, 8)) * 0.3
    known = Known([Interval(x, x)], [0.0], {})
    pending = {0: first}
    cost = _merge(pending, 0, second, known, REAL)
    for r in range(ROWS):
        gap = ((exact(first[0, r]) + exact(second[0, r]) - exact(pending[0][0, r])) * exact(x[0])).sum()
        assert abs(gap) <= Fraction(float(cost[0, r])) < Fraction(1, 10**13)


def test_an_execution_error_lowers_every_bound() -> None:
    rng = np.random.default_rng(5)
    x, y = (Interval.exactly(rng.normal(size=(1, 4))) for _ in range(2))
    cases: list[tuple[ops.Operation, list[Interval]]] = [
        (ops.Affine(rng.normal(size=(4, 4)), np.zeros(4)), [x]),
        (ops.Scale(np.ones(4), np.zeros(4)), [x]),
        (ops.Add(), [x, y]),
        (ops.Multiply(), [x, y]),
        (ops.Gelu(), [x]),
        (ops.Square(), [x]),
        (ops.Softmax(np.ones(4)), [x]),
    ]
    rows = rng.normal(size=(1, ROWS, 4))
    for operation, xs in cases:
        relaxed = operation.relax(xs, REAL)
        error = np.abs(rng.normal(size=(1, 4)))
        exactly, executed = (operation.backward(rows, xs, relaxed, e, REAL)[1] for e in (np.zeros((1, 4)), error))
        assert np.allclose(exactly - executed, (np.abs(rows) * error[:, None]).sum(-1), rtol=1e-12)
        units = np.arange(4)
        plain, erring = (operation.select(units, np.ones(4), xs, relaxed, e, REAL)[1] for e in (0.0, error))
        assert np.allclose(plain - erring, error, rtol=1e-12)


def float32_sum(terms: np.ndarray) -> float:
    return float(np.add.accumulate(terms.astype(np.float32))[-1])


def test_execution_errors_cover_the_worst_order() -> None:
    """All orders of a short sum of one large and many half-unit terms, where the error is as large as it gets."""
    half = 2.0**-24
    weight = np.array([[1.0, half, half, half, half]])
    operation = ops.Affine(weight, np.zeros(1))
    x = Interval.exactly(np.ones((1, 5)))
    error = operation.error([x], operation.interval([x], REAL))
    sums = [float32_sum(np.array(order)) for order in itertools.permutations(weight[0])]
    worst = max(abs(s - (1 + 4 * half)) for s in sums)
    assert worst == 4 * half
    assert worst <= float(np.max(error)) < 2 * worst


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e10])
def test_execution_errors_cover_float32_products_and_sums(size: float) -> None:
    rng = np.random.default_rng(6)
    x, y = (rng.normal(size=(1, 500)).astype(np.float32) * np.float32(size) for _ in range(2))
    xs = [Interval.exactly(v.astype(np.float64)) for v in (x, y)]
    with np.errstate(under="ignore"):
        cases: list[tuple[ops.Operation, np.ndarray]] = [(ops.Multiply(), x * y), (ops.Add(), x + y), (ops.Square(), x * x)]
    for operation, executed in cases:
        inputs = xs[: 1 if isinstance(operation, ops.Square) else 2]
        value = operation.interval(inputs, REAL)
        error = np.asarray(operation.error(inputs, value))
        gap = np.maximum(value.lo - executed, executed - value.hi)
        assert np.all(gap <= error)
        assert np.any(gap > 0)
        assert np.all(error <= 2.0**-23 * value.magnitude() + 2.0**-124 * (1 + 10 * size))


def test_a_root_alone_has_no_execution_model() -> None:
    operation = ops.InverseRoot()
    with pytest.raises(AssayError, match="use rms_norm"):
        operation.error([Interval.exactly(np.ones((1, 1)))], Interval.exactly(np.ones((1, 1))))
