"""Typos and missing files are answered in one line, before PyTorch is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from assay.proofs.max_of_k.strategies import STRATEGIES
from assay.proofs.max_of_k.tables import LEVELS
from assay.studies import names
from assay.targets.metrics import METRICS

RUN = """
import contextlib, io, json, sys
from assay import cli
found = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["assay", *words]
    errors = io.StringIO()
    code = None
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as ended:
        code = ended.code
    loaded = sorted({"torch", "transformers", "altair"} & set(sys.modules))
    found.append((words, code, errors.getvalue(), loaded))
print(json.dumps(found))
"""


def test_the_names_are_those_of_the_package() -> None:
    assert set(names.STRATEGIES) == set(STRATEGIES)
    assert set(names.LEVELS) == set(LEVELS)
    assert set(names.METRICS) == set(METRICS)


def test_typos_and_missing_files_need_no_pytorch(tmp_path: Path) -> None:
    here, there = tmp_path / "w.safetensors", tmp_path / "c.json"
    here.write_bytes(b"")
    there.write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "list.yaml").write_text("study: [a]\n")
    (tmp_path / "five.yaml").write_text("study: channels\ntraining: 5\n")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfstudy: channels\nseed: -1\n")
    (tmp_path / "digits.yaml").write_text("study: channels\nseed: " + "9" * 6000 + "\n")
    (tmp_path / "deep.yaml").write_text("study: " + "[" * 20000 + "]" * 20000 + "\n")
    pairs = ["--set", f"data.pairs={there}"]
    cases: list[tuple[list[str], str]] = [
        (["run", "tms-directins"], "did you mean tms-directions"),
        (["atribute", "x"], "Did you mean 'attribute'"),
        (["run", "max-of-k", "--set", "model.width"], "--set takes key=value"),
        (["run", "max-of-k", "--set", "model.widht=3"], "did you mean model.width"),
        (["run", "max-of-k", "--set", "seed=-1"], "greater than or equal to 0"),
        (["run", "max-of-k", "--set", "model.vocabulary=1"], "greater than or equal to 2"),
        (["run", "max-of-k", "--set", "model.positions=1"], "greater than or equal to 2"),
        (["run", "max-of-k", "--set", "proofs.strategies=[bset]"], "did you mean best"),
        (["run", "max-of-k", "--set", "proofs.level=float64"], "must be real or float32"),
        (["run", "max-of-k", "--set", f"model.path={tmp_path}/no"], "no file"),
        (
            ["run", "digits-channels", "--set", "audit.examples=16"],
            "need 18 distinct held-out examples",
        ),
        (["run", "attribution"], "this recipe takes your own model and pairs"),
        (["run", "attribution", "--set", "metric=probabilty"], "did you mean probability"),
        (["run", "attribution", "--set", "target.path=gpt2"], "needs pairs of your own"),
        (
            ["run", "attribution", "--set", f"target.path={tmp_path}/folder", *pairs],
            "holds no config.json",
        ),
        (["run", "directions", "--set", "data.path=x"], "takes your own model and text"),
        (["run", f"{tmp_path}/list.yaml"], "a recipe is a mapping"),
        (["run", f"{tmp_path}/five.yaml"], "training: Input should be"),
        (["run", f"{tmp_path}/bom.yaml"], "seed: Input should be greater"),
        (["run", f"{tmp_path}/digits.yaml"], "is not YAML"),
        (["run", f"{tmp_path}/deep.yaml"], "is not YAML"),
        (["prove", "max-of-z", str(here)], "did you mean max-of-k"),
        (["prove", "max-of-k", f"{tmp_path}/no"], "no file"),
        (["prove", "max-of-k", str(here), "--strategy", "bset"], "did you mean best"),
        (["prove", "max-of-k", str(here), "--level", "flaot32"], "did you mean float32"),
        (["check", f"{tmp_path}/no.json", "--weights", str(here)], "no file"),
        (["check", str(there), "--weights", f"{tmp_path}/no"], "no file"),
        (["attribute", str(tmp_path / "folder")], "no run in"),
        (["attribute", "x", "--method", "gradent"], "did you mean gradient"),
        (["attribute", "x", "--top", "-3"], "--top must lie between"),
        (["audit", "x", "--alpha", "2"], "--alpha must lie between"),
        (["audit", "x", "--seed", "-1"], "--seed must lie between"),
        (["audit", "x", "--exact", "0"], "--exact must lie between"),
        (["compare", "x", "y"], "no run in"),
        (["run", "max-of-k", "--resume", "--force"], "give one of them"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([words for words, _ in cases])],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    for (words, needle), (_, code, said, loaded) in zip(
        cases, json.loads(done.stdout), strict=True
    ):
        assert code == 2, (words, said)
        assert needle in said, words
        assert len(said.splitlines()) == 1, words
        assert loaded == [], words
    assert not (tmp_path / "runs").exists()


def test_names_list_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean best"):
        names.require_proof("max-of-k", __file__, "bst", "real")
    names.require_proof("max-of-k", __file__, "all", "float64")
