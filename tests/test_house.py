"""The rooms' rules hold and bite, the command starts quickly, and the public names exist."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = Path(sys.executable).with_name("lint-imports")


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts of pyproject.toml over the packages in `root/src`."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(LINT), "--no-cache", "--config", str(root / "pyproject.toml")]
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def test_the_rules_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


PLANTED = {
    "a kind in the audit": ("assay/audit/agreement.py", "from assay.mechanisms import nodes"),
    "assay in the checker": ("assay_check/envelope.py", "import assay.errors"),
    "torch in the checker": ("assay_check/envelope.py", "import torch"),
    "a lazy import": ("assay/bounds/levels.py", "def f():\n    from assay.audit import audit"),
    "a lazy kind": ("assay/core/parts.py", "def f():\n    import assay.mechanisms.nodes.kind"),
    "one kind in another": (
        "assay/mechanisms/nodes/parts.py",
        "def f():\n    from assay.mechanisms.channels import channels",
    ),
    "a module that has no room": ("assay/elsewhere.py", ""),
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_imports_are_found(case, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    file, line = PLANTED[case]
    with (tmp_path / "src" / file).open("a") as out:
        out.write(f"\n\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    found = "BROKEN" in done.stdout or "not defined" in done.stdout + done.stderr
    assert found, done.stdout + done.stderr


def test_no_text_of_a_page_holds_the_marks_of_markdown():
    """Pages show section texts as they are, so that backticks would stand in them."""
    found = []
    for path in (ROOT / "src" / "assay" / "studies").rglob("*.py"):
        tree = ast.parse(path.read_text())
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [
            f"{path.name}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in alone
            and "`" in node.value
        ]
    assert found == []


def test_the_command_does_not_import_torch_to_print_help():
    code = (
        "import sys, assay.cli; "
        "assert not {'torch', 'altair', 'polars', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    import assay

    for name in assay.__all__:
        assert getattr(assay, name) is not None
    with pytest.raises(AttributeError):
        _ = assay.nothing
