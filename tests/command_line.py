"""The command, run in this process."""

from __future__ import annotations

import sys

import pytest

from assay import cli


def command(monkeypatch, capsys, *words):
    """Run `assay` with these words; return its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["assay", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr()
