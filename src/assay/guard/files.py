"""Saved guards: `guard.safetensors` with a JSON file beside it, `guard.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from assay.errors import InputError
from assay.guard.compiled import Compiled
from assay.guard.conformal import Ranks
from assay.guard.explanations import Explanation, Form, Refused, Sort
from assay.guard.guard import Guard, Scorer
from assay.guard.quantise import Quantiser
from assay.guard.scores import TWO_SIDED, Mahalanobis
from assay.guard.settings import Settings
from assay.io import files
from assay.io.ours import require_ours

TENSORS = "guard.safetensors"
CONFIG = "guard.json"
FORMAT = "assay-guard/1"
_KEYS = (
    *("format", "names", "settings", "explanations", "refused", "model_hash", "reading"),
    *("training", "figures", "sha256", "checksum"),
)
_BOOLS = ("single", "pairs", "counted", "root")
_WHOLE = (*_BOOLS, "edges", "fires", "classes", "decisions")


def save(folder: Path | str, guard: Guard) -> Path:
    """Write a guard into a folder; the place that bounds know is not saved (see `Guard.attach`).

    Raises InputError where the folder holds another file, or a link, under one of the names."""
    folder = Path(folder)
    config = require_ours(folder / CONFIG, {"format": FORMAT})
    files.save_tensors(folder / TENSORS, _tensors(guard))
    entry: dict[str, Any] = {
        "format": FORMAT,
        "names": guard.names,
        "settings": asdict(guard.settings),
        "explanations": [asdict(one) for one in guard.explanations],
        "refused": [
            {"explanation": asdict(one.explanation), "reason": one.reason} for one in guard.refused
        ],
        "model_hash": guard.model_hash,
        "reading": guard.reading,
        "training": sorted(guard.training),
        "figures": guard.figures,
        "sha256": files.sha256(folder / TENSORS),
    }
    files.write_json(config, {**entry, "checksum": _checksum(files.plain(entry))})
    return folder


def load(folder: Path | str, *, model_hash: str | None = None) -> Guard:
    """Read a guard that `save` wrote; with `model_hash`, the digest of the network that it will
    guard.

    Raises InputError for missing, damaged or malformed files, tensors that do not fit, and a guard
    of another network."""
    folder = Path(folder)
    config = files.existing(folder / CONFIG)
    entry = files.read_json(config)
    if not isinstance(entry, dict) or set(entry) != set(_KEYS) or entry["format"] != FORMAT:
        raise InputError(f"{config} is no guard of this version; it needs {', '.join(_KEYS)}")
    if _checksum(entry) != entry["checksum"]:
        raise InputError(f"{config} is damaged, or was edited: its checksum differs; fit again")
    tensors = files.load_tensors(folder / TENSORS, finite=False)
    if files.sha256(folder / TENSORS) != entry["sha256"]:
        raise InputError(f"{folder / TENSORS} is not the file that {CONFIG} was written with")
    with_hash = entry["model_hash"]
    if model_hash is not None and with_hash and model_hash != with_hash:
        raise InputError(
            f"the guard in {folder} was fitted on another network (the digest of the weights"
            " differs); fit one for this network"
        )
    try:
        guard = _guard(entry, tensors)
        _require_words(config, guard)
        _require_shapes(folder, guard)
    except InputError:
        raise
    except Exception as error:  # a file of another's making can hold anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{config} does not describe its tensors: {reason}") from error
    return guard


def _tensors(guard: Guard) -> dict[str, Tensor]:
    scorer = guard.scorer
    found = {
        "cuts": scorer.quantiser.cuts,
        "fires": scorer.quantiser.fires,
        "distance.means": scorer.distance.means,
        "distance.whiten": scorer.distance.whiten,
        "statistic": guard.statistic,
    }
    for entry in fields(Compiled):
        value = getattr(scorer.compiled, entry.name)
        found[f"compiled.{entry.name}"] = value.to(torch.uint8) if entry.name in _BOOLS else value
    if scorer.root_distance is not None and scorer.classes is not None:
        found["classes"] = scorer.classes
        found["root_distance.means"] = scorer.root_distance.means
        found["root_distance.whiten"] = scorer.root_distance.whiten
    for name, ranks in (("ranks", guard.ranks), ("single", guard.single)):
        if ranks is not None:
            found[name] = ranks.reference
    if guard.memory is not None and guard.decisions is not None:
        found |= {"memory": guard.memory, "decisions": guard.decisions}
    return found


def _guard(entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> Guard:
    compiled = {
        one.name: tensors[f"compiled.{one.name}"].bool()
        if one.name in _BOOLS
        else tensors[f"compiled.{one.name}"]
        for one in fields(Compiled)
    }
    rooted = "classes" in tensors
    scorer = Scorer(
        Quantiser(tensors["cuts"], tensors["fires"]),
        Compiled(**compiled),
        Mahalanobis(tensors["distance.means"], tensors["distance.whiten"]),
        Mahalanobis(tensors["root_distance.means"], tensors["root_distance.whiten"])
        if rooted
        else None,
        tensors["classes"] if rooted else None,
    )
    sides = tuple(name in TWO_SIDED for name in scorer.tests)
    settings = dict(entry["settings"])
    names = tuple(map(str, entry["names"]))
    return Guard(
        names,
        Settings(**{**settings, "modes": tuple(settings["modes"])}),
        scorer,
        Ranks(tensors["ranks"], sides) if "ranks" in tensors else None,
        Ranks(tensors["single"], sides) if "single" in tensors else None,
        tensors["statistic"],
        tuple(_explanation(one) for one in entry["explanations"]),
        tuple(
            Refused(_explanation(one["explanation"]), str(one["reason"]))
            for one in entry["refused"]
        ),
        str(entry["model_hash"]),
        dict(entry["reading"]),
        frozenset(map(str, entry["training"])),
        dict(entry["figures"]),
        tensors.get("memory"),
        tensors.get("decisions"),
    )


def _explanation(entry: Mapping[str, Any]) -> Explanation:
    return Explanation(**{**entry, "features": tuple(map(int, entry["features"]))})


def _require_shapes(folder: Path, guard: Guard) -> None:
    """Raise InputError for tensors that would index outside of one another."""
    n, scorer, c = len(guard.names), guard.scorer, guard.scorer.compiled
    size = scorer.quantiser.bins
    roots = 1 if scorer.classes is None else len(scorer.classes) + 1
    edges = len(c.edges)
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "cuts": (scorer.quantiser.cuts, (n, size - 1)),
        "fires": (scorer.quantiser.fires, (n,)),
        "edges": (c.edges, (edges, 2)),
        "single": (c.single, (roots, n, size)),
        "pairs": (c.pairs, (edges, size, size)),
        "log": (c.log, (roots, n, size)),
        "ratio": (c.ratio, (edges, size, size)),
        "counted": (c.counted, (edges,)),
        "root": (c.root, (roots,)),
        "root_log": (c.root_log, (roots,)),
        "distance.means": (scorer.distance.means, (1, n)),
        "distance.whiten": (scorer.distance.whiten, (n, n)),
    }
    if scorer.root_distance is not None:
        wanted["root_distance.means"] = (scorer.root_distance.means, (roots, n))
        wanted["root_distance.whiten"] = (scorer.root_distance.whiten, (n, n))
    if scorer.classes is not None:
        wanted["classes"] = (scorer.classes, (roots - 1,))
    if guard.memory is not None:
        rows = len(guard.memory)
        wanted["memory"] = (guard.memory, (rows, n))
        if guard.decisions is None:
            raise InputError(f"{folder / TENSORS}: memory without decisions")
        wanted["decisions"] = (guard.decisions, (rows,))
    tests = len(scorer.tests)
    for name, ranks in (("ranks", guard.ranks), ("single", guard.single)):
        if ranks is not None:
            wanted[f"scores of {name}"] = (ranks.reference, (tests, ranks.reference.shape[-1]))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{folder / TENSORS}: {name} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        if bool(tensor.isnan().any()):
            raise InputError(f"{folder / TENSORS}: {name} holds NaN")
        whole = not tensor.is_floating_point()
        if tensor.is_complex() or whole != (name in _WHOLE):
            kind = "whole numbers or bits" if name in _WHOLE else "real numbers"
            raise InputError(f"{folder / TENSORS}: {name} must hold {kind}, got {tensor.dtype}")
    if edges and not bool(((c.edges >= 0) & (c.edges < n)).all()):
        raise InputError(f"{folder / TENSORS}: an edge names a feature that does not exist")
    statistic = guard.statistic
    if guard.ranks is not None and not (statistic.ndim == 1 and len(statistic)):
        raise InputError(f"{folder / TENSORS}: the statistic must be a vector that is not empty")
    rows_that_rise = [statistic[None], scorer.quantiser.cuts]
    if scorer.classes is not None:
        rows_that_rise.append(scorer.classes[None])
    for found in (guard.ranks, guard.single):
        if found is not None:
            if not found.reference.shape[1]:
                raise InputError(f"{folder / TENSORS}: there are no scores to rank against")
            rows_that_rise.append(found.reference)
    if not all(bool((rows[:, 1:] >= rows[:, :-1]).all()) for rows in rows_that_rise):
        raise InputError(f"{folder / TENSORS}: cuts, classes, scores and statistic must rise")
    if bool(statistic.isnan().any()):
        raise InputError(f"{folder / TENSORS}: the statistic holds NaN")


def _require_words(config: Path, guard: Guard) -> None:
    """Raise InputError for explanations of forms or features that do not exist, and names that
    repeat.
    """
    n = len(guard.names)
    if len(set(guard.names)) < n:
        raise InputError(f"{config}: the names of features must be distinct")
    for one in (*guard.explanations, *(each.explanation for each in guard.refused)):
        places = one.features
        good = len(set(places)) == (2 if one.form == "edge" else 1) == len(places)
        good = good and all(0 <= place < n for place in places)
        numbers = (one.bits, one.explains, one.predicted or 0.0, one.observed or 0.0)
        if (
            not good
            or one.form not in get_args(Form)
            or one.sort not in get_args(Sort)
            or not all(type(number) in (int, float) for number in numbers)
        ):
            raise InputError(f"{config}: {one} is no explanation of {n} features")


def _checksum(entry: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything that a guard's JSON says. It tells damage, not a forger."""
    said = {key: value for key, value in entry.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
