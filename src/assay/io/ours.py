"""What a writer may overwrite: nothing that Assay did not write."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from assay.errors import AssayError, InputError
from assay.memory import require_memory

DIGEST = "assay-sha256"
"""The entry of a file of Assay's that holds the SHA-256 of what else is in it."""


def marks_of(entries: Mapping[str, Any]) -> dict[str, str | None]:
    """Return what tells a file with these entries (of a JSON object, or of a safetensors file's
    metadata) from others: its format, or that it has a digest of Assay's.
    """
    if isinstance(entries.get("format"), str):
        return {"format": entries["format"]}
    return {DIGEST: None} if DIGEST in entries else {}


def require_ours(path: Path | str, marks: Mapping[str, str | None]) -> Path:
    """Return a path to write to; InputError where something is there that does not carry the marks
    of what will be written (None stands for any value).

    Without marks nothing may be replaced; a link is never ours."""
    path = Path(path)
    if not os.path.lexists(path):
        return path
    plain = path.is_file() and not path.is_symlink()
    found = _entries(path) if plain and marks else {}
    if not marks or any(
        name not in found or value not in (None, found[name]) for name, value in marks.items()
    ):
        raise InputError(
            f"{path} exists and is not a file that Assay would write there; it is left alone:"
            " choose another name, or move it away"
        )
    return path


def _entries(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as opened:
                return opened.metadata() or {}
        require_memory(4 * path.stat().st_size, f"the text of {path}")
        found = json.loads(path.read_bytes())
    except (AssayError, OSError, SafetensorError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
