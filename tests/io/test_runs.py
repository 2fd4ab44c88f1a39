"""Run folders: what is refused, what a resume accepts, what survives a kill."""

from __future__ import annotations

import pytest

from assay.errors import InputError
from assay.io import runs

CONFIG = {"recipe": "r", "config": {"seed": 0, "training": {"steps": 3}}}


def test_new_resumed_and_forced(tmp_path):
    folder = tmp_path / "run"
    run = runs.start(folder, CONFIG)
    assert run.json("config.json") == CONFIG
    assert run.json("versions.json")["torch"]
    with pytest.raises(InputError, match="already exists; use --resume"):
        runs.start(folder, CONFIG)
    run.save_json("summary.json", {"a": 1})
    assert runs.start(folder, CONFIG, resume=True).has("summary.json")
    other = {"recipe": "r", "config": {"seed": 0, "training": {"steps": 4}}}
    with pytest.raises(InputError, match=r"config\.training\.steps: 3 there, 4 here"):
        runs.start(folder, other, resume=True)
    (folder / "inner").mkdir()
    fresh = runs.start(folder, other, force=True)
    assert not fresh.has("summary.json")
    assert not fresh.has("inner")


def test_folders_that_are_not_runs_are_never_touched(tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    for options in ({"resume": True}, {"force": True}):
        with pytest.raises(InputError, match="not a run folder"):
            runs.start(tmp_path, CONFIG, **options)
    with pytest.raises(InputError, match="is a file"):
        runs.start(tmp_path / "precious.txt", CONFIG)
    with pytest.raises(InputError, match="no run in"):
        runs.opened(tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_metrics_lines_cut_by_a_kill_are_left_out_and_forgotten_steps_return(tmp_path):
    run = runs.start(tmp_path / "run", CONFIG)
    for step in range(4):
        run.log("a", step, {"loss": float(step)})
    run.log("b", 9, {"loss": 1.0})
    with run.path("metrics.jsonl").open("a") as stream:
        stream.write('{"phase": "a", "st')
    run.forget_after("a", 1)
    table = run.metrics()
    assert table.filter(table["phase"] == "a")["step"].to_list() == [0, 1]
    assert table.filter(table["phase"] == "b")["step"].to_list() == [9]
