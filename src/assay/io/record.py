"""Writes to a run folder that never touch a foreign file.

The record of what was written, `assay-run.jsonl`, is also the file that is locked: one process at a
time writes to a run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from assay.errors import AssayError, InputError, shown
from assay.io import commits, files, locks
from assay.io.commits import NAME, Changes, Entry, digest
from assay.io.recorded import FolderReader

_PATIENCE = 10.0  # seconds that a single write waits for another one
_LONGEST = 255  # bytes in the name of a file


class FolderRecord(FolderReader):
    """The record of one folder; reading needs no lock, writing takes it."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._handle: int | None = None
        self._holders = 0
        self._unsettled = False
        self._seen: dict[str, tuple[int, int, int]] = {}

    @contextmanager
    def held(self, patience: float = 0.0) -> Iterator[None]:
        """Hold the folder's lock; nested uses share it.

        Raises InputError when another process has it, or when the folder holds files and no
        record."""
        if self._holders == 0:
            self._take(patience)
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if self._holders == 0:
                # On a full disk the next process settles the rest.
                with contextlib.suppress(AssayError):
                    self._seal()
                self._release()

    def write(self, name: str, write: Callable[[Path], object], *, log: bool = False) -> Path:
        """Write a file atomically and record it; logs that have grown are recorded with it.

        Raises InputError when a file is in the way that Assay did not write."""
        with self._writing(name) as path:
            grown = self._grown_logs(name)
            files.write_atomic(
                path,
                write,
                temporary=self._temporary(path),
                before_rename=lambda new: self._append({name: _entry(new, log), **grown}),
            )
            self._seen[name] = _stamp(path)
            return path

    def write_folder(self, name: str, write: Callable[[Path], object]) -> Path:
        """Write a folder, which appears complete or not at all, and record its files.

        Raises InputError when something has its name, AssayError when it cannot be written."""
        with self._writing(name) as path:
            if path.is_dir():
                raise self._foreign(path)
            temporary = self._temporary(path)
            whole = temporary / path.name
            try:
                temporary.mkdir(parents=True)
                files.call(write, whole)
                written = sorted(one for one in whole.rglob("*") if one.is_file())
                inner = {one.relative_to(whole).as_posix(): _entry(one) for one in written}
                self._append({f"{name}/{one}": entry for one, entry in inner.items()})
                whole.replace(path)
            except OSError as error:
                raise files.cannot_write(path, error) from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return path

    def write_files(self, folder: str, write: Callable[[Path], object]) -> None:
        """Write files that belong together: `write` puts them into the temporary folder that it is
        given, and each takes the place of its predecessor in `folder` ("" for the run's own).

        Raises InputError when a file is in the way that Assay did not write."""
        with self.held(_PATIENCE):
            self._settle()
            temporary = self._temporary(self.folder / (folder or "files"))
            try:
                temporary.mkdir(parents=True)
                files.call(write, temporary)
                new = {folder + one.name: one for one in sorted(temporary.iterdir())}
                for name in new:
                    self._require_ours(name, self._place(name))
                self._unsettled = True
                self._append({name: _entry(one) for name, one in new.items()})
                for name, one in new.items():
                    one.replace(self._place(name))
                    self._seen[name] = _stamp(self._place(name))
                self._unsettled = False
            except OSError as error:
                raise files.cannot_write(self.folder / folder, error) from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def append(self, name: str, text: str) -> None:
        """Append text to a log, all of it or nothing.

        What is not recorded by a later write, or when the lock is released, is dropped by the next
        process: a kill leaves the log as it was at the last checkpoint. Raises AssayError when the
        disk is full, InputError when the log is not ours."""
        with self.held(_PATIENCE):
            path = self._place(name)
            if name not in self._state.files:
                self._begin_log(name)
            if path.is_symlink():
                raise self._foreign(path)
            try:
                if path.stat().st_nlink > 1:  # a copy of the run must not get the lines too
                    data = path.read_bytes()
                    files.write_atomic(path, lambda new: files.put(new, data))
                handle = os.open(path, os.O_WRONLY | os.O_APPEND)
                try:
                    _append_whole(handle, text.encode())
                finally:
                    os.close(handle)
            except OSError as error:
                raise files.cannot_write(path, error) from error

    def remove_all(self, inputs: Collection[Path] = ()) -> None:
        """Remove every file that Assay wrote, and the folders that this empties; all others stay.

        Raises InputError, before anything is removed, when one of them was changed since or is
        among the inputs of the new run."""
        with self.held():
            kept = {_inode(one) for one in inputs if one.exists()}
            there = []
            for name, entry in self._state.files.items():
                path = self._place(name)
                if os.path.lexists(path):
                    if not entry.describes(path):
                        raise self._changed(path)
                    if _inode(path) in kept:
                        raise InputError(
                            f"{path} is an input of the new run, and --force would delete it; copy"
                            " it out of the folder, or use another folder with -o"
                        )
                    there.append(path)
            try:
                for path in there:
                    path.unlink()
                for parent in sorted({p for path in there for p in self._parents(path)})[::-1]:
                    if parent.is_dir() and not any(parent.iterdir()):
                        parent.rmdir()
            except OSError as error:
                raise files.cannot_write(self.folder, error) from error
            if self._state.files:
                self._append(dict.fromkeys(self._state.files))

    def remove(self) -> None:
        """Remove the record itself and the folder, when nothing else is in it."""
        with self.held():
            if {entry.name for entry in self.folder.iterdir()} <= {NAME}:
                self.path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    self.folder.rmdir()

    def _read(self) -> None:
        if self._handle is None:
            super()._read()

    def _take(self, patience: float) -> None:
        self._require_run_or_empty()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{self.folder} cannot be a folder: {error}") from error
        except OSError as error:
            raise files.cannot_write(self.folder, error) from error
        self._handle = locks.acquire(self.path, patience)
        try:
            self._part_hard_links()
            self._state = commits.parse(self.path)
            if os.fstat(self._handle).st_size > self._state.whole:
                os.ftruncate(self._handle, self._state.whole)
            if not self._state.token:
                _append_whole(self._handle, self._state.header(os.urandom(8).hex()))
            for rest in self.folder.rglob(f".*.{self._state.token}.part*"):
                shutil.rmtree(rest) if rest.is_dir() and not rest.is_symlink() else rest.unlink()
            self._unsettled = True
            self._settle()
            self._cut_logs()
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                raise files.cannot_write(self.path, error) from error
            raise

    def _release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
        self._handle, self._seen = None, {}

    def _require_run_or_empty(self) -> None:
        if self.path.is_file() or not self.folder.is_dir():
            return
        # A rival may have made the record between the two looks.
        if any(self.folder.iterdir()) and not self.path.is_file():
            raise InputError(
                f"{self.folder} is not a run folder (it has no {NAME}) and is not empty; use"
                " another folder with -o"
            )

    def _part_hard_links(self) -> None:
        """Give a record that shares its inode with a copy of the run an inode of its own."""
        assert self._handle is not None
        if os.fstat(self._handle).st_nlink > 1:
            data = self.path.read_bytes()
            files.write_atomic(self.path, lambda new: files.put(new, data))
            os.close(self._handle)
            self._handle = None
            self._handle = locks.acquire(self.path)

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """Hold the lock around one write of a file that is ours or not there."""
        with self.held(_PATIENCE):
            self._settle()
            path = self._place(name)
            self._require_ours(name, path)
            self._unsettled = True
            yield path
            self._unsettled = False

    def _seal(self) -> None:
        """Record logs that have grown, and that the last commit is not open."""
        self._settle()
        if grown := self._grown_logs():
            self._append(grown)
        if self._state.before:
            self._append({})

    def _begin_log(self, name: str) -> None:
        with self._writing(name) as path:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._append({name: Entry(0, digest(b""), log=True)})
                path.touch(exist_ok=False)
            except OSError as error:
                raise files.cannot_write(path, error) from error

    def _settle(self) -> None:
        """Close a commit that may be open: what did not take its name is recorded as before."""
        if self._unsettled:
            back = {
                name: before
                for name, before in self._state.before.items()
                if not self._is(name, self._state.files.get(name)) and self._is(name, before)
            }
            if back:
                self._append(back)
            self._unsettled = False

    def _append(self, changed: Changes) -> None:
        assert self._handle is not None
        try:
            _append_whole(self._handle, self._state.commit(changed))
        except OSError as error:
            self._state = commits.parse(self.path)
            raise files.cannot_write(self.path, error) from error

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f".{path.name[:100]}.{self._state.token}.part")

    def _grown_logs(self, but: str = "") -> dict[str, Entry]:
        """Return the entries of logs that are longer than recorded, and otherwise as recorded."""
        grown = {}
        for name, entry in self._state.files.items():
            path = self._place(name)
            if entry.log and name != but and path.is_file() and path.stat().st_size > entry.size:
                if not entry.describes(path):
                    raise self._changed(path)
                grown[name] = _entry(path, log=True)
        return grown

    def _cut_logs(self) -> None:
        """Cut logs to what is recorded: the rest is of work that a kill undid."""
        for name in self._grown_logs():
            path, entry = self._place(name), self._state.files[name]
            data = path.read_bytes()[: entry.size]
            files.write_atomic(path, lambda new, data=data: files.put(new, data))  # type: ignore[misc]

    def _require_ours(self, name: str, path: Path) -> None:
        """Refuse to replace what Assay did not write, or what was changed since, and names that no
        file can have: the commit comes before the file.
        """
        if len(os.fsencode(path.name)) > _LONGEST:
            raise InputError(f"{shown(path.name)} is too long for the name of a file")
        if os.path.lexists(path):
            entry = self._state.files.get(name)
            if entry is None:
                raise self._foreign(path)
            if self._seen.get(name) != _stamp(path) and not entry.describes(path):
                raise self._changed(path)


def _entry(path: Path, log: bool = False) -> Entry:
    return Entry(path.stat().st_size, files.sha256(path), log)


def _stamp(path: Path) -> tuple[Any, ...]:
    state = path.stat(follow_symlinks=False)
    return state.st_ino, state.st_size, state.st_mtime_ns


def _inode(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def _append_whole(handle: int, data: bytes) -> None:
    """Append bytes to a file and have the disk hold them, or leave the file as it is."""
    size = os.fstat(handle).st_size
    try:
        if os.write(handle, data) < len(data):
            raise OSError(28, os.strerror(28))
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, size)
        raise
