"""The toy-directions study end to end, on small networks."""

from pathlib import Path

import pytest
import torch

from assay.attribution import Gradient, attribute
from assay.errors import InputError
from assay.io.files import save_tensors
from assay.io.runs import Run
from assay.studies import runner

pytestmark = pytest.mark.slow


def test_a_saved_network_is_taken_apart_and_the_run_binds_again(tmp_path: Path) -> None:
    # The pentagon: what training finds, written down.
    angles = 2 * torch.pi * torch.arange(5) / 5
    save_tensors(
        tmp_path / "w.safetensors",
        {"W": 1.13 * torch.stack([angles.cos(), angles.sin()]), "b": torch.full((5,), -0.25)},
    )
    recipe = runner.load(
        "tms-directions", [f"target.weights={tmp_path / 'w.safetensors'}", "method.k=[7, 10]"]
    )
    summary = runner.execute(recipe, tmp_path / "run")
    assert summary["clean_circuits"] == 5
    assert summary["purity"] >= 0.998
    assert summary["k_chosen"] == [5, 5]
    assert summary["steepness"]["steepest"] > summary["steepness"]["circuits"]
    run = Run(tmp_path / "run")
    assert "5 of 5" in run.path("report.html").read_text()
    mechanisms = runner.mechanisms_of(run)
    scores = attribute(mechanisms, Gradient())
    assert scores.values["directions"].shape == (1000, 10)
    assert runner.study_of(run).contexts(run).height == 1000  # type: ignore[attr-defined]
    again = runner.execute(recipe, tmp_path / "run", resume=True)
    assert again == summary


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind",
    [
        "superposition",
        "xor",
        *(pytest.param(kind, marks=SLOW) for kind in ("groups", "squares", "digits")),
    ],
)
def test_every_kind_of_network_runs(tmp_path: Path, kind: str) -> None:
    sets = [
        f"target.kind={kind}",
        "target.features=6",
        "target.hidden=3",
        "target.samples=60",
        "target.steps=150",
        "method.k=[5]",
    ]
    summary = runner.execute(
        runner.load("tms-directions", [*sets, "target.networks=1"]), tmp_path / "run"
    )
    assert -1e-9 <= summary["error"] <= 1
    assert len(summary["k_chosen"]) == 1
    mechanisms = runner.mechanisms_of(Run(tmp_path / "run"))
    assert bool(torch.isfinite(mechanisms.values()).all())


@pytest.mark.parametrize(
    "name", ["refinement", *(pytest.param(name, marks=SLOW) for name in ("bilevel", "npeff"))]
)
def test_every_method_runs(tmp_path: Path, name: str) -> None:
    sets = [
        "target.networks=1",
        "target.samples=60",
        "target.steps=100",
        f"method.name={name}",
        "method.factors=pairs",
        "method.steps=40",
    ]
    summary = runner.execute(
        runner.load("tms-directions", [*sets, "method.k=[6]"]), tmp_path / "run"
    )
    assert summary["circuits"] == 5


def test_bad_configs_are_refused_before_any_work(tmp_path: Path) -> None:
    for sets, message in (
        (["method.k=[16]"], "between 1 and 15"),
        (["method.k=[]"], "empty"),
        (["target.weights=missing.safetensors"], "no file"),
        (["target.kind=xor", "target.weights=w.safetensors"], "kind 'tms'"),
    ):
        with pytest.raises(InputError, match=message):
            runner.execute(runner.load("tms-directions", sets), tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_superposed_circuits_are_recovered_on_five_networks(tmp_path: Path) -> None:
    summary = runner.execute(runner.load("superposition-directions"), tmp_path / "run")
    assert summary["clean_circuits"] == 10
    assert summary["error"] <= 0.08
    assert summary["coefficient_r2"] >= 0.86


@pytest.mark.slow
def test_forty_features_in_ten_dimensions_are_all_found(tmp_path: Path) -> None:
    sets = ["target.features=40", "target.hidden=10", "method.k=[60]"]
    summary = runner.execute(runner.load("tms-directions", sets), tmp_path / "run")
    assert summary["clean_circuits"] == 40
    assert summary["purity"] >= 0.99


@pytest.mark.slow
def test_squares_are_reconstructed(tmp_path: Path) -> None:
    sets = [
        "target.kind=squares",
        "target.samples=500",
        "target.networks=3",
        "method.factors=pairs",
        "method.k=[20]",
    ]
    summary = runner.execute(runner.load("tms-directions", sets), tmp_path / "run")
    assert summary["error"] <= 0.3
