"""Run folders: what is refused, what a resume accepts, what survives a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
import torch

from assay.errors import AssayError, InputError
from assay.io import runs
from assay.io.commits import NAME

CONFIG = {"recipe": "r", "config": {"seed": 0, "training": {"steps": 3}}}
OTHER = {"recipe": "r", "config": {"seed": 0, "training": {"steps": 4}}}


def contents(folder):
    """Return every file below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_new_resumed_and_forced(tmp_path):
    folder = tmp_path / "run"
    with runs.start(folder, CONFIG) as run:
        assert run.json("config.json") == CONFIG
        assert run.json("versions.json")["torch"]
        run.save_json("summary.json", {"a": 1})
    with pytest.raises(InputError, match="already exists; use --resume"):
        runs.start(folder, CONFIG)
    with runs.start(folder, CONFIG, resume=True) as run:
        assert run.has("summary.json")
    with pytest.raises(InputError, match=r"config\.training\.steps: 3 there, 4 here"):
        runs.start(folder, OTHER, resume=True)
    with runs.start(folder, OTHER, force=True) as fresh:
        assert not fresh.has("summary.json")
        assert fresh.json("config.json") == OTHER


def test_folders_that_are_not_runs_are_never_touched(tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    for options in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(InputError, match="not a run folder"):
            runs.start(tmp_path, CONFIG, **options)
    with pytest.raises(InputError, match="is a file"):
        runs.start(tmp_path / "precious.txt", CONFIG)
    with pytest.raises(InputError, match="cannot be"):
        runs.start(tmp_path / "precious.txt" / "run", CONFIG)
    with pytest.raises(InputError, match="no run in"):
        runs.opened(tmp_path)
    with pytest.raises(InputError, match="not a run folder"):
        runs.Run(tmp_path).log("a", 0, {})
    assert contents(tmp_path) == {"precious.txt": b"keep"}


def test_a_foreign_file_with_the_name_of_the_record_is_left_alone(tmp_path):
    for data in (b"", b"mine", b'{"mine": 1}\n', b'{"assay-run": 1}\n'):
        folder = tmp_path / str(len(data))
        folder.mkdir()
        (folder / NAME).write_bytes(data)
        (folder / "model.bin").write_bytes(b"weights")
        for options in ({}, {"resume": True}, {"force": True}):
            try:
                runs.start(folder, CONFIG, **options).close()
            except InputError:
                continue
            assert data == b"", data  # an empty one is like that of a run killed at its birth
        assert contents(folder)["model.bin"] == b"weights"
        assert contents(folder)[NAME].startswith(data)


def test_force_removes_what_assay_wrote_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    with runs.start(folder, CONFIG) as run:
        run.save_tensors("a.safetensors", {"x": torch.ones(2)})
        run.write_folder("model", lambda new: (new.mkdir(), (new / "w").write_text("w")))
        run.child("inner").log("a", 0, {"loss": 1.0})
    foreign = {"notes.txt": b"n", "model/mine.bin": b"m", "own/deep/x": b"x"}
    for name, data in foreign.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with runs.start(folder, OTHER, force=True) as run:
        assert not run.has("a.safetensors")
        assert not (folder / "inner").exists()
        found = contents(folder)
        assert set(found) == {*foreign, "config.json", "versions.json", NAME}
        assert all(found[name] == data for name, data in foreign.items())
        with pytest.raises(InputError, match=r"notes\.txt was not written by this run"):
            run.save_text("notes.txt", "ours")
        with pytest.raises(InputError, match="not written by this run"):
            run.write_folder("own", lambda new: new.mkdir())
    assert all(contents(folder)[name] == data for name, data in foreign.items())


def test_a_file_changed_since_is_neither_read_nor_replaced_nor_removed(tmp_path):
    folder = tmp_path / "run"
    with runs.start(folder, CONFIG) as run:
        run.save_table("t.parquet", pl.DataFrame({"a": [1]}))
        run.save_json("s.json", {"a": 1})
    run.path("s.json").write_text("my notes")
    before = contents(folder)
    with pytest.raises(InputError, match=r"s\.json is damaged"):
        run.json("s.json")
    with pytest.raises(InputError, match=r"s\.json was changed since Assay wrote it"):
        run.save_json("s.json", {"a": 2})
    with pytest.raises(InputError, match=r"s\.json was changed since Assay wrote it"):
        runs.start(folder, OTHER, force=True)
    assert contents(folder) == before
    run.path("s.json").unlink()
    with pytest.raises(InputError, match=r"s\.json is missing, and the run wrote it"):
        run.has("s.json")
    with pytest.raises(InputError, match=r"s\.json is missing"):
        run.json("s.json")
    with runs.start(folder, OTHER, force=True) as run:
        assert not run.has("s.json")


@pytest.mark.parametrize("name", ["t.parquet", "x.safetensors", "state.pt", "s.json", "m/w", NAME])
def test_every_flipped_byte_is_named(name, tmp_path):
    folder = tmp_path / "run"
    with runs.start(folder, CONFIG) as run:
        run.save_table("t.parquet", pl.DataFrame({"a": [1]}))
        run.save_tensors("x.safetensors", {"x": torch.ones(2)})
        run.save_state("state.pt", {"x": torch.ones(2)})
        run.save_json("s.json", {"a": 1})
        run.write_folder("m", lambda new: (new.mkdir(), (new / "w").write_text("weights")))
    whole = run.path(name).read_bytes()
    read = {
        "t.parquet": lambda run: run.table(name),
        "x.safetensors": lambda run: run.tensors(name),
        "state.pt": lambda run: run.state(name),
        "s.json": lambda run: run.json(name),
        "m/w": lambda run: run.checked("m"),
        NAME: lambda run: run.checked("m"),
    }[name]
    read(runs.opened(folder))
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        run.path(name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match=f"{folder}/{name}|{folder}/m"):
            read(runs.opened(folder))
    run.path(name).write_bytes(whole)
    read(runs.opened(folder))


def test_links_lead_nowhere(tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with runs.start(folder, CONFIG) as run:
        run.write_folder("model", lambda new: (new.mkdir(), (new / "w").write_text("w")))
        run.log("a", 0, {"loss": 1.0})
        run.save_json("s.json", {})
    shutil.copytree(folder, elsewhere)
    shutil.rmtree(folder / "model")
    (folder / "model").symlink_to(elsewhere / "model")
    with pytest.raises(InputError, match="is a link"):
        runs.start(folder, OTHER, force=True)
    with pytest.raises(InputError, match="is a link"):
        run.checked("model")
    (folder / "model").unlink()
    (folder / "s.json").unlink()
    (folder / "s.json").symlink_to(elsewhere / "s.json")
    with pytest.raises(InputError, match="was changed since"):
        runs.start(folder, OTHER, force=True)
    assert (elsewhere / "model" / "w").read_text() == "w"
    assert (elsewhere / "s.json").is_file()


def test_a_copy_by_hard_links_does_not_change_with_the_run(tmp_path):
    folder, copy = tmp_path / "run", tmp_path / "copy"
    with runs.start(folder, CONFIG) as run:
        run.log("a", 0, {"loss": 1.0})
        run.save_json("s.json", {"a": 1})
    shutil.copytree(folder, copy, copy_function=os.link)
    before = contents(copy)
    with runs.start(folder, CONFIG, resume=True) as run:
        run.log("a", 1, {"loss": 2.0})
        run.save_json("s.json", {"a": 2})
    assert contents(copy) == before
    assert runs.opened(copy).json("s.json") == {"a": 1}
    assert runs.opened(folder).metrics()["loss"].to_list() == [1.0, 2.0]


def test_an_input_of_the_new_run_is_not_removed(tmp_path):
    folder = tmp_path / "run"
    with runs.start(folder, CONFIG) as run:
        run.save_text("pairs.jsonl", "{}\n")
    (tmp_path / "hard.jsonl").hardlink_to(folder / "pairs.jsonl")
    (tmp_path / "soft.jsonl").symlink_to(folder / "pairs.jsonl")
    before = contents(tmp_path)
    for name in ("run/pairs.jsonl", "hard.jsonl", "soft.jsonl"):
        with pytest.raises(InputError, match="is an input of the new run"):
            runs.start(folder, OTHER, force=True, inputs=[tmp_path / name])
    assert contents(tmp_path) == before


HOLD = """
import sys, time
from assay.io import runs
run = runs.start(sys.argv[1], {"recipe": "r"}, resume=True)
run.save_text("mark.txt", "held")
time.sleep(60)
"""


def test_one_process_at_a_time_and_no_lock_outlives_a_kill(tmp_path):
    folder = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "mark.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for options in ({"resume": True}, {"force": True}):
            with pytest.raises(InputError, match="in use by another process"):
                runs.start(folder, {"recipe": "r"}, **options)
        assert runs.opened(folder).json("config.json") == {"recipe": "r"}  # reading is free
    finally:
        holder.kill()
        holder.wait()
    runs.start(folder, {"recipe": "r"}, resume=True).close()


DIE = """
import os, signal, sys
from pathlib import Path
from assay.io import runs

folder, what, when = sys.argv[1:]
run = runs.start(folder, {"recipe": "r"}, resume=True)
replace = Path.replace

def die(self, target):
    if when == "after":
        replace(self, target)
    os.kill(os.getpid(), signal.SIGKILL)

Path.replace = die
match what:
    case "old":
        run.save_text("old", "2")
    case "new":
        run.save_text("new", "2")
    case "folder":
        run.write_folder("folder", lambda new: (new.mkdir(), (new / "w").write_text("2")))
    case "log":
        run.forget_after("a", 0)
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["old", "new", "folder", "log"])
def test_a_write_that_a_kill_cut_short_is_settled(what, when, tmp_path):
    folder, config = tmp_path / "run", {"recipe": "r"}
    with runs.start(folder, config) as run:
        run.save_text("old", "1")
        run.log("a", 0, {})
        run.log("a", 1, {})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DIE, str(folder), what, when]
    killed = subprocess.run(command, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL

    def state(run):
        return [
            run.checked("old").read_text(),
            run.has("new") and run.checked("new").read_text(),
            run.has("folder") and run.checked("folder/w").read_text(),
            run.metrics().height,
        ]

    expected = ["1", False, False, 2]
    if when == "after":
        expected[["old", "new", "folder", "log"].index(what)] = 1 if what == "log" else "2"
    left = [path.name for path in folder.iterdir() if path.name.endswith(".part")]
    assert len(left) == (when == "before" or what == "folder")
    # Before the log's new text is in place, the record already says that its first line is all.
    seen = state(runs.opened(folder))
    assert seen == expected
    with runs.start(folder, config, resume=True) as run:
        run.save_text("more", "")  # the open commit is no longer the last one
        if what == "log":
            expected[3] = 1
    assert state(runs.opened(folder)) == expected
    assert not any(path.name.endswith(".part") for path in folder.iterdir())


def test_a_resumed_log_is_that_of_the_last_write(tmp_path):
    with runs.start(tmp_path / "run", CONFIG) as run:
        for step in range(4):
            run.log("a", step, {"loss": float(step)})
        run.log("b", 9, {"loss": 1.0})
        run.forget_after("a", 1)
        table = run.metrics()
        assert table.filter(table["phase"] == "a")["step"].to_list() == [0, 1]
        assert table.filter(table["phase"] == "b")["step"].to_list() == [9]
    with run.path("metrics.jsonl").open("a") as stream:  # a kill, after a line and a half
        stream.write('{"phase": "a", "step": 2, "loss": 9.0}\n{"phase": "a", "st')
    with runs.start(tmp_path / "run", CONFIG, resume=True) as run:
        run.log("a", 2, {"loss": 2.0})
        assert run.metrics()["loss"].to_list() == [0.0, 1.0, 1.0, 2.0]


def test_a_log_line_is_whole_or_absent_on_a_full_disk(tmp_path, monkeypatch):
    run = runs.Run(tmp_path)
    run.log("a", 0, {"loss": 0.0})
    before = run.path("metrics.jsonl").read_bytes()
    write = os.write

    def half(handle, data):
        return write(handle, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(AssayError, match="No space left on device"):
        run.log("a", 1, {"loss": 1.0})
    with pytest.raises(AssayError, match="No space left on device"):
        run.save_json("s.json", {})
    monkeypatch.undo()
    assert run.path("metrics.jsonl").read_bytes() == before
    assert not run.path("s.json").exists()
    run.save_json("s.json", {"a": 1})
    assert run.json("s.json") == {"a": 1}


def test_a_record_cannot_name_files_outside_of_its_folder(tmp_path):
    (tmp_path / "precious").write_text("keep")
    with runs.start(tmp_path / "run", CONFIG) as run:
        for name in ("../precious", "/precious", "a/../../precious", NAME):
            run._record._append({name: runs.FolderRecord(tmp_path)._state.files.get(name)})
    with pytest.raises(InputError, match="this is not what Assay wrote"):
        runs.start(tmp_path / "run", CONFIG, force=True)
    assert (tmp_path / "precious").read_text() == "keep"


def test_reading_a_state_holds_nothing_but_tensors_and_values(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    run = runs.Run(tmp_path / "run")
    run.save_state("x.pt", {"a": torch.ones(2)})
    assert torch.equal(run.state("x.pt")["a"], torch.ones(2))
    run.save_state("y.pt", {"a": Bad()})
    run.save_text("z.pt", "no torch file")
    for name in ("y.pt", "z.pt"):
        with pytest.raises(InputError) as refused:
            run.state(name)
        assert "weights_only" not in str(refused.value)
        assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "pwned").exists()
