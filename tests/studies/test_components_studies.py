"""Both studies of components end to end on small networks, their resume, and the dry run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from assay.attribution import Gradient, attribute
from assay.errors import InputError
from assay.io.files import save_tensors
from assay.io.runs import Run
from assay.mechanisms.components import Objective, Problem, Recon, Rows, decomposition
from assay.mechanisms.components.planning import count_importance, plan_training
from assay.studies import recipes, runner
from assay.studies.components.inputs import load_inputs
from assay.targets.agreement import agreement_text, build_model, build_tokenizer
from assay.targets.language import save_language_model
from assay.targets.tms import pentagon

pytestmark = pytest.mark.slow

QUICK = [
    "training.steps=60",
    "training.batch=512",
    "training.warmup_steps=40",
    "evaluation.samples=64",
    "evaluation.pgd=[5, 10]",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pentagon, as a user would save a network."""
    model = pentagon()
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_tensors(path, {"W": model.W.detach(), "b": model.b.detach()})
    return path


@pytest.fixture(scope="module")
def finished(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    runner.execute(runner.load("tms-components", [f"target.weights={weights}", *QUICK]), folder)
    return folder


def test_a_saved_network_is_taken_apart_and_the_run_binds_again(finished: Path) -> None:
    summary = runner.finished_summary(Run(finished))
    assert summary["sites"] == ["linear1", "linear2"]
    assert summary["runs"] == 2
    assert summary["mmcs"] > 0.9
    assert summary["divergence"]["unmasked"] < summary["divergence"]["zero"] / 5
    assert list(summary["pgd"]) == ["5", "10"]
    assert summary["agreement_of_seeds"]["components"] > 0
    run = Run(finished)
    text = run.path("report.html").read_text()
    for words in ("wrong importances", "MMCS", "What do they read and write", "another seed"):
        assert words in text
    mechanisms = runner.mechanisms_of(run)
    assert set(mechanisms.groups) == {"linear1", "linear1.delta", "linear2", "linear2.delta"}
    scores = attribute(mechanisms, Gradient())
    assert scores.values["linear1"].shape == (64, 20)
    assert runner.study_of(run).contexts(run).height == 64  # type: ignore[attr-defined]
    importance = run.table("importance.parquet")
    assert importance["site"].unique(maintain_order=True).to_list() == ["linear1", "linear2"]


def test_a_finished_run_is_resumed_at_once(finished: Path, weights: Path) -> None:
    recipe = runner.load("tms-components", [f"target.weights={weights}", *QUICK])
    assert runner.execute(recipe, finished, resume=True) == runner.finished_summary(Run(finished))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path: Path, weights: Path) -> None:
    sets = ["training.steps=400", "training.batch=256", "training.warmup_steps=20"]
    sets += ["components.decompositions=1", "evaluation.pgd=[5]", f"target.weights={weights}"]
    words = [word for entry in sets for word in ("--set", entry)]
    command = [sys.executable, "-m", "assay.cli", "run", "tms-components", "--json", *words, "-o"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    state = killed / "network-0" / "components.pt"
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "summary.json").exists()
    done = subprocess.run(
        [*command, str(killed), "--resume"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    whole = runner.execute(runner.load("tms-components", sets), tmp_path / "whole")
    resumed = json.loads(done.stdout)
    for summary in (whole, resumed):
        summary.pop("seconds")
    assert resumed == json.loads(json.dumps(whole))


@pytest.mark.parametrize(
    "sets",
    [
        ["target.kind=tms", "target.identities=1", "target.steps=60"],
        pytest.param(
            ["components.start=random", "components.importance=vector", "target.steps=60"],
            marks=pytest.mark.slow,
        ),
        ["penalty.form=lp", "penalty.p_start=2", "penalty.beta=0.2", "target.steps=60"],
        pytest.param(
            ["components.importance=shared", "target.networks=2", "target.steps=60"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_option_runs(sets: list[str], tmp_path: Path) -> None:
    quick = [*QUICK, "training.steps=20", "components.decompositions=1", "components.per_site=8"]
    summary = runner.execute(runner.load("tms-components", [*quick, *sets]), tmp_path / "run")
    assert summary["identity_error"] >= 0
    assert ("hidden_layers.0" in summary["sites"]) == ("target.identities=1" in sets)
    assert summary["runs"] == (2 if "target.networks=2" in sets else 1)


@pytest.mark.slow
def test_a_residual_mlp_is_taken_apart(tmp_path: Path) -> None:
    sets = ["target.features=12", "target.width=16", "target.hidden=6", "target.layers=2"]
    sets += [
        "target.orthonormal=true",
        "target.steps=100",
        "components.per_site=14",
        *QUICK,
        "components.decompositions=2",
    ]
    summary = runner.execute(runner.load("resid-mlp-components", sets), tmp_path / "run")
    assert len(summary["sites"]) == 4
    low, high = summary["monosemantic_w_in"]
    assert 0 <= low <= high <= 28
    mechanisms = runner.mechanisms_of(Run(tmp_path / "run"))
    assert bool(torch.isfinite(mechanisms.values()).all())


def test_bad_configs_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for sets, message in (
        (["components.per_site=0"], "components.per_site"),
        (["target.weights=missing.safetensors"], "no file"),
        ([f"target.weights={tmp_path / 'bad.safetensors'}"], "bad.safetensors"),
        (["target.kind=residual", "target.weights=w.safetensors"], "kind 'tms'"),
        (["target.kind=residual", "target.identities=1"], "kind 'tms'"),
        (["target.orthonormal=true", "target.width=4"], "target.width of at least 5"),
        (["evaluation.pgd=[]"], "evaluation.pgd is empty"),
        (["penalty.form=l1"], "penalty.form"),
    ):
        with pytest.raises(InputError, match=message):
            runner.execute(runner.load("tms-components", sets), tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_five_networks_are_solved(tmp_path: Path) -> None:
    sets = ["target.networks=5", "components.decompositions=1"]
    summary = runner.execute(runner.load("tms-components", sets), tmp_path / "run")
    assert summary["identity_error"] == 0
    assert summary["mmcs"] >= 0.999
    for ratios in (summary["ml2r"], summary["ml2r_decoder"]):
        assert 0.99 <= ratios[0] <= ratios[1] <= 1.01


@pytest.mark.slow
def test_an_identity_layer_has_two_components(tmp_path: Path) -> None:
    sets = ["target.identities=1", "components.decompositions=1"]
    summary = runner.execute(runner.load("tms-components", sets), tmp_path / "run")
    assert summary["identity_error"] == 0
    assert summary["dense_error"] == 0
    assert summary["mmcs"] >= 0.995


@pytest.mark.slow
def test_a_hundred_functions_of_fifty_neurons_are_a_hundred_components(tmp_path: Path) -> None:
    summary = runner.execute(runner.load("resid-mlp-components"), tmp_path / "run")
    low, high = summary["monosemantic_w_in"]
    assert 98 <= low <= high <= 102
    assert summary["alive"]["layers.0.mlp_in"] <= 102


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder of the GPT-2 architecture and a text file."""
    home = tmp_path_factory.mktemp("own")
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), layers=2, width=16, heads=2, context=16, seed=0)
    (home / "text.txt").write_text("\n".join(agreement_text(200)))
    return save_language_model(home / "model", model, tokenizer), home / "text.txt"


def language_sets(own: tuple[Path, Path]) -> list[str]:
    return [
        f"target.path={own[0]}",
        f"data.path={own[1]}",
        "data.length=12",
        "data.held_out=6",
        "sites=[transformer.h.*.mlp.c_*, transformer.wte]",
        "components.per_site=10",
        "components.width=16",
        "components.hidden=16",
        "training.steps=15",
        "training.warmup_steps=10",
        "training.batch=4",
        "pgd=[3, 6]",
    ]


def test_components_of_a_users_model_on_a_users_text(
    own: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = runner.load("components", language_sets(own))
    planned = runner.plan(recipe)
    assert planned["sites"]["count"] == 5
    assert planned["memory_gb"]["fits"] is True
    summary = runner.execute(recipe, tmp_path / "run")
    assert summary["components"] == 50
    assert len(summary["sites"]) == 5
    assert summary["kl"]["unmasked"] >= 0
    run = Run(tmp_path / "run")
    masks = {row["masks"]: row for row in run.table("reconstruction.parquet").to_dicts()}
    assert masks["zero"]["ce_unrecovered"] == pytest.approx(1)
    mechanisms = runner.mechanisms_of(run)
    scores = attribute(mechanisms, Gradient())
    assert scores.values["transformer.wte"].shape == (6, 12, 10)
    assert runner.study_of(run).contexts(run).height == 6  # type: ignore[attr-defined]
    assert "Where do they matter" in run.path("report.html").read_text()


OPTIONS = ["frontier=[0.01]", "seeds=2", "singular=true", "split=true"]


def test_frozen_singular_parts_stay_and_their_importances_are_learned(
    own: tuple[Path, Path], tmp_path: Path
) -> None:
    sets = [*language_sets(own), "sites=[transformer.h.0.mlp.c_*]", "pgd=[3]"]
    sets += ["components.start=singular", "components.frozen=true"]
    sets += ["components.importance=relative", "training.steps=4", "training.faithfulness=1"]
    summary = runner.execute(runner.load("components", sets), tmp_path / "run")
    assert summary["kl"]["unmasked"] >= 0
    saved = Run(tmp_path / "run").tensors("decomposition.safetensors")
    mechanisms = runner.mechanisms_of(Run(tmp_path / "run"))
    for index, site in enumerate(mechanisms.found.sites):
        sizes = torch.linalg.svdvals(site.matrix(mechanisms.target.model).detach())[:10]
        torch.testing.assert_close(saved[f"V.{index}"].square().sum(0), sizes)
        assert bool(saved[f"importance.w2.{index}"].any())
    with pytest.raises(InputError, match="17 components and its matrix 16 singular parts"):
        runner.execute(
            runner.load("components", [*sets, "components.per_site=17"]), tmp_path / "more"
        )


def test_every_option_of_a_language_model_is_reported(
    own: tuple[Path, Path], tmp_path: Path
) -> None:
    sets = [*language_sets(own), *OPTIONS, "components.importance=shared", "pgd=[3]"]
    sets += ["sites=[transformer.h.*.mlp.c_*, transformer.wte, lm_head]", "training.steps=10"]
    summary = runner.execute(runner.load("components", sets), tmp_path / "run")
    assert summary["tied"] == {"transformer.wte": ["lm_head"]}
    run = Run(tmp_path / "run")
    assert run.table("frontier.parquet").height == 2
    assert {row["coefficient"] for row in summary["frontier"]} == {1e-3, 1e-2}
    assert all(row["kl_pgd_3_singular"] > 0 for row in summary["frontier"])
    assert summary["seeds"]["components"] >= summary["seeds"]["matched"] > 0
    singular = run.table("singular.parquet")
    assert singular.height == 6
    by_site = singular.filter(singular["chosen"] == "by site")
    for l0 in by_site["l0"]:
        assert l0 == pytest.approx(summary["l0"], rel=0.05)
    split = {row["number"]: row for row in run.table("split.parquet").to_dicts()}
    assert split["alive"]["after"] == split["alive"]["before"] + 1
    assert split["minimality"]["after"] > split["minimality"]["before"]
    assert split["kl_stochastic"]["expected"] is None
    assert set(summary["split"]["invariant"]) == {
        "kl_unmasked",
        "kl_ci",
        "kl_rounded",
        "kl_zero",
        "ce_difference_ci",
    }
    assert summary["split"]["as_expected_within"] < 1e-3
    text = run.path("report.html").read_text()
    for words in ("singular vectors as good", "count parts", "a component less", "other seeds"):
        assert words in text


def test_controls_change_what_they_name(own: tuple[Path, Path], tmp_path: Path) -> None:
    sets = [*language_sets(own), "target.random=true", "seed=7"]
    config = runner.load("components", sets).config
    drawn, again = load_inputs(config, None), load_inputs(config, None)
    plain = load_inputs(runner.load("components", language_sets(own)).config, None)
    for (name, one), two in zip(
        drawn.model.model.named_parameters(), again.model.model.parameters(), strict=True
    ):
        assert torch.equal(one, two)
        assert one.ndim < 2 or not torch.equal(one, plain.model.model.get_parameter(name))
    fewer = load_inputs(
        runner.load("components", [*language_sets(own), "data.share=0.25"]).config, None
    )
    assert torch.equal(fewer.held, plain.held)
    assert torch.equal(fewer.ids, plain.ids[: round(len(plain.ids) / 4)])
    random = runner.execute(runner.load("components", sets), tmp_path / "run")
    mechanisms = runner.mechanisms_of(Run(tmp_path / "run"))
    weight = mechanisms.target.model.get_parameter("transformer.wte.weight")
    assert torch.equal(weight, drawn.model.model.get_parameter("transformer.wte.weight"))
    assert random["kl"]["zero"] >= 0


def test_text_of_another_vocabulary_is_refused(own: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("colourless green ideas sleep furiously " * 40)
    sets = [*language_sets(own), f"data.path={tmp_path / 'text.txt'}"]
    with pytest.raises(InputError, match="give a text in its vocabulary"):
        runner.execute(runner.load("components", sets), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_run_of_a_users_model_resumes_to_the_same_numbers(
    own: tuple[Path, Path], tmp_path: Path
) -> None:
    sets = [*language_sets(own), "training.steps=250"]
    words = [word for entry in sets for word in ("--set", entry)]
    command = [sys.executable, "-m", "assay", "run", "components", *words, "-o"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "components.pt").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    recipe = runner.load("components", sets)
    resumed = runner.execute(recipe, killed, resume=True)
    whole = runner.execute(recipe, tmp_path / "whole")
    for summary in (resumed, whole):
        summary.pop("seconds")
    assert resumed == whole


@pytest.mark.slow
def test_the_agreement_model_is_taken_apart(tmp_path: Path) -> None:
    """A few steps of the recipe: its sentences, padding, and every matrix with the tied one."""
    sets = ["training.steps=20", "training.warmup_steps=20", "data.held_out=6", "pgd=[3]"]
    sets += ["target.agreement.steps=40", "target.agreement.required=0", "components.per_site=12"]
    summary = runner.execute(runner.load("agreement-components", sets), tmp_path / "run")
    assert summary["ranks"] == 9 * 64
    assert summary["tied"] == {"transformer.wte": ["lm_head"]}
    mechanisms = runner.mechanisms_of(Run(tmp_path / "run"))
    assert len(mechanisms.batch) == 18
    assert not bool(mechanisms.batch.inputs["attention_mask"].all())
    assert mechanisms.routed is not None


def test_bad_language_configs_are_refused(own: tuple[Path, Path], tmp_path: Path) -> None:
    for sets, message in (
        (["sites=[transformer.h.*.mlp.up]"], "unknown module path"),
        (["components.per_site=0"], "components.per_site"),
        (["sites=[]"], "sites is empty"),
        (["components.width=18"], "cannot be split into 4 heads"),
        (["data.held_out=100000"], "needs twice as many"),
        (["data.path=none.txt"], "no file"),
        (["pgd=[]"], "pgd is empty"),
        (["target.train=true"], "goes with neither target.path nor data.path"),
        (["data.share=0"], "data.share"),
    ):
        with pytest.raises(InputError, match=message):
            runner.execute(
                runner.load("components", [*language_sets(own), *sets]), tmp_path / "run"
            )
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="your own model and text"):
        recipes.load("components").config.require()


def test_the_reference_configuration_is_planned_without_loading_anything() -> None:
    planned = runner.plan(runner.load("llama-components"))
    assert planned["sites"]["count"] == 27
    assert planned["sites"]["components"] == 27 * 49_152
    assert planned["parameters"]["factors"] == 27 * 49_152 * (4096 + 14_336)
    assert planned["coefficients"]["coefficient"] == 5e-6
    assert planned["coefficients"]["beta_at_common"] == pytest.approx(0.2)
    assert planned["coefficients"]["dead_component_firings"] == pytest.approx(16.6, abs=0.05)
    assert planned["coefficients"]["dead_site_loss"] == pytest.approx(1.42, abs=0.005)
    assert all(row["factor"] == 1 and row["keep"] for row in planned["terms"])
    smaller = runner.plan(runner.load("llama-components", ["training.batch=256"]))
    change = {round(100 * row["penalty"], 1) for row in smaller["batch"]}
    assert change == {-4.6, -5.4, -6.6, -8.4}
    assert smaller["coefficients"]["beta_at_rare"] > smaller["coefficients"]["beta_at_common"] > 0.2
    fewer = runner.plan(runner.load("llama-components", ["reference.sites=3"]))
    factors = {row["term"]: row["factor"] for row in fewer["terms"]}
    assert factors["importance minimality, sites"] == 1
    assert factors["faithfulness, sum / numel"] == pytest.approx(1 / 9)


def test_a_study_without_a_dry_run_says_so() -> None:
    with pytest.raises(InputError, match="has no dry run"):
        runner.plan(runner.load("tms-components"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("scalar", {"hidden": 5}),
        ("vector", {"hidden": 5}),
        ("shared", {"hidden": 5}),
        ("relative", {"hidden": 5}),
        ("transformer", {"hidden": 5, "width": 8, "blocks": 3, "heads": 2}),
        ("scalar", {}),
        ("vector", {}),
        ("shared", {}),
        ("relative", {}),
        ("transformer", {}),
    ],
)
def test_importance_functions_have_as_many_parameters_as_planned(name, options) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Linear(6, 7))
    found = decomposition(model, "*", 5, importance=name, **options)
    counted = sum(entry.numel() for entry in found.importance.parameters())
    assert count_importance(name, found.sites, **options) == counted


def test_a_step_takes_as_many_operations_as_planned() -> None:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    found = decomposition(model, "*", 40, importance="shared", hidden=24, generator=generator)
    problem = Problem(model, found, Objective((Recon(),)), generator)
    with FlopCounterMode(display=False) as counter:
        loss, _ = problem(Rows(torch.randn(50, 48, generator=generator)), 0.5)
        loss.backward()
    planned = plan_training(
        found.sites,
        positions=50,
        passes=1,
        model_parameters=sum(entry.numel() for entry in model.parameters()),
        model_activations=128,
        importance="shared",
        hidden=24,
    )
    assert planned.flops == pytest.approx(counter.get_total_flops(), rel=0.25)
    assert planned.state == 16 * sum(entry.numel() for entry in found.parameters())
    assert planned.memory == planned.state + planned.model + planned.activations
