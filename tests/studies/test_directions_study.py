"""The directions studies of language models end to end, on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from assay.attribution import Gradient, attribute
from assay.errors import InputError
from assay.io.prompts import read_pairs
from assay.io.runs import Run
from assay.mechanisms.directions import around
from assay.mechanisms.directions.steps import step_of_divergence
from assay.studies import runner
from assay.targets.agreement import agreement_text, build_model, build_tokenizer
from assay.targets.language import load_language_model, save_language_model


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder of the GPT-2 architecture and a text file."""
    home = tmp_path_factory.mktemp("own")
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), layers=2, width=16, heads=2, context=16, seed=0)
    (home / "text.txt").write_text("\n".join(agreement_text(200)))
    return save_language_model(home / "model", model, tokenizer), home / "text.txt"


def test_directions_of_a_users_model_on_a_users_text(
    own: tuple[Path, Path], tmp_path: Path
) -> None:
    model, text = own
    sets = [
        f"target.path={model}",
        f"data.path={text}",
        "data.length=12",
        "data.windows=24",
        "k=5",
        "parameters=transformer.h.1.attn.c_*",
    ]
    summary = runner.execute(runner.load("directions", sets), tmp_path / "run")
    assert summary["parameters"]["count"] == 16 * 48 + 48 + 16 * 16 + 16
    assert 0 <= summary["error"] < 1
    assert summary["stability"] <= 1
    run = Run(tmp_path / "run")
    table = run.table("directions.parquet")
    assert table["score"].is_sorted(descending=True)
    assert bool(table["own KL"].is_finite().all())
    vectors = run.tensors("directions.safetensors")["directions"]
    torch.testing.assert_close(
        vectors @ vectors.T, torch.eye(5, dtype=torch.float64), rtol=1e-3, atol=1e-3
    )
    assert attribute(runner.mechanisms_of(run), Gradient()).values["directions"].shape == (24, 5)
    assert runner.study_of(run).contexts(run).height == 24  # type: ignore[attr-defined]


def test_bad_input_of_a_users_model_is_refused(own: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = own
    ours = [f"target.path={model}", f"data.path={text}", "data.length=12", "data.windows=24"]
    for sets, message in (
        ([], "target.path=MODEL_DIR"),
        ([ours[0], "data.path=missing.txt"], "no file"),
        ([*ours, "parameters=transformer.h.1.atn.*"], "unknown parameter pattern"),
        ([*ours, "parameters=transformer.wte.*"], "per-token gradients are for linear layers"),
        ([*ours, "k=500", "parameters=transformer.h.1.attn.c_proj.bias"], "at most 16"),
    ):
        with pytest.raises(InputError, match=message):
            runner.execute(
                runner.load("directions", sets), tmp_path / message[:8].strip().replace(".", "-")
            )


def chosen_by_effect(folder: Path, prompts: int, kl: float) -> str:
    """Return the direction whose step of equal KL moves the logit difference most on the prompts
    that the directions were found on.
    """
    run = Run(folder)
    model = load_language_model(run.path("model"))
    pairs = read_pairs(run.path("pairs/nounpp.jsonl"), model.tokenizer).take(slice(0, prompts))
    inputs = {"input_ids": pairs.clean, "attention_mask": pairs.mask}
    local = around(model.model, inputs, "transformer.h.0.attn.*")

    def differences(output: torch.Tensor) -> torch.Tensor:
        at_verb = output[torch.arange(prompts), pairs.last]
        return at_verb.gather(1, pairs.answers).diff(dim=1)[:, 0]

    with torch.no_grad():
        before = differences(local.output())
        effects = []
        for row in run.tensors("directions.safetensors")["directions"]:
            moved = [
                differences(local.moved(way, step_of_divergence(local, way, kl)))
                for way in (row, -row)
            ]
            effects.append(max(float((after - before).abs().mean()) for after in moved))
    return str(max(range(len(effects)), key=effects.__getitem__))


@pytest.mark.slow
def test_agreement_study_runs_on_a_tiny_model_and_takes_a_saved_one(tmp_path: Path) -> None:
    tiny = [
        "target.layers=1",
        "target.width=16",
        "target.heads=2",
        "target.steps=20",
        "target.required=0",
        "prompts=6",
        "k=3",
        "kl=1e-4",
    ]
    summary = runner.execute(runner.load("agreement-directions", tiny), tmp_path / "run")
    table = Run(tmp_path / "run").table("steps.parquet")
    assert table.height == 2 * 4
    assert 0 <= summary["number_away"] <= 1
    assert summary["number_effect"] in table["effect"].to_list()
    assert summary["number_direction"] == chosen_by_effect(tmp_path / "run", 6, 1e-4)
    again = runner.execute(
        runner.load("agreement-directions", [*tiny, f"target.path={tmp_path / 'run'}"]),
        tmp_path / "again",
    )
    assert again == summary
    assert attribute(runner.mechanisms_of(Run(tmp_path / "again")), Gradient()).values[
        "directions"
    ].shape == (6, 3)


def test_agreement_study_refuses_bad_input(tmp_path: Path) -> None:
    for sets, message in (
        (["block=2"], "has 2 blocks"),
        ([f"target.path={tmp_path}"], "no run in"),
    ):
        with pytest.raises(InputError, match=message):
            runner.execute(
                runner.load("agreement-directions", sets), tmp_path / message[:5].strip()
            )


@pytest.mark.slow
def test_the_number_direction_moves_agreement_most_on_new_prompts_too(tmp_path: Path) -> None:
    """Chosen on other prompts, so that a rival may come within the noise of the choice."""
    summary = runner.execute(runner.load("agreement-directions"), tmp_path / "run")
    assert summary["number_effect"] > 0.9 * summary["next_effect"]
    assert summary["number_effect"] > 3 * summary["eigenvector_effect"]
    assert summary["number_away"] <= 0.1
