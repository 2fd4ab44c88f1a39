"""One backward step of each operation is valid in exact arithmetic: tested on points, where no
width hides a rounding error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from flint import arb, ctx

from assay.bounds import Graph, bound, nonlinear, relaxations
from assay.bounds import operations as ops
from assay.bounds.engine import Known, _merge
from assay.bounds.levels import arithmetic
from assay.bounds.propagate import METHODS
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
    return nonlinear.Square(), exact(x) * exact(x)


def relu(x: np.ndarray, rng: np.random.Generator) -> tuple[ops.Operation, np.ndarray]:
    return nonlinear.Relu(), np.maximum(exact(x), Fraction(0))


def multiply(x: np.ndarray, y: np.ndarray) -> tuple[ops.Operation, np.ndarray]:
    return nonlinear.Multiply(), exact(x) * exact(y)


def rescale(x: np.ndarray, y: np.ndarray) -> tuple[ops.Operation, np.ndarray]:
    return nonlinear.Multiply(), exact(x) * exact(y[..., :1])


def matmul(x: np.ndarray, y: np.ndarray) -> tuple[ops.Operation, np.ndarray]:
    return nonlinear.MatMul(), exact(x) @ exact(np.swapaxes(y, -1, -2))


def add(x: np.ndarray, y: np.ndarray) -> tuple[ops.Operation, np.ndarray]:
    return ops.Add(-1.0), exact(x) - exact(y)


def check_step(
    operation: ops.Operation, value: np.ndarray, xs: list[np.ndarray], rows: np.ndarray
) -> None:
    """Assert `rows . value >= sum rows_p . x_p + c` exactly, and that it is tight up to
    rounding.
    """
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
def test_a_step_through_one_input(
    build: Callable[..., tuple[ops.Operation, np.ndarray]], size: float
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=7) * size
    operation, value = build(x, rng)
    rows = rng.normal(size=(1, ROWS, *value.shape)) * min(1.0, size)
    check_step(operation, value, [x], rows)


@pytest.mark.parametrize("size", SCALES)
@pytest.mark.parametrize("build", [multiply, rescale, matmul, add])
def test_a_step_through_two_inputs(
    build: Callable[..., tuple[ops.Operation, np.ndarray]], size: float
) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(3, 7)) * size, rng.normal(size=(3, 7)) * size
    operation, value = build(x, y)
    second = {rescale: y[..., :1], matmul: y.T}.get(build, y)
    rows = rng.normal(size=(1, ROWS, *value.shape)) * min(1.0, size)
    check_step(operation, value, [x, second], rows)


def test_a_step_through_softmax() -> None:
    rng = np.random.default_rng(2)
    x, rows = rng.normal(size=6), rng.normal(size=(1, ROWS, 6))
    operation = nonlinear.Softmax(np.ones(6))
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
            left = sum(
                (arb(float(a)) * v / total for a, v in zip(rows[0, r], e, strict=True)), arb(0)
            )
            right = sum(
                (arb(float(a)) * arb(float(v)) for a, v in zip(part[0, r], x, strict=True)),
                arb(float(constant[0, r])),
            )
            assert right <= left
            assert left - right < 1e-13


def test_every_linear_form_is_a_lower_bound_over_its_box() -> None:
    rng = np.random.default_rng(3)
    for size in SCALES:
        rows, lo = rng.normal(size=(1, ROWS, 9)), rng.normal(size=(1, 9)) * size
        hi = (
            lo
            + np.abs(rng.normal(size=(1, 9)))
            * size
            * np.array([0.0, 1.0, 1e-9])[rng.integers(0, 3, (1, 9))]
        )
        wobble = np.abs(rng.normal(size=(1, 9))) * size * 1e-3
        for w in (0.0 * wobble, wobble):
            found = REAL.lower(rows, lo, hi, w)
            for r in range(ROWS):
                a = exact(rows[0, r])
                least = (
                    np.where(
                        a > 0, a * (exact(lo[0]) - exact(w[0])), a * (exact(hi[0]) + exact(w[0]))
                    )
                ).sum()
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
        gap = (
            (exact(first[0, r]) + exact(second[0, r]) - exact(pending[0][0, r])) * exact(x[0])
        ).sum()
        assert abs(gap) <= Fraction(float(cost[0, r])) < Fraction(1, 10**13)


def test_an_execution_error_lowers_every_bound() -> None:
    rng = np.random.default_rng(5)
    x, y = (Interval.exactly(rng.normal(size=(1, 4))) for _ in range(2))
    cases: list[tuple[ops.Operation, list[Interval]]] = [
        (ops.Affine(rng.normal(size=(4, 4)), np.zeros(4)), [x]),
        (ops.Scale(np.ones(4), np.zeros(4)), [x]),
        (ops.Add(), [x, y]),
        (nonlinear.Multiply(), [x, y]),
        (nonlinear.Gelu(), [x]),
        (nonlinear.Square(), [x]),
        (nonlinear.Softmax(np.ones(4)), [x]),
    ]
    rows = rng.normal(size=(1, ROWS, 4))
    for operation, xs in cases:
        relaxed = operation.relax(xs, REAL)
        error = np.abs(rng.normal(size=(1, 4)))
        exactly, executed = (
            operation.backward(rows, xs, relaxed, e, REAL)[1] for e in (np.zeros((1, 4)), error)
        )
        assert np.allclose(exactly - executed, (np.abs(rows) * error[:, None]).sum(-1), rtol=1e-12)
        units = np.arange(4)
        plain, erring = (
            operation.select(units, np.ones(4), xs, relaxed, e, REAL)[1] for e in (0.0, error)
        )
        assert np.allclose(plain - erring, error, rtol=1e-12)


def float32_sum(terms: np.ndarray) -> float:
    return float(np.add.accumulate(terms.astype(np.float32))[-1])


def test_execution_errors_cover_the_worst_order() -> None:
    """All orders of a short sum of one large and many half-unit terms, where the error is as
    large as it gets.
    """
    half = 2.0**-24
    weight = np.array([[1.0, half, half, half, half]])
    operation = ops.Affine(weight, np.zeros(1))
    x = Interval.exactly(np.ones((1, 5)))
    error = operation.error([x], operation.interval([x], REAL))
    sums = [float32_sum(np.array(order)) for order in itertools.permutations(weight[0])]
    worst = max(abs(s - (1 + 4 * half)) for s in sums)
    assert worst == 4 * half
    assert worst <= float(np.max(error)) < 2 * worst


def test_a_bias_is_added_outward() -> None:
    """A product of 2^-60 is lost beside a bias of one; both ends must still differ from it."""
    for sign in (1.0, -1.0):
        operation = ops.Affine(np.array([[2.0**-60]]), np.array([sign]))
        for x in (1.0, -1.0):
            found = operation.interval([Interval.exactly(np.array([[x]]))], REAL)
            exact_value = Fraction(sign) + Fraction(x) * Fraction(2.0**-60)
            assert Fraction(found.lo.item()) <= exact_value <= Fraction(found.hi.item())
            graph = Graph()
            graph.add_node(operation, graph.input(1))
            for method in METHODS:
                whole = bound(graph, Interval.exactly([[x]]), method=method)
                assert Fraction(whole.lower.item()) <= exact_value <= Fraction(whole.upper.item())
                row = bound(graph, Interval.exactly([[x]]), method=method, objective=[[1.0]])
                assert Fraction(row.lower.item()) <= exact_value <= Fraction(row.upper.item())


def nearly_half(step: int) -> float:
    """A factor near one whose product with `1 + step 2^-23` is nearly half a unit off a float32."""
    for other in range(1, 4000):
        if Fraction(97, 100) < Fraction(step * other, 2**46) % Fraction(1, 2**23) * 2**24 < 1:
            return 1 + other * 2.0**-23
    raise AssertionError("no such factor")


@pytest.mark.parametrize("kind", ["affine", "scale", "multiply", "add", "subtract", "square"])
def test_every_rounding_in_float32_is_allowed_for(kind: str) -> None:
    """A product and a sum that are each off by nearly half a unit, in the same direction."""
    step, unit = 1409, 2.0**-24
    x, y, bias = 1 + step * 2.0**-23, nearly_half(step), 0.99 * unit
    narrow = np.float32
    bias = float(narrow(bias))
    one, two = (Interval.exactly(np.array([[v]])) for v in (x, y))
    operation, xs, run, true, least = {
        "affine": (
            ops.Affine(np.array([[y]]), np.array([bias])),
            [one],
            narrow(x) * narrow(y) + narrow(bias),
            Fraction(x) * Fraction(y) + Fraction(bias),
            1.9,
        ),
        "scale": (
            ops.Scale(np.array([y]), np.array([bias])),
            [one],
            narrow(x) * narrow(y) + narrow(bias),
            Fraction(x) * Fraction(y) + Fraction(bias),
            1.9,
        ),
        "multiply": (
            nonlinear.Multiply(),
            [one, two],
            narrow(x) * narrow(y),
            Fraction(x) * Fraction(y),
            0.95,
        ),
        "add": (
            ops.Add(),
            [one, Interval.exactly(np.array([[bias]]))],
            narrow(x) + narrow(bias),
            Fraction(x) + Fraction(bias),
            0.95,
        ),
        "subtract": (
            ops.Add(-1.0),
            [one, Interval.exactly(np.array([[-bias]]))],
            narrow(x) - narrow(-bias),
            Fraction(x) + Fraction(bias),
            0.95,
        ),
        "square": (
            nonlinear.Square(),
            [Interval.exactly(np.array([[1 + 2018 * 2.0**-23]]))],
            narrow(1 + 2018 * 2.0**-23) * narrow(1 + 2018 * 2.0**-23),
            Fraction(1 + 2018 * 2.0**-23) ** 2,
            0.9,
        ),
    }[kind]
    value = operation.interval(xs, REAL)
    error = float(np.max(operation.error(xs, value)))
    off = float(abs(Fraction(float(run)) - true))
    assert off > least * unit
    assert off <= error < 2 * off
    graph = Graph()
    inputs = [graph.input(1) for _ in xs]
    graph.add_node(operation, *inputs)
    for method in METHODS:
        assert bound(graph, xs, method=method, level="float32").contain([[float(run)]])


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e10])
@pytest.mark.parametrize("kind", ["multiply", "add", "square", "matmul", "gelu", "softmax"])
def test_execution_errors_cover_float32(kind: str, size: float) -> None:
    x, y = (
        torch.randn(1, 40, 40, generator=torch.Generator().manual_seed(i)) * size for i in (6, 7)
    )
    xs = [Interval.exactly(v.double().numpy()) for v in (x, y)]
    two = kind in ("multiply", "add", "matmul")
    operation, executed = {
        "multiply": (nonlinear.Multiply(), lambda: x * y),
        "add": (ops.Add(), lambda: x + y),
        "square": (nonlinear.Square(), lambda: x * x),
        "matmul": (nonlinear.MatMul(), lambda: x @ y),
        "gelu": (nonlinear.Gelu(), lambda: torch.nn.functional.gelu(x)),
        "softmax": (nonlinear.Softmax(np.ones(40)), lambda: x.softmax(-1)),
    }[kind]
    inputs = xs if two else xs[:1]
    value, result = operation.interval(inputs, REAL), executed().double().numpy()
    error = np.asarray(operation.error(inputs, value))
    gap = np.maximum(value.lo - result, result - value.hi)
    assert np.all(gap <= error)
    assert np.any(gap > 0) or (
        kind in ("softmax", "gelu") and size != 1.0
    )  # one-hot, x / 2 and max(x, 0) are exact


def test_a_root_alone_has_no_execution_model() -> None:
    operation = nonlinear.InverseRoot()
    with pytest.raises(AssayError, match="use rms_norm"):
        operation.error([Interval.exactly(np.ones((1, 1)))], Interval.exactly(np.ones((1, 1))))


def test_long_sums_pay_for_the_terms_that_rounding_loses() -> None:
    """One large term swallows thousands of half-unit ones in every accumulator that holds it."""
    terms = 4096
    lo = np.full((1, terms), -0.49 * 2.0**-52)
    for place in (0, 1, terms // 2, terms - 1):
        row = lo.copy()
        row[0, place] = -1.0
        found = REAL.lower(np.ones((1, 1, terms)), row, np.zeros((1, terms)))
        assert Fraction(float(found[0, 0])) <= exact(row[0]).sum()


@pytest.mark.parametrize("kind", ["affine", "scale", "multiply", "matmul", "relu"])
def test_underflowing_coefficients_are_paid_for(kind: str) -> None:
    """Coefficients lose all their digits below 1e-320, and meet numbers of 1e150."""
    rng = np.random.default_rng(7)
    tiny, x = rng.normal(size=(4, 4)) * 1e-161, Interval.exactly(rng.normal(size=(1, 4, 4)) * 1e150)
    y = Interval.exactly(tiny[None])
    operation, xs, value = {
        "affine": (ops.Affine(tiny, np.zeros(4)), [x], exact(x.lo[0]) @ exact(tiny).T),
        "scale": (ops.Scale(tiny, np.zeros(())), [x], exact(x.lo[0]) * exact(tiny)),
        "multiply": (nonlinear.Multiply(), [x, y], exact(x.lo[0]) * exact(tiny)),
        "matmul": (nonlinear.MatMul(), [x, y], exact(x.lo[0]) @ exact(tiny)),
        "relu": (nonlinear.Relu(), [x], np.maximum(exact(x.lo[0]), Fraction(0))),
    }[kind]
    rows = rng.normal(size=(1, ROWS, 4, 4)) * 1e-161
    relaxed = operation.relax(xs, REAL)
    if kind == "relu":  # any slope is allowed at a point: one that makes the coefficient underflow
        slope = np.full((1, 4, 4), 1e-161)
        offset = operation.interval(xs, REAL) - Interval.exactly(slope) * x
        relaxed = type(relaxed)(slope, offset.lo, slope, offset.hi)
    parts, constant = operation.backward(rows, xs, relaxed, 0.0, REAL)
    for r in range(ROWS):
        right = Fraction(float(constant[0, r]))
        for part, box in zip(parts, xs, strict=True):
            right += (exact(np.asarray(part)[0, r]) * exact(box.lo[0])).sum()
        assert right <= (exact(rows[0, r]) * value).sum()


def test_every_underflowing_product_is_paid_for() -> None:
    terms = 4096
    found = REAL.lower(
        np.full((1, 1, terms), 1e-162), np.full((1, terms), -2e-162), np.zeros((1, terms))
    )
    assert Fraction(float(found[0, 0])) <= terms * Fraction(1e-162) * Fraction(-2e-162)


@pytest.mark.parametrize(
    "kind", ["affine", "scale", "multiply", "matmul", "elementwise", "softmax"]
)
def test_a_rounded_coefficient_is_paid_for_over_the_whole_box(kind: str) -> None:
    """On a box around zero through a map that is linear in x, the constant must cover the sum of
    |coefficient error| radius.
    """
    rng = np.random.default_rng(8)
    weight, radius, rows = (
        rng.normal(size=(5, 5)),
        np.abs(rng.normal(size=(1, 5, 5))) + 0.5,
        rng.normal(size=(1, ROWS, 5, 5)),
    )
    x, y, zero = (
        Interval(-radius, radius),
        Interval.exactly(weight[None]),
        Interval.exactly(np.zeros((1, 5, 5))),
    )
    share = np.abs(weight)[None] / np.abs(weight).sum(-1)
    operation, xs, relaxed = {
        "affine": (ops.Affine(weight, np.zeros(5)), [x], None),
        "scale": (ops.Scale(weight, np.zeros(())), [x], None),
        "multiply": (nonlinear.Multiply(), [x, y], (np.zeros((1, 5, 5)), weight[None], zero)),
        "matmul": (nonlinear.MatMul(), [x, y], None),
        "elementwise": (
            nonlinear.Gelu(),
            [x],
            relaxations.Lines(weight[None], zero.lo, weight[None], zero.hi),
        ),
        "softmax": (nonlinear.Softmax(np.ones(5)), [x], (share, np.ones((1, 5, 5)), zero)),
    }[kind]
    relaxed = operation.relax(xs, REAL) if relaxed is None else relaxed
    parts, constant = operation.backward(rows, xs, relaxed, 0.0, REAL)
    W, p = exact(weight), exact(share[0])
    for r in range(ROWS):
        a = exact(rows[0, r])
        right = {
            "affine": lambda: a @ W,
            "matmul": lambda: a @ W.T,
            "softmax": lambda: p * (a - (a * p).sum(-1)[:, None]),
        }.get(kind, lambda: a * W)()
        lost = (abs(right - exact(np.asarray(parts[0])[0, r])) * exact(radius[0])).sum()
        assert 0 < lost <= -Fraction(float(constant[0, r])) < Fraction(1, 10**12)
