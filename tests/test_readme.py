"""The Python in the README and the docs runs as it stands, and the commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from assay import cli
from assay.learn.settings import AGREEMENT, AgreementTraining

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("path", PAGES, ids=[path.stem for path in PAGES])


def blocks(path: Path) -> list[str]:
    """Return the Python of a page that needs nothing of the reader's."""
    found = re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)
    return [block for block in found if "path/to" not in block]


LONG = ("certify", "directions")
WITH_BLOCKS = [
    pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG), id=path.stem)
    for path in PAGES[1:]
    if blocks(path)
]


def run_blocks(path: Path) -> int:
    whole = blocks(path)
    for block in whole:
        exec(compile(block, path.name, "exec"), {})
    return len(whole)


@pytest.mark.parametrize("size", ["small", pytest.param("its own", marks=pytest.mark.slow)])
def test_every_python_block_of_the_readme_runs(size, tmp_path, monkeypatch, capsys):
    if size == "small":  # what is trained changes the numbers, and nothing else
        small = AgreementTraining(width=32, heads=4, steps=60, batch=64, required=0)
        monkeypatch.setitem(AGREEMENT, "short", small)
    monkeypatch.chdir(tmp_path)
    assert run_blocks(ROOT / "README.md")
    assert "coverage >=" in capsys.readouterr().out


@pytest.mark.parametrize("path", WITH_BLOCKS)
def test_every_python_block_of_the_docs_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks(path)


def test_every_command_exists():
    verbs = {command.callback.__name__ for command in cli.app.registered_commands}
    verbs |= {group.name for group in cli.app.registered_groups}
    named = set(re.findall(r"`assay (\w+)", "".join(path.read_text() for path in PAGES)))
    assert named
    assert named <= verbs


@page
def test_every_link_leads_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link


@page
def test_every_benchmark_and_example_that_is_named_exists(path):
    for script in re.findall(r"python ((?:benchmarks|examples|docs)/\w+\.py)", path.read_text()):
        assert (ROOT / script).exists(), script
