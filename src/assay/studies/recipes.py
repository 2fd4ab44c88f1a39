"""Recipes: YAML configs of complete runs, every key checked without loading PyTorch, so that a typo
is answered at once.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from assay.errors import InputError, shown, unknown
from assay.io import runs
from assay.io.files import plain, read_text
from assay.io.runs import Run
from assay.studies.fields import StudyConfig

STUDIES = {
    entry.name.replace("_", "-"): f"assay.studies.{entry.name}.study"
    for entry in sorted(resources.files("assay.studies").iterdir(), key=lambda entry: entry.name)
    if entry.joinpath("study.py").is_file()
}
"""Every folder beside this file that holds a `study.py`, by its name."""


@dataclass(frozen=True)
class Recipe:
    """A named config of a study; `short` are the overrides that the tour makes, `overrides` those
    that were made.
    """

    name: str
    study: str
    about: str
    config: Any
    short: Mapping[str, Any]
    overrides: Mapping[str, Any]

    def saved(self) -> dict[str, Any]:
        """Return what a run keeps of its recipe."""
        return {
            "recipe": self.name,
            "study": self.study,
            "config": self.config.model_dump(mode="json"),
            "overrides": plain(self.overrides),
        }


def shipped() -> list[str]:
    """Return the names of the recipes in the package, one YAML file each in its study's folder."""
    return sorted(_recipe_files())


def load(
    name: str,
    overrides: Sequence[str] = (),
    *,
    short: bool = False,
    resumes: Path | str | None = None,
) -> Recipe:
    """Return a shipped recipe by name, or the one in a YAML file, with `key=value` overrides
    (dotted keys, YAML values).

    With `resumes`, the folder of a run to go on with, the overrides of that run come first. Raises
    InputError for an unknown recipe, key or value, with the nearest names, and where a run that
    never wrote its config is resumed without any."""
    text, label = _text(name)
    raw = copy.deepcopy(_raw(text, name))
    if not isinstance(raw, dict) or not isinstance(raw.get("study"), str):
        raise InputError(
            f"{name}: a recipe is a mapping with a key 'study' (one of {', '.join(STUDIES)})"
        )
    kind, about, brief = raw.pop("study"), raw.pop("about", ""), raw.pop("short", {})
    if not isinstance(about, str) or not isinstance(brief, dict):
        raise InputError(f"{name}: 'about' is a text and 'short' a mapping of keys to values")
    config_type = config_of_study(kind)
    before = _overrides_of(resumes, label, kind, given=bool(overrides))
    changed = {**(brief if short else {}), **before, **_parsed(overrides)}
    for key, value in changed.items():
        _put(raw, config_type, str(key), value)
    return Recipe(label, kind, about, validated(config_type, raw, name), brief, changed)


def config_of_study(name: str) -> type[StudyConfig]:
    """Return the type of a study's config; InputError for an unknown study."""
    module = module_of_study(name)
    beside = f"{module.removesuffix('.study')}.config"
    try:
        found = importlib.import_module(beside)
    except ModuleNotFoundError as error:
        if error.name != beside:
            raise
        found = importlib.import_module(module)  # a study that keeps its config in itself
    config_type: type[StudyConfig] = found.Config
    return config_type


def module_of_study(name: Any) -> str:
    """Return the name of a study's module; InputError for an unknown study."""
    if not isinstance(name, str) or name not in STUDIES:
        raise unknown("study", name, STUDIES)
    return STUDIES[name]


AUDIT, STEERING = "audit of", "steering of"  # in the configs of what verbs save


def saved_recipe(run: Run) -> dict[str, Any]:
    """Return what a run keeps of its recipe: recipe, study, config and overrides.

    Raises InputError when one is missing, as in the folder of another version."""
    saved = runs.saved_config(run)
    for key in (AUDIT, STEERING):
        if key in saved:
            raise InputError(
                f"{run.folder} holds the {key} {shown(saved[key])} and is no run of a recipe; look"
                " at its report.html, or build it again with: assay report"
            )
    for key, kind in {"recipe": str, "study": str, "config": dict, "overrides": dict}.items():
        if not isinstance(saved.get(key), kind):
            raise InputError(
                f"{run.path('config.json')} has no {key!r}; was this run made by another version?"
            )
    return saved


def validated(config_type: type[StudyConfig], raw: Any, where: str) -> Any:
    """Return a config; InputError, with the key, for a value that it does not accept."""
    try:
        return config_type.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise unknown("config key", key, _names(config_type)) from error
        raise InputError(f"{where}: {key}: {first['msg']} (got {shown(first['input'])})") from error


def _overrides_of(
    folder: Path | str | None, recipe: str, study: str, *, given: bool
) -> dict[str, Any]:
    if folder is None or not Path(folder).is_dir() or not any(Path(folder).iterdir()):
        return {}
    runs.require_startable(folder, resume=True)
    run = Run(folder)
    if not run.has("config.json"):  # killed before it began: nobody knows its settings
        if given:
            return {}
        raise InputError(
            f"the run in {folder} was stopped before it kept its settings; give them again with"
            " --set beside --resume, or start the recipe as it stands with --force"
        )
    saved = saved_recipe(run)
    if (saved["recipe"], saved["study"]) != (recipe, study):
        raise InputError(
            f"{folder} holds a run of the recipe {saved['recipe']!r}, not of {recipe!r}; go on with"
            f" that one, or use another folder with -o"
        )
    return dict(saved["overrides"])


def _text(name: str) -> tuple[str, str]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            return read_text(path), path.stem
        except InputError as error:
            raise InputError(f"no recipe file {shown(name)}: {error}") from error
    found = _recipe_files()
    if name not in found:
        raise unknown("recipe", name, found)
    return found[name].read_text(encoding="utf-8"), name


@cache
def _recipe_files() -> dict[str, Traversable]:
    folders = (entry for entry in resources.files("assay.studies").iterdir() if entry.is_dir())
    files = (file for folder in folders for file in folder.iterdir())
    return {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}


@cache
def _raw(text: str, name: str) -> Any:
    """Return what a recipe's file holds, parsed once."""
    return _yaml(text, name)


def _yaml(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{what} is not YAML: {reason}") from error


def _parsed(overrides: Sequence[str]) -> dict[str, Any]:
    found = {}
    for entry in overrides:
        key, equals, value = entry.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set takes key=value, got {shown(entry)}")
        found[key.strip()] = _yaml(value, f"--set {shown(key)}: the value {shown(value)}")
    return found


def _put(raw: dict[str, Any], config_type: type[BaseModel], key: str, value: Any) -> None:
    here, model = raw, config_type
    *parents, last = key.split(".")
    for parent in parents:
        kind = model.model_fields[parent].annotation if parent in model.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            raise unknown("config key", key, _names(config_type))
        inner = here.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InputError(
                f"{parent}: a mapping of keys to values is expected (got {shown(inner)})"
            )
        here, model = inner, kind
    if last not in model.model_fields:
        raise unknown("config key", key, _names(config_type))
    here[last] = value


def _names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += _names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names
