"""Steering from the command: settings are read, rows are saved, and a report is made of them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from html import unescape

import node_models
import pytest
import torch
from cases import random_dictionary

from assay import cli
from assay.audit.steering import steer
from assay.core.target import Batch, Target
from assay.dictionaries import Placed
from assay.io.runs import opened, start
from assay.mechanisms.features import features
from assay.studies import steer_verbs
from assay.targets.metrics import loss

SITE = "blocks.1.hook_mlp_out"


@pytest.fixture
def bound(tmp_path, monkeypatch):
    """Features, and a run's folder that stands for them."""
    ids = torch.randint(1, 31, (40, 5), generator=torch.Generator().manual_seed(0))
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {})
    target = Target(node_models.build("gpt2"), loss)
    dictionary = random_dictionary(16, 12, 3).double()
    found = features(target, {SITE: Placed(dictionary, SITE, (SITE,))}, batch, None, "zero")
    with start(tmp_path / "run", {"recipe": "stands for one"}) as run:
        run.save_json("summary.json", {})
    monkeypatch.setattr(steer_verbs, "mechanisms_of", lambda run: found)
    return found


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["assay", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err


def test_values_and_gates_make_rows_and_a_report(bound, tmp_path, monkeypatch, capsys):
    words = ["steer", tmp_path / "run", f"{SITE}[*, feature 4]=-2", "--set", f"{SITE}[pos 2, 3]=5"]
    options = [
        "--continue",
        "3",
        "--examples",
        "2",
        "--temperature",
        "0.9",
        "--seed",
        "4",
        "-o",
        tmp_path / "out",
        "--json",
    ]
    code, out, err = command(monkeypatch, capsys, *words, *options)
    assert code == 0, err
    found = json.loads(out)
    expected = steer(bound, {(SITE, (None, 4)): -2.0}, to={(SITE, (2, 3)): 5.0}, seed=4)
    assert found["change_measured"] == pytest.approx(float(expected.measured.mean()))
    assert found["gates"] == {f"{SITE}[*, 4]": -2.0}
    assert found["set_to"] == {f"{SITE}[pos 2, feature 3]": 5.0}
    assert len(found["continuations"]) == 2
    saved = opened(tmp_path / "out")
    assert saved.table("examples.parquet")["measured"].to_list() == expected.measured.tolist()
    html = (tmp_path / "out" / "report.html").read_text()
    for part in ("What was set", "measured, and predicted with its bar", "What the model says"):
        assert part in html
    line = unescape(re.search(r"Run again with: (assay steer .*?)</p>", html)[1])
    said = [word.replace("NEW_FOLDER", str(tmp_path / "again")) for word in shlex.split(line)]
    code, out, err = command(monkeypatch, capsys, *said[1:], "--json")
    assert code == 0, err
    assert json.loads(out) == {**found, "report": str(tmp_path / "again" / "report.html")}
    (tmp_path / "out" / "report.html").unlink()
    code, out, err = command(monkeypatch, capsys, "report", tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "out" / "report.html").read_text() == html


BAD = {
    "another form": (["--set", "big"], "a setting is written PART=VALUE"),
    "no number": ([f"{SITE}[*, 4]=big"], "a setting is written PART=GATE"),
    "a gate that is not finite": ([f"{SITE}[*, 4]=nan"], "is nan; give a finite number"),
    "a value that is not finite": (["--set", f"{SITE}[*, 4]=inf"], "is set to inf"),
    "a gate too large": ([f"{SITE}[*, 4]=-1e309"], "is -inf"),
    "a star with a number": ([f"{SITE}[1*, 4]=2"], "* stands alone"),
    "a position outside": ([f"{SITE}[9, 4]=2"], "below 5 and 12 in turn"),
    "a feature outside": (["--set", f"{SITE}[*, 12]=2"], "below 5 and 12 in turn"),
    "an error with a value": (["--set", f"{SITE} error[2]=1"], "have no activation"),
    "one part twice": ([f"{SITE}[*, 4]=2", f"{SITE}[*, feature 4]=3"], "set to 2 too"),
    "one feature twice": (["--set", f"{SITE}[1, 4]=2", "--set", f"{SITE}[1, 4]=0"], "set to 2 too"),
    "nothing": ([], "no gate was given"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_settings_are_one_line(case, bound, tmp_path, monkeypatch, capsys):
    words, message = BAD[case]
    out = tmp_path / "out"
    code, _, err = command(monkeypatch, capsys, "steer", tmp_path / "run", *words, "-o", out)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not out.exists()


def test_nothing_that_is_there_is_overwritten(bound, tmp_path, monkeypatch, capsys):
    words = ["steer", tmp_path / "run", f"{SITE}[*, 4]=2", "-o", tmp_path / "run"]
    code, _, err = command(monkeypatch, capsys, *words)
    assert (code, "already exists" in err) == (2, True)
