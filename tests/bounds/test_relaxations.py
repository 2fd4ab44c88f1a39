"""Every relaxation holds at every real point: rational arithmetic where the function is
algebraic, 400-bit balls where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from flint import arb, ctx
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from assay.bounds import relaxations as relax
from assay.bounds.levels import arithmetic
from assay.bounds.rounding import Interval
from assay.errors import InputError

ANY = st.floats(allow_nan=False, allow_infinity=False)
REAL = arithmetic("real")


@st.composite
def box_and_point(
    draw: st.DrawFn, values: st.SearchStrategy[float] = ANY
) -> tuple[Interval, float]:
    lo, hi = sorted(
        (draw(values) + 0.0, draw(values) + 0.0)
    )  # no negative zero: drawing between signed zeros fails
    point = draw(st.one_of(st.floats(lo, hi), st.just(lo), st.just(hi)))
    return Interval(np.array([[lo]]), np.array([[hi]])), point


def lines_at(lines: relax.Lines, x: float) -> tuple[Fraction | None, Fraction | None]:
    """The exact values of both lines at x; none where an intercept is infinite on its sound
    side.
    """
    ends = []
    for slope, offset, sound in (
        (lines.below_slope, lines.below, -math.inf),
        (lines.above_slope, lines.above, math.inf),
    ):
        s, o = float(slope.item()), float(offset.item())
        assert math.isfinite(s)
        assert math.isfinite(o) or o == sound
        ends.append(Fraction(s) * Fraction(x) + Fraction(o) if math.isfinite(o) else None)
    return ends[0], ends[1]


def enclosed(ends: tuple[Fraction | None, Fraction | None], exact: Fraction) -> bool:
    return (ends[0] is None or ends[0] <= exact) and (ends[1] is None or exact <= ends[1])


@given(box_and_point())
@settings(max_examples=300)
@example((Interval(np.array([[-5e-324]]), np.array([[5e-324]])), 5e-324))
@example((Interval(np.array([[-1.7e308]]), np.array([[1.7e308]])), 1.7e308))
def test_relu_lines(case: tuple[Interval, float]) -> None:
    box, x = case
    with np.errstate(all="ignore"):
        lines = relax.relu_lines(box)
    assert enclosed(lines_at(lines, x), max(Fraction(x), Fraction(0)))


def test_relu_lines_are_the_tightest_ones() -> None:
    lines = relax.relu_lines(
        Interval(np.array([-1.0, -3.0, 1.0, -2.0]), np.array([3.0, 1.0, 2.0, -1.0]))
    )
    assert np.allclose(lines.above_slope, [0.75, 0.25, 1, 0], atol=1e-15)
    assert np.allclose(lines.above, [0.75, 0.75, 0, 0], atol=1e-15)
    assert lines.below_slope.tolist() == [1, 0, 1, 0]
    assert lines.below.tolist() == [0, 0, 0, 0]


@given(box_and_point(st.floats(-1e150, 1e150)))
@settings(max_examples=300)
def test_square_lines(case: tuple[Interval, float]) -> None:
    box, x = case
    assert enclosed(lines_at(relax.square_lines(box), x), Fraction(x) ** 2)


@given(
    box_and_point(st.floats(0, 1e150)), st.integers(1, 50), st.sampled_from([0.0, 1e-30, 1e-5, 3.0])
)
@settings(max_examples=300)
def test_inverse_root_lines(case: tuple[Interval, float], width: int, eps: float) -> None:
    box, x = case
    assume(box.lo.item() > 1e-100 or eps > 0)
    lines = relax.inverse_root_lines(
        box, Interval.exactly(1.0) / float(width), Interval.exactly(eps)
    )
    below, above = lines_at(lines, x)
    inside = Fraction(x) / width + Fraction(eps)
    assert below is None or below <= 0 or below**2 * inside <= 1
    assert above is None or (above > 0 and above**2 * inside >= 1)


def test_a_root_that_may_vanish_is_refused() -> None:
    with pytest.raises(InputError, match="norm may be zero"):
        relax.inverse_root_lines(
            Interval(np.zeros(1), np.ones(1)), Interval.exactly(1.0), Interval.exactly(0.0)
        )


@given(
    box_and_point(st.floats(-1e100, 1e100)), box_and_point(st.floats(-1e100, 1e100)), st.booleans()
)
@settings(max_examples=300)
def test_product_rest(
    first: tuple[Interval, float], second: tuple[Interval, float], tight: bool
) -> None:
    (a, x), (b, y) = first, second
    plus, minus = a + b, a - b
    if tight:  # the tightest correct knowledge about the sum and the difference of this point
        plus, minus = Interval.exactly(np.array([[x]])) + y, Interval.exactly(np.array([[x]])) - y
    m_x, m_y, rest = relax.product_rest(a, b, plus, minus)
    left = (
        Fraction(x) * Fraction(y)
        - Fraction(m_y.item()) * Fraction(x)
        - Fraction(m_x.item()) * Fraction(y)
    )
    assert Fraction(rest.lo.item()) <= left <= Fraction(rest.hi.item())


def test_knowing_the_sum_and_the_difference_halves_the_product() -> None:
    one, root = Interval(-np.ones(1), np.ones(1)), Interval(-np.full(1, 2**0.5), np.full(1, 2**0.5))
    alone = relax.product_rest(one, one, one + one, one - one)[2]
    known = relax.product_rest(one, one, root, root)[2]
    assert np.isclose(known.hi - known.lo, 0.5 * (alone.hi - alone.lo), rtol=1e-12)


def ball_gelu(x: float) -> arb:
    return arb(x) * (-arb(x) / arb(2).sqrt()).erfc() / 2


@given(
    box_and_point(
        st.one_of(
            st.floats(-8, 8), st.floats(-1.5, 1.5), st.floats(-60, 60), st.floats(-1e100, 1e100)
        )
    )
)
@settings(max_examples=300, deadline=None)
@example((Interval(np.array([[-1.0]]), np.array([[-0.5]])), -0.7517915))
@example((Interval(np.array([[-1.5]]), np.array([[-1.41]])), -(2.0**0.5)))
@example((Interval(np.array([[2.0**0.5]]), np.array([[9.0]])), 2.0))
def test_gelu_and_its_lines(case: tuple[Interval, float]) -> None:
    box, x = case
    lines, whole = relax.gelu_lines(box, REAL), relax.gelu(box, REAL)
    below, above = lines_at(lines, x)
    assert below is not None
    assert above is not None
    with ctx.workprec(4000):
        value = ball_gelu(x)
        assert not arb(float(whole.lo.item())) > value
        assert not arb(float(whole.hi.item())) < value
        for end, wrong in ((below, lambda line: line > value), (above, lambda line: line < value)):
            line = arb(end.numerator) / arb(end.denominator)
            assert not wrong(line)


def test_gelu_turns_where_stated() -> None:
    with ctx.workprec(128):

        def slope(x: float) -> arb:
            b = arb(x)
            return (-b / arb(2).sqrt()).erfc() / 2 + b * (-b * b / 2).exp() / (2 * arb.pi()).sqrt()

        lo, hi = relax.GELU_TURNS
        assert slope(lo) < 0
        assert slope(hi) > 0
        # The least value is at most the slope times the gap below the value at either side.
        assert arb(relax.GELU_LEAST) < ball_gelu(lo) - abs(slope(lo)) * (hi - lo)


@pytest.mark.parametrize("ends", [(-0.5, 0.6), (1.5, 4.0), (-4.0, -1.5), (-3.0, 3.0), (0.1, 0.11)])
def test_gelu_lines_touch_the_curve(ends: tuple[float, float]) -> None:
    box = Interval(np.array([ends[0]]), np.array([ends[1]]))
    lines = relax.gelu_lines(box, arithmetic("float64"))
    x = np.linspace(*ends, 20001)
    with np.errstate(all="ignore"):
        values = np.asarray(relax._gelu(x, arithmetic("float64")).lo)
    below, above = (
        values - lines.below_slope * x - lines.below,
        lines.above_slope * x + lines.above - values,
    )
    assert -1e-12 < below.min() < 1e-6
    assert -1e-12 < above.min() < 1e-6


def exact_softmax(x: list[float], mask: np.ndarray) -> list[arb]:
    e = [arb(v).exp() if m else arb(0) for v, m in zip(x, mask, strict=True)]
    total = sum(e, arb(0))
    return [v / total for v in e]


@given(st.integers(2, 5), st.data(), st.sampled_from([1e-6, 0.01, 0.3, 2.0, 30.0, 2000.0]))
@settings(max_examples=150, deadline=None)
def test_softmax_and_its_linear_part(n: int, data: st.DataObject, radius: float) -> None:
    centre = np.array([data.draw(st.lists(st.floats(-20, 20), min_size=n, max_size=n))])
    mask = np.ones((1, n))
    if data.draw(st.booleans()):
        mask[0, -1] = 0
    radii = radius * np.array([data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))])
    box = Interval(centre - radii, centre + radii)
    share = np.array(
        [data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=n, max_size=n))]
    )
    x = np.clip(box.lo + share * (box.hi - box.lo), box.lo, box.hi)[0].tolist()
    whole = relax.softmax(box, mask, REAL)
    p, kept, rest = relax.softmax_rest(box, mask, REAL)
    with ctx.workprec(400):
        exact = exact_softmax(x, mask[0])
        mean = sum((arb(float(p[0, j])) * arb(x[j]) for j in range(n)), arb(0))
        for i in range(n):
            left = exact[i] - arb(float(kept[0, i])) * arb(float(p[0, i])) * (arb(x[i]) - mean)
            for value, part in ((exact[i], whole), (left, rest)):
                assert not arb(float(part.lo[0, i])) > value
                assert not arb(float(part.hi[0, i])) < value
    assert np.all(whole.lo >= 0)
    assert np.all(whole.hi <= 1)


def test_the_linear_part_of_softmax_is_second_order() -> None:
    centre = np.random.default_rng(0).normal(size=(1, 6))
    widths: Callable[[float], float] = lambda r: float(  # noqa: E731
        np.diff(
            [
                getattr(
                    relax.softmax_rest(Interval(centre - r, centre + r), np.ones((1, 6)), REAL)[2],
                    e,
                ).sum()
                for e in ("lo", "hi")
            ]
        )[0]
    )
    assert widths(1e-3) < 1e-5
    assert 90 < widths(1e-2) / widths(1e-3) < 110


def test_masked_entries_carry_nothing() -> None:
    box = Interval(np.full((1, 3), -1.0), np.full((1, 3), 1.0))
    mask = np.array([[1.0, 1.0, 0.0]])
    whole = relax.softmax(box, mask, REAL)
    p, kept, rest = relax.softmax_rest(box, mask, REAL)
    assert whole.lo[0, 2] == whole.hi[0, 2] == 0
    assert (p * kept)[0, 2] == 0
    assert abs(rest.lo[0, 2]) < 1e-300
    assert abs(rest.hi[0, 2]) < 1e-300
