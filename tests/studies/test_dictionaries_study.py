"""The dictionaries study on a small network, through the command: training, files, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from assay import cli
from assay.dictionaries.load import load_dictionaries
from assay.errors import InputError, StoppedError
from assay.io.runs import Run
from assay.io.texts import read_text
from assay.learn.reading import Reader, rows_of
from assay.studies import runner
from assay.studies.dictionaries import study
from assay.targets.agreement import agreement_text, build_model, build_tokenizer
from assay.targets.language import load_language_model, save_language_model

QUICK = [
    "data.length=8",
    "data.held_out=8",
    "features=32",
    "k=4",
    "training.steps=8",
    "training.batch=64",
    "training.windows=4",
    "training.save_every=4",
]
SITES = ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = build_tokenizer()
    stop = tokenizer.eos_token_id
    made = build_model(len(tokenizer), layers=2, width=16, heads=2, context=16, seed=0, stop=stop)
    return save_language_model(tmp_path_factory.mktemp("model") / "m", made, tokenizer)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(agreement_text(200, seed=0)))
    return path


def words(model: Path, text: Path, *more: str) -> list[str]:
    return [f"target.path={model}", f"data.path={text}", *QUICK, *more]


def command(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    sets = [word for entry in words(model, text, *more) for word in ("--set", entry)]
    return ["train", "dictionaries", *sets, "-o", str(out)]


@pytest.mark.slow
def test_a_text_gives_dictionaries_in_the_format_of_saelens(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    line = command(model, text, out, "sites=blocks.*.hook_mlp_out", "architecture=batchtopk")
    cli.app([*line, "--json"], standalone_mode=False)
    summary = json.loads(capsys.readouterr().out)
    assert summary["sites"] == SITES
    assert summary["features"] == dict.fromkeys(SITES, 32)
    saved = load_dictionaries(out / "dictionaries")
    assert list(saved) == SITES
    config = json.loads((out / "dictionaries" / SITES[0] / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == SITES[0]
    assert config["architecture"] == "jumprelu"
    found = load_language_model(model)
    ids = torch.randint(3, 40, (4, 8), generator=torch.Generator().manual_seed(0))
    values = Reader(found.model, SITES)(rows_of(ids))
    assert saved[SITES[0]].dictionary(values[SITES[0]]).shape == values[SITES[0]].shape
    run = Run(out)
    assert "all at once" in run.table("evaluation.parquet")["site"].to_list()
    page = run.path("report.html").read_text()
    assert "PCA" in page
    assert "None, 95 %" not in page
    again = runner.execute(
        runner.load("dictionaries", words(model, text, f"sites={SITES}"), resumes=out),
        tmp_path / "other",
    )
    assert again["loss_recovered"] != {}
    cli.app([*command(model, text, out), "--resume", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == summary


@pytest.mark.slow
def test_a_text_alone_gives_a_model_and_its_dictionaries(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["target.width=16", "target.heads=2", "target.vocabulary=300", "target.steps=6"]
    sets = [word for entry in (f"data.path={text}", *QUICK, *own) for word in ("--set", entry)]
    cli.app(["run", "text-dictionaries", *sets, "--dry-run", "--json"], standalone_mode=False)
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 6
    out = tmp_path / "run"
    line = ["run", "text-dictionaries", *sets, "-o", str(out), "--json"]
    train = study.train

    def killed(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "train", killed)
    with pytest.raises(StoppedError):
        cli.app(line, standalone_mode=False)
    monkeypatch.setattr(study, "train", train)
    cli.app([*line, "--resume"], standalone_mode=False)
    summary = json.loads(capsys.readouterr().out)
    assert len(summary["loss_recovered"]) == 6
    # What evaluates the dictionaries is what the model's own training held out.
    model = load_language_model(out / "model")
    ids = read_text(text, model.tokenizer, length=8)
    kept = len(ids) - len(ids) // 10
    held = {tuple(row) for row in ids[kept:].tolist()}
    _, rows, test = study._inputs(runner.config_of(Run(out)), Run(out))
    assert len(rows) == kept
    assert {tuple(row) for row in test.ids.tolist()} <= held


def test_a_dry_run_loads_nothing(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.app([*command(model, text, tmp_path / "no"), "--dry-run", "--json"], standalone_mode=False)
    planned = json.loads(capsys.readouterr().out)
    assert len(planned["sites"]) == 6
    assert planned["sites"][0]["features"] == 32
    assert planned["memory_gb"]["fits"]
    assert not (tmp_path / "no").exists()


def test_bad_input_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def refused(*more: str, where: Path = text) -> None:
        runner.execute(runner.load("dictionaries", words(model, where, *more)), out)

    with pytest.raises(InputError, match=r"did you mean blocks\.0\.hook_mlp_out"):
        refused("sites=blocks.0.hook_mlpout")
    with pytest.raises(InputError, match="k = 40 is more than the 32 features"):
        refused("k=40")
    with pytest.raises(InputError, match="architecture"):
        refused("architecture=topp")
    with pytest.raises(InputError, match="takes your own model and text"):
        runner.execute(runner.load("dictionaries", QUICK), out)
    with pytest.raises(
        InputError, match=r"target\.train trains a model and target\.path names one"
    ):
        refused("target.train=true")
    small = [f"data.path={text}", "target.heads=3"]
    with pytest.raises(InputError, match=r"multiple of target\.heads, got 64 and 3"):
        runner.execute(runner.load("text-dictionaries", small), out)
    empty, foreign = tmp_path / "empty.txt", tmp_path / "foreign.txt"
    empty.write_text("")
    foreign.write_text("zxcv qwer asdf " * 200)
    with pytest.raises(InputError, match="holds 0 tokens"):
        refused(where=empty)
    with pytest.raises(InputError, match="unknown to the model's tokenizer"):
        refused(where=foreign)
    few = tmp_path / "few.txt"
    few.write_text("the dog barks . " * 12)
    short = [f"data.path={few}", "data.length=16", "target.vocabulary=257"]
    with pytest.raises(InputError, match="at least 20 are needed, as the last tenth is held out"):
        runner.execute(runner.load("text-dictionaries", short), out)
    with pytest.raises(InputError, match="did you mean dictionaries"):
        cli.app(["train", "dictionary"], standalone_mode=False)
    assert not out.exists()
