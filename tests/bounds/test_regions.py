"""Regions that are none are refused, however they were made; those that are hold what they say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from assay.bounds import Ball, Graph, Interval, ball, bound, linear_lower
from assay.errors import AssayError, InputError


def identity(size: int = 2) -> Graph:
    graph = Graph()
    graph.linear(graph.input(size), np.eye(size))
    return graph


LOW, HIGH, MIDDLE, RADII = -np.ones((1, 2)), np.ones((1, 2)), np.zeros((1, 2)), np.ones(1)
BAD_BALLS: dict[str, tuple[Any, Any, Any, Any]] = {
    "a negative radius": (LOW, HIGH, MIDDLE, np.array([-5.0])),
    "a radius that is NaN": (LOW, HIGH, MIDDLE, np.array([np.nan])),
    "an infinite radius": (LOW, HIGH, MIDDLE, np.array([np.inf])),
    "a complex radius": (LOW, HIGH, MIDDLE, np.array([1j])),
    "no radius": (LOW, HIGH, MIDDLE, None),
    "one radius for all": (LOW, HIGH, MIDDLE, np.float64(1.0)),
    "two radii": (LOW, HIGH, MIDDLE, np.ones(2)),
    "a radius per coordinate": (LOW, HIGH, MIDDLE, np.ones((1, 2))),
    "a centre that is NaN": (LOW, HIGH, MIDDLE * np.nan, RADII),
    "a centre outside": (LOW, HIGH, MIDDLE + 2, RADII),
    "a centre of another shape": (LOW, HIGH, np.zeros((1, 3)), RADII),
    "ends that are NaN": (LOW * np.nan, HIGH, MIDDLE, RADII),
    "ends of another shape": (np.zeros((1, 3)), np.zeros((1, 3)), MIDDLE, RADII),
    "ends that would broadcast": (-np.ones(2), np.ones(2), MIDDLE[0], RADII),
}


@pytest.mark.parametrize("what", BAD_BALLS)
def test_a_ball_that_is_none_is_refused(what: str) -> None:
    with pytest.raises(InputError, match=r"radius|centre|ball"):
        Ball(*BAD_BALLS[what])


def test_a_ball_changed_after_it_was_made_is_refused() -> None:
    region = ball(MIDDLE, 1.0, norm=2)
    assert isinstance(region, Ball)
    for name, bad in (("radii", -1.0), ("radii", np.nan), ("centre", np.nan), ("centre", 9.0)):
        changed = Ball(region.lo, region.hi, region.centre.copy(), region.radii.copy())
        getattr(changed, name)[...] = bad
        with pytest.raises(InputError, match=r"radius|centre"):
            bound(identity(), changed)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("end", ["lo", "hi"])
def test_boxes_with_undefined_ends_are_refused(bad: float, end: str) -> None:
    ends = {"lo": LOW.copy(), "hi": HIGH.copy()}
    ends[end][0, 1] = bad
    for level in ("float64", "real", "float32"):
        for work in (
            lambda level=level: bound(identity(), Interval(**ends), level=level),
            lambda level=level: linear_lower(identity(), Interval(**ends), np.eye(2), level=level),
        ):
            with pytest.raises(InputError, match="NaN or infinite"):
                work()


@pytest.mark.parametrize(
    "box",
    [
        Interval(np.zeros(2), np.ones(2)),
        Interval(np.zeros((1, 2)), np.ones((2, 2))),
        Interval(np.zeros((2, 2)), np.ones((1, 2))),
        Interval(np.zeros((0, 2)), np.ones((0, 2))),
        Interval(np.zeros((1, 1)), np.ones((1, 1))),
        Interval(np.zeros((1, 2, 1)), np.ones((1, 2, 1))),
        Interval(np.float64(0.0), np.float64(1.0)),  # type: ignore[arg-type]
        np.zeros((1, 2)),
        (np.zeros((1, 2)), np.ones((1, 2))),
        None,
    ],
    ids=lambda box: type(box).__name__,
)
def test_shapes_that_would_have_to_broadcast_are_refused(box: Any) -> None:
    with pytest.raises(InputError, match="box"):
        bound(identity(), [box])


def test_two_inputs_share_the_number_of_samples() -> None:
    graph = Graph()
    graph.add(graph.input(1), graph.input(1))
    with pytest.raises(InputError, match="box"):
        bound(graph, [ball(np.zeros((2, 1)), 0.1), ball(np.zeros((1, 1)), 0.1)])


@pytest.mark.parametrize("radius", [-5.0, math.nan, math.inf, -math.inf, -1e-300])
@pytest.mark.parametrize("norm", [2, math.inf])
def test_bad_radii_are_refused_in_every_form(radius: float, norm: float) -> None:
    forms = (radius, [radius], np.float32(radius), torch.tensor([radius]), np.array([radius]))
    for form in forms:
        if float(np.asarray(form).ravel()[0]) == 0:
            continue  # 1e-300 is zero in float32
        with pytest.raises(InputError, match="radius"):
            ball(MIDDLE, form, norm=norm)


@pytest.mark.parametrize("domain", [(1.0, 0.0), (math.nan, 1.0), (0.0, math.nan), (0.0,), 3.0])
def test_bad_domains_are_refused(domain: Any) -> None:
    with pytest.raises(InputError, match="domain"):
        ball(MIDDLE, 0.1, domain)


def test_an_open_domain_is_allowed() -> None:
    box = ball(MIDDLE, 2.0, (-1.0, math.inf))
    assert box.lo.tolist() == [[-1.0, -1.0]]
    assert np.all(box.hi >= 2.0)


def test_float32_bounds_hold_for_inputs_that_are_rounded_first() -> None:
    """The network reads float32: a point between two such numbers is executed at one of them."""
    rng, graph = np.random.default_rng(0), Graph()
    graph.relu(graph.input(3))  # an operation without any rounding error of its own
    for norm in (2, math.inf):
        for radius in (0.0, 1e-9, 0.3):
            x = np.abs(rng.normal(size=(200, 3))) * 10.0 ** rng.integers(-6, 6, (200, 1)) + radius
            step = rng.normal(size=(200, 3))
            step /= np.linalg.norm(step, axis=1, keepdims=True)
            executed = (x + radius * (1 - 1e-12) * step).astype(np.float32)
            found = bound(graph, ball(x, radius, norm=norm), level="float32")
            assert found.contain(executed)
            row = np.ones((1, 3))
            along = bound(graph, ball(x, radius, norm=norm), level="float32", objective=row)
            assert along.contain(executed.astype(np.float64).sum(1, keepdims=True))
    exact = np.abs(rng.normal(size=(5, 3))).astype(np.float32)
    assert np.max(bound(graph, ball(exact, 0.0), level="float32").width) < 1e-14


def test_float32_regions_beyond_float32_are_refused() -> None:
    with pytest.raises(AssayError, match="beyond float32"):
        bound(identity(), ball([[0.0, 1e39]], 0.0), level="float32")
    with pytest.raises(AssayError, match="float32"):
        bound(identity(), ball([[0.0, 3.4e38]], 1e38), level="float32")
