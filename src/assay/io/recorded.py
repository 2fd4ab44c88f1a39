"""Checked reads of a run folder: only what the run wrote, and only as it wrote it.

`assay-run.jsonl` marks a folder as a run's and records every file that Assay wrote there (see
`commits`).
"""

from __future__ import annotations

import os
from pathlib import Path

from assay.errors import InputError
from assay.io import commits
from assay.io.commits import NAME, Commits, Entry

_ATTEMPTS = 3  # reads of a file that another process may be writing


class FolderReader:
    """What one folder's record says of its files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / NAME
        self._state = Commits()

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

    def _read(self) -> None:
        self._state = commits.parse(self.path)

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

    def _holds(self, name: str) -> bool:
        """Return whether a file is as recorded, or as it was before an open last commit."""
        return self._is(name, self._state.files[name]) or (
            name in self._state.before and self._is(name, self._state.before[name])
        )

    def _is(self, name: str, entry: Entry | None) -> bool:
        path = self._place(name)
        return not os.path.lexists(path) if entry is None else entry.describes(path)

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
