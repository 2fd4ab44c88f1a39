"""Imports go down only, the checker stands alone, and the command starts quickly."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
ORDER = [
    "cli",
    "recipes",
    "report",
    "guard",
    "proofs",
    "learn",
    "audit",
    "attribution",
    "bounds",
    "mechanisms",
    "parts",
    "targets",
    "hooks",
    "charts",
    "io",
    "memory",
    "errors",
]


def room(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> list[str]:
    """Return the modules that a file imports when it is loaded; imports inside functions and for type checkers do not run then."""
    found = []
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module if node.module != "assay" else f"assay.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            stack += ast.iter_child_nodes(node)
    return found


FILES = sorted(path for path in (SOURCE / "assay").rglob("*.py") if path.parent.name != "assay" or path.stem not in ("__init__",))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SOURCE)) for path in FILES])
def test_arrows_go_down(path: Path):
    here = path.relative_to(SOURCE / "assay").parts[0].removesuffix(".py")
    assert here in ORDER, f"room {here} has no place in the order"
    for module in imports(path):
        if module.startswith("assay."):
            assert ORDER.index(room(module)) >= ORDER.index(here), f"{here} imports {module}, which stands above it"


def test_every_room_is_named():
    rooms = {path.relative_to(SOURCE / "assay").parts[0].removesuffix(".py") for path in FILES}
    assert rooms <= set(ORDER)


def test_only_channels_know_channels():
    for path in FILES:
        parts = path.relative_to(SOURCE / "assay").parts
        if parts[0] in ("attribution", "audit", "learn", "parts.py", "hooks.py", "memory.py", "io") or path.name == "base.py":
            assert not any("channels" in module or "directions" in module for module in imports(path)), path


def test_the_command_does_not_import_torch_to_print_help():
    code = "import sys, assay.cli; assert not {'torch', 'altair', 'polars', 'transformers'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    import assay

    for name in assay.__all__:
        assert getattr(assay, name) is not None
    with pytest.raises(AttributeError):
        _ = assay.nothing
