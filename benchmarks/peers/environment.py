"""Environments of other packages, which benchmarks make on first use below the cache folder."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import torch

TORCH = f"torch=={torch.__version__.partition('+')[0]}"


def peer_python(package: str) -> Path:
    """Return the interpreter of an environment with a package of one version, "name==version"."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / "assay" / "peers" / f"{package.replace('==', '-')}-python{version}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "complete").is_file():
        print(f"installing {package} into {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, TORCH, package], check=True, capture_output=True, text=True)
        (folder / "complete").touch()
    return python
