"""Carry out a recipe into a run folder, resume it, and build its report."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from polars.exceptions import PolarsError

from assay.core.mechanisms import Mechanisms
from assay.errors import InputError, shown
from assay.io import runs
from assay.io.files import sha256
from assay.io.runs import Run
from assay.learn.processes import from_first, join, speaks_first
from assay.report import page
from assay.report.page import Fact, Section
from assay.studies.fields import Config, StudyConfig, input_paths
from assay.studies.recipes import (
    STUDIES,
    Recipe,
    config_of_study,
    load,
    module_of_study,
    saved_recipe,
    shipped,
    validated,
)

__all__ = [
    "STUDIES",
    "Config",
    "Recipe",
    "Study",
    "StudyConfig",
    "config_of",
    "execute",
    "facts",
    "finished_summary",
    "join",
    "load",
    "mechanisms_of",
    "provenance",
    "readable",
    "report",
    "require_same_inputs",
    "shipped",
    "speaks_first",
    "study",
    "study_of",
]


class Study(Protocol):
    """A module that carries out one kind of study; its `Config` is in `config.py` beside it.

    `check` refuses bad input before anything is written; `run` does the work into the folder and
    returns the summary that `--json` prints; `sections` builds the report from the saved run alone
    and `headline` its title and lead. `load` binds the run's mechanisms again and `contexts`
    describes its examples, one row each, for the verbs over saved runs; a study without mechanisms
    has neither. `assist(config, folder)` takes part in the work as another process than the first;
    a study that runs in one process has none. `apply(run, path) -> (summary, table)` puts what the
    run calibrated on the inputs of a file that were not there before; a study that calibrates
    nothing has none."""

    Config: type[StudyConfig]

    def check(self, config: Any) -> None: ...

    def run(self, config: Any, run: Run) -> dict[str, Any]: ...

    def sections(self, run: Run) -> tuple[list[Fact], list[Section]]: ...

    def headline(self, run: Run) -> tuple[str, str]: ...


def study(name: str) -> Study:
    """Return a study's module by name."""
    return importlib.import_module(module_of_study(name))


def execute(
    recipe: Recipe, folder: Path | str, *, resume: bool = False, force: bool = False
) -> dict[str, Any]:
    """Run a recipe into a folder, write its report and return its summary; a finished run that
    is resumed returns it at once. Of several processes (`torchrun`) the first has the folder, and
    the others help it and return nothing.

    Raises InputError, before anything is written, when the folder is refused (see
    `assay.io.runs.start`), when it is or holds an input of the run, and for a config that the study
    refuses."""
    rank, world = join()
    if world > 1 and not hasattr(study(recipe.study), "assist"):
        raise InputError(
            f"the study {recipe.study!r} runs in one process; start it without torchrun"
        )
    if not rank:
        runs.require_startable(folder, resume=resume, force=force)
    inputs = _inputs(recipe, Path(folder))
    recipe.config.require()
    study(recipe.study).check(recipe.config)
    if rank:
        return _assist(recipe, Path(folder))
    with runs.start(folder, recipe.saved(), resume=resume, force=force, inputs=inputs) as run:
        if run.has("inputs.json"):
            require_same_inputs(run)
        elif not run.has("summary.json"):
            run.save_json("inputs.json", _digests(recipe.config))
        from_first(torch.tensor(not run.has("summary.json")))
        if not run.has("summary.json"):
            began = time.process_time()
            try:
                summary = study(recipe.study).run(recipe.config, run)
            except InputError:
                run.discard_if_bare()
                raise
            run.save_json("timing.json", {"cpu_seconds": time.process_time() - began})
            run.save_json("summary.json", summary)
        report(run)
        return finished_summary(run)


def _assist(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Help the first process with a run, once it has opened the folder; nothing where the run is
    finished.
    """
    if bool(from_first(torch.tensor(False))):
        study(recipe.study).assist(recipe.config, folder)  # type: ignore[attr-defined]
    return {}


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe would take, before anything is loaded; InputError for a study that
    cannot say.
    """
    found = getattr(study(recipe.study), "plan", None)
    if found is None:
        raise InputError(f"the study {recipe.study!r} has no dry run; it runs on small inputs")
    planned: dict[str, Any] = found(recipe.config)
    return planned


def report(run: Run) -> Path:
    """Build `report.html` of a finished run from what it saved; InputError when it is not
    finished.
    """
    finished_summary(run)
    kind = study_of(run)
    with readable(run):
        facts, sections = kind.sections(run)
        title, lead = kind.headline(run)
        html = page.render(title, lead, facts, [*sections, provenance(run)])
    return run.save_text("report.html", html)


def facts(folder: Path | str) -> list[Fact]:
    """Return the headline numbers of a finished run."""
    run = runs.opened(folder)
    finished_summary(run)
    with readable(run):
        return study_of(run).sections(run)[0]


def provenance(run: Run, again: str = "") -> Section:
    """Return the report's last section: config, versions and seed of the run, and how to make it
    `again`, by its recipe where nothing is given.
    """
    import polars as pl

    if not again:
        recipe = run.json("config.json")["recipe"]
        again = f"assay run {recipe} -o NEW_FOLDER, with the keys below"
    flat = list(_flat(run.json("config.json")))
    versions = list(run.json("versions.json").items())
    return Section(
        "How this was made",
        f"Run again with: {again}",
        tables=[
            page.Table(pl.DataFrame(flat, schema=["key", "value"], orient="row"), "Config"),
            page.Table(
                pl.DataFrame(versions, schema=["package", "version"], orient="row"), "Versions"
            ),
        ],
    )


def study_of(run: Run) -> Study:
    """Return the study that made a run."""
    return study(saved_recipe(run)["study"])


def config_of(run: Run) -> Any:
    """Return the validated config of a saved run."""
    saved = saved_recipe(run)
    return validated(
        config_of_study(saved["study"]), saved["config"], str(run.folder / "config.json")
    )


def mechanisms_of(run: Run) -> Mechanisms:
    """Bind the mechanisms of a finished run again; InputError when its study has none."""
    finished_summary(run)
    require_same_inputs(run)
    found = getattr(study_of(run), "load", None)
    if found is None:
        raise InputError(
            f"a run of {run.json('config.json')['study']!r} has no parts to attribute; look at its"
            " report instead"
        )
    return found(run)


def finished_summary(run: Run) -> dict[str, Any]:
    """Return the summary of a finished run; InputError, with how to go on, when it is not."""
    if not run.has("summary.json"):
        name = saved_recipe(run)["recipe"]
        raise InputError(
            f"the run in {run.folder} is not finished; go on with: assay run {name} -o {run.folder}"
            " --resume"
        )
    found = run.json("summary.json")
    if not isinstance(found, dict):
        raise InputError(f"{run.path('summary.json')}: a JSON object expected")
    return found


def require_same_inputs(run: Run) -> None:
    """Raise InputError when a file that a run read has changed since the run was started, or is
    gone; a run of an earlier version, which kept no digests, passes.
    """
    if not run.has("inputs.json"):
        return
    written = run.json("inputs.json")
    now = _digests(config_of(run))
    if not isinstance(written, dict):
        raise InputError(f"{run.path('inputs.json')}: a JSON object expected")
    for path in sorted({*written, *now}):
        if written.get(path) != now.get(path):
            what = "changed" if path in written and path in now else "gone"
            what = what if path in written else "new"
            raise InputError(
                f"{path} is {what} since the run in {run.folder} read it, so its results are not"
                " about what lies there now; restore it from a copy, or run again"
            )


def _digests(config: StudyConfig) -> dict[str, str]:
    """Return the SHA-256 of every file that a config names, and of the files that lie directly in
    folders that it names; hidden ones are left out.
    """
    found = {}
    try:
        for path in map(Path, input_paths(config)):
            for one in sorted(path.iterdir()) if path.is_dir() else [path]:
                if one.is_file() and not one.name.startswith("."):
                    found[str(one)] = sha256(one)
    except OSError as error:
        raise InputError(f"an input cannot be read: {error}") from error
    return found


@contextmanager
def readable(run: Run) -> Iterator[None]:
    """Raise InputError where what a run saved is not what this version's report reads."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, PolarsError) as error:
        raise InputError(
            f"the run in {run.folder} does not hold what the report of this version shows"
            f" ({shown(str(error))}); was it made by another version? Run it again"
        ) from error


def _inputs(recipe: Recipe, folder: Path) -> list[Path]:
    """Return the files and folders that a recipe reads; InputError when its folder is one of
    them, or one is damaged.
    """
    found = []
    for path in map(Path, input_paths(recipe.config)):
        try:
            if path.exists() and folder.exists() and path.samefile(folder):
                raise InputError(f"{folder} is an input of the run and cannot be its output")
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        runs.require_undamaged(path)
        found += [path, *path.rglob("*")] if path.is_dir() else [path]
    return found


def _flat(value: Any, prefix: str = "") -> Any:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(entry, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, str(value)
