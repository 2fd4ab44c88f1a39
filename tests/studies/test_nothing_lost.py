"""The commands that could destroy a user's files, each on a folder of them: every foreign file is
unchanged afterwards, to the inode.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from assay import cli
from assay.io.commits import NAME
from assay.targets.max_of_k import MaxOfK, save

TINY = [
    "target.networks=1",
    "target.steps=20",
    "target.samples=40",
    "method.k=[3]",
    "method.steps=3",
]


def assay(*words: object) -> tuple[int, str]:
    """Run the command and return its exit code and what it said on stderr."""
    errors, before = io.StringIO(), sys.argv
    sys.argv = ["assay", *map(str, words)]
    try:
        with redirect_stderr(errors), redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as ended:
        return int(ended.code or 0), errors.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("the command did not exit")


def run_tiny(folder: Path, *more: object) -> tuple[int, str]:
    sets = [word for override in TINY for word in ("--set", override)]
    return assay("run", "tms-directions", *sets, "-o", folder, *more)


def state(folder: Path) -> dict[str, tuple[int, int, object]]:
    """Return every entry below a folder: its inode, its time of change, and its content."""
    found: dict[str, tuple[int, int, object]] = {}
    for path in sorted(folder.rglob("*")):
        entry = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        if not path.is_dir() or path.is_symlink():
            found[str(path.relative_to(folder))] = (entry.st_ino, entry.st_mtime_ns, content)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run_tiny(folder) == (0, "")
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights that can be proved about, alone in a folder."""
    model = MaxOfK(4, 2, 4, generator=torch.Generator().manual_seed(0))
    (tmp_path / "nets").mkdir()
    return save(tmp_path / "nets" / "mynet.safetensors", model)


FOREIGN = {
    "a model of Hugging Face": {"config.json": '{"model_type": "gpt2"}', "model.safetensors": "w"},
    "a config like that of a run": {
        "config.json": json.dumps({"recipe": "tms-directions", "study": "toy-directions"}),
        "summary.json": "{}",
        "report.html": "mine",
    },
    "hidden files alone": {".git/HEAD": "ref: x"},
    "one file": {"thesis.tex": "everything"},
    "a record of someone else": {NAME: '{"mine": 1}\n', "config.json": "{}", "a/b/c": "deep"},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_no_command_touches_a_folder_that_is_no_run(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    for name, text in FOREIGN[what].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (tmp_path / "link").symlink_to(folder)
    before = state(tmp_path)
    for place in (folder, tmp_path / "link", f"{folder}/../theirs"):
        for flags in ([], ["--force"], ["--resume"]):
            commands = (
                ["run", "tms-directions", "-o", place, *flags],
                ["tour", "-o", place, *flags],
            )
            for words in commands:
                code, said = assay(*words)
                assert code == 2, words
                assert len(said.strip().splitlines()) == 1
        for words in (["attribute", place], ["audit", place], ["report", place]):
            code, said = assay(*words)
            assert code == 2
            assert "no run in" in said or "not written by Assay" in said
    assert state(tmp_path) == before


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    before = state(tmp_path)
    for place in ("notes", "notes/run"):
        for flags in ([], ["--force"], ["--resume"]):
            assert assay("run", "tms-directions", "-o", tmp_path / place, *flags)[0] == 2
            assert assay("tour", "-o", tmp_path / place, *flags)[0] == 2
    assert state(tmp_path) == before


def test_foreign_files_in_a_run_survive_its_replacement(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    foreign = ("notes.txt", "network-0/mine.pt", "model/weights.bin", ".hidden/x", "runs.parquet~")
    for name in foreign:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "link").symlink_to(tmp_path)
    before = {name: entry for name, entry in state(folder).items() if name in (*foreign, "link")}
    assert len(before) == len(foreign) + 1
    assert run_tiny(folder)[0] == 2
    assert run_tiny(folder, "--resume") == (0, "")
    code, said = run_tiny(folder, "--force")
    assert (code, said) == (0, "")
    after = state(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) == set(before) | set(state(finished))


def test_a_result_that_the_user_replaced_is_not_replaced_again(
    finished: Path, tmp_path: Path
) -> None:
    for name in ("report.html", "directions.safetensors", "config.json", "network-0/tms.pt"):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(finished, folder)
        (folder / name).write_text("edited by hand")
        before = state(folder)
        for words in (["report", folder], ["attribute", folder]):
            code, said = assay(*words)
            if code:
                assert (code, name in said) == (2, True)
        code, said = run_tiny(folder, "--force")
        assert code == 2
        assert f"{name} was changed since Assay wrote it" in said
        after = state(folder)
        assert after[name] == before[name]
        assert {**after, NAME: before[NAME]}.keys() >= before.keys()


def test_inputs_are_never_outputs(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    model = folder / "model.safetensors"
    (tmp_path / "hard.safetensors").hardlink_to(model)
    (tmp_path / "soft.safetensors").symlink_to(model)
    before = state(tmp_path)
    for source in (model, tmp_path / "hard.safetensors", tmp_path / "soft.safetensors"):
        code, said = run_tiny(folder, "--force", "--set", f"target.weights={source}")
        assert code == 2
        assert "is an input of the new run" in said
    code, said = assay(
        *("run", "attribution", "-o", folder, "--force", "--set", f"target.path={folder}"),
        *("--set", f"data.pairs={folder / 'config.json'}"),
    )
    assert code == 2
    assert "is an input of the run and cannot be its output" in said
    assert state(tmp_path) == before


def test_a_tour_is_replaced_only_by_force(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tour"
    shutil.copytree(finished, folder)
    before = state(folder)
    code, said = assay("tour", "-o", folder)
    assert code == 2
    assert "--force to replace it" in said
    code, said = assay("tour", "-o", folder, "--resume")
    assert code == 2
    assert "another config" in said
    assert state(folder) == before


def test_a_proof_leaves_the_weights_alone(weights: Path) -> None:
    before = state(weights.parent)
    certificate = weights.with_suffix(".json")
    prove = ("prove", "max-of-k", weights, "--strategy", "box_exact", "-o")
    assert assay(*prove, certificate) == (0, "")
    advice = weights.with_name("mynet.advice.safetensors")
    after = state(weights.parent)
    assert set(after) == {"mynet.safetensors", "mynet.json", "mynet.advice.safetensors"}
    assert after["mynet.safetensors"] == before["mynet.safetensors"]
    assert assay("check", certificate, "--weights", weights)[0] == 0
    assert assay(*prove, certificate) == (0, "")  # an earlier certificate may be replaced
    advice.write_bytes(b"mine")
    before = state(weights.parent)
    code, said = assay(*prove, certificate)
    assert code == 2
    assert "mynet.advice.safetensors exists and is no certificate's advice" in said
    assert state(weights.parent) == before


def test_a_certificate_takes_no_other_files_place(weights: Path) -> None:
    folder = weights.parent
    (folder / "notes.json").write_text('{"mine": true}')
    (folder / "text.json").write_text("mine")
    (folder / "empty.json").write_text("")
    (folder / "soft.json").symlink_to(weights)
    (folder / "hard.json").hardlink_to(weights)
    (folder / "dangling.json").symlink_to(folder / "nowhere")
    (folder / "dir.json").mkdir()
    (folder / "other.advice.safetensors").write_bytes(b"mine")
    shutil.copy(weights, folder / "net.advice.safetensors")
    before = state(folder)
    places = ("notes", "text", "empty", "soft", "hard", "dangling", "dir", "other")
    for place in places:
        code, said = assay("prove", "max-of-k", weights, "-o", folder / f"{place}.json")
        assert code == 2, place
        assert "choose another name" in said, place
        assert len(said.strip().splitlines()) == 1
    code, said = assay(
        "prove", "max-of-k", folder / "net.advice.safetensors", "-o", folder / "net.json"
    )
    assert code == 2
    assert "is an input and would be overwritten" in said
    assert assay("prove", "max-of-k", weights, "-o", weights)[0] == 2
    assert state(folder) == before
    assert (folder / "dir.json").is_dir()
