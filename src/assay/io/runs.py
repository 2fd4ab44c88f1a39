"""A run folder: config, versions, metrics, tensors, score tables and the report of one run."""

from __future__ import annotations

import json
import pickle
import platform
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.errors import InputError
from assay.io import files
from assay.io.commits import NAME
from assay.io.record import FolderRecord

if TYPE_CHECKING:
    import polars as pl
    import torch

METRICS = "metrics.jsonl"
_PACKAGES = (
    "assay-interp",
    "torch",
    "transformers",
    "numpy",
    "polars",
    "scikit-learn",
    "python-flint",
)


class Run:
    """One folder on disk; everything that a run reads back or writes goes through it, and
    nothing is written outside it.

    Every file is recorded with its SHA-256 and checked when it is read: what was changed, removed,
    or not written by Assay is named (InputError), never computed with and never replaced."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._record, self._prefix = FolderRecord(self.folder), ""
        self._holding = ExitStack()

    def child(self, name: str) -> Run:
        """Return a part of the run with files of its own, in a folder of the run's."""
        inner = Run(self.folder / name)
        inner._record, inner._prefix = self._record, f"{self._prefix}{name}/"
        return inner

    def path(self, name: str) -> Path:
        """Return where a file lies, unchecked."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Return whether the run wrote a file or folder; InputError when it is gone since."""
        return self._record.has(self._prefix + name)

    def checked(self, name: str) -> Path:
        """Return the path of a file or folder after its SHA-256 was found right."""
        return self._record.checked(self._prefix + name)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder's lock; InputError when another process has it."""
        with self._record.held():
            yield

    def hold(self) -> None:
        """Hold the folder's lock until `close`, or to the end of the process."""
        self._holding.enter_context(self._record.held())

    def close(self) -> None:
        """Release the lock that `start` or `hold` took."""
        self._holding.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def discard_if_bare(self) -> None:
        """Remove the folder when it holds no more than a new run does: input refused at the
        start leaves nothing behind.
        """
        if set(self._record.names()) <= {"config.json", "inputs.json", "versions.json"}:
            self._record.remove_all()
            self._record.remove()

    def write(self, name: str, write: Callable[[Path], object]) -> Path:
        """Write a file through a function that is given a temporary name; return its path."""
        return self._record.write(self._prefix + name, write)

    def write_folder(self, name: str, write: Callable[[Path], object]) -> Path:
        """Write a whole folder likewise: it appears complete or not at all."""
        return self._record.write_folder(self._prefix + name, write)

    def write_files(self, write: Callable[[Path], object]) -> None:
        """Write files that belong together into the temporary folder that `write` is given."""
        self._record.write_files(self._prefix, write)

    def save_text(self, name: str, text: str) -> Path:
        return self.write(name, lambda new: files.put(new, text.encode(errors="replace")))

    def save_json(self, name: str, value: Any) -> None:
        self.save_text(name, files.to_json(value))

    def json(self, name: str) -> Any:
        return files.read_json(self.checked(name))

    def save_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.write(name, lambda new: files.put_tensors(new, tensors))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return files.load_tensors(self.checked(name), finite=False)

    def save_table(self, name: str, table: pl.DataFrame) -> None:
        self.write(name, table.write_parquet)

    def table(self, name: str) -> pl.DataFrame:
        import polars as pl

        return pl.read_parquet(self.checked(name))

    def save_state(self, name: str, state: Mapping[str, Any]) -> None:
        """Write tensors and plain values, nested as they come, as a torch file."""
        self.write(name, lambda new: files.put_state(new, state))

    def state(self, name: str) -> dict[str, Any]:
        """Read what `save_state` wrote; InputError when the file holds anything else."""
        import torch

        path = self.checked(name)
        try:
            state = torch.load(path, weights_only=True)
        except pickle.UnpicklingError as error:
            raise InputError(f"{path} holds more than tensors and plain values") from error
        except Exception as error:  # a malformed file can make the unpickler raise anything
            raise InputError(f"{path} is not a file of tensors and plain values") from error
        if not isinstance(state, dict):
            raise InputError(f"{path} holds a {type(state).__name__} where a dict is expected")
        return state

    def log(self, phase: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl`, all of it or nothing; a phase is one training of the
        run.
        """
        line = json.dumps({"phase": phase, "step": step, **files.plain(metrics)})
        self._record.append(self._prefix + METRICS, line + "\n")

    def metrics(self) -> pl.DataFrame:
        """Return `metrics.jsonl` as a table, one row per logged step."""
        import polars as pl

        return pl.DataFrame(list(self._lines()), infer_schema_length=None)

    def forget_after(self, phase: str, step: int) -> None:
        """Drop the lines that a phase logged after `step`: the resumed run will write them
        again.
        """
        if self.has(METRICS):
            kept = [
                line for line in self._lines() if line["phase"] != phase or line["step"] <= step
            ]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            self._record.write(
                self._prefix + METRICS, lambda new: files.put(new, text.encode()), log=True
            )

    def _lines(self) -> Iterator[dict[str, Any]]:
        if self.has(METRICS):
            path = self.checked(METRICS)
            for number, line in enumerate(files.read_text(path).splitlines(), 1):
                entry = files.parse_json(line, f"{path}, line {number}")
                if not isinstance(entry, dict) or not {"phase", "step"} <= entry.keys():
                    raise InputError(f"{path}, line {number}: no phase and step")
                yield entry


def start(
    folder: Path | str,
    config: Mapping[str, Any],
    *,
    resume: bool = False,
    force: bool = False,
    inputs: Collection[Path] = (),
) -> Run:
    """Open a new run folder, or an old one with `resume` (same config) or `force` (its results are
    replaced), and hold its lock until the run is closed.

    Only files that Assay wrote are ever removed. Raises InputError when the folder is no run's, is
    in use, or holds a run and neither was asked for; when the config is another one; and when a
    file among `inputs` would be removed."""
    require_startable(folder, resume=resume, force=force)
    run, config = Run(folder), files.plain(config)
    run.hold()
    try:
        names = run._record.names()
        if names and resume:
            require_same(run, config)
        elif names:
            # A rival may have filled the folder since the first look.
            require_startable(folder, resume=resume, force=force)
            run._record.remove_all(inputs)
        if not run.has("config.json"):
            run.save_json("config.json", config)
        if not run.has("versions.json"):
            run.save_json("versions.json", versions())
    except BaseException:
        run.close()
        raise
    return run


def require_startable(folder: Path | str, *, resume: bool = False, force: bool = False) -> None:
    """Raise InputError when `start` would refuse the folder, whatever the config."""
    folder = Path(folder)
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{str(folder)!r} is no text; give the folder another name") from error
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file, not a run folder")
        occupied = folder.is_dir() and any(entry.name != NAME for entry in folder.iterdir())
        is_run = FolderRecord(folder).is_there()
    except OSError as error:
        raise InputError(f"{folder} cannot be opened as a folder: {error}") from error
    if occupied and not is_run:
        raise InputError(
            f"{folder} is not a run folder (it has no {NAME}) and is not empty; use another folder"
            " with -o. Only folders that Assay made are resumed or replaced"
        )
    if occupied and not resume and not force:
        raise InputError(
            f"{folder} already exists; use --resume to continue it, --force to replace it, or -o"
            " for another folder"
        )


def require_same(run: Run, config: Mapping[str, Any]) -> None:
    """Raise InputError, with the keys that differ, when a run was started with another config."""
    # Overrides say how the config came about; the config itself says what it is.
    saved, config = ({**given, "overrides": None} for given in (saved_config(run), config))
    if saved != config:
        raise InputError(
            f"{run.folder} was started with another config ({_changed(saved, config)}); use the"
            " same one, another folder, or --force"
        )


def require_new(folder: Path | str) -> None:
    """Raise InputError, before any work, for a folder that holds a run or anything else."""
    require_startable(folder, resume=True)
    if FolderRecord(Path(folder)).is_there():
        raise InputError(f"{folder} already exists; use another folder with -o")


def saved_config(run: Run) -> dict[str, Any]:
    """Return the config that a run was started with."""
    saved = run.json("config.json")
    if not isinstance(saved, dict):
        raise InputError(f"{run.path('config.json')}: a JSON object expected")
    return saved


def opened(folder: Path | str) -> Run:
    """Open a saved run to read it; InputError when it is none."""
    run = Run(folder)
    try:
        there = run._record.is_there()
    except OSError as error:
        raise InputError(f"{folder} cannot be opened as a folder: {error}") from error
    if not there or not run.has("config.json"):
        raise InputError(f"no run in {str(folder)!r} (no {NAME} there)")
    return run


def require_undamaged(path: Path | str) -> None:
    """Raise InputError when a file or folder lies in a run that wrote it otherwise, or lost a
    part of it; what lies in no run cannot be checked and passes.
    """
    whole = Path(path).absolute()
    for folder in (whole, *whole.parents):
        if (folder / NAME).is_file():
            record, name = FolderRecord(folder), whole.relative_to(folder).as_posix()
            written = record.names()
            inner = written if whole == folder else [name]
            for one in inner:
                if any(entry == one or entry.startswith(f"{one}/") for entry in written):
                    record.checked(one)
            return


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, and the git commit of the working folder if
    it is in a checkout.
    """
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        found["git"] = commit.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["git"] = "none"
    return found


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    names = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            if before != after:
                names.append(_changed(before, after, f"{prefix}{key}."))
        elif before != after:
            names.append(f"{prefix}{key}: {before} there, {after} here")
    return ", ".join(names)
