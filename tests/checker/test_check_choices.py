"""Steps and choices of the largest in certificates: no forgery of one passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gate_cases import Forged, Network, largest_damage, write_case

from assay_check import InputError, check
from assay_check.gates import choices
from assay_check.gates.arithmetic import Box
from assay_check.gates.graph import Node

LOW = 0.4
SORTS = ("jump", "largest", "open")
Case = tuple[str, Network, Path, Path]


@pytest.fixture(scope="module", params=SORTS)
def case(request: Any, tmp_path_factory: Any) -> Case:
    path = tmp_path_factory.mktemp("choices") / "cert.json"
    network, weights = write_case(path, request.param, seed=6)
    return request.param, network, path, weights


def node_of(f: Forged, sort: str) -> dict[str, Any]:
    (found,) = [node for node in f.example["graph"] if node["op"] == sort]
    return found


def holds(value: Any) -> Callable[[Forged, str], None]:
    """Put another threshold, or another number of entries, in the place of its constant."""

    def forge(f: Forged, sort: str) -> None:
        f.held["constant.forged"] = torch.as_tensor(value, dtype=torch.float64)
        node_of(f, sort)["holds"] = ["constant.forged"]

    return forge


def another(op: str) -> Callable[[Forged, str], None]:
    def forge(f: Forged, sort: str) -> None:
        node = node_of(f, sort)
        node["op"] = op
        node["parents"] = node["parents"][:1]

    return forge


def reads_itself(f: Forged, sort: str) -> None:
    node = node_of(f, sort)
    node["parents"] = [f.example["graph"].index(node)] * len(node["parents"])


def no_parent(f: Forged, sort: str) -> None:
    node_of(f, sort)["parents"] = []


def three_parents(f: Forged, sort: str) -> None:
    node_of(f, sort)["parents"] = [node_of(f, sort)["parents"][0]] * 3


def other_shape(f: Forged, sort: str) -> None:
    node_of(f, sort)["shape"] = [1]


def slopes_of_one(f: Forged, sort: str) -> None:
    place = str(f.example["graph"].index(node_of(f, sort)))
    for phase in ("boxes", "rows"):
        f.goal[phase][place] = f.goal[phase][place][:1]


def slopes_at_infinity(f: Forged, sort: str) -> None:
    place = str(f.example["graph"].index(node_of(f, sort)))
    for name in f.goal["rows"][place]:
        f.held[name] = torch.full_like(f.held[name], torch.inf)


def decided(f: Forged, sort: str) -> None:
    """The derivative, which only the checker's own chain rule may make."""
    node = node_of(f, sort)
    node["op"], node["name"] = "decided", sort


FORGERIES: dict[str, Callable[[Forged, str], None]] = {
    "none of the largest": holds(0.0),
    "half an entry": holds(0.5),
    "a threshold below zero": holds(-1.0),
    "a threshold of NaN": holds(torch.nan),
    "an infinite threshold": holds(torch.inf),
    "thresholds of another shape": holds([[0.1, 0.2]]),
    "no threshold": lambda f, sort: node_of(f, sort).update(holds=["constant.0"] * 3),
    "another operation": another("relu"),
    "its derivative": decided,
    "itself": reads_itself,
    "nothing": no_parent,
    "three numbers": three_parents,
    "another shape": other_shape,
    "one slope for two": slopes_of_one,
    "slopes at infinity": slopes_at_infinity,
}


OF_THE_LARGEST = ("none of the largest", "half an entry")


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_choice_is_refused(name: str, case: Case, tmp_path: Path) -> None:
    sort, network, path, weights = case
    if sort == "jump" and name in OF_THE_LARGEST:
        return  # another threshold is another network
    assert check(path, weights).accepted
    forged = Forged(path, tmp_path)
    FORGERIES[name](forged, sort)
    if name == "another operation":  # a network of its own, whose claim is another one
        forged.entry["claim"]["0"] = repr(largest_damage(network, LOW) / 2)
    try:
        verdict = check(forged.write(), weights)
    except InputError:
        return
    assert not verdict.accepted, verdict.reason


def boxes(rng: np.random.Generator, *shape: int) -> Box:
    lo = rng.normal(size=shape)
    return Box(lo, lo + rng.exponential(size=shape) * rng.integers(0, 2, shape))


def exact(node: Node, xs: list[np.ndarray]) -> np.ndarray:
    """The value of a choice at a point, by definition."""
    x = xs[0]
    if node.op == "open":
        return np.where(xs[1] > 0, x, 0.0)
    positive = np.maximum(x, 0.0)
    sizes = positive * (xs[1] if len(xs) > 1 else 1.0)
    if node.op == "jump":
        return np.where(sizes > node.constants[0], positive, 0.0)
    found = np.zeros_like(x)
    for row in range(len(x)):
        chosen = sorted(range(x.shape[1]), key=lambda i: -sizes[row, i])
        chosen = chosen[: int(node.constants[0])]
        found[row, chosen] = positive[row, chosen]
    return found


@pytest.mark.parametrize("op", SORTS)
@pytest.mark.parametrize("norms", [False, True])
def test_no_value_leaves_the_rules_of_a_choice(op: str, norms: bool) -> None:
    """Boxes and lines of any slope, at corners and points, beside the definition."""
    rng, open_, known = np.random.default_rng(5), 0, 0
    for _ in range(300):
        x, shape = boxes(rng, 2, 5), (2, 5)
        other = boxes(rng, 2, 5)
        other = Box(np.abs(other.lo), np.abs(other.lo) + 0.01) if op != "open" else other
        two = norms or op == "open"
        constant = np.asarray(float(rng.integers(1, 7)) if op == "largest" else 0.4)
        node = Node(op, (0, 1) if two else (0,), shape, () if op == "open" else (constant,))
        xs = [x, other] if two else [x]
        slopes = (rng.normal(size=shape) * 3, rng.normal(size=shape) * 3)
        whole = choices.values(node, xs)
        with np.errstate(all="ignore"):
            lines = choices.lines(node, xs, slopes if rng.random() < 0.7 else None)
        rate = choices.decided(node, xs)
        open_ += rate is None
        known += rate is not None
        for _ in range(4):
            at = [
                b.lo + np.round(rng.random(shape), int(rng.integers(0, 3))) * (b.hi - b.lo)
                for b in xs
            ]
            at = [np.clip(p, b.lo, b.hi) for p, b in zip(at, xs, strict=True)]
            y = exact(node, at)
            assert (whole.lo <= y).all()
            assert (y <= whole.hi).all()
            below, under, above, over = lines
            assert (below * at[0] + under <= y + 1e-12).all()
            assert (above * at[0] + over >= y - 1e-12).all()
            if rate is not None:
                assert (rate.lo * at[0] == y).all()
    assert open_ > 20
    assert known > 20
