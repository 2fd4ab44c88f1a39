"""Every enclosure is compared with exact rational numbers, or with balls of far higher
precision.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from flint import arb, ctx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from assay.bounds import rounding
from assay.bounds.exact import dyadic, erf_interval, exact_product, exp_interval
from assay.bounds.rounding import Interval
from assay.errors import AssayError, InputError

ANY = st.floats(allow_nan=False, allow_infinity=False)  # subnormal, tiny and huge numbers included
MEDIUM = st.floats(-1e100, 1e100, allow_nan=False)


def between(lo: float, exact: Fraction, hi: float) -> bool:
    return (lo == -math.inf or Fraction(lo) <= exact) and (hi == math.inf or exact <= Fraction(hi))


@given(ANY, ANY)
@settings(max_examples=300)
def test_elementwise_operations_enclose_the_rational_result(a: float, b: float) -> None:
    x, y = Fraction(a), Fraction(b)
    assert between(float(rounding.add_down(a, b)), x + y, float(rounding.add_up(a, b)))
    assert between(float(rounding.sub_down(a, b)), x - y, float(rounding.sub_up(a, b)))
    assert between(float(rounding.mul_down(a, b)), x * y, float(rounding.mul_up(a, b)))
    if b != 0:
        assert between(float(rounding.div_down(a, b)), x / y, float(rounding.div_up(a, b)))
    root_lo, root_hi = float(rounding.sqrt_down(abs(a))), float(rounding.sqrt_up(abs(a)))
    assert Fraction(root_lo) ** 2 <= abs(x) <= Fraction(root_hi) ** 2


@given(arrays(np.float64, st.integers(0, 9), elements=ANY))
def test_sums_enclose_the_rational_sum(x: np.ndarray) -> None:
    exact = sum((Fraction(float(v)) for v in x), Fraction(0))
    assert between(float(rounding.sum_down(x)), exact, float(rounding.sum_up(x)))


def test_sums_run_along_any_axis() -> None:
    x = np.random.default_rng(0).normal(size=(3, 5, 4))
    for axis in range(3):
        assert rounding.sum_up(x, axis).shape == x.sum(axis).shape
        assert np.all(rounding.sum_down(x, axis) < rounding.sum_up(x, axis))
        assert np.allclose(rounding.sum_up(x, axis), x.sum(axis), rtol=0, atol=1e-14)


@st.composite
def intervals_and_points(draw: st.DrawFn) -> tuple[Interval, Fraction]:
    ends = sorted(
        x + 0.0 for x in draw(st.tuples(MEDIUM, MEDIUM))
    )  # no negative zero: drawing between signed zeros fails
    point = draw(st.floats(*ends))
    return Interval(np.array(ends[0]), np.array(ends[1])), Fraction(point)


@given(intervals_and_points(), intervals_and_points())
@settings(max_examples=200)
def test_interval_operators_contain_every_pair(
    first: tuple[Interval, Fraction], second: tuple[Interval, Fraction]
) -> None:
    (a, x), (b, y) = first, second
    results = [(a + b, x + y), (a - b, x - y), (a * b, x * y), (-a, -x)]
    if not b.lo <= 0 <= b.hi:
        results.append((a / b, x / y))
    for interval, exact in results:
        assert between(float(interval.lo), exact, float(interval.hi))
    assert abs(x) <= Fraction(float(a.magnitude()))
    assert abs(x - Fraction(float(a.midpoint()))) <= Fraction(float(a.radius()))


def test_division_by_an_interval_around_zero_is_refused() -> None:
    with pytest.raises(InputError, match="contains zero"):
        Interval.exactly(1.0) / Interval(np.array(-1.0), np.array(1.0))


@given(arrays(np.float64, (3, 4), elements=ANY), arrays(np.float64, (4, 2), elements=ANY))
def test_exact_products_are_exact(a: np.ndarray, b: np.ndarray) -> None:
    product = exact_product(a, b)
    box = product.interval()
    for i in range(3):
        for j in range(2):
            exact = sum(
                (Fraction(float(a[i, k])) * Fraction(float(b[k, j])) for k in range(4)), Fraction(0)
            )
            assert product.fractions()[i][j] == exact
            lo, hi = float(box.lo[i, j]), float(box.hi[i, j])
            assert between(lo, exact, hi)
            assert lo == hi or hi == math.nextafter(lo, math.inf)
    assert (dyadic(a) + a - a).fractions() == dyadic(a).fractions()
    assert dyadic(a).T.shape == (4, 3)
    assert np.array_equal(dyadic(a).interval().lo, a)
    assert np.array_equal(dyadic(a).interval().hi, a)


def test_a_product_beyond_float64_has_an_infinite_end_and_is_refused() -> None:
    box = exact_product([[1e200, -1e200]], [[1e200, 0.0], [0.0, 1e200]]).interval()
    largest = np.finfo(np.float64).max
    assert box.lo.tolist() == [[largest, -np.inf]]
    assert box.hi.tolist() == [[np.inf, -largest]]
    with pytest.raises(AssayError, match="overflow"):
        rounding.finite("the product", box)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_matrices_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="NaN or infinite"):
        exact_product([[bad]], [[1.0]])


def test_misshapen_products_are_refused() -> None:
    with pytest.raises(InputError, match="do not match"):
        exact_product(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(InputError, match="matrix is needed"):
        dyadic(np.ones((2, 2, 2)))
    with pytest.raises(InputError, match="at least one"):
        exact_product()


@given(arrays(np.float64, (2, 5), elements=ANY), arrays(np.float64, (5, 3), elements=ANY))
@settings(max_examples=200)
def test_one_float_product_with_its_error_encloses_the_exact_one(
    a: np.ndarray, b: np.ndarray
) -> None:
    box = rounding.dot_interval(a, b)
    bound = rounding.dot_up(np.abs(a), np.abs(b))
    exact, absolute = (
        exact_product(a, b).fractions(),
        exact_product(np.abs(a), np.abs(b)).fractions(),
    )
    for i in range(2):
        for j in range(3):
            lo, hi = float(box.lo[i, j]), float(box.hi[i, j])
            assert (
                math.isnan(lo) or math.isnan(hi) or between(lo, exact[i][j], hi)
            )  # NaN is refused by `finite`
            assert between(-math.inf, absolute[i][j], float(bound[i, j]))


def test_gamma_is_an_upper_bound_and_refuses_long_sums() -> None:
    for terms in (1, 7, 256, 10**6):
        exact = Fraction(terms, 2**53) / (1 - Fraction(terms, 2**53))
        assert exact <= Fraction(rounding.gamma(terms)) <= exact * (1 + Fraction(1, 2**40))
    with pytest.raises(InputError, match="too long"):
        rounding.gamma(10**6, 2.0**-24)


@given(st.floats(-800, 800), st.floats(0, 20))
def test_exponential_and_erf_enclosures_hold_high_precision_balls(lo: float, width: float) -> None:
    hi = lo + width
    exp, erf = exp_interval(lo, hi), erf_interval(lo / 100, hi / 100)
    with ctx.workprec(400):
        assert arb(float(exp.lo)) <= arb(lo).exp()
        assert math.isinf(exp.hi) or arb(hi).exp() <= arb(float(exp.hi))
        assert not arb(float(erf.lo)) > arb(lo / 100).erf()
        assert not arb(hi / 100).erf() > arb(float(erf.hi))
    assert exp.lo >= 0
    assert -1 <= erf.lo <= erf.hi <= 1


def test_exponentials_of_extreme_numbers_stay_enclosures() -> None:
    box = exp_interval([-1e300, -np.inf, 1e300, 0.0], [-1e300, 1.0, 1e300, np.inf])
    assert box.lo.tolist() == [0.0, 0.0, np.finfo(np.float64).max, 1.0]
    assert box.hi[0] == 5e-324
    assert 2.718281828 < box.hi[1] < 2.718281829
    assert np.all(np.isinf(box.hi[2:]))
    with pytest.raises(InputError, match="NaN"):
        exp_interval(np.nan, 1.0)


def test_enclosures_of_exp_are_one_step_wide() -> None:
    x = np.random.default_rng(0).normal(size=(4, 5))
    box = exp_interval(x, x)
    assert box.shape == (4, 5)
    assert np.all(np.nextafter(box.lo, np.inf) == box.hi)


def test_this_process_rounds_to_nearest() -> None:
    rounding.check_arithmetic()


def test_flushed_subnormals_are_refused() -> None:
    import torch

    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        with pytest.raises(AssayError, match="flush"):
            rounding.check_arithmetic()
    finally:
        torch.set_flush_denormal(False)
