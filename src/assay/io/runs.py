"""A run folder: config, versions, metrics, tensors, score tables and the report of one run."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl
import torch

from assay.errors import AssayError, InputError
from assay.io import files

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
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        return self.folder / name

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def discard_if_bare(self) -> None:
        """Remove the folder when it holds no more than a new run does: input refused at the
        start leaves nothing behind.
        """
        entries = list(self.folder.iterdir())
        if {entry.name for entry in entries} <= {"config.json", "versions.json"}:
            for entry in entries:
                entry.unlink()
            self.folder.rmdir()

    def save_json(self, name: str, value: Any) -> None:
        files.write_json(self.path(name), value)

    def json(self, name: str) -> Any:
        return files.read_json(self.path(name))

    def save_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        files.save_tensors(self.path(name), tensors)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return files.load_tensors(self.path(name), finite=False)

    def save_table(self, name: str, table: pl.DataFrame) -> None:
        files.write_atomic(self.path(name), lambda temporary: table.write_parquet(temporary))

    def table(self, name: str) -> pl.DataFrame:
        return pl.read_parquet(files.existing(self.path(name)))

    def log(self, phase: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl`; a phase is one training of the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path("metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"phase": phase, "step": step, **files.plain(metrics)}) + "\n")

    def metrics(self) -> pl.DataFrame:
        """Return `metrics.jsonl` as a table, one row per logged step; lines cut short by a kill
        are left out.
        """
        return pl.DataFrame(list(self._lines()), infer_schema_length=None)

    def forget_after(self, phase: str, step: int) -> None:
        """Drop the lines that a phase logged after `step`: the resumed run will write them
        again.
        """
        kept = [line for line in self._lines() if line["phase"] != phase or line["step"] <= step]
        files.write_text(
            self.path("metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in kept)
        )

    def _lines(self) -> Iterator[dict[str, Any]]:
        if self.has("metrics.jsonl"):
            for line in self.path("metrics.jsonl").read_text().splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue


def start(
    folder: Path | str, config: Mapping[str, Any], *, resume: bool = False, force: bool = False
) -> Run:
    """Open a new run folder, or an old one with `resume` (same config) or `force` (its results are
    replaced).

    Raises InputError when the folder holds something and neither was asked for, or when the config
    is another one."""
    run = Run(folder)
    config = files.plain(config)
    if run.folder.exists() and not run.folder.is_dir():
        raise InputError(f"{folder} is a file, not a run folder")
    occupied = run.folder.is_dir() and any(run.folder.iterdir())
    if occupied and resume:
        if not run.has("config.json"):
            raise InputError(
                f"{folder} is not a run folder (no config.json); give another folder with -o"
            )
        if run.json("config.json") != config:
            changed = _changed(run.json("config.json"), config)
            raise InputError(
                f"{folder} was started with another config ({changed}); use the same one, another"
                " folder, or --force"
            )
        return run
    if occupied and not force:
        raise InputError(
            f"{folder} already exists; use --resume to continue it, --force to replace it, or -o"
            " for another folder"
        )
    if occupied:
        if not run.has("config.json"):
            raise InputError(
                f"{folder} is not a run folder (no config.json); --force replaces runs only"
            )
        for entry in run.folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssayError(f"cannot make the run folder {folder}: {error}") from error
    run.save_json("config.json", config)
    run.save_json("versions.json", versions())
    return run


def opened(folder: Path | str) -> Run:
    """Open a saved run to read it; InputError when it is none."""
    run = Run(folder)
    if not run.has("config.json"):
        raise InputError(f"no run in {str(folder)!r} (no config.json there)")
    return run


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
