"""Load a recipe, check every key before any work, run it into a folder, and build its report."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from assay.core.mechanisms import Mechanisms
from assay.errors import InputError, unknown
from assay.io import runs
from assay.io.runs import Run
from assay.report import page
from assay.report.page import Fact, Section

STUDIES = {
    entry.name.replace("_", "-"): f"assay.studies.{entry.name}.study"
    for entry in sorted(resources.files("assay.studies").iterdir(), key=lambda entry: entry.name)
    if entry.joinpath("study.py").is_file()
}
"""Every folder beside this file that holds a `study.py`, by its name."""


class Config(BaseModel):
    """A frozen config; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StudyConfig(Config):
    """What every study's config has."""

    seed: int = 0


class Study(Protocol):
    """A module that carries out one kind of study.

    `check` refuses bad input before anything is written; `run` does the work into the folder and
    returns the summary that `--json` prints; `sections` builds the report from the saved run alone
    and `headline` its title and lead. `load` binds the run's mechanisms again and `contexts`
    describes its examples, one row each, for the verbs over saved runs; a study without mechanisms
    has neither."""

    Config: type[StudyConfig]

    def check(self, config: Any) -> None: ...

    def run(self, config: Any, run: Run) -> dict[str, Any]: ...

    def sections(self, run: Run) -> tuple[list[Fact], list[Section]]: ...

    def headline(self, run: Run) -> tuple[str, str]: ...


@dataclass(frozen=True)
class Recipe:
    """A named config of a study; `short` are the overrides that the tour makes."""

    name: str
    study: str
    about: str
    config: Any
    short: Mapping[str, Any]


def study(name: str) -> Study:
    """Return a study's module by name."""
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    return importlib.import_module(STUDIES[name])


def shipped() -> list[str]:
    """Return the names of the recipes in the package, one YAML file each in its study's folder."""
    return sorted(_recipe_files())


def load(name: str, overrides: Sequence[str] = (), *, short: bool = False) -> Recipe:
    """Return a shipped recipe by name, or the one in a YAML file, with `key=value` overrides
    (dotted keys, YAML values).

    Raises InputError for an unknown recipe, key or value, with the nearest names.
    """
    text, label = _text(name)
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict) or "study" not in raw:
        raise InputError(
            f"{name}: a recipe is a mapping with a key 'study' (one of {', '.join(STUDIES)})"
        )
    kind, about, brief = raw.pop("study"), raw.pop("about", ""), raw.pop("short", {})
    config_type = study(kind).Config
    for key, value in {**(brief if short else {}), **_parsed(overrides)}.items():
        _put(raw, config_type, key, value)
    return Recipe(label, kind, about, _validated(config_type, raw, name), brief)


def execute(
    recipe: Recipe, folder: Path | str, *, resume: bool = False, force: bool = False
) -> dict[str, Any]:
    """Run a recipe into a folder, write its report and return its summary; a finished run that
    is resumed returns it at once.
    """
    saved = {
        "recipe": recipe.name,
        "study": recipe.study,
        "config": recipe.config.model_dump(mode="json"),
    }
    study(recipe.study).check(recipe.config)
    run = runs.start(folder, saved, resume=resume, force=force)
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
    return run.json("summary.json")


def report(run: Run) -> Path:
    """Build `report.html` of a finished run from what it saved; InputError when it is not
    finished.
    """
    _finished(run)
    kind = study_of(run)
    facts, sections = kind.sections(run)
    title, lead = kind.headline(run)
    return page.write(run.folder, page.render(title, lead, facts, [*sections, provenance(run)]))


def facts(folder: Path | str) -> list[Fact]:
    """Return the headline numbers of a finished run."""
    run = runs.opened(folder)
    _finished(run)
    return study_of(run).sections(run)[0]


def provenance(run: Run) -> Section:
    """Return the report's last section: config, versions and seed of the run."""
    import polars as pl

    flat = list(_flat(run.json("config.json")))
    versions = list(run.json("versions.json").items())
    return Section(
        "How this was made",
        f"Run again with: assay run {run.json('config.json')['recipe']} -o NEW_FOLDER, with the"
        " keys below.",
        tables=[
            page.Table(pl.DataFrame(flat, schema=["key", "value"], orient="row"), "Config"),
            page.Table(
                pl.DataFrame(versions, schema=["package", "version"], orient="row"), "Versions"
            ),
        ],
    )


def study_of(run: Run) -> Study:
    """Return the study that made a run."""
    saved = run.json("config.json")
    if not isinstance(saved, dict) or "study" not in saved:
        raise InputError(
            f"{run.folder / 'config.json'} does not name a study; is this a run folder?"
        )
    return study(saved["study"])


def config_of(run: Run) -> Any:
    """Return the validated config of a saved run."""
    saved = run.json("config.json")
    return _validated(study_of(run).Config, saved["config"], str(run.folder / "config.json"))


def mechanisms_of(run: Run) -> Mechanisms:
    """Bind the mechanisms of a finished run again; InputError when its study has none."""
    _finished(run)
    found = getattr(study_of(run), "load", None)
    if found is None:
        raise InputError(
            f"a run of {run.json('config.json')['study']!r} has no parts to attribute; look at its"
            " report instead"
        )
    return found(run)


def _finished(run: Run) -> None:
    if not run.has("summary.json"):
        name = run.json("config.json").get("recipe", "RECIPE")
        raise InputError(
            f"the run in {run.folder} is not finished; go on with: assay run {name} -o {run.folder}"
            " --resume"
        )


def _text(name: str) -> tuple[str, str]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"no recipe file {name!r}")
        return path.read_text(), path.stem
    found = _recipe_files()
    if name not in found:
        raise unknown("recipe", name, found)
    return found[name].read_text(), name


def _recipe_files() -> dict[str, Traversable]:
    folders = (entry for entry in resources.files("assay.studies").iterdir() if entry.is_dir())
    files = (file for folder in folders for file in folder.iterdir())
    return {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}


def _parsed(overrides: Sequence[str]) -> dict[str, Any]:
    found = {}
    for entry in overrides:
        key, equals, value = entry.partition("=")
        if not equals or not key:
            raise InputError(f"--set takes key=value, got {entry!r}")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--set {key}: the value {value!r} is not YAML") from error
    return found


def _put(raw: dict[str, Any], config_type: type[BaseModel], key: str, value: Any) -> None:
    here, model = raw, config_type
    *parents, last = key.split(".")
    for parent in parents:
        model = _field(model, parent, key)
        here = here.setdefault(parent, {})
    if last not in model.model_fields:
        raise unknown("config key", key, _keys(config_type))
    here[last] = value


def _field(model: type[BaseModel], name: str, key: str) -> type[BaseModel]:
    kind = model.model_fields[name].annotation if name in model.model_fields else None
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        raise unknown("config key", key, _keys(model))
    return kind


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += _keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _validated(config_type: type[StudyConfig], raw: Any, where: str) -> Any:
    try:
        return config_type.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise unknown("config key", key, _keys(config_type)) from error
        raise InputError(f"{where}: {key}: {first['msg']} (got {first['input']!r})") from error


def _flat(value: Any, prefix: str = "") -> Any:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(entry, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, str(value)
