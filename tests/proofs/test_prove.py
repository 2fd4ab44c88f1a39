"""`prove`: results, certificates, measures, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_models import draw, planted

from assay.errors import InputError
from assay.proofs.max_of_k import certificate, operations
from assay.proofs.max_of_k.cells import Measure
from assay.proofs.max_of_k.prove import prove, prove_all, search
from assay.proofs.max_of_k.strategies import STRATEGIES, brute, named
from assay.proofs.max_of_k.strategies.base import Problem
from assay.targets import max_of_k
from assay.targets.max_of_k import Weights


@pytest.fixture(scope="module")
def weights() -> Weights:
    return planted(9, 3, np.random.default_rng(1), 0.12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_results_are_bounds_with_costs(strategy: str, weights: Weights) -> None:
    result = prove(weights, strategy, "real")
    truth = prove(weights, "brute_force", "real")
    assert 0 <= result.count <= truth.count <= result.total == 9**3
    assert result.normalised == pytest.approx(result.count / truth.count)
    assert result.operations is not None
    assert result.operations > 0
    assert result.unexplained > 0
    assert json.loads(json.dumps(result.to_json()))["count"] == result.count


def test_stronger_strategies_prove_no_less(weights: Weights) -> None:
    bound = {
        result.strategy: result.bound for result in prove_all(weights, "real", normalise=False)
    }
    assert (
        bound["brute_force"]
        >= bound["union"]
        >= bound["best"]
        >= max(bound["set_exact"], bound["box_exact"])
    )
    assert bound["named_rivals"] >= bound["cubic"]
    assert bound["subcubic_anchored"] >= bound["subcubic"] >= bound["subcubic_low_rank"]
    assert bound["box_exact"] >= max(
        value for name, value in bound.items() if name.startswith("worst_")
    )


def test_search_ranks_measures_and_strategies(weights: Weights) -> None:
    V, K = weights.vocabulary, weights.positions
    apart = np.zeros((V, V, K), bool)
    apart[np.triu_indices(V, 1)] = True
    measures = (Measure(), Measure("query is not the largest", None, apart))
    results = search(weights, measures, ["box_exact", "cubic", "brute_force"])
    assert [result.bound for result in results] == sorted(
        (result.bound for result in results), reverse=True
    )
    assert {result.measure for result in results} == {"accuracy", "query is not the largest"}
    assert {result.total for result in results} == {
        V**K,
        V**K - sum((m + 1) ** (K - 1) for m in range(V)),
    }


@pytest.mark.parametrize(
    "strategy", ["union", "box_exact", "cubic", "subcubic_low_rank", "brute_force"]
)
def test_certificates_hold_claim_and_advice(
    strategy: str, weights: Weights, tmp_path: Path
) -> None:
    path = tmp_path / "claim.json"
    result = prove(weights, strategy, "real", certificate_path=path)
    entry = json.loads(path.read_text())
    assert entry["claim"] == {
        "count": str(result.count),
        "total": str(9**3),
        "bound": str(result.bound),
    }
    assert entry["rule"] == named(strategy).rule
    assert entry["model"] == certificate.model_entry(weights)
    if entry["advice"]["file"] is None:
        assert strategy == "brute_force"
        return
    advice = load_file(tmp_path / entry["advice"]["file"])
    if "sets" in advice:
        advice["sets"] = certificate.unpack(advice["sets"], weights.vocabulary)
    problem = Problem(weights, "real")
    assert named(strategy).verify(problem, advice).weigh() == result.count


def test_false_advice_certifies_nothing_false(weights: Weights) -> None:
    from small_models import margins, members, sequences

    from assay.proofs.max_of_k import cells

    problem, tokens = Problem(weights, "real"), sequences(weights)
    wrong = ~(margins(weights, tokens) < 0)
    everything = {"sets": cells.everything(9, 3), "limits": np.full((9, 9, 3), 8, np.int16)}
    for name in ("union", "cubic", "subcubic", "subcubic_anchored", "worst_direct"):
        advice = {**named(name).search(problem), **everything}
        certified = named(name).verify(problem, advice).sets  # type: ignore[attr-defined]
        assert not (members(certified, tokens) & wrong).any()


def test_brute_force_out_of_reach_is_refused_with_the_estimate(weights: Weights) -> None:
    with pytest.raises(InputError, match=r"64\^10 = 1.15e\+18 sequences needs .* GiB"):
        brute.refuse(64, 10)
    with pytest.raises(InputError, match="GiB"):
        brute.table(Problem(weights, "float64").tables, budget=10)


def test_unknown_names_and_files_are_refused(weights: Weights, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean"):
        prove(weights, "cubik")
    with pytest.raises(InputError, match="unknown level"):
        prove(weights, "cubic", "float16")
    with pytest.raises(InputError, match="no file"):
        prove(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="json"):
        prove(weights, "cubic", certificate_path=tmp_path / "claim.txt")
    with pytest.raises(InputError, match="weight 0"):
        prove(weights, "cubic", measure=Measure("none", np.zeros((3, 9), np.int64)))


def test_operations_count_what_the_docstring_says() -> None:
    a, b = operations.counting(np.ones((3, 4))), operations.counting(np.ones((4, 5)))
    assert operations.count(lambda: a @ b) == 3 * 5 * 7
    assert operations.count(lambda: a + 1.0) == 12
    assert operations.count(lambda: a.max(1)) == 3 * 3
    assert operations.count(lambda: np.maximum.accumulate(a, axis=1)) == 3 * 3
    assert operations.count(lambda: np.sort(a, axis=0)) == 4 * 2
    assert operations.count(lambda: a.T.reshape(2, 6)[:, :3]) == 0


def test_proofs_survive_a_round_trip_through_files(tmp_path: Path) -> None:
    w = draw(4, "rough")
    path = max_of_k.save(tmp_path / "w.safetensors", w)
    assert prove(path, "box_exact").count == prove(w, "box_exact").count
    again = max_of_k.load(path)
    assert certificate.model_entry(again) == certificate.model_entry(w)
    other = replace(w, U=w.U * np.float32(2.0))
    assert certificate.model_entry(other)["sha256"] != certificate.model_entry(w)["sha256"]


def test_all_leaves_out_what_would_take_too_long(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assay.proofs.max_of_k.strategies.exact import ExactSets

    monkeypatch.setattr(ExactSets, "seconds", lambda self, weights: 1e9)
    monkeypatch.setattr(brute, "refuse", _refuse)
    names = [
        result.strategy
        for result in prove_all(weights, "float64", normalise=False, count_operations=False)
    ]
    assert not {"box_exact", "set_exact", "best", "union", "brute_force"} & set(names)
    assert {"cubic", "subcubic"} <= set(names)
    assert named("box_exact").seconds(weights) == 1e9
    assert named("cubic").seconds(weights) == 0.0


def _refuse(*_: int, **__: int) -> None:
    raise InputError("too many")
