"""Verify: properties that just hold and that just do not, beside the exact least value over all
patterns of ReLUs; and certificates of those that hold.
"""

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import command
from onnx_networks import declared, helper, layered, saved
from scipy.optimize import linprog

from assay.bounds.rounding import Interval
from assay.bounds.search.attack import Attack
from assay.bounds.search.goal import Goal
from assay.bounds.search.sweep import bound_rows, sweep
from assay.bounds.search.twin import Twin
from assay.errors import AssayError, InputError
from assay.io.vnnlib import Property, read_vnnlib
from assay.proofs.unsafe import counterexample, pose, verify
from assay.targets.onnx_network import OnnxNetwork, load_onnx
from assay_check import check

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "acasxu"


def property_of(folder: Path, *asserts: str, **ends: Any) -> Any:
    path = folder / "p.vnnlib"
    path.write_text(declared(2, 2, *asserts, **ends))
    return read_vnnlib(path)


def vars_of(function: Any) -> list[torch.Tensor]:
    """Return the tensors that a function closes over."""
    held = [cell.cell_contents for cell in function.__closure__]
    return [x for x in held if isinstance(x, torch.Tensor)]


def exact_least(weights: dict[str, np.ndarray], groups: list[list[np.ndarray]]) -> float:
    """Return the least over x in [-1, 1]^2 and conjunctions of the largest constraint: a linear
    program for every pattern of ReLUs. A constraint is (a, b, c): a y0 + b y1 + c.
    """
    w0, b0, w1, b1 = (weights[name].astype(np.float64) for name in ("w0", "b0", "w1", "b1"))
    best = np.inf
    for pattern in itertools.product((0.0, 1.0), repeat=len(b0)):
        on = np.array(pattern)
        slope, start = (w0 * on) @ w1, (b0 * on) @ w1 + b1
        side = np.where(on > 0, -1.0, 1.0)
        fits = [np.append(side[i] * w0[:, i], 0.0) for i in range(len(b0))]
        least = [-side[i] * b0[i] for i in range(len(b0))]
        for group in groups:
            rows = [np.append(slope @ c[:2], -1.0) for c in group]
            ends = [-(start @ c[:2] + c[2]) for c in group]
            box = [(-1, 1), (-1, 1), (None, None)]
            found = linprog([0, 0, 1], np.array(fits + rows), least + ends, bounds=box)
            if found.success:
                best = min(best, found.fun)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_verdicts_on_both_sides_of_the_exact_threshold(tmp_path: Path, seed: int) -> None:
    path, weights = layered(tmp_path / "n.onnx", (2, 6, 2), seed)
    network = load_onnx(path)
    groups = [[np.array([1.0, 0, 0]), np.array([1.0, -1, 0])], [np.array([0, 1.0, 0])]]
    exact = exact_least(weights, groups)
    for shift, verdict in ((-1e-4, "holds"), (1e-4, "violated")):
        c = repr(exact + shift)
        unsafe = f"(or (and (<= Y_0 {c}) (<= (- Y_0 Y_1) {c})) (<= Y_1 {c}))"
        found = verify(network, property_of(tmp_path, unsafe), seconds=20)
        assert found.verdict == verdict
        assert found.bound <= -shift + 1e-9
        assert found.value >= -shift - 1e-5
        if verdict == "holds":
            assert found.bound > 0
            assert found.open_share == 0
            continue
        broken = found.counterexample
        assert broken is not None
        x = torch.tensor([broken.inputs], dtype=torch.float64)
        assert bool((x.abs() <= 1).all())
        y0, y1 = network(x)[0].tolist()
        assert max(y0, y0 - y1) <= float(c) or y1 <= float(c)
        assert broken.outputs == tuple(network(x.float())[0].double().tolist())


def test_a_conjunction_needs_its_constraints_at_one_input(tmp_path: Path) -> None:
    """Each constraint alone is met somewhere in the box, both nowhere: y = (x, -x) + relu terms."""
    w = np.array([[1.0, -1.0], [0.0, 0.0]], np.float32)
    path = saved(
        tmp_path / "n.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w}, (1, 2)
    )
    network = load_onnx(path)
    both = property_of(tmp_path, "(and (<= Y_0 -0.1) (<= Y_1 -0.1))")
    assert verify(network, both, seconds=5).verdict == "holds"
    either = property_of(tmp_path, "(or (<= Y_0 -0.1) (<= Y_1 -0.1))")
    assert verify(network, either, seconds=5).verdict == "violated"


def test_boxes_whose_ends_no_float_holds_are_covered_and_met_exactly(tmp_path: Path) -> None:
    path, _ = layered(tmp_path / "n.onnx", (2, 4, 2))
    network = load_onnx(path)
    at = network(torch.full((1, 2), 0.1, dtype=torch.float64))[0, 0].item()
    for shift, verdict in ((-1e-6, "holds"), (1e-6, "violated")):
        claim = property_of(tmp_path, f"(<= Y_0 {at + shift!r})", ends=("0.1", "0.1"))
        assert verify(network, claim, seconds=5).verdict == verdict


def test_boxes_cover_what_no_float_holds_and_constants_grow_the_unsafe_set(tmp_path: Path) -> None:
    network = load_onnx(layered(tmp_path / "n.onnx", (2, 4, 2))[0])
    for text in ("0.1", "0.3", "-0.1", "-0.3"):
        (case,) = property_of(tmp_path, f"(<= Y_0 {text})", ends=(text, text)).cases
        posed = pose(network, case)
        low, high = posed.low[0, 0].item(), posed.high[0, 0].item()
        assert Fraction(low) < case.low[0] < Fraction(high)
        constants = [x for x in vars_of(posed.function) if x.shape == (1,) and x != 1]
        assert [Fraction(x.item()) < -Fraction(text) for x in constants] == [True]


def test_an_enclosure_decides_by_its_worse_end(tmp_path: Path) -> None:
    """Ends that no float holds stand as intervals: a threshold within one is not met for sure."""
    node = helper.make_node("Identity", ["x"], ["y"])
    network = load_onnx(saved(tmp_path / "n.onnx", [node], {}, (1, 2)))
    (case,) = property_of(tmp_path, "(<= Y_0 0.1)", ends=("0.1", "0.1")).cases
    x = torch.full((1, 2), 0.1, dtype=torch.float64)
    assert counterexample(network, case, x, 0) is None
    (case,) = property_of(tmp_path, "(<= Y_0 0.5)", ends=("0.1", "0.6")).cases
    found = counterexample(network, case, x - 9, 0)
    assert found is not None
    assert all(Fraction(1, 10) <= Fraction(value) <= Fraction(6, 10) for value in found.inputs)


def test_coefficients_are_scaled_to_exact_ones(tmp_path: Path) -> None:
    path, weights = layered(tmp_path / "n.onnx", (2, 6, 2))
    exact = exact_least(weights, [[np.array([0.1, 0.3, 0.0])]])
    for shift, verdict in ((-1e-4, "holds"), (1e-4, "violated")):
        line = f"(<= (+ (* 0.1 Y_0) (* 0.3 Y_1)) {exact + shift!r})"
        found = verify(load_onnx(path), property_of(tmp_path, line), seconds=10)
        assert found.verdict == verdict
        assert found.bound <= -shift + 1e-9  # in the property's units, not in those of the scaling
        assert found.value >= -shift - 1e-5


def test_alternatives_that_share_constraints_cost_no_more_than_those(tmp_path: Path) -> None:
    path, weights = layered(tmp_path / "n.onnx", (2, 6, 2))
    exact = exact_least(weights, [[np.array([1.0, 0, 0])]])
    # 2^10 conjunctions of 20 constraints; one of all those on Y_0 implies the others.
    lines = [f"(or (<= Y_0 {exact + 1e-3 - i!r}) (<= Y_1 {-9 - i}))" for i in range(10)]
    network, claim = load_onnx(path), property_of(tmp_path, *lines)
    assert pose(network, claim.cases[0]).goal.rows.shape == (20, 1, 20)
    assert verify(network, claim, seconds=10).verdict == "holds"


def test_boxes_that_there_is_no_time_for_stay_open(tmp_path: Path) -> None:
    path, _ = layered(tmp_path / "n.onnx", (2, 6, 2))
    boxes = [f"(and (<= X_0 0.{i}) (<= Y_0 -9))" for i in range(5)]
    found = verify(load_onnx(path), property_of(tmp_path, f"(or {' '.join(boxes)})"), seconds=1e-9)
    assert (found.verdict, found.bound) == ("open", -np.inf)
    assert found.open_share >= 0.8


def test_an_output_on_the_threshold_is_unsafe(tmp_path: Path) -> None:
    """ReLU gives exact zeros: no rounding may hide that zero meets `<= 0`."""
    path = saved(tmp_path / "n.onnx", [helper.make_node("Relu", ["x"], ["y"])], {}, (1, 2))
    claim = property_of(tmp_path, "(and (<= Y_0 0) (<= (* 0.3 Y_1) 0))")
    assert verify(load_onnx(path), claim, seconds=5).verdict == "violated"


def test_networks_without_inputs_and_constants_beyond_bounds_are_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["z"]),
        helper.make_node("Constant", [], ["y"], value_floats=[1.0, 2.0]),
    ]
    network = load_onnx(saved(tmp_path / "n.onnx", nodes, {}, (1, 2)))
    with pytest.raises(InputError, match="depends on none of its inputs"):
        verify(network, property_of(tmp_path, "(<= Y_0 0)"))
    path, _ = layered(tmp_path / "n.onnx", (2, 4, 2))
    line = "(or (<= Y_0 1e30) (<= Y_1 -1e43))"
    with pytest.raises(InputError, match="masked scores"):
        verify(load_onnx(path), property_of(tmp_path, line))


def test_an_input_without_axes_is_a_box_too(tmp_path: Path) -> None:
    path = saved(tmp_path / "n.onnx", [helper.make_node("Relu", ["x"], ["y"])], {}, ())
    claim = tmp_path / "p.vnnlib"
    claim.write_text(declared(1, 1, "(<= Y_0 -0.5)"))
    assert verify(load_onnx(path), read_vnnlib(claim), seconds=5).verdict == "holds"


def test_a_property_that_the_checker_cannot_show_gets_no_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, weights = layered(tmp_path / "n.onnx", (2, 6, 2))
    exact = exact_least(weights, [[np.array([1.0, 0, 0])]])
    claim = property_of(tmp_path, f"(<= Y_0 {exact - 1e-3!r})")
    monkeypatch.setattr("assay.proofs.gate_certificate.recompute", lambda *_: -1e-16)
    with pytest.raises(AssayError, match="the property holds, but the checker's rules"):
        verify(load_onnx(path), claim, seconds=10, certificate=tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()


def test_an_attack_draws_on_faces_of_every_dimension() -> None:
    low, high = -torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    attack = Attack(lambda x: x.sum()[None], Goal(np.eye(1)), low, high)
    points = attack._drawn(1000, torch.Generator().manual_seed(0))
    assert points.abs().max() == 1
    counts = (points.abs() == 1).sum(1).bincount(minlength=4)
    assert counts.min() > 100


def deep(folder: Path) -> tuple[OnnxNetwork, Property]:
    """Return a property of a network that it takes many boxes to prove."""
    path, _ = layered(folder / "n.onnx", (2, 8, 8, 2), 3)
    network = load_onnx(path)
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 101, dtype=torch.float64)] * 2)
    y = torch.func.vmap(network)(grid[:, None])[:, 0]
    either = float(torch.maximum(y[:, 0], y[:, 0] - y[:, 1]).min()) - 0.02
    other = float(y[:, 1].min()) - 0.02
    one = f"(and (<= Y_0 {either!r}) (<= (- Y_0 Y_1) {either!r}))"
    return network, property_of(folder, f"(or {one} (<= Y_1 {other!r}))")


def test_a_box_is_bounded_alike_whatever_is_bounded_with_it(tmp_path: Path) -> None:
    """Intervals that one box wants tightened stay as they are for the others."""
    network, claim = deep(tmp_path)
    traced = pose(network, claim.cases[0]).traced()
    draw = np.random.default_rng(0)
    middles, width = draw.uniform(-0.7, 0.7, (8, 1, 2)), draw.uniform(0.05, 0.3, (8, 1, 2))
    boxes = Interval(middles - width, middles + width)
    rows = np.eye(3).reshape(1, 3, 1, 3)
    together = bound_rows(traced.at("real"), sweep(traced.at("real"), [boxes]), rows)
    twin = Twin(traced.at("float64"))
    ends = torch.from_numpy(boxes.lo), torch.from_numpy(boxes.hi)
    with torch.no_grad():
        values = twin.sweep([ends], twin.rules.parameters(8)).values[-1][0]
    for place in range(8):
        some = slice(place, place + 1)
        known = sweep(traced.at("real"), [Interval(boxes.lo[some], boxes.hi[some])])
        alone = bound_rows(traced.at("real"), known, rows)
        np.testing.assert_allclose(alone[0], together[place], rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            mine = twin.sweep([tuple(end[some] for end in ends)], twin.rules.parameters(1)).values[
                -1
            ][0]
        np.testing.assert_allclose(mine[0], values[place], rtol=1e-12, atol=1e-12)


def test_certificates_of_many_boxes_are_accepted(tmp_path: Path) -> None:
    network, claim = deep(tmp_path)
    found = verify(network, claim, seconds=20, certificate=tmp_path / "c.json")
    assert found.verdict == "holds"
    assert found.boxes > 15
    verdict = check(tmp_path / "c.json")
    assert verdict.accepted, verdict.reason
    assert float(verdict.bound or 0) == pytest.approx(found.bound)


@pytest.mark.parametrize("whole", [True, False])
def test_a_rare_unsafe_point_is_found_by_faces_and_in_the_worst_boxes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Unsafe within 2e-3 of x = (1, 0.37): on a face, where random points hardly ever are."""
    w0 = np.array([[-1, 0, 0], [0, 1, -1]], np.float32)
    b0, w1 = np.array([1, -0.37, 0.37], np.float32), np.ones((3, 2), np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "b0"], ["a"]),
        helper.make_node("Relu", ["a"], ["h"]),
        helper.make_node("MatMul", ["h", "w1"], ["y"]),
    ]
    weights = {"w0": w0, "b0": b0, "w1": w1}
    network = load_onnx(saved(tmp_path / "n.onnx", nodes, weights, (1, 2)))
    if not whole:
        monkeypatch.setattr(Attack, "whole", lambda self, **_: (self.low, 1.0))
    found = verify(network, property_of(tmp_path, "(<= Y_0 0.002)"), seconds=5)
    assert found.verdict == "violated"
    assert found.boxes == 1 if whole else found.boxes < 30


def test_a_search_without_time_says_what_is_open(tmp_path: Path) -> None:
    path, _ = layered(tmp_path / "n.onnx", (2, 24, 24, 2), 3)
    network = load_onnx(path)
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 101, dtype=torch.float64)] * 2)
    least = float(torch.func.vmap(network)(grid[:, None])[..., 0].min())
    claim = property_of(tmp_path, f"(<= Y_0 {least - 0.02!r})")
    found = verify(network, claim, seconds=1e-6)
    assert found.verdict == "open"
    assert 0 < found.open_share <= 1
    assert found.bound <= 0.02 <= found.value + 1e-9


def test_goals_are_the_least_conjunction_of_the_largest_constraint() -> None:
    goal = Goal(np.eye(3)[:, None], ((0, 2), (1,)))
    assert goal.at(np.array([[1.0, 5.0, 3.0]])) == 3.0
    assert goal.at(np.array([[1.0, 2.0, 3.0]])) == 2.0
    assert goal.of(torch.tensor([[9.0, 4.0, -1.0]])).tolist() == [4.0]
    assert goal.decisive(torch.tensor([[1.0, 5.0, 3.0], [1.0, 2.0, 3.0]])).tolist() == [2, 1]
    shared = Goal(np.eye(3)[:, None], ((0, 2), (1, 2)))
    assert shared.at(np.array([[1.0, 5.0, 3.0]])) == 3.0
    with pytest.raises(AssayError, match="every row belongs to a group"):
        Goal(np.eye(3)[:, None], ((0, 2),))


def test_numbers_of_inputs_and_outputs_must_fit(tmp_path: Path) -> None:
    path, _ = layered(tmp_path / "n.onnx", (3, 4, 2))
    with pytest.raises(InputError, match=r"is about 2 inputs and 2 outputs, and .* has 3 and 2"):
        verify(load_onnx(path), property_of(tmp_path, "(<= Y_0 1)"))


def test_the_command_says_what_holds_and_writes_a_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, weights = layered(tmp_path / "n.onnx", (2, 6, 2))
    exact = exact_least(weights, [[np.array([1.0, 0, 0])], [np.array([0, 1.0, 0])]])
    property_of(tmp_path, f"(or (<= Y_0 {exact - 1e-3!r}) (<= Y_1 {exact - 1e-3!r}))")
    claim, out = tmp_path / "p.vnnlib", tmp_path / "c.json"
    code, said = command(monkeypatch, capsys, "verify", path, claim, "-o", out)
    assert code == 0, said.err
    assert said.out.startswith("holds: proved at level real")
    verdict = check(out)
    assert verdict.accepted, verdict.reason
    assert "no output is unsafe" in verdict.reason
    assert "how far the output stays from the unsafe set" in verdict.measure
    entry = json.loads(out.read_text())
    for change in (higher, one_conjunction):
        out.write_text(json.dumps(change(json.loads(json.dumps(entry)))))
        assert not check(out).accepted
    property_of(tmp_path, f"(or (<= Y_0 {exact + 1e-3!r}) (<= Y_1 {exact + 1e-3!r}))")
    code, said = command(monkeypatch, capsys, "verify", path, claim, "--json")
    assert code == 1
    assert json.loads(said.out)["verdict"] == "violated"
    code, said = command(monkeypatch, capsys, "verify", path, tmp_path / "none.vnnlib")
    assert code == 2
    assert "no file" in said.err


def test_every_box_and_every_conjunction_counts_in_a_certificate(tmp_path: Path) -> None:
    """Y_0 stays far from unsafe, Y_1 hardly: the checker supports the smaller distance alone."""
    w = np.eye(2, dtype=np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = saved(tmp_path / "n.onnx", [node], {"w": w}, (1, 2))
    claim = property_of(tmp_path, "(or (<= Y_0 -3) (<= Y_1 -1.5))")
    out = tmp_path / "c.json"
    found = verify(load_onnx(path), claim, seconds=5, certificate=out)
    assert found.verdict == "holds"
    assert found.bound == pytest.approx(0.5)
    assert check(out).accepted
    entry = json.loads(out.read_text())
    entry["claim"]["0"] = "0.6"
    out.write_text(json.dumps(entry))
    assert not check(out).accepted
    entry["examples"]["0"]["groups"] = [[0]]
    out.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match="groups must hold each of 2 numbers"):
        check(out)


def higher(entry: dict[str, Any]) -> dict[str, Any]:
    entry["claim"]["0"] = repr(float(entry["claim"]["0"]) + 0.01)
    return entry


def one_conjunction(entry: dict[str, Any]) -> dict[str, Any]:
    """Claim what one of two numbers above the threshold would prove."""
    entry["examples"]["0"]["groups"] = [[0, 1]]
    entry["claim"]["0"] = "10.0"
    return entry


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
@pytest.mark.parametrize(
    ("network", "number", "verdict"),
    [
        ("1_6", 3, "holds"),
        ("1_7", 3, "violated"),
        ("1_9", 7, "violated"),
        ("2_9", 8, "violated"),
    ],
)
def test_collision_avoidance_networks(network: str, number: int, verdict: str) -> None:
    file = SHARED / f"ACASXU_run2a_{network}_batch_2000.onnx"
    found = verify(load_onnx(file), read_vnnlib(SHARED / f"prop_{number}.vnnlib"), seconds=20)
    assert found.verdict == verdict
