"""What is done to a run folder: checked reads, and writes that never touch a foreign file.

`assay-run.jsonl` marks a folder as a run's and records every file that Assay wrote there (see
`commits`). It is also the file that is locked: one process at a time writes to a run.
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
from assay.io.commits import NAME, Changes, Commits, Entry, digest

_PATIENCE = 10.0  # seconds that a single write waits for another one
_LONGEST = 255  # bytes in the name of a file
_ATTEMPTS = 3  # reads of a file that another process may be writing


class FolderRecord:
    """The record of one folder; reading needs no lock, writing takes it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / NAME
        self._state = Commits()
        self._handle: int | None = None
        self._holders = 0
        self._unsettled = False
        self._seen: dict[str, tuple[int, int, int]] = {}

    # Reading

    def is_there(self) -> bool:
        """Return whether the folder has a record; InputError when a foreign file has its name."""
        if not self.path.is_file():
            return False
        self._read()
        return True

    def names(self) -> list[str]:
        """Return the names of the files that Assay wrote."""
        self._read()
        return list(self._state.files)

    def has(self, name: str) -> bool:
        """Return whether the run wrote a file, or a folder of files, that is still there.

        Raises InputError when it wrote it and it is gone."""
        self._read()
        names = self._under(name)
        there = [self._place(one).is_file() for one in names]
        if names and all(there):
            return True
        opened = all(self._state.before.get(one, 1) is None for one in names)
        if opened and not any(there):  # nothing was written, or a kill came before its rename
            return False
        raise self._missing(names[there.index(False)])

    def checked(self, name: str) -> Path:
        """Return the path of a file, or a folder of files, whose contents are those recorded.

        Raises InputError when it is missing, was not written by the run, or was changed."""
        wrong = ""
        for _ in range(_ATTEMPTS):
            self._read()
            names = self._under(name)
            if not names:
                path = self._place(name)
                if os.path.lexists(path):
                    raise self._foreign(path)
                raise InputError(f"the run in {self.folder} has no {name!r}")
            wrong = next((one for one in names if not self._holds(one)), "")
            if not wrong:
                return self._place(name)
        path = self._place(wrong)
        if not os.path.lexists(path):
            raise self._missing(wrong)
        raise InputError(
            f"{path} is damaged: its content is not what the run wrote (the SHA-256 differs)."
            " Restore it from a copy, or delete it and run again with --force"
        )

    # Writing

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

    # The parts of both

    def _read(self) -> None:
        if self._handle is None:
            self._state = commits.parse(self.path)

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

    def _under(self, name: str) -> list[str]:
        return [one for one in self._state.files if one == name or one.startswith(f"{name}/")]

    def _place(self, name: str) -> Path:
        """Return where a file lies; InputError when a link on the way leads out of the folder."""
        path = self.folder / name
        for parent in self._parents(path):
            if parent.is_symlink():
                raise InputError(f"{parent} is a link that Assay did not make; it is left alone")
        return path

    def _parents(self, path: Path) -> list[Path]:
        inner = path.relative_to(self.folder).parts[:-1]
        return [self.folder.joinpath(*inner[: count + 1]) for count in range(len(inner))]

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f".{path.name[:100]}.{self._state.token}.part")

    def _holds(self, name: str) -> bool:
        """Return whether a file is as recorded, or as it was before an open last commit."""
        return self._is(name, self._state.files[name]) or (
            name in self._state.before and self._is(name, self._state.before[name])
        )

    def _is(self, name: str, entry: Entry | None) -> bool:
        path = self._place(name)
        return not os.path.lexists(path) if entry is None else entry.describes(path)

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

    def _missing(self, name: str) -> InputError:
        return InputError(
            f"{self.folder / name} is missing, and the run wrote it. Restore it from a copy, or run"
            " again with --force"
        )

    def _foreign(self, path: Path) -> InputError:
        return InputError(f"{path} was not written by this run and is left alone; move it away")

    def _changed(self, path: Path) -> InputError:
        return InputError(
            f"{path} was changed since Assay wrote it and is left alone; move it away or delete it"
        )


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
