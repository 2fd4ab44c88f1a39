"""The crosscoder study on a language model of another family, through the command: training,
files, verbs, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from assay import cli
from assay.errors import InputError
from assay.io.runs import Run
from assay.mechanisms.crosscoder import hash_of, load
from assay.studies import runner, verbs
from assay.targets.agreement import agreement_text, build_tokenizer
from assay.targets.language import load_language_model, save_language_model

QUICK = [
    "data.length=8",
    "data.held_out=8",
    "data.shown=6",
    "features=24",
    "k=4",
    "training.steps=8",
    "training.batch=64",
    "training.save_every=4",
]


def make(folder: Path, seed: int) -> Path:
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(seed)
    return save_language_model(folder, LlamaForCausalLM(config), tokenizer)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model") / "m", 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(agreement_text(200, seed=0)))
    return path


def words(model: Path, text: Path, *more: str) -> list[str]:
    return [f"target.path={model}", f"data.path={text}", *QUICK, *more]


def command(verb: str, model: Path, text: Path, out: Path, *more: str) -> list[str]:
    sets = [word for entry in words(model, text, *more) for word in ("--set", entry)]
    return [verb, "crosscoder", *sets, "-o", str(out)]


@pytest.mark.slow
def test_a_model_of_a_user_gives_a_crosscoder(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    cli.app([*command("run", model, text, out), "--json"], standalone_mode=False)
    summary = json.loads(capsys.readouterr().out)
    assert summary["family"] == "llama"
    assert len(summary["fvu"]) == 2
    assert summary["l0"] > 0
    found = load(out)
    assert found.model_hash == hash_of(load_language_model(model).model)
    assert (found.width, found.size, len(found.sites)) == (16, 24, 2)
    page = (out / "report.html").read_text()
    assert "Layer by layer" in page
    assert "Training" in page
    _, table = verbs.attribute_run(out, top=3)
    assert table.height == 3
    assert verbs.ablate_run(out, [table["part"][0]])[1].height
    assert verbs.compare_runs(out, out)[1].height
    part = next(name for name in table["part"].to_list())
    assert "text" in verbs.explain_run(out, part, top=2)[1].columns
    cli.app([*command("run", model, text, out), "--resume", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == summary
    again = runner.execute(
        runner.load("crosscoder", words(model, text, f"path={out}")), tmp_path / "loaded"
    )
    assert again["fvu"] == summary["fvu"]
    state = found.state_dict()
    outside = tmp_path / "outside"
    outside.mkdir()
    torch.save(
        {
            "encoder.weight": state["W_enc"],
            "encoder.bias": state["b_enc"],
            "decoder.weight": state["W_dec"].transpose(0, 1).contiguous(),
            "decoder.bias": state["b_dec"],
            "threshold": state["threshold"],
        },
        outside / "ae.pt",
    )
    theirs = runner.execute(
        runner.load("crosscoder", words(model, text, f"path={outside}")), tmp_path / "theirs"
    )
    assert theirs["fvu"] == pytest.approx(summary["fvu"])
    assert theirs["model_hash"] == summary["model_hash"]
    other = make(tmp_path / "other", 1)
    with pytest.raises(InputError, match="was trained on another network"):
        runner.execute(runner.load("crosscoder", words(other, text, f"path={out}")), tmp_path / "n")
    with pytest.raises(InputError, match="not the sites"):
        runner.execute(
            runner.load(
                "crosscoder", words(model, text, f"path={out}", "sites=blocks.*.hook_mlp_out")
            ),
            tmp_path / "n",
        )


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_other_activations_are_trained(
    activation: str, model: Path, text: Path, tmp_path: Path
) -> None:
    chosen = words(model, text, f"activation={activation}", "training.steps=40")
    summary = runner.execute(runner.load("crosscoder", chosen), tmp_path / "run")
    assert summary["activation"] == activation
    metrics = Run(tmp_path / "run").metrics()["losses/reconstruction"].drop_nulls().to_list()
    assert metrics[-1] < 0.9 * metrics[0]


def test_bad_input_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def refused(*more: str) -> None:
        runner.execute(runner.load("crosscoder", words(model, text, *more)), out)

    with pytest.raises(InputError, match="did you mean"):
        refused("sites=blocks.0.hook_resid_pst")
    with pytest.raises(InputError, match="names heads; a crosscoder reads whole vectors"):
        refused("sites=blocks.*.attn.hook_z")
    with pytest.raises(InputError, match="different widths"):
        refused("sites=[blocks.0.hook_resid_post, blocks.0.mlp.hook_post]")
    with pytest.raises(InputError, match="k = 40 is more than the 24 features"):
        refused("k=40")
    with pytest.raises(InputError, match="holds no crosscoder"):
        refused(f"path={tmp_path}")
    with pytest.raises(InputError, match="shown = 9 is more than"):
        refused("data.shown=9")
    with pytest.raises(InputError, match="takes your own model and text"):
        runner.execute(runner.load("crosscoder", QUICK), out)
    assert not out.exists()
