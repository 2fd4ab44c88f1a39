"""Mechanistic explanations: predicted from gates alone, admitted when a fresh split agrees."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from assay.core.target import Batch, target
from assay.errors import InputError
from assay.guard import Explanation, Settings, fit
from assay.guard.explanations import Refused
from assay.guard.gates import joined, last_column_off, swaps
from assay.guard.proposals import (
    Prediction,
    Proposal,
    Swapped,
    checked,
    from_circuit,
    judge,
    predict,
    read_proposals,
)
from assay.guard.quantise import quantise
from assay.guard.reading import Reading, read
from assay.io.circuits import Circuit, Scored, write_circuit
from assay.mechanisms.nodes import nodes
from assay.targets.firing import FEATURES, Firing, draw_inputs

A, C, TWIN, B, D, E = FEATURES
READING = Reading({"first": (0, 1, 2), "second": (0, 1, 2)}, logits=False)


def metric(output, batch):
    return output[:, 0]


@pytest.fixture(scope="module")
def scene():
    model = Firing()
    clean, paired = draw_inputs(1500, 1), draw_inputs(1500, 2)
    quantiser = quantise(read(model, clean, READING).values, 4)
    bound = nodes(
        target(model, metric), Batch(clean), Batch(paired), ["first", "second"],
        neurons=["first", "second"],
    )  # fmt: skip
    swap = swaps(bound, READING, quantiser, read(model, paired, READING),
                 last_column_off(READING, None))  # fmt: skip
    fresh = read(model, draw_inputs(600, 3), READING)
    return model, quantiser, swap, quantiser(fresh.values) >= quantiser.fires, clean


def judged(scene, proposal: Proposal):
    _, quantiser, swap, fresh, clean = scene
    prediction = predict(proposal, swap, FEATURES)
    fires = quantiser(read(scene[0], clean, READING).values) >= quantiser.fires
    marginal = float(fires[:, FEATURES.index(proposal.effect)].double().mean())
    return prediction, judge(prediction, marginal, fresh, FEATURES)


def test_a_cause_predicts_and_is_admitted(scene):
    prediction, found = judged(scene, Proposal(A, B))
    assert prediction.low <= 0.9 <= prediction.high
    assert isinstance(found, Explanation)
    assert (found.form, found.sort) == ("edge", "mechanistic")
    assert found.predicted == prediction.value
    assert found.bits > 20


@pytest.mark.parametrize(("cause", "effect"), [(TWIN, D), (D, E)])
def test_what_only_co_occurs_is_refused(scene, cause, effect):
    prediction, found = judged(scene, Proposal(cause, effect))
    assert isinstance(found, Refused)
    assert prediction.value == pytest.approx(0.27, abs=0.05)  # the effect's own rate
    assert found.explanation.observed == pytest.approx(0.9, abs=0.06)
    assert "they only co-occur" in found.reason


def test_a_common_parent_predicts_what_its_children_do(scene):
    prediction, found = judged(scene, Proposal(D, E, parent=C))
    assert prediction.low <= 0.9 <= prediction.high
    assert isinstance(found, Explanation)


def test_the_wrong_parent_does_not(scene):
    _, found = judged(scene, Proposal(D, E, parent=A))
    assert isinstance(found, Refused)


def test_a_true_prediction_that_saves_nothing_is_refused(scene):
    _, found = judged(scene, Proposal(A, D))  # independent, and predicted so
    assert isinstance(found, Refused)
    assert "saves nothing" in found.reason


def test_the_prediction_is_the_share_over_swapped_runs(scene):
    model, _, swap, _, clean = scene
    paired = draw_inputs(1500, 2)
    first, brought = model.first(clean), model.first(paired)
    first = torch.cat([brought[:, :1], first[:, 1:]], 1)
    fires = model.second(first)[:, 0] > 0
    share = float(fires[brought[:, 0] > 0].double().mean())
    assert predict(Proposal(A, B), swap, FEATURES).value == pytest.approx(share)
    twice = joined([swap, swap])(A)
    assert len(twice.brought) == 3000


def test_the_mixture_over_a_parent_is_summed_by_hand():
    brought = torch.tensor([True] * 4 + [False] * 6)
    fires = torch.tensor(
        [[1, 1], [1, 0], [1, 1], [0, 1], [0, 0], [0, 1], [1, 0], [0, 0], [0, 0], [0, 0]]
    ).bool()
    names = ("a", "b", "c")
    wide = torch.cat([fires, brought[:, None]], 1)
    found = predict(Proposal("a", "b", "c"), lambda name: Swapped(brought, wide), names)
    weights = [0.4 * 3 / 4, 0.6 * 1 / 6]
    assert found.value == pytest.approx((weights[0] * 3 / 4 + weights[1] / 6) / sum(weights))
    assert found.low < found.value < found.high
    with pytest.raises(InputError, match="fires in all inputs or in none"):
        predict(Proposal("a", "b", "c"), lambda name: Swapped(brought | True, wide), names)
    with pytest.raises(InputError, match="fires in no input"):
        predict(Proposal("a", "b"), lambda name: Swapped(brought & False, wide), names)


def test_a_cause_that_never_fires_in_the_fresh_split_is_refused():
    nothing = torch.zeros(20, 2, dtype=torch.bool)
    found = judge(Prediction(Proposal("a", "b"), 0.9, 0.8, 0.95, 50), 0.3, nothing, ("a", "b"))
    assert isinstance(found, Refused)
    assert "fires nowhere in the fresh split" in found.reason


def test_bits_are_those_of_the_two_codes():
    fresh = torch.tensor([[True, True]] * 45 + [[True, False]] * 5 + [[False, False]] * 50)
    found = judge(Prediction(Proposal("a", "b"), 0.9, 0.85, 0.95, 200), 0.3, fresh, ("a", "b"))
    bits = 45 * math.log2(0.9 / 0.3) + 5 * math.log2(0.1 / 0.7) - 2
    assert isinstance(found, Explanation)
    assert found.bits == pytest.approx(bits)


def test_admitted_mechanisms_are_explanations_of_a_guard(scene):
    model = scene[0]
    reading = Reading(READING.sites)
    parts = [read(model, draw_inputs(n, seed), reading)
             for n, seed in ((900, 11), (300, 12), (300, 13))]  # fmt: skip
    _, found = judged(scene, Proposal(A, B))
    _, refused = judged(scene, Proposal(TWIN, D))
    guard = fit(*parts, Settings(bins=4), given=[found], refused=[refused])
    assert guard.explanations[0] == found
    assert guard.refused[0] == refused
    pairs = [set(one.features) for one in guard.explanations if one.form == "edge"]
    assert len(pairs) == len({frozenset(pair) for pair in pairs})


def test_proposals_about_what_is_not_there_are_refused(tmp_path):
    def put(data) -> str:
        (tmp_path / "p.json").write_text(json.dumps(data))
        return str(tmp_path / "p.json")

    def one(**entry):
        return {"proposals": [entry]}

    good = one(cause=A, effect=B, parent=None)
    assert read_proposals(put(good), FEATURES) == [Proposal(A, B)]
    cyclic = [(A, B), (B, D), (D, A)]
    for data, message in (
        (one(cause="first[9]", effect=B), r"unknown feature 'first\[9\]'; did you mean first"),
        (one(cause=A, effect=B, parent="x"), "unknown feature 'x'"),
        (one(cause=A, effect=A), "distinct features"),
        (one(cause=A, effect=B, parent=A), "distinct features"),
        (one(cause=A), "'cause' and 'effect' expected"),
        (one(cause=A, effect=3), "effect must be the name"),
        (one(cause=A, effect=B, why="x"), "unknown entry"),
        ({"proposals": []}, "a list 'proposals' expected"),
        ([], "a list 'proposals' expected"),
        ({"proposals": [{"cause": a, "effect": b} for a, b in cyclic]}, "closes a cycle"),
    ):
        with pytest.raises(InputError, match=message):
            read_proposals(put(data), FEATURES)


def test_a_circuit_proposes_the_features_of_its_edges(tmp_path):
    settings = {"n_layers": 2, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 4}
    nodes_ = {name: Scored(None, True) for name in ("input", "m0", "m1", "logits")}
    edges = {
        "m0->m1": Scored(2.0, True),
        "input->m0": Scored(3.0, True),
        "m1->logits": Scored(1.0, False),
    }
    circuit = Circuit(settings, nodes_, edges)
    homes = {A: "m0", C: "m0", B: "m1"}
    assert from_circuit(circuit, homes) == [Proposal(A, B), Proposal(C, B)]
    path = write_circuit(tmp_path / "circuit.json", circuit)
    assert read_proposals(path, FEATURES, nodes=homes) == [Proposal(A, B), Proposal(C, B)]
    with pytest.raises(InputError, match="no edge of the circuit joins two features"):
        read_proposals(path, FEATURES)
    # Two by two would be a cycle: the fourth edge is left out.
    assert len(from_circuit(circuit, {**homes, D: "m1"})) == 3


def test_checked_proposals_are_a_forest():
    pairs = list(itertools.pairwise(FEATURES))
    assert len(checked([Proposal(a, b) for a, b in pairs], FEATURES)) == 5


def test_swaps_need_the_values_of_other_inputs():
    model = Firing()
    bound = nodes(
        target(model, metric), Batch(draw_inputs(5)), sites=["first"], reference="zero",
        neurons=["first"],
    )  # fmt: skip
    data = read(model, draw_inputs(5), READING)
    with pytest.raises(InputError, match="needs mechanisms with a counterfactual reference"):
        swaps(bound, READING, quantise(data.values, 2, least=1), data,
              last_column_off(READING, None))  # fmt: skip
