"""Run folders whose process ends while it writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from assay.bounds.search import branch
from assay.io.runs import Run, start


class KilledError(Exception):
    """The end of a process, as far as a search can see it."""


class Killing(Run):
    """A run folder whose process ends at the next write after the `left` ones that it makes."""

    left = 0

    def save_state(self, name: str, state: Mapping[str, Any]) -> None:
        if self.left == 0:
            raise KilledError
        self.left -= 1
        super().save_state(name, state)


def always_saving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a new run folder in which searches keep their boxes at every step."""
    monkeypatch.setattr(branch, "EVERY", 0.0)
    monkeypatch.setattr(branch, "COST", 0.0)
    start(folder / "run", {"study": "none"}).close()
    return folder / "run"
