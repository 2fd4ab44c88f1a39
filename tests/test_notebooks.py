"""The code cells of the notebooks run in order, each notebook after the ones before it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[str]:
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def run_cell(text: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does and return the value of its last line, if that is one."""
    tree = ast.parse(text)
    last = tree.body[-1] if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    body = tree.body[:-1] if last is not None else tree.body
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return (
        None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    )


def test_there_are_three_without_saved_outputs() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "features-1-compute",
        "features-2-analyse",
        "features-3-validate",
    ]
    for path in NOTEBOOKS:
        code = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        assert code
        assert not any(cell["outputs"] for cell in code)
        assert sum(len(text.splitlines()) for text in cells(path)) < 60


@pytest.mark.slow
def test_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in NOTEBOOKS:
        names: dict[str, Any] = {}
        for text in cells(path):
            shown = run_cell(text, names)
            if shown is not None and hasattr(shown, "_repr_html_"):
                assert shown._repr_html_()
