"""Runs whose inputs or files changed, were edited, or are of another version, and hostile names."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from assay.errors import InputError
from assay.io import commits
from assay.io.record import FolderRecord
from assay.studies import runner
from assay.studies.channels import study
from assay.studies.channels.promises import Promises
from assay.studies.names import applied_table
from assay.studies.recipes import load
from assay.studies.verbs import apply_run, attribute_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on a file of its own, and a file of new inputs."""
    folder = tmp_path_factory.mktemp("hostile")
    draw = np.random.default_rng(0)
    np.savez(folder / "old.npz", x=draw.normal(size=(120, 5)), y=np.arange(120) % 3)
    np.savez(folder / "new.npz", x=draw.normal(size=(8, 5)), y=np.arange(8) % 3)
    words = [f"data.path={folder / 'old.npz'}", "training.steps=20", "model.hidden=4"]
    words += ["model.width=8", "model.blocks=2", "audit.exact=4", "audit.resplits=2"]
    with mock.patch.object(study, "BRACKETED", 0):
        runner.execute(load("channels", words), folder / "run")
    return folder


@pytest.fixture
def here(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path


def forge(run, name, value):
    """Edit a file of a run, and its record to match."""
    path, record = run / name, FolderRecord(run)
    path.write_text(json.dumps(value))
    with record.held():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        record._append({name: commits.Entry(path.stat().st_size, digest)})


@pytest.mark.parametrize("name", ["n" * 251, "new\nline", "\u202ertl", os.fsdecode(b"\xff")])
def test_the_file_of_new_inputs_may_have_any_name(made, here, name):
    file = here / f"{name}.npz"
    shutil.copy(made / "new.npz", file)
    saved = apply_run(here / "run", file)[0]["saved_as"]
    assert saved == applied_table(file) != applied_table(here / "other.npz")
    assert saved.isprintable()
    assert (here / "run" / saved).is_file()


def test_plain_names_are_kept():
    assert applied_table("a/new-1.b_c.npz") == "verb-on-new-1.b_c.parquet"
    assert applied_table("a b.npz") != applied_table("a_b.npz") != applied_table("a\nb.npz")


def test_a_name_that_no_file_can_have_leaves_the_run_as_it_was(here):
    record = FolderRecord(here / "run")
    before = (here / "run" / "assay-run.jsonl").read_bytes()
    with pytest.raises(InputError, match="too long for the name of a file"):
        record.write("n" * 256, lambda path: path.write_bytes(b""))
    assert (here / "run" / "assay-run.jsonl").read_bytes().startswith(before)
    # A record with such a commit, whose file never came, is settled by the next write.
    with record.held():
        record._append({"n" * 300: commits.Entry(0, hashlib.sha256(b"").hexdigest())})
        record._state.before = {"n" * 300: None}
    record.write("next", lambda path: path.write_bytes(b"next"))
    assert FolderRecord(here / "run").checked("next").read_bytes() == b"next"


def test_a_run_whose_data_changed_is_refused(made, tmp_path):
    run, data, new = tmp_path / "run", made / "old.npz", made / "new.npz"
    shutil.copytree(made / "run", run)
    recipe = load("channels", resumes=run)
    acts = (
        lambda: apply_run(run, new),
        lambda: attribute_run(run),
        lambda: runner.execute(recipe, run, resume=True),
    )
    for act in acts:
        act()
    before = data.read_bytes()
    try:
        with np.load(data) as arrays:
            np.savez(data, x=2 * arrays["x"], y=arrays["y"])
        for act in acts:
            with pytest.raises(InputError, match=r"old\.npz is changed since the run"):
                act()
    finally:
        data.write_bytes(before)


def test_a_run_without_digests_is_read_as_before(made, here):
    record = FolderRecord(here / "run")
    (here / "run" / "inputs.json").unlink()
    with record.held():
        record._append({"inputs.json": None})
    assert apply_run(here / "run", made / "new.npz")[0]["inputs"]["kept"] == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [("summary.json", []), ("summary.json", {}), ("summary.json", 3), ("versions.json", [])],
)
def test_the_report_of_another_version_is_one_line(here, name, value):
    forge(here / "run", name, value)
    with pytest.raises(InputError, match=r"another version|JSON object expected"):
        runner.report(runner.runs.opened(here / "run"))


def edited(saved, *path, value):
    inner = saved
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return saved


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("bars", "alpha"), 0),
        (("bars", "quantile"), "q"),
        (("bars", "quantile"), -1),
        (("bars",), []),
        (("estimate",), "foo"),
        (("scale",), ["squared_step"]),
        (("threshold", "promise"), "both"),
        (("threshold", "tolerance"), 0),
        (("threshold", "threshold"), -1),
        (("threshold", "more"), 1),
    ],
)
def test_edited_promises_are_refused(made, here, path, value):
    saved = json.loads((here / "run" / "promises.json").read_text())
    forge(here / "run", "promises.json", edited(saved, *path, value=value))
    with pytest.raises(InputError, match="threshold"):
        apply_run(here / "run", made / "new.npz")


def test_an_infinite_quantile_comes_back(here):
    saved = json.loads((here / "run" / "promises.json").read_text())
    found = Promises.from_dict(edited(saved, "bars", "quantile", value=None))
    assert math.isinf(found.bars.quantile)
    assert found.bars.guarantee.startswith("There are no bars")


def command(*words, cwd=None, stdout=subprocess.PIPE):
    # Not "-m": a deleted working folder is what is tested.
    code = "import sys; from assay.cli import main; sys.argv[0] = 'assay'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = command("recipes", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "assay: the output cannot be written: No space left on device\n"


def test_a_deleted_working_folder_is_one_line(tmp_path, monkeypatch, capsys):
    from assay import cli

    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "argv", ["assay", "recipes"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "assay: the working folder was deleted; change to another one\n"
    )


def test_flags_that_new_inputs_do_not_take_are_refused(made, monkeypatch, capsys):
    from assay import cli

    words = ["audit", str(made / "run"), "--on", str(made / "new.npz"), "--alpha", "0.3"]
    monkeypatch.setattr(sys, "argv", ["assay", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--on applies what the run calibrated" in capsys.readouterr().err
