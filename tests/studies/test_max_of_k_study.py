"""The max-of-K study end to end: trained here, a user's weights, and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

import assay_check
from assay.errors import InputError
from assay.io import files
from assay.proofs.max_of_k.strategies import STRATEGIES
from assay.studies import runner

pytestmark = pytest.mark.slow

SMALL = [
    "model.vocabulary=8",
    "model.positions=3",
    "model.width=16",
    "training.steps=250",
    "training.rate=0.01",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ours"
    runner.execute(runner.load("max-of-k", SMALL), folder)
    return folder


def test_summary_certificate_and_report(folder: Path) -> None:
    summary = files.read_json(folder / "summary.json")
    assert set(summary["bounds"]) == set(STRATEGIES)
    assert 0 < summary["certified"]["bound"] <= summary["accuracy"] <= 1
    assert summary["executed"] <= summary["accuracy"]
    assert all(bound <= summary["accuracy"] for bound in summary["bounds"].values())
    weights = folder / "weights.safetensors"
    assert assay_check.check(folder / "certificate.json", weights).accepted
    loss = assay_check.check(folder / "cross-entropy.json", weights)
    assert loss.accepted
    assert loss.bound is not None
    assert loss.bound <= summary["cross_entropy"]["bound"]
    assert summary["cross_entropy"]["checked"] == loss.reason
    assert summary["measure"] == "accuracy, the share of all 8^3 = 512 inputs"
    assert summary["assumptions"] == []
    page = (folder / "report.html").read_text()
    for title in (
        "Bound against cost",
        "What each part buys",
        "The circuits",
        "Where the margin comes from",
        "cross-entropy at most",
        "proved and checked",
    ):
        assert title in page


def test_weights_of_a_user_and_some_strategies(folder: Path, tmp_path: Path) -> None:
    words = [
        f"model.path={folder / 'weights.safetensors'}",
        "proofs.strategies=[cubic, subcubic]",
        "proofs.float32=false",
    ]
    summary = runner.execute(runner.load("max-of-k", words), tmp_path / "theirs")
    assert set(summary["bounds"]) == {"cubic", "subcubic"}
    assert (
        summary["certified"]["count"]
        == files.read_json(folder / "summary.json")["certified"]["count"]
    )
    assert "Training" not in (tmp_path / "theirs" / "report.html").read_text()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("proofs.certified=cubik", "did you mean"),
        ("proofs.level=float64", "real or float32"),
        ("model.path=nowhere.safetensors", "no file"),
        ("model.vocabulary=1", "vocabulary"),
    ],
)
def test_bad_configs_are_refused(word: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        runner.execute(runner.load("max-of-k", [*SMALL, word]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
