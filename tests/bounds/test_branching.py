"""The search for tight bounds: its twin in torch, any slope sound, splits, and anytime bounds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from assay.bounds.rounding import Interval
from assay.bounds.search.branch import least
from assay.bounds.search.goal import goal_of
from assay.bounds.search.leaves import Budget, Leaf, halves
from assay.bounds.search.pins import Split
from assay.bounds.search.plain import bound_plainly
from assay.bounds.search.sweep import bound_rows, sweep
from assay.bounds.search.twin import State, Twin
from assay.bounds.trace import Traced, trace
from assay.errors import InputError


@cache
def weights(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def relu(g: Tensor) -> Tensor:
    x = torch.relu((g * weights(0, 6)) @ weights(1, 6, 8) - 0.2)
    return (torch.relu(x @ weights(2, 8, 8)) @ weights(3, 8, 1))[:, 0]


def bilinear(g: Tensor) -> Tensor:
    x = g * weights(0, 6)
    h = (x @ weights(1, 6, 8)) * (x @ weights(2, 6, 8))
    return ((h @ weights(3, 8, 4)) ** 2 @ weights(4, 4, 1))[:, 0] + x.sum(-1)


def attention(g: Tensor) -> Tensor:
    x = (g[..., None] * weights(0, 6, 4)).reshape(-1, 6, 4)
    x = torch.nn.functional.layer_norm(x + weights(5, 6, 4), (4,))
    scores = (x @ weights(1, 4, 4)) @ x.mT / 2
    mixed = scores.softmax(-1) @ x
    return torch.nn.functional.gelu(mixed @ weights(2, 4, 8), approximate="tanh")[:, -1] @ weights(
        3, 8
    )


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": relu,
    "bilinear": bilinear,
    "attention": attention,
}


@cache
def traced(name: str) -> Traced:
    ones = torch.ones(1, 6, dtype=torch.float64)
    FUNCTIONS[name](ones)  # draws the weights before the trace
    return trace(FUNCTIONS[name], ones, regions=[(0 * ones, ones)])


def grid(name: str, low: float) -> float:
    """The least value on a grid of the box, corners included."""
    steps = 5 if name == "attention" else 7
    axis = torch.linspace(low, 1, steps, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * 6)
    return min(float(FUNCTIONS[name](part).min()) for part in points.split(4096))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_twin_and_the_sound_sweep_agree(name: str) -> None:
    found = traced(name)
    at, twin = found.at("float64"), Twin(found.at("float64"))
    lo, hi = np.full((2, 1, 6), 0.6), np.ones((2, 1, 6))
    lo[1] = 0.9
    parameters = {
        ref: tuple(
            0.3 * torch.rand(p.shape, generator=torch.Generator().manual_seed(ref)).double()
            for p in ps
        )
        for ref, ps in twin.rules.parameters(2).items()
    }
    with np.errstate(all="ignore"):
        state = twin.sweep([(torch.tensor(lo), torch.tensor(hi))], parameters)
        mine = twin.bound(state, parameters, torch.ones(1, 1, 1, dtype=torch.float64))[:, 0]
        slopes = twin.slopes(State(state.values, {}), parameters)
        for level in ("float64", "real"):
            known = sweep(found.at(level), [Interval(lo, hi)], slopes=slopes)
            other = bound_rows(
                at if level == "float64" else found.at(level), known, np.ones((1, 1, 1))
            )
            assert np.maximum(mine.numpy(), other[:, 0]) == pytest.approx(other[:, 0], abs=1e-6)
            assert other[:, 0] == pytest.approx(np.maximum(mine.numpy(), other[:, 0]), abs=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_slopes_are_sound(name: str) -> None:
    found, rng = traced(name), np.random.default_rng(0)
    twin = Twin(found.at("float64"))
    box = Interval(np.full((1, 1, 6), 0.7), np.ones((1, 1, 6)))
    lowest = grid(name, 0.7)
    with np.errstate(all="ignore"):
        state = twin.sweep([(torch.tensor(box.lo), torch.tensor(box.hi))], twin.rules.parameters(1))
        own = twin.slopes(state, twin.rules.parameters(1))
        for _ in range(5):
            forged = {
                ref: tuple(s + rng.normal(size=s.shape) for s in ss) for ref, ss in own.items()
            }
            known = sweep(found.at("real"), [box], slopes=forged)
            assert bound_rows(found.at("real"), known, np.ones((1, 1, 1)))[0, 0] <= lowest


@pytest.mark.parametrize("name", ["relu", pytest.param("bilinear", marks=pytest.mark.slow)])
def test_splits_close_the_gap(name: str) -> None:
    ones = torch.ones(1, 6, dtype=torch.float64)
    budget = Budget(seconds=20, gap=1e-6, whole=5, steps=(20, 10))
    for level in ("float64", "real"):
        result = least(traced(name), [0.95 * ones], [ones], np.ones(1), level=level, budget=budget)
        assert result.closed
        assert result.bound <= grid(name, 0.95) + 1e-9
        size = abs(float(FUNCTIONS[name](ones)) - result.value)
        assert result.value - result.bound <= 2e-6 * max(size, abs(result.value))


def test_the_bound_is_anytime_and_grows() -> None:
    ones, found = torch.ones(1, 6, dtype=torch.float64), traced("attention")
    lowest, bounds = grid("attention", 0.9), []
    for boxes in (1, 5):
        result = least(
            found,
            [0.9 * ones],
            [ones],
            np.ones(1),
            level="float64",
            budget=Budget(seconds=60, boxes=boxes, whole=0, steps=(5, 5)),
        )
        bounds.append(result.bound)
        assert result.bound <= lowest
        assert result.value >= result.bound
        halvings = [sum(isinstance(s, Split) for s in leaf.path) for leaf in result.leaves]
        assert sum(0.5**count for count in halvings) == 1.0
        for leaf in result.leaves:  # the box of a leaf is what its path leaves of the region
            low, high = 0.9 * ones.numpy().reshape(-1), ones.numpy().reshape(-1).copy()
            for step in leaf.path:
                if isinstance(step, Split):
                    (high if step.side == 0 else low)[step.place] = step.value
                else:
                    for _, place, side in step.ends:
                        end = (low if side == 0 else high)[place]
                        low[place] = high[place] = end
            assert np.array_equal(leaf.lows[0].reshape(-1), low)
            assert np.array_equal(leaf.highs[0].reshape(-1), high)
    for earlier, later in itertools.pairwise(bounds):
        assert later >= earlier - 1e-9


def test_a_false_claim_comes_with_a_counterexample() -> None:
    ones, found = torch.ones(1, 6, dtype=torch.float64), traced("bilinear")
    lowest = grid("bilinear", 0.0)
    claim = lowest + 0.2 * abs(lowest) + 0.1
    result = least(found, [0 * ones], [ones], np.ones(1), above=claim, budget=Budget(seconds=20))
    assert result.value <= claim
    assert float(bilinear(result.point[0])) == result.value
    safe = least(
        found, [0.99 * ones], [ones], np.ones(1), above=lowest - 5, budget=Budget(seconds=20)
    )
    assert safe.bound > lowest - 5


def test_a_budget_is_checked() -> None:
    with pytest.raises(InputError, match="must not be negative"):
        Budget(seconds=-1)
    with pytest.raises(InputError, match="must not be negative"):
        Budget(seconds=float("nan"))
    with pytest.raises(InputError, match="must not be negative"):
        Budget(boxes=0)


def test_slopes_of_relu_are_moved_and_inherited() -> None:
    """A descent finds better slopes than the usual ones, and no half of a box has a weaker bound
    than the box: it starts from the same slopes.
    """
    ones = torch.ones(6, dtype=torch.float64)
    found = trace(lambda x: torch.relu(x @ weights(1, 6, 8)) @ weights(3, 8, 1), ones)
    bounds = [
        least(
            found, [-ones], [ones], np.ones(1), level=level, budget=Budget(1e9, boxes, 0.0, steps)
        ).bound
        for level, boxes, steps in (
            ("real", 1, (0, 0)),
            ("real", 1, (20, 0)),
            ("real", 2, (20, 0)),
            ("real", 40, (20, 0)),
        )
    ]
    assert bounds[0] + 0.1 < bounds[1] < bounds[2] < bounds[3]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_in_parts_have_the_bounds_and_gradients_of_all_at_once(name: str) -> None:
    def swept(memory: int) -> tuple[list[Tensor], list[Tensor]]:
        twin = Twin(traced(name).at("float64"), memory)
        box = [torch.full((2, 1, 6), end, dtype=torch.float64) for end in (0.6, 1.0)]
        slopes = {
            ref: tuple(0.1 * torch.ones_like(p) for p in ps)
            for ref, ps in twin.rules.parameters(2).items()
        }
        moved = [*box, *(p for ps in slopes.values() for p in ps)]
        for x in moved:
            x.requires_grad_(True)
        state = twin.sweep([(box[0], box[1])], slopes)
        bound = twin.bound(state, slopes, torch.ones(1, 1, 1, dtype=torch.float64)).sum()
        grads = torch.autograd.grad(bound, moved, allow_unused=True, materialize_grads=True)
        return [end for ends in state.values for end in ends], list(grads)

    for whole, parts in zip(swept(1 << 30), swept(1), strict=True):
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_no_entry_stays_wide_because_lines_hide_it() -> None:
    """The entry with the largest effect is halved, but where another is 256 times wider as a share
    of the region.
    """
    ones = torch.ones(1, 2, dtype=torch.float64)
    weights = torch.tensor([1e6, 1.0], dtype=torch.float64)
    found = trace(lambda x: x * weights, ones, regions=[(0 * ones, ones)])
    twin, goal = Twin(found.at("float64")), goal_of(np.ones((1, 2)))
    for width, chosen in ((1 / 128, 0), (1 / 512, 1)):
        leaf = Leaf([np.zeros((1, 2))], [np.array([[width, 1.0]])], -np.inf, {}, {})
        bound_plainly(twin, [leaf], goal, [np.ones((1, 2))])
        assert leaf.split == (0, chosen)
        assert len(halves(leaf)) == 2
