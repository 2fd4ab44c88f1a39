"""The checker stands alone: what it imports, its size, and its command."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checker_cases import certify, right

import assay_check

PACKAGE = Path(assay_check.__file__).parent
BLOCKER = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        absent = {"torch", "assay", "safetensors", "scipy", "transformers", "polars"}
        if name.split(".")[0] in absent:
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])
import assay_check
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("torch came in")
verdict = assay_check.check(sys.argv[2], sys.argv[3])
print(verdict.accepted, verdict.bound)
outside = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
outside -= {"__main__", "assay_check", "numpy", "flint", "cython_runtime"}
assert not {name for name in outside if not name.startswith("_")}, outside
"""


def test_imports_are_of_the_standard_library_numpy_and_flint() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                found.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.Name):
                assert node.id not in ("__import__", "eval", "exec")
    assert found - set(sys.stdlib_module_names) <= {"numpy", "flint", "assay_check"}
    assert not found & {"importlib", "pickle", "subprocess", "ctypes", "marshal"}


def test_the_package_is_short() -> None:
    """A reader of one task reads what all tasks share, and that task."""
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    most = {"crosscoder": 860, "gates": 2300}
    for task, allowed in most.items():
        assert sum(count for path, count in lines.items() if task in path.parts) < allowed
    assert sum(count for path, count in lines.items() if not most.keys() & {*path.parts}) < 1200


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return certify(
        tmp_path, right(5, 3, np.random.default_rng(0), 0.02), 125, None, rule="sequences"
    )


def test_checks_where_torch_cannot_be_imported(paths: tuple[Path, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCKER, str(PACKAGE.parent), *map(str, paths)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "True 1\n"), done.stderr


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, "-m", "assay_check", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )


def test_the_command(paths: tuple[Path, Path]) -> None:
    certificate, weights = paths
    done = command(certificate, "--weights", weights)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "accepted: 125 of 125 inputs are proved right, 125 are claimed",
        "measure: accuracy, the share of all 5^3 = 125 inputs",
        "level: real, the weights as rational numbers, in real arithmetic",
        "assumptions: none",
    ]
    done = command(certificate, "--weights", weights, "--json")
    assert json.loads(done.stdout) == {
        "accepted": True,
        "reason": "125 of 125 inputs are proved right, 125 are claimed",
        "measure": "accuracy, the share of all 5^3 = 125 inputs",
        "level": "real",
        "assumptions": [],
        "bound": "1",
        "cell": None,
    }
    text = certificate.read_text()
    certificate.write_text(text.replace('"real"', '"float64"'))
    done = command(certificate, "--weights", weights)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("rejected: level float64")
    certificate.write_text(text[:-5])
    done = command(certificate, "--weights", weights)
    assert (done.returncode, done.stdout) == (2, "")
    assert "not JSON" in done.stderr
    assert "Traceback" not in done.stderr
    done = command(certificate.parent / "none.json", "--weights", weights)
    assert done.returncode == 2
    assert "none.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert command(certificate).returncode == 2
