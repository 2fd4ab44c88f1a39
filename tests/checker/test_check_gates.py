"""Certificates of gates: accepted where the prover is right, and no forgery passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gate_cases import SORTS, Forged, Network, largest_damage, metric, write_case

from assay.errors import InputError as ProverError
from assay.proofs.gate_certificate import require_writable
from assay_check import InputError, check
from assay_check.gates.arithmetic import Box
from assay_check.gates.claims import read_example
from assay_check.gates.derivative import Derivatives
from assay_check.gates.graph import Graph
from assay_check.gates.rules import NONLINEAR, NoBoundError, slope_shapes
from assay_check.gates.sweep import Sweep

LOW = 0.4


FEW = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]
SLOW = ("gelu", "tanh", "norm", "rms")


@pytest.fixture(
    scope="module",
    params=[pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in SORTS],
)
def case(request: Any, tmp_path_factory: Any) -> tuple[str, Network, Path, Path]:
    path = tmp_path_factory.mktemp("gates") / "cert.json"
    network, weights = write_case(path, request.param)
    return request.param, network, path, weights


@pytest.fixture(scope="module")
def relu(tmp_path_factory: Any) -> tuple[Network, Path, Path]:
    path = tmp_path_factory.mktemp("gates") / "cert.json"
    network, weights = write_case(path, "relu", seed=3)
    return network, path, weights


def test_what_is_proved_is_accepted_and_what_is_false_is_not(
    case: tuple[str, Network, Path, Path], tmp_path: Path
) -> None:
    """A claim just below a damage that occurs is false, whatever the leaves say."""
    _, network, path, weights = case
    verdict = check(path, weights)
    assert verdict.accepted, verdict.reason
    seen = largest_damage(network, LOW)
    claimed = float(json.loads(path.read_text())["claim"]["0"])
    assert seen <= float(verdict.bound or 0) <= claimed
    for below in (seen * (1 - 1e-9) - 1e-12, seen / 2, 0.0, -1.0):
        forged = Forged(path, tmp_path)
        forged.entry["claim"]["0"] = repr(below)
        assert not check(forged.write(), weights).accepted


def test_the_verdict_says_what_was_proved(relu: tuple[Network, Path, Path]) -> None:
    _, path, weights = relu
    verdict = check(path, weights)
    assert "how far the metric ('logit') falls below" in verdict.measure
    assert "4 gates of groups of 5 move, within [0.4, 1]" in verdict.measure
    assert verdict.level == "real"
    assert "are tensors of the weights file" in verdict.assumptions[1]
    alone = check(path)
    assert alone.accepted
    assert "no weights were given" in alone.assumptions[1]
    assert "damage is at most" in verdict.reason


def claim(text: str) -> Callable[[Forged], None]:
    return lambda f: f.entry["claim"].update({"0": text})


PINS = "0.0.pins"
OTHER_END = torch.tensor([0, 0, 1])


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Forged], None]:
    def forge(f: Forged) -> None:
        f.held[name] = change(f.held[name].clone())

    return forge


def smaller_claim(f: Forged) -> None:
    f.entry["claim"]["0"] = repr(float(f.entry["claim"]["0"]) * (1 - 1e-7) - 1e-9)


def dropped_leaf(f: Forged) -> None:
    f.held["0.0.tree"], f.held["0.0.values"] = f.held["0.0.tree"][:-1], f.held["0.0.values"][:-1]


def all_pinned(f: Forged) -> None:
    """One corner, that of the network itself, in place of the region."""
    f.held["0.0.tree"] = torch.tensor([[-2, 5], [-1, -1]])
    f.held["0.0.values"] = torch.zeros(2).double()
    f.held[PINS] = torch.tensor([[0, place, 1] for place in range(5)])
    f.goal["boxes"], f.goal["rows"] = {}, {}
    f.entry["claim"]["0"] = "1e-6"


def extra_leaf(f: Forged) -> None:
    leaf = torch.tensor([[-1, -1]])
    f.held["0.0.tree"] = torch.cat([f.held["0.0.tree"], leaf])
    f.held["0.0.values"] = torch.cat([f.held["0.0.values"], torch.zeros(1).double()])


def one_leaf_for_all(f: Forged) -> None:
    """The whole region as one leaf, with the slopes of one of its parts."""
    f.held["0.0.tree"], f.held["0.0.values"] = f.held["0.0.tree"][-1:], f.held["0.0.values"][-1:]
    for phase in ("boxes", "rows"):
        for names in f.goal[phase].values():
            for name in names:
                f.held[name] = f.held[name][-1:]


def fewer_slopes(f: Forged) -> None:
    name = next(iter(f.goal["rows"].values()))[0]
    f.held[name] = f.held[name][:-1]


def nan_slopes(f: Forged) -> None:
    name = next(iter(f.goal["rows"].values()))[0]
    f.held[name] = torch.full_like(f.held[name], torch.nan)


def wide_slopes(f: Forged) -> None:
    for phase in ("boxes", "rows"):
        for names in f.goal[phase].values():
            for name in names:
                f.held[name] = torch.cat([f.held[name]] * 2, -1)


def slopes_elsewhere(f: Forged) -> None:
    f.goal["rows"]["0"] = next(iter(f.goal["rows"].values()))


def weight_of(f: Forged) -> str:
    return next(n for n in sorted(f.entry["model"]["weights"]) if f.held[n].ndim == 2)


def changed_weight(f: Forged) -> None:
    f.held[weight_of(f)][0, 0] += 1e-3


def changed_weight_unnamed(f: Forged) -> None:
    """Another network, whose weights are no longer said to be any: its claim is its own."""
    name = weight_of(f)
    f.held[name] = f.held[name] * 3
    f.entry["model"]["weights"].remove(name)


def nan_constant(f: Forged) -> None:
    f.held[weight_of(f)][0, 0] = torch.nan


def other_op(f: Forged) -> None:
    for node in f.example["graph"]:
        if node["op"] == "relu":
            node["op"] = "square"


def unknown_op(f: Forged) -> None:
    for node in f.example["graph"]:
        if node["op"] == "relu":
            node["op"], node["name"] = "other", "softsign"
    for phase in ("boxes", "rows"):
        f.goal[phase].clear()


def forward_reference(f: Forged) -> None:
    f.example["graph"][1]["parents"] = [5]


def shorter_graph(f: Forged) -> None:
    f.example["graph"].pop()


def gates_at_two(f: Forged) -> None:
    f.held["0.point.0"] = f.held["0.point.0"] * 2
    f.held["0.high.0"] = f.held["0.high.0"] * 2


def level(name: str) -> Callable[[Forged], None]:
    return lambda f: f.entry.update(level=name)


def no_goal(f: Forged) -> None:
    f.example["goals"] = []


def other_sign(f: Forged) -> None:
    f.example["sign"] = -1


def region_upside_down(f: Forged) -> None:
    f.held["0.low.0"], f.held["0.high.0"] = f.held["0.high.0"], f.held["0.low.0"]


def another_example(f: Forged) -> None:
    f.entry["claim"]["1"] = "0"


FORGERIES: dict[str, Callable[[Forged], None]] = {
    "a claim a little too small": smaller_claim,
    "a claim of nothing": claim("0"),
    "a claim that is no number": claim("nan"),
    "a claim that is infinite": claim("-inf"),
    "a claim in words": claim("small"),
    "a claim about another example": another_example,
    "a leaf left out": dropped_leaf,
    "a leaf too many": extra_leaf,
    "one leaf in place of all": one_leaf_for_all,
    "a split moved outside": changed("0.0.values", lambda x: x + 10.0),
    "a split at NaN": changed("0.0.values", lambda x: x * torch.nan),
    "a split of no input": changed("0.0.tree", lambda x: torch.where(x >= 0, x + 7, x)),
    "pins at the other end": changed(PINS, lambda x: x * torch.tensor([1, 1, -1]) + OTHER_END),
    "a pin at no end": changed(PINS, lambda x: x + 2 * OTHER_END),
    "a pin of no input": changed(PINS, lambda x: x + torch.tensor([7, 0, 0])),
    "a pin of no entry": changed(PINS, lambda x: x + torch.tensor([0, 70, 0])),
    "a pin left out": changed(PINS, lambda x: x[:-1]),
    "a pin too many": changed(PINS, lambda x: torch.cat([x, x[:1]])),
    "pins of another shape": changed(PINS, lambda x: x[:, :2]),
    "everything pinned": all_pinned,
    "slopes of fewer leaves": fewer_slopes,
    "slopes that are NaN": nan_slopes,
    "slopes of another shape": wide_slopes,
    "slopes of an input": slopes_elsewhere,
    "a wider region": changed("0.low.0", lambda x: x - 1.0),
    "a region of NaN": changed("0.low.0", lambda x: x * torch.nan),
    "a region upside down": region_upside_down,
    "a region of another shape": changed("0.low.0", lambda x: x[:-1]),
    "a region without the network": changed("0.high.0", lambda x: x * 0.9),
    "another point for the network": gates_at_two,
    "a changed weight": changed_weight,
    "a changed weight, unnamed": changed_weight_unnamed,
    "a constant of NaN": nan_constant,
    "another operation": other_op,
    "an operation without a rule": unknown_op,
    "an operation that reads a later one": forward_reference,
    "a graph cut short": shorter_graph,
    "another direction": other_sign,
    "no goal": no_goal,
    "level float64": level("float64"),
    "level float32": level("float32"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_refused(name: str, relu: tuple[Network, Path, Path], tmp_path: Path) -> None:
    _, path, weights = relu
    forged = Forged(path, tmp_path)
    FORGERIES[name](forged)
    written = forged.write()
    try:
        verdict = check(written, weights)
    except InputError:
        return
    assert not verdict.accepted, verdict.reason
    if "without a rule" in name:
        assert "bounded, not checkable: the checker has no rule for softsign (1)" in verdict.reason


def test_the_certificate_of_the_forgeries_has_all_parts(
    relu: tuple[Network, Path, Path], tmp_path: Path
) -> None:
    """Splits, pins and slopes, so that each can be forged."""
    forged = Forged(relu[1], tmp_path)
    places = forged.held["0.0.tree"][:, 0]
    assert (places >= 0).any()
    assert (places == -2).any()
    assert len(forged.held[PINS])
    assert forged.goal["boxes"]
    assert forged.goal["rows"]


@pytest.mark.parametrize("seed", FEW)
def test_no_derivative_leaves_what_the_checker_bounds(
    seed: int, case: tuple[str, Network, Path, Path], tmp_path: Path
) -> None:
    _, network, path, _ = case
    forged = Forged(path, tmp_path)
    held = {name: x.numpy() for name, x in forged.held.items()}
    graph = read_example("0", forged.example, held, "damage").graph
    derivatives, function = Derivatives(graph, np.ones(1)), metric(network)
    rng, known = np.random.default_rng(seed), 0
    for width in (1e-9, 0.05, 0.5):
        low = rng.uniform(0.2, 1.0, 5)
        box = Box(low, low + width * rng.uniform(0, 1, 5))
        found = derivatives.boxes([box])
        if found is None:
            continue
        known += 1
        for share in rng.uniform(0, 1, (16, 5)):
            x = torch.from_numpy(np.clip(box.lo + share * (box.hi - box.lo), box.lo, box.hi))
            x.requires_grad_(True)
            function(x).sum().backward()
            assert x.grad is not None
            slack = 1e-9 * (1 + np.abs(x.grad.numpy()).max())
            assert (found[0].lo <= x.grad.numpy() + slack).all()
            assert (found[0].hi >= x.grad.numpy() - slack).all()
        if width == 1e-9:
            assert (found[0].hi - found[0].lo <= 1e-3 * (1 + found[0].size())).all()
    assert known


@pytest.mark.parametrize("name", ["a changed weight", "another operation", "a graph cut short"])
def test_digests_tell_files_apart(
    name: str, relu: tuple[Network, Path, Path], tmp_path: Path
) -> None:
    _, path, _ = relu
    forged = Forged(path, tmp_path)
    FORGERIES[name](forged)
    try:
        verdict = check(forged.write(honest=False))
    except InputError:
        return
    assert not verdict.accepted


def test_other_weights_are_refused(relu: tuple[Network, Path, Path], tmp_path: Path) -> None:
    _, path, _ = relu
    _, others = write_case(tmp_path / "cert.json", "relu", seed=4)
    verdict = check(path, others)
    assert not verdict.accepted
    assert "about other weights" in verdict.reason


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 8))]
)
def test_changed_slopes_stay_sound(
    seed: int, case: tuple[str, Network, Path, Path], tmp_path: Path
) -> None:
    """Any finite slopes give a bound that holds: it is accepted or refused for what it proves."""
    _, network, path, weights = case
    forged, generator = Forged(path, tmp_path), torch.Generator().manual_seed(seed)
    for phase in ("boxes", "rows"):
        for names in forged.goal[phase].values():
            for name in names:
                x = forged.held[name]
                scale = 10.0 ** float(torch.randint(-2, 3, (), generator=generator))
                forged.held[name] = x + scale * torch.randn(x.shape, generator=generator)
    forged.entry["claim"]["0"] = repr(largest_damage(network, LOW) * (1 - 1e-9) - 1e-12)
    assert not check(forged.write(), weights).accepted
    forged.entry["claim"]["0"] = "1e9"
    found = check(forged.write(), weights)
    if found.accepted:
        assert found.bound is not None
        assert found.bound >= Fraction(largest_damage(network, LOW))


@pytest.mark.parametrize("seed", FEW)
def test_no_value_leaves_what_the_checker_bounds(
    seed: int, case: tuple[str, Network, Path, Path], tmp_path: Path
) -> None:
    """Random boxes, without and with slopes at random: every sampled value is inside."""
    _, network, path, _ = case
    forged = Forged(path, tmp_path)
    held = {name: x.numpy() for name, x in forged.held.items()}
    graph = read_example("0", forged.example, held, "damage").graph
    rng = np.random.default_rng(seed)
    function = metric(network)
    for width in (0.0, 1e-9, 0.05, 0.4, 1.5):
        low = rng.uniform(-1, 1.5, 5)
        box = Box(low, low + width * rng.uniform(0, 1, 5))
        points = box.lo + rng.uniform(0, 1, (32, 5)) * (box.hi - box.lo)
        points[:16] = np.where(rng.uniform(size=(16, 5)) < 0.5, box.lo, box.hi)
        with torch.no_grad():
            values = [float(function(torch.from_numpy(p))) for p in np.clip(points, box.lo, box.hi)]
        for sign in (1.0, -1.0):
            bound = bound_on(graph, box, sign, {})
            assert bound <= min(sign * v for v in values) + 1e-12 * (1 + abs(values[0]))
            if width <= 1e-9:
                assert bound >= min(sign * v for v in values) - 1e-6
            slopes = {
                place: tuple(
                    rng.normal(size=shape)
                    for shape in slope_shapes(
                        node.op,
                        graph.nodes[node.parents[0]].shape,
                        graph.nodes[node.parents[min(1, len(node.parents) - 1)]].shape,
                    )
                )
                for place, node in enumerate(graph.nodes)
                if node.op in NONLINEAR - {"softmax"}
            }
            bound = bound_on(graph, box, sign, slopes)
            assert bound <= min(sign * v for v in values) + 1e-12 * (1 + abs(values[0]))


def bound_on(graph: Graph, box: Box, sign: float, slopes: dict[int, Any]) -> float:
    with np.errstate(all="ignore"):
        try:
            return Sweep(graph, [box], slopes).bound(np.full(1, sign), slopes)
        except NoBoundError:
            return -np.inf


@pytest.mark.slow
def test_margins_of_every_rival_are_needed(tmp_path: Path) -> None:
    """A claim about margins has one tree for each of them."""
    import cases

    import assay
    from assay.bounds.search.leaves import Budget

    mechanisms = cases.CASES["directions"]().take(slice(0, 1))
    path, other = tmp_path / "cert.json", tmp_path / "forged"
    other.mkdir()
    budget = Budget(seconds=0.3, boxes=8, steps=(5, 3), whole=0)
    found = assay.certify(mechanisms, low=0.9, claim="same-answer", budget=budget, certificate=path)
    verdict = check(path)
    assert verdict.accepted, verdict.reason
    assert found.certificate == path
    assert "least margin of the untouched network's answer" in verdict.measure
    forged = Forged(path, other)
    forged.goal["tree"] = "0.low.0"
    with pytest.raises(InputError):
        check(forged.write())
    forged = Forged(path, other)
    forged.example["goals"].pop()
    with pytest.raises(InputError, match="goals are needed"):
        check(forged.write())
    forged = Forged(path, other)
    forged.entry["claim"]["0"] = repr(float(found.found.values[0]) + 1e-6)
    assert not check(forged.write()).accepted


def test_a_certificate_of_gates_is_at_level_real(tmp_path: Path) -> None:
    with pytest.raises(ProverError, match="level real, got level 'float32'"):
        require_writable(tmp_path / "cert.json", "float32")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ProverError, match="not a file that Assay would write there"):
        require_writable(tmp_path / "other.json", "real")
