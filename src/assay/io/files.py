"""Atomic writes and careful reads: a model or data file is untrusted input."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from assay.errors import AssayError, InputError, shown
from assay.io.ours import DIGEST, marks_of, require_ours
from assay.memory import require_memory

if TYPE_CHECKING:
    import torch


def write_atomic(
    path: Path | str,
    write: Callable[[Path], object],
    *,
    temporary: Path | None = None,
    before_rename: Callable[[Path], object] | None = None,
) -> Path:
    """Call `write` on a temporary name beside `path` and rename it: readers see the old file or the
    new one, never half.

    `temporary` is the name to use, which must be free; `before_rename` is called with the complete
    temporary file. Raises AssayError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if temporary is None:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            temporary = Path(name)
        else:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.close(handle)
        temporary.unlink()  # the name was free, and what is there may not be written over
        try:
            call(write, temporary)
            _sync(temporary)
            temporary.chmod(0o644)
            if before_rename is not None:
                before_rename(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def cannot_write(path: Path, error: Exception) -> AssayError:
    """Return the error for a file that could not be written."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return AssayError(f"cannot write {path}: {reason}; what was there before is unchanged")


def write_text(path: Path | str, text: str, marks: Mapping[str, str | None] | None = None) -> Path:
    """Write UTF-8 text atomically.

    Raises InputError for text that UTF-8 cannot hold (lone surrogates), and where a file would be
    overwritten that does not carry the marks (see `require_ours`)."""
    require_ours(path, marks or {})
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path} would hold text that is not Unicode (a lone surrogate):"
            f" {text[error.start]!r} at character {error.start}"
        ) from error
    return write_atomic(path, lambda temporary: put(temporary, data))


def write_json(path: Path | str, value: Any) -> Path:
    """Write JSON atomically; infinities and NaN become null, so that the file is standard JSON.

    It replaces an object of the same format, and nothing else: InputError."""
    return write_text(path, to_json(value), marks_of(value if isinstance(value, Mapping) else {}))


def to_json(value: Any) -> str:
    """Return a value as indented JSON text."""
    return json.dumps(plain(value), indent=2, allow_nan=False) + "\n"


def read_text(path: Path | str) -> str:
    """Read a UTF-8 text file, without its byte order mark if it has one.

    Raises InputError when it is missing, unreadable, not UTF-8, or larger than the memory."""
    path = existing(path)
    try:
        require_memory(4 * path.stat().st_size, f"the text of {path}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_json(path: Path | str) -> Any:
    """Read a JSON file; InputError when it is missing or malformed."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, what: str) -> Any:
    """Parse JSON text; InputError when it is malformed, nested too deeply, or holds numbers of
    thousands of digits.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON: {_reason(error)}") from error


def require_unicode(value: Any, what: str) -> None:
    """Raise InputError where a JSON value holds text that no file can hold (lone surrogates)."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        part = error.object[max(0, error.start - 10) : error.end + 10]
        raise InputError(f"{what} holds a lone surrogate: {shown(part)}") from error


def save_tensors(
    path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file atomically; InputError where it would replace one that Assay did not
    write.
    """
    require_ours(path, metadata or {DIGEST: None})
    return write_atomic(path, lambda temporary: put_tensors(temporary, tensors, metadata))


def put_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in place, for use within an atomic write.

    Without other metadata it holds the SHA-256 of its tensors, which `load_tensors` checks."""
    from safetensors.torch import save_file

    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # One entry only: safetensors writes several in an order that differs from file to file.
    save_file(kept, path, metadata=dict(metadata or {DIGEST: digest_of_tensors(kept)}))


def load_tensors(path: Path | str, *, finite: bool = True) -> dict[str, torch.Tensor]:
    """Read a safetensors or npz file; InputError when it is missing, damaged, of another format,
    larger than the memory, or (with `finite`) holds NaN or infinity.
    """
    import torch
    from safetensors.torch import load_file

    from assay.io.arrays import read_npz

    path = existing(path)
    try:
        if path.suffix == ".npz":
            tensors = {name: torch.from_numpy(array) for name, array in read_npz(path).items()}
        else:
            require_memory(path.stat().st_size, f"loading {path}")
            tensors = load_file(path)
            _require_digest(path, tensors)
    except InputError:
        raise
    except Exception as error:  # a damaged file can make the readers raise anything
        raise InputError(
            f"{path} is neither safetensors nor npz without pickles: {_reason(error)}"
        ) from error
    if finite:
        for name, tensor in tensors.items():
            require_finite(tensor, f"{path}: tensor {name!r}")
    return tensors


def digest_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of tensors, in the names' order."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def hash_of(model: torch.nn.Module) -> str:
    """Return the digest that tells networks apart: the SHA-256 of all their tensors."""
    return digest_of_tensors(
        {name: entry.detach().cpu() for name, entry in model.state_dict().items()}
    )


def _require_digest(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError when a file that Assay wrote holds other tensors than it was written
    with.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        written = (opened.metadata() or {}).get(DIGEST)
    if written is not None and written != digest_of_tensors(tensors):
        raise InputError(
            f"{path} is damaged: its tensors are not those that Assay wrote (the SHA-256 differs)."
            " Restore it from a copy"
        )


def put_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a dictionary of tensors and plain values as a torch file in place, for use within an
    atomic write.
    """
    import torch

    with path.open("wb") as stream:
        kept = _Kept(stream)
        try:
            torch.save(state, cast(BinaryIO, kept))
        except RuntimeError as error:
            # PyTorch says "unexpected pos" of a full disk; the stream knows better.
            raise kept.error or error from error


def is_finite(value: float) -> bool:
    """Whether a number of a file is finite in float64; integers may be too large for it."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def require_finite(tensor: torch.Tensor, what: str) -> None:
    """Raise InputError, with the count, when a tensor holds NaN or infinity."""
    if tensor.is_floating_point() or tensor.is_complex():
        import torch

        if bool(torch.isfinite(tensor.sum())):  # one cheap pass: a sum keeps NaN and infinity
            return
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise InputError(
                f"{what} holds {bad} NaN or infinite value{'s' * (bad > 1)} of {tensor.numel()}"
            )


def existing(path: Path | str) -> Path:
    """Return the path of a file that exists; InputError otherwise."""
    path = Path(path)
    try:
        if path.is_file():
            return path
    except (OSError, ValueError) as error:
        raise InputError(f"no file {shown(str(path))}: {_reason(error)}") from error
    raise InputError(f"no file {shown(str(path))}")


def require_folder(path: Path | str, *anyof: str) -> None:
    """Raise InputError for a path that is neither a folder with one of the files `anyof` (default:
    config.json) nor looks like a hub name.
    """
    anyof = anyof or ("config.json",)
    if not str(path):
        raise InputError(f"no folder ''; give the folder that holds {anyof[0]}")
    folder = Path(path)
    if folder.is_file():
        raise InputError(f"{path} is a file; give the folder that holds {anyof[0]}")
    if folder.is_dir() and not any((folder / name).is_file() for name in anyof):
        raise InputError(f"{path} holds no {' or '.join(anyof)}")
    looks_local = (
        isinstance(path, Path) or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    )
    if looks_local and not folder.is_dir():
        raise InputError(
            f"no folder {str(path)!r}; give a folder in the Hugging Face format or a hub name such"
            " as 'gpt2'"
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """Turn tensors, arrays, numpy values, paths and tuples into plain JSON values; non-finite
    numbers become None.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or type(value) in (bool, int, float, str):
        return value
    if hasattr(value, "tolist"):  # a tensor, an array or a numpy number
        return plain(value.tolist())
    return value if isinstance(value, bool | int | float | str) else str(value)


class _Kept:
    """A stream that remembers the error of a write."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.stream.flush()


def call(write: Callable[[Path], object], temporary: Path) -> None:
    """Call a writer of a file or folder; a full disk is an OSError, whichever library met it."""
    try:
        write(temporary)
    except (AssayError, OSError):
        raise
    except Exception as error:
        # safetensors, tokenizers and polars have exceptions of their own, which quote the system's.
        if "os error" in str(error):
            raise OSError(_reason(error)) from error
        raise


def _sync(path: Path) -> None:
    """Have the disk hold a file or the names in a folder, where the system can say so."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__


def put(path: Path, data: bytes) -> None:
    """Write bytes in place, for use within an atomic write."""
    path.write_bytes(data)
