"""The crosscoder proof study end to end, a user's network and crosscoder, and bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

import assay_check
from assay.errors import InputError
from assay.io import files
from assay.mechanisms.crosscoder import Crosscoder, hash_of, save
from assay.mechanisms.crosscoder import load as load_crosscoder
from assay.proofs.crosscoder.problem import Points, features_of
from assay.proofs.crosscoder.prove import STRATEGIES
from assay.studies import runner, verbs
from assay.targets import residual_relu
from assay.targets.residual_relu import ResidualReLU

slow = pytest.mark.slow

SMALL = [
    "model.vocabulary=12",
    "model.width=26",
    "model.hidden=24",
    "model.steps=250",
    "model.rate=0.01",
    "crosscoder.features=36",
    "crosscoder.steps=15",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ours"
    runner.execute(runner.load("crosscoder-proof", SMALL), folder)
    return folder


@slow
def test_summary_certificate_and_report(folder: Path) -> None:
    summary = files.read_json(folder / "summary.json")
    true = summary["right"] / summary["points"]
    assert set(summary["certified"]) == set(STRATEGIES)
    assert all(share <= true for share in summary["certified"].values())
    assert 0 < summary["certified"]["strongest"] <= summary["certified"]["exact"]
    assert summary["fvu"] < 0.2
    assert summary["mean_l0"] >= 2
    assert summary["groups_needed"] <= summary["points"]
    verdict = assay_check.check(folder / "certificate.json", folder / "weights.safetensors")
    assert verdict.accepted
    assert float(verdict.bound or 0) == pytest.approx(summary["certificate"]["share"])
    page = (folder / "report.html").read_text()
    for title in (
        "Certified share against groups and operations",
        "Independence of features",
        "a claim, not a bound",
        "a heuristic estimate, not a bound",
        "Bounds and true margins",
    ):
        assert title in page


@slow
def test_a_network_and_a_crosscoder_of_a_user(folder: Path, tmp_path: Path) -> None:
    words = [
        f"model.path={folder / 'weights.safetensors'}",
        f"crosscoder.path={folder}",
        "proofs.certified=exact",
        "proofs.depth=1",
    ]
    again = runner.execute(runner.load("crosscoder-proof", words), tmp_path / "run")
    before = files.read_json(folder / "summary.json")
    assert again["certified"] == before["certified"]
    assert again["certificate"]["share"] == before["certified"]["exact"]


@slow
def test_every_verb_works_over_the_run(folder: Path) -> None:
    _, table = verbs.attribute_run(folder, top=3)
    part = table["part"][0]
    assert table.height == 3
    _, exact = verbs.ablate_run(folder, [part])
    assert exact["part"][0] == part
    assert verbs.audit_run(folder, exact=16)[1].height
    found, contexts = verbs.explain_run(folder, part, top=4)
    assert found["part"] == part
    assert contexts.columns[:3] == ["first", "second", "larger"]
    summary, brackets = verbs.certify_run(folder, "top:30", budget=0.5, examples=2)
    assert brackets.height == 2
    assert summary["free_gates"] > 0
    assert verbs.compare_runs(folder, folder)[1].height


@slow
def test_digits_are_proved_of_a_network_that_was_trained_for_it(tmp_path: Path) -> None:
    words = ["model.width=12", "model.hidden=32", "model.steps=60", "crosscoder.features=24",
             "crosscoder.steps=80", "crosscoder.batch=256"]  # fmt: skip
    out = tmp_path / "run"
    summary = runner.execute(runner.load("digits-crosscoder-proof", words), out)
    assert (summary["points"], summary["held_out"], summary["cotrained"]) == (1797, 359, True)
    true = summary["right"] / summary["points"]
    assert all(share <= true for share in summary["certified"].values())
    verdict = assay_check.check(out / "certificate.json", out / "weights.safetensors")
    assert verdict.accepted
    assert "points that the advice lists" in verdict.measure
    growth = pl.read_parquet(out / "growth.parquet").pivot(
        "what", index="points", values="operations"
    )
    assert growth["points"].to_list() == [224, 449, 898, 1797]
    compact, running = (
        growth[name].to_list() for name in ("one_side_compact", "running the network")
    )
    # Tables are paid once: eight times the points are less than eight times the operations.
    assert compact[-1] < 7 * compact[0]
    assert running[-1] == pytest.approx(running[0] * 1797 / 224)
    _, contexts = verbs.explain_run(out, verbs.attribute_run(out, top=1)[1]["part"][0], top=3)
    assert {"digit", "mean pixel"} <= set(contexts.columns)
    assert load_crosscoder(out).model_hash == hash_of(
        residual_relu.load(out / "weights.safetensors")
    )


def refused(tmp_path: Path, message: str, *words: str) -> None:
    with pytest.raises(InputError, match=message):
        runner.execute(runner.load("crosscoder-proof", list(words)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_keys_and_files_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "at most a quarter of the 576 points", "crosscoder.features=145")
    refused(tmp_path, "needs 72 features", "crosscoder.features=70")
    refused(tmp_path, "proofs.certified must be one of", "proofs.certified=ball")
    refused(tmp_path, "no file", "model.path=nowhere.safetensors")
    refused(tmp_path, "start = tokens is for the task pairs", "task=digits")
    words = ("task=digits", "crosscoder.start=random")
    refused(tmp_path, "a quarter of the 1797 points", *words, "crosscoder.features=450")
    refused(
        tmp_path,
        "cotrain trains a network and",
        "crosscoder.cotrain=true",
        "model.path=x.safetensors",
    )
    pairs = residual_relu.save(tmp_path / "pairs.safetensors", ResidualReLU(24, 5, 5, 12))
    refused(tmp_path, "reads 64 pixels and has 10 outputs", *words, f"model.path={pairs}")
    deep = residual_relu.save(tmp_path / "deep.safetensors", ResidualReLU(24, 5, 5, 12, 2))
    refused(tmp_path, "the network has 2", f"model.path={deep}")
    wide = residual_relu.save(tmp_path / "wide.safetensors", ResidualReLU(23, 5, 5, 12))
    refused(tmp_path, "reads 24 inputs, this one reads 23", f"model.path={wide}")
    model = residual_relu.save(tmp_path / "model.safetensors", ResidualReLU(24, 5, 5, 12))
    mine, layers = tmp_path / "mine", ("embed", "blocks.0")
    for found, message in (
        (Crosscoder(("embed",), 5, 4), "not the sites"),
        (Crosscoder(layers, 4, 4), "states of width 4"),
        (Crosscoder(layers, 5, 4, model_hash="0" * 64), "was trained on another network"),
    ):
        save(mine, found)
        refused(tmp_path, message, f"model.path={model}", f"crosscoder.path={mine}")


def test_a_crosscoder_refuses_a_network_that_the_run_trains(tmp_path: Path) -> None:
    small = ("model.vocabulary=4", "model.width=5", "model.hidden=6", "model.steps=1")
    found = Crosscoder(("embed", "blocks.0"), 5, 4, model_hash="0" * 64)
    words = (*small, f"crosscoder.path={save(tmp_path / 'mine', found)}")
    with pytest.raises(InputError, match="was trained on another network"):
        runner.execute(runner.load("crosscoder-proof", list(words)), tmp_path / "run")
    model = ResidualReLU(4, 5, 6, 3)
    with pytest.raises(InputError, match="was trained on another network"):
        features_of(found, model, Points(np.eye(4), np.zeros(4, dtype=int)))
