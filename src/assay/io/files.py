"""Atomic writes and careful reads: a model or data file is untrusted input."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from assay.errors import AssayError, InputError


def write_atomic(path: Path | str, write: Callable[[Path], None]) -> Path:
    """Call `write` on a temporary name beside `path` and rename it: readers see the old file or the
    new one, never half.

    Raises AssayError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise AssayError(
            f"cannot write {path}: {error}; what was there before is unchanged"
        ) from error
    return path


def write_text(path: Path | str, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_atomic(path, lambda temporary: _put(temporary, text.encode()))


def write_json(path: Path | str, value: Any) -> Path:
    """Write JSON atomically; infinities and NaN become null, so that the file is standard JSON."""
    return write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; InputError when it is missing or malformed."""
    try:
        return json.loads(existing(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def save_tensors(
    path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file atomically."""
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return write_atomic(
        path, lambda temporary: save_file(kept, temporary, metadata=dict(metadata or {}))
    )


def load_tensors(path: Path | str, *, finite: bool = True) -> dict[str, torch.Tensor]:
    """Read a safetensors or npz file; InputError when it is missing, of another format, or (with
    `finite`) holds NaN or infinity.
    """
    path = existing(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                tensors = {
                    name: torch.from_numpy(np.ascontiguousarray(archive[name]))
                    for name in archive.files
                }
        else:
            tensors = load_file(path)
    except (SafetensorError, ValueError, OSError, TypeError, EOFError) as error:
        raise InputError(
            f"{path} is neither safetensors nor npz without pickles: {error}"
        ) from error
    if finite:
        for name, tensor in tensors.items():
            require_finite(tensor, f"{path}: tensor {name!r}")
    return tensors


def require_finite(tensor: torch.Tensor, what: str) -> None:
    """Raise InputError, with the count, when a tensor holds NaN or infinity."""
    if tensor.is_floating_point() or tensor.is_complex():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise InputError(
                f"{what} holds {bad} NaN or infinite value{'s' * (bad > 1)} of {tensor.numel()}"
            )


def existing(path: Path | str) -> Path:
    """Return the path of a file that exists; InputError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}")
    return path


def plain(value: Any) -> Any:
    """Turn tensors, numpy values, paths and tuples into plain JSON values; non-finite numbers
    become None.
    """
    if isinstance(value, torch.Tensor | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)
