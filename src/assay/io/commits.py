"""The lines of a run's record: what Assay wrote into the folder, with the SHA-256 of every file.

The first line names the format; each further one is a commit, written *before* the files take their
names:

    {"files": {NAME: [bytes, sha256] | [bytes, sha256, "log"] | null, ...}, "check": c}

null says that the file is gone. Of a log only the first bytes are recorded, as lines are appended
behind them. `check` is the start of the SHA-256 of the check before and of this line, so that a
change to the record itself is found. After a kill the last commit may be open: its files have their
new content or the one before. An empty commit says that none is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from assay.errors import InputError
from assay.io import files

NAME = "assay-run.jsonl"
_FORMAT = 1
_HEADER = b'{"assay-run": '
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """What a file holds: its size and its SHA-256, of a log those of its beginning."""

    size: int
    sha256: str
    log: bool = False

    def describes(self, path: Path) -> bool:
        """Return whether a file is there and holds what was recorded."""
        try:
            if path.is_symlink() or not path.is_file():
                return False
            size = path.stat().st_size
            if size < self.size or (size > self.size and not self.log):
                return False
            if not self.log:
                return files.sha256(path) == self.sha256
            with path.open("rb") as stream:
                return digest(stream.read(self.size)) == self.sha256
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # no file can have this name
                return False
            raise InputError(f"{path} cannot be read: {error}") from error


Changes = Mapping[str, Entry | None]


@dataclass
class Commits:
    """The state after all commits: `files` by name, and `before`, what the last commit replaced.

    `whole` counts the bytes of complete lines; `token`, drawn once per folder, is part of every
    temporary name, so that those that a kill left behind are known as ours."""

    files: dict[str, Entry] = field(default_factory=dict)
    before: dict[str, Entry | None] = field(default_factory=dict)
    token: str = ""
    whole: int = 0
    _check: str = ""

    def header(self, token: str) -> bytes:
        """Return the first line, for a folder with that token."""
        self.token = token
        return self._line({"assay-run": _FORMAT, "token": token})

    def commit(self, changed: Changes) -> bytes:
        """Apply a commit and return its line."""
        line = self._line({"files": {name: _plain(entry) for name, entry in changed.items()}})
        self._apply(changed)
        return line

    def _line(self, entry: dict[str, Any]) -> bytes:
        self._check = _chained(self._check, entry)
        line = (json.dumps({**entry, "check": self._check}) + "\n").encode()
        self.whole += len(line)
        return line

    def _apply(self, changed: Changes) -> None:
        self.before = {name: self.files.get(name) for name in changed}
        for name, entry in changed.items():
            if entry is None:
                self.files.pop(name, None)
            else:
                self.files[name] = entry

    def _read(self, line: bytes, first: bool) -> None:
        entry = json.loads(line)
        check = entry.pop("check")
        self._check = _chained(self._check, entry)
        if check != self._check:
            raise ValueError("another check")
        if first:
            if entry["assay-run"] != _FORMAT or not re.fullmatch("[0-9a-f]{16}", entry["token"]):
                raise ValueError("another format")
            self.token = entry["token"]
        else:
            self._apply({name: _entry(name, kept) for name, kept in entry["files"].items()})


def parse(path: Path) -> Commits:
    """Read a record, that of no commits where there is none; a last line that was cut short counts
    for nothing.

    Raises InputError when it was changed, or written, by anything but Assay."""
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    found = Commits()
    lines = data.split(b"\n")
    torn = lines.pop()
    foreign = not (_HEADER.startswith(data[: len(_HEADER)]))
    if foreign:
        raise InputError(f"{path} was not written by Assay and is left alone")
    for number, line in enumerate(lines, 1):
        try:
            found._read(line, number == 1)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number}: this is not what Assay wrote, so no file of the run can be"
                " checked against it. Restore the record from a copy, or use another folder"
            ) from error
    found.whole = len(data) - len(torn)
    return found


def digest(data: bytes) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def _entry(name: str, kept: Any) -> Entry | None:
    # A record may come from anyone: no name in it may lead out of the folder.
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name in (".", NAME):
        raise ValueError("no name of a file in the folder")
    if kept is None:
        return None
    size, sha256, *log = kept
    known = type(size) is int and size >= 0 and _DIGEST.fullmatch(sha256)
    if not known or log not in ([], ["log"]):
        raise ValueError("no size and SHA-256")
    return Entry(size, sha256, bool(log))


def _plain(entry: Entry | None) -> list[Any] | None:
    if entry is None:
        return None
    return [entry.size, entry.sha256, *(["log"] if entry.log else [])]


def _chained(check: str, entry: Mapping[str, Any]) -> str:
    return digest((check + json.dumps(entry, sort_keys=True)).encode())[:16]
