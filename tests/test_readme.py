"""The README's Python runs as it stands, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from assay import cli

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_every_python_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        if "path/to" not in block:
            exec(compile(block, "README.md", "exec"), {})
    assert "coverage >=" in capsys.readouterr().out


def test_every_command_exists():
    verbs = {command.callback.__name__ for command in cli.app.registered_commands}
    named = set(re.findall(r"`assay (\w+)", README))
    assert named
    assert named <= verbs


def test_every_link_leads_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / link).exists(), link
