"""Numbers of every precision and layout are bounded as what they are: exactly, outward, or not at
all.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from assay.bounds import Graph, Interval, ball, bound, linear_lower, numbers, rounding
from assay.bounds.exact import dyadic
from assay.bounds.propagate import METHODS
from assay.errors import AssayError, InputError

# How the same small integers and halves arrive.
PRECISIONS: dict[str, Callable[[np.ndarray], Any]] = {
    **{
        name: lambda x, name=name: x.astype(name)
        for name in (
            *("float64", "float32", "float16", "longdouble", ">f4", ">f8"),
            *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        )
    },
    "bool": lambda x: x != 0,
    "list": lambda x: x.tolist(),
    "a matrix": lambda x: x.view(np.matrix),
    "fractions": lambda x: np.array([[Fraction(v) for v in row] for row in x.tolist()]),
    "python integers": lambda x: np.array(x.astype(int).tolist(), object),
    **{
        str(dtype): lambda x, dtype=dtype: torch.tensor(x).to(dtype)
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
            *(torch.int8, torch.int64, torch.uint8, torch.bool),
        )
    },
    "float8": lambda x: torch.tensor(x).to(torch.float8_e4m3fn),
    "negated view": lambda x: torch.imag(torch.conj(torch.complex(torch.zeros(1, 1), -Tensor(x)))),
}


def values_of(x: Any) -> list[list[Fraction]]:
    """The entries of what a precision made, as exact fractions."""
    plain = x.double().numpy() if isinstance(x, Tensor) else np.asarray(x)
    return [[exact(v) for v in row] for row in plain.tolist()]


def exact(value: Any) -> Fraction:
    """One number as a fraction, long doubles included."""
    if isinstance(value, np.floating):
        return Fraction(*value.as_integer_ratio())
    return Fraction(value)


def dense(weight: Any) -> Graph:
    graph = Graph()
    graph.linear(graph.relu(graph.linear(graph.input(3), weight)), np.full((1, 4), 0.1))
    return graph


def exact_dense(weight: list[list[Fraction]], x: list[Fraction]) -> Fraction:
    hidden = [sum((w * v for w, v in zip(row, x, strict=True)), Fraction(0)) for row in weight]
    return sum((max(h, Fraction(0)) * Fraction(0.1) for h in hidden), Fraction(0))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_boxes_of_every_precision_contain_exact_values(precision: str, method: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3)) / 3
    for _ in range(60):
        lo = rng.integers(0, 40, (1, 3)).astype(float)
        hi = lo + rng.integers(0, 40, (1, 3))
        low, high = (PRECISIONS[precision](end) for end in (lo, hi))
        found = bound(dense(weight), Interval(low, high), method=method)
        (below,), (above,) = values_of(low), values_of(high)
        rows = [[Fraction(float(w)) for w in row] for row in weight]
        for corner in (below, above, [(a + b) / 2 for a, b in zip(below, above, strict=True)]):
            value = exact_dense(rows, corner)
            assert Fraction(float(found.lower.item())) <= value
            assert value <= Fraction(float(found.upper.item()))


FIRST: dict[str, tuple[Callable[[Graph, int, int], int], Callable[[Tensor, Tensor], Tensor]]] = {
    "add": (lambda g, x, y: g.add(x, y), lambda x, y: x + y),
    "subtract": (lambda g, x, y: g.subtract(x, y), lambda x, y: x - y),
    "multiply": (lambda g, x, y: g.multiply(x, y), lambda x, y: x * y),
    "matmul": (lambda g, x, y: g.matmul(x, y), lambda x, y: x @ y),
    "scale": (lambda g, x, y: g.scale(x, 3.0, 0.1), lambda x, y: 3 * x + 0.1),
    "linear": (
        lambda g, x, y: g.linear(x, np.full((2, 9), 0.1)),
        lambda x, y: 0.1 * x @ torch.ones(9, 2).double(),
    ),
    "relu": (lambda g, x, y: g.relu(g.subtract(x, y)), lambda x, y: (x - y).clamp(0)),
    "gelu": (lambda g, x, y: g.gelu(x), lambda x, y: torch.nn.functional.gelu(x)),
    "softmax": (lambda g, x, y: g.softmax(x), lambda x, y: x.softmax(-1)),
    "rms norm": (
        lambda g, x, y: g.rms_norm(x, eps=1e-3),
        lambda x, y: torch.nn.functional.rms_norm(x, (9,), eps=1e-3),
    ),
    "layer norm": (
        lambda g, x, y: g.layer_norm(x),
        lambda x, y: torch.nn.functional.layer_norm(x, (9,)),
    ),
    "turn": (lambda g, x, y: g.rearrange(x, (9, 9), (1, 0)), lambda x, y: x.mT),
}


@pytest.mark.parametrize("operation", FIRST)
def test_every_operation_on_a_box_of_every_precision(operation: str) -> None:
    """The box is one point, so that nothing hides a rounding in another precision than float64."""
    build, forward = FIRST[operation]
    for precision, make in PRECISIONS.items():
        rng = np.random.default_rng(3)
        values = [rng.integers(1, 120, (9, 9)) / 7.0 for _ in range(2)]
        ends = [make(v if "float" in precision else np.round(v)) for v in values]
        held = [[[float(n) for n in row] for row in values_of(end)] for end in ends]
        graph = Graph()
        build(graph, graph.input(9, 9), graph.input(9, 9))
        boxes = [Interval(end, end) for end in ends]
        boxes = [Interval(b.lo.reshape(1, 9, 9), b.hi.reshape(1, 9, 9)) for b in boxes]
        value = forward(*[torch.tensor(p, dtype=torch.float64) for p in held]).numpy().ravel()
        room = 1e-13 * (1 + np.abs(value))  # what float64 itself may lose in the oracle
        for method in METHODS:
            found = bound(graph, boxes, method=method)
            lower, upper = found.lower.ravel(), found.upper.ravel()
            assert np.all(lower <= value + room), precision
            assert np.all(value - room <= upper), precision
            assert np.all(upper - lower < 1e-9 * (1 + np.abs(value))), precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_centres_and_objectives_of_every_precision_are_exact(precision: str) -> None:
    rng = np.random.default_rng(1)
    weight, x = rng.integers(0, 9, (4, 3)).astype(float), rng.integers(0, 9, (1, 3)).astype(float)
    made = PRECISIONS[precision](weight), PRECISIONS[precision](x)
    found = bound(
        dense(made[0]), ball(made[1], 0.0), objective=PRECISIONS[precision](np.full((1, 1), 1.0))
    )
    value = exact_dense(values_of(made[0]), values_of(made[1])[0])
    assert Fraction(float(found.lower.item())) <= value <= Fraction(float(found.upper.item()))
    assert found.width.item() < 1e-12


@pytest.mark.parametrize("precision", PRECISIONS)
def test_operators_of_every_precision_contain_exact_results(precision: str) -> None:
    a, b = (PRECISIONS[precision](np.array([[v]])) for v in (7.0, 3.0))
    x, y = (values_of(v)[0][0] for v in (a, b))
    one, two = Interval(a, a), Interval(b, b)
    for found, true in ((one + two, x + y), (one - two, x - y), (one * two, x * y), (-one, -x)):
        assert Fraction(float(found.lo.item())) <= true <= Fraction(float(found.hi.item()))
    quotient, power = one / two, Interval.exactly(a) + a
    assert Fraction(float(quotient.lo.item())) <= x / y <= Fraction(float(quotient.hi.item()))
    assert Fraction(float(power.lo.item())) <= 2 * x <= Fraction(float(power.hi.item()))
    for down, up, true in (
        (rounding.add_down, rounding.add_up, x + y),
        (rounding.sub_down, rounding.sub_up, x - y),
        (rounding.mul_down, rounding.mul_up, x * y),
        (rounding.div_down, rounding.div_up, x / y),
    ):
        assert Fraction(down(a, b).item()) <= true <= Fraction(up(a, b).item())


def test_small_integers_do_not_wrap_around() -> None:
    big = np.array([100], np.int8)
    assert rounding.mul_up(big, big).item() >= 10_000
    assert (Interval(big, big) * big).lo.item() > 9_999
    assert (-Interval(np.array([-128], np.int8), np.array([-128], np.int8))).hi.item() == 128
    assert (Interval(np.array([True]), np.array([True])) + np.array([True])).hi.item() >= 2


INEXACT: dict[str, Any] = {
    "a large integer": np.array([[2**53 + 1]]),
    "an unsigned integer": np.array([[2**63 + 1]], np.uint64),
    "a tensor of integers": torch.tensor([[2**53 + 1]]),
    "a fraction": np.array([[Fraction(1, 3)]]),
    "a long double": np.array([[1]], np.longdouble) / 3,
    "a huge integer": np.array([[10**400]], object),
}


@pytest.mark.parametrize("what", INEXACT)
def test_what_float64_cannot_hold_is_refused_as_a_number_and_enclosed_as_an_end(what: str) -> None:
    value = INEXACT[what]
    if what == "a long double" and np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("long doubles are float64 here")
    graph = Graph()
    for use in (
        lambda: graph.linear(graph.input(1), value),
        lambda: graph.scale(graph.input(1), value),
        lambda: ball(value, 0.0),
        lambda: rounding.add_up(value, 1.0),
        lambda: dyadic(value),
        lambda: bound(dense(np.ones((4, 3))), ball(np.ones((1, 3)), 0.0), objective=value),
    ):
        with pytest.raises(InputError, match=r"float64 cannot hold|infinite"):
            use()
    box = Interval(value, value)
    plain = value.numpy() if isinstance(value, Tensor) else value
    value = exact(plain.flat[0] if what == "a long double" else plain.item())
    assert Fraction(float(box.lo.item())) < value
    assert np.isinf(box.hi.item()) or value < Fraction(float(box.hi.item()))
    assert box.lo.dtype == box.hi.dtype == np.float64


@pytest.mark.parametrize("radius", [Fraction(1, 3), np.longdouble(1) / 3, np.float16(0.1)])
def test_a_radius_is_rounded_up(radius: Any) -> None:
    box = ball([[0.0]], radius)
    assert Fraction(float(box.hi.item())) >= exact(radius)
    assert Fraction(float(box.lo.item())) <= -exact(radius)


NOT_REAL: dict[str, Any] = {
    "complex": np.array([[1 + 2j]]),
    "a complex tensor": torch.tensor([[1 + 2j]]),
    "text": np.array([["1.5"]]),
    "text in an object": np.array([["1.5"]], object),
    "nothing": None,
    "ragged": [[1.0], [1.0, 2.0]],
    "a masked array": np.ma.masked_array([[1.0]], [[True]]),
    "times": np.array([["2020-01-01"]], "datetime64[D]"),
    "a sparse tensor": torch.eye(1).to_sparse(),
}


@pytest.mark.parametrize("what", NOT_REAL)
def test_what_is_no_real_number_is_refused_everywhere(what: str) -> None:
    graph, value = Graph(), NOT_REAL[what]
    for use in (
        lambda: Interval(value, value),
        lambda: Interval.exactly(value),
        lambda: graph.linear(graph.input(1), value),
        lambda: graph.scale(graph.input(1), value),
        lambda: ball(value, 0.0),
        lambda: ball([[0.0]], value),
        lambda: rounding.up(value),
    ):
        with pytest.raises(InputError, match="numbers are needed"):
            use()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.longdouble, object])
def test_nan_and_infinities_of_every_precision_are_refused(bad: float, dtype: type) -> None:
    value, graph = np.array([[bad]], dtype), dense(np.ones((4, 3)))
    for use in (
        lambda: Graph().linear(Graph().input(1), value),
        lambda: ball(value, 0.0),
        lambda: ball([[0.0]], value[0]),
        lambda: bound(graph, Interval(np.repeat(value, 3, 1), np.repeat(value, 3, 1))),
        lambda: bound(graph, ball(np.ones((1, 3)), 0.0), objective=value),
    ):
        with pytest.raises(InputError):
            use()


def test_layouts_change_nothing() -> None:
    """Transposed, strided, reversed and Fortran-ordered arrays hold the same numbers."""
    rng = np.random.default_rng(2)
    weight, bias, x = rng.normal(size=(6, 4)), rng.normal(size=6), rng.normal(size=(5, 2, 4))

    def layouts(a: np.ndarray) -> list[np.ndarray]:
        wide = np.repeat(a, 2, axis=-1)
        return [
            a,
            np.asfortranarray(a),
            np.ascontiguousarray(a.T).T,
            wide[..., ::2],
            np.ascontiguousarray(a[..., ::-1])[..., ::-1],
        ]

    def bounds(weight: np.ndarray, bias: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
        graph = Graph()
        turned = graph.rearrange(graph.input(2, 4), (4, 2), (1, 0))
        back = graph.rearrange(graph.gelu(turned), (2, 4), (1, 0))
        normed = graph.rms_norm(graph.gelu(graph.linear(back, weight, bias)), eps=1e-3)
        graph.relu(graph.rearrange(normed, (6, 2), (1, 0)))
        box = ball(x, 0.3)
        boxes = [Interval(lo, hi) for lo, hi in zip(layouts(box.lo), layouts(box.hi), strict=True)]
        found = [bound(graph, b) for b in boxes]
        return [np.stack([f.lower, f.upper]) for f in found]

    first = bounds(weight, bias, x)[0]
    for W, b, y in zip(layouts(weight), layouts(bias), layouts(x), strict=True):
        for other in bounds(W, b, y):
            np.testing.assert_allclose(other, first, rtol=0, atol=1e-12)


def test_tensors_and_arrays_are_never_shared() -> None:
    """Whatever a region or a graph was made from may change afterwards."""
    weight, centre = torch.ones(2, 2).double(), torch.zeros(1, 2).double()
    as_numpy, lo = np.ones(2), np.zeros((1, 2))
    graph = Graph()
    graph.scale(graph.linear(graph.input(2), weight, as_numpy), as_numpy, as_numpy)
    region, box = ball(centre, 1.0, norm=2), ball(lo, 1.0)
    held = Interval(centre, centre)
    before = [bound(graph, r).upper for r in (region, box, held)]
    line = linear_lower(graph, box, np.eye(2))
    kept = line.constant.copy()
    for shared in (weight, centre):
        shared.mul_(7.0).add_(3.0)
    for array in (as_numpy, lo):
        array *= 5.0
        array += 2.0
    for r, old in zip((region, box, held), before, strict=True):
        np.testing.assert_array_equal(bound(graph, r).upper, old)
    np.testing.assert_array_equal(line.constant, kept)


def test_constants_cannot_be_written_to() -> None:
    value = numbers.constant("weight", np.ones(2))
    with pytest.raises(ValueError, match="read-only"):
        value[0] = 2.0


def test_an_operation_made_by_hand_is_converted_too() -> None:
    from assay.bounds.nonlinear import Softmax
    from assay.bounds.operations import Affine, Scale

    weight = np.full((1, 1), -128, np.int8)
    for operation in (
        Affine(weight, np.zeros(1, np.int8)),
        Scale(weight[0], np.zeros(1, np.int8)),
    ):
        graph = Graph()
        graph.add_node(operation, graph.input(1))
        found = bound(graph, ball([[1.0]], 1.0))
        assert found.contain([[0.0]])
        assert found.contain([[-256.0]])
    graph = Graph()
    graph.add_node(Softmax(np.array([0.5, 7.0])), graph.input(2))
    assert bound(graph, ball([[0.0, 0.0]], 0.0)).contain([[0.5, 0.5]])


def test_sizes_that_are_not_positive_are_refused() -> None:
    for shape in ((0,), (-1,), (2, 0), (1.5,)):
        with pytest.raises(InputError, match="positive sizes"):
            Graph().input(*shape)


def test_a_level_that_cannot_hold_a_weight_says_so() -> None:
    with pytest.raises(AssayError, match="not a float32"):
        bound(dense(np.full((4, 3), 0.1)), ball(np.ones((1, 3)), 0.0), level="float32")
