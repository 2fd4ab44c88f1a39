"""The digits guard study end to end on a small network, and keys that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from assay.errors import InputError
from assay.guard.files import load
from assay.io import files
from assay.studies import runner

SMALL = [
    "model.networks=1",
    "model.first=24",
    "model.second=12",
    "model.steps=250",
    "resplits=20",
    "agreement=none",
]


@pytest.mark.slow
def test_summary_saved_guard_and_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runner.execute(runner.load("digits-guard", SMALL), folder)
    summary = files.read_json(folder / "summary.json")
    assert summary["accepted_without_explanations"] == 0
    assert summary["held_out"]["accepted"] > 0.85
    assert summary["ninety"]["accepted"] >= 0.9
    assert abs(summary["level"]["errors_from_nominal"]) < 4
    assert summary["mean_auroc"] > 0.8
    assert summary["weights"]["moved"] <= summary["weights"]["proved_most"]
    clean = summary["backdoor"]["clean"]
    assert clean["triggered digits sent to the target"] > 0.9
    assert clean["clean accepted"] > 0.8
    guard = load(folder)
    assert len(guard.explanations) == summary["explanations"]
    page = (folder / "report.html").read_text()
    for title in ("From nothing", "Families of anomalies", "Predictions from gates", "A backdoor"):
        assert title in page
    again = runner.execute(runner.load("digits-guard", SMALL), folder, resume=True)
    assert again == summary


@pytest.mark.slow
def test_the_agreement_model_is_guarded_too(tmp_path: Path) -> None:
    words = [word for word in SMALL if "agreement" not in word]
    summary = runner.execute(runner.load("digits-guard", [*words, "agreement=short"]), tmp_path)
    found = summary["agreement"]
    assert found["held_out"]["accepted"] > 0.5
    assert found["mean_auroc"] > 0.6
    assert "Sentences outside of a grammar" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.laboratory=1500", "100 must be left to measure on"),
        ("data.laboratory=30", "too few for bins"),
        ("agreement=large", "agreement: Input should be"),
        ("guard.alpha=1", "guard.alpha: .*less than 1"),
        ("data.novel=10", "data.novel: .*less than or equal to 9"),
        ("guard.bin=3", "did you mean guard.bins"),
    ],
)
def test_keys_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runner.load("digits-guard", [override]).config.require()
