"""The commands that could destroy a user's files, each on a folder of them: every foreign file is
unchanged afterwards, to the inode.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
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
        verbs = [[verb, place] for verb in ("attribute", "ablate", "audit", "report")]
        for words in (*verbs, ["explain", place, "x[0]"], ["compare", place, place]):
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
    assert "mynet.advice.safetensors exists and is not a file that Assay would" in said
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


def test_copies_by_hard_links_keep_every_byte(finished: Path, tmp_path: Path) -> None:
    """What `cp -al` made of a run is a folder of someone else."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(finished, run)
    shutil.copytree(run, copy, copy_function=os.link)
    before = state(copy)
    assert assay("report", run)[0] == 0
    assert assay("attribute", run)[0] == 0
    assert assay("audit", run, "--exact", 2) == (0, "")
    assert run_tiny(run, "--force") == (0, "")
    assert state(copy) == before
    shutil.rmtree(run)
    # The copy is a run too: replacing it leaves links to its files alone.
    shutil.copytree(copy, run, copy_function=os.link)
    assert run_tiny(copy, "--force") == (0, "")
    assert state(run) == before


def test_a_linked_run_folder_is_replaced_behind_the_link(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "notes").write_text("mine")
    (tmp_path / "link").symlink_to("run")
    before = state(tmp_path)
    assert run_tiny(tmp_path / "link", "--force") == (0, "")
    after = state(tmp_path)
    assert after["link"] == before["link"]
    assert after["run/notes"] == before["run/notes"]
    assert after.keys() == before.keys()


@pytest.mark.parametrize("how", ["file", "soft", "hard", "folder"])
def test_verbs_take_no_foreign_files_place(how: str, finished: Path, tmp_path: Path) -> None:
    """Every verb that writes into a run meets a foreign entry under the name it would use."""
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(finished, run)
    mine.write_text("mine")
    names = {
        "verb-scores-gradient.parquet": ("attribute", run),
        "verb-audit-gradient.parquet": ("audit", run, "--exact", 2),
        "report.html": ("report", run),
    }
    (run / "report.html").unlink()
    for name in names:
        match how:
            case "file":
                (run / name).write_text("mine")
            case "soft":
                (run / name).symlink_to(mine)
            case "hard":
                (run / name).hardlink_to(mine)
            case "folder":
                (run / name).mkdir()
                (run / name / "x").write_text("mine")
    before = state(tmp_path)
    for name, words in names.items():
        code, said = assay(*words)
        assert code == 2, words
        assert name in said
        assert len(said.strip().splitlines()) == 1
    assert state(tmp_path) == before


def test_a_link_inside_a_run_leads_nothing_out(finished: Path, tmp_path: Path) -> None:
    """A folder of the run that was moved away and linked is someone else's."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "network-0").rename(tmp_path / "elsewhere")
    (run / "network-0").symlink_to(tmp_path / "elsewhere")
    before = state(tmp_path)
    code, said = run_tiny(run, "--force")
    assert code == 2
    assert "network-0 is a link that Assay did not make" in said
    assert state(tmp_path) == before


def test_checks_and_comparisons_write_nothing(
    finished: Path, weights: Path, tmp_path: Path
) -> None:
    certificate = weights.with_suffix(".json")
    prove = ("prove", "max-of-k", weights, "--strategy", "box_exact")
    assert assay(*prove, "-o", certificate)[0] == 0
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = state(tmp_path)
    assert assay("check", certificate, "--weights", weights)[0] == 0
    assert assay(*prove)[0] == 0
    assert assay("compare", run, run)[0] == 0
    assert assay("explain", run, "directions[0]")[0] == 0
    assert assay("ablate", run)[0] == 0
    assert run_tiny(run)[0] == 2
    assert state(tmp_path) == before


def test_damaged_inputs_from_a_run_are_named(finished: Path, tmp_path: Path) -> None:
    """A file that lies in a run is checked against its record where it is an input of another."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    model = run / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"\1")
    before = state(tmp_path)
    code, said = run_tiny(tmp_path / "new", "--set", f"target.weights={model}")
    assert code == 2
    assert "model.safetensors is damaged" in said
    assert assay("prove", "max-of-k", model)[0] == 2
    assert state(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["attribute", "ablate", "audit", "explain", "compare", "report"])
def test_each_verb_works_in_a_process_of_its_own(verb: str, finished: Path, tmp_path: Path) -> None:
    """No verb leans on what another part of the program has imported."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    more = {"explain": ["directions[0]"], "compare": [str(run)], "audit": ["--exact", "2"]}
    words = [sys.executable, "-m", "assay.cli", verb, str(run), *more.get(verb, [])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
