"""The crosscoder proof study end to end, a user's network and crosscoder, and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import assay_check
from assay.errors import InputError
from assay.io import files
from assay.mechanisms.crosscoder import Crosscoder, save
from assay.proofs.crosscoder.prove import STRATEGIES
from assay.studies import runner
from assay.targets import residual_relu
from assay.targets.residual_relu import ResidualReLU

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


def test_bad_input_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(message: str, *words: str) -> None:
        with pytest.raises(InputError, match=message):
            runner.execute(runner.load("crosscoder-proof", list(words)), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    weights = f"model.path={folder / 'weights.safetensors'}"
    refused("at most a quarter of the 576 points", "crosscoder.features=145")
    refused("needs 72 features", "crosscoder.features=70")
    refused("proofs.certified must be one of", "proofs.certified=balls")
    refused("no file", "model.path=nowhere.safetensors")
    other = ResidualReLU(24, 26, 24, 12, generator=torch.Generator().manual_seed(5))
    path = residual_relu.save(tmp_path / "other.safetensors", other)
    refused("was trained on another network", f"model.path={path}", f"crosscoder.path={folder}")
    deep = residual_relu.save(tmp_path / "deep.safetensors", ResidualReLU(24, 5, 5, 12, 2))
    refused("the network has 2", f"model.path={deep}")
    wide = residual_relu.save(tmp_path / "wide.safetensors", ResidualReLU(23, 5, 5, 12))
    refused("reads 24 inputs, this one reads 23", f"model.path={wide}")
    save(tmp_path / "layers", Crosscoder(("embed",), 26, 4))
    refused("not the sites", weights, f"crosscoder.path={tmp_path / 'layers'}")
