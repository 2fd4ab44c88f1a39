"""Saved guards: `guard.safetensors` with a JSON file beside it, `guard.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.errors import InputError
from assay.guard.compiled import Compiled
from assay.guard.conformal import Ranks
from assay.guard.explanations import Explanation, Refused
from assay.guard.guard import Guard, Scorer
from assay.guard.quantise import Quantiser
from assay.guard.scores import TWO_SIDED, Mahalanobis
from assay.guard.settings import Settings
from assay.io import files

TENSORS = "guard.safetensors"
CONFIG = "guard.json"
FORMAT = "assay-guard/1"
_KEYS = (
    *("format", "names", "settings", "explanations", "refused", "model_hash", "reading"),
    *("training", "figures", "sha256"),
)
_BOOLS = ("single", "pairs", "counted", "root")


def save(folder: Path | str, guard: Guard) -> Path:
    """Write a guard into a folder; the place that bounds know is not saved (see `Guard.attach`).

    Raises InputError where the folder holds another file under one of the names."""
    folder = Path(folder)
    config = folder / CONFIG
    if config.exists() and not _is_ours(config):
        raise InputError(f"{config} exists and is no guard; choose another folder")
    if (folder / TENSORS).exists() and not config.exists():
        raise InputError(f"{folder / TENSORS} exists without its {CONFIG}; choose another folder")
    files.save_tensors(folder / TENSORS, _tensors(guard))
    entry = {
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
    files.write_json(config, entry)
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
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{config} does not describe its tensors: {reason}") from error
    _require_shapes(folder, guard)
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
    tests = len(scorer.tests)
    for name, ranks in (("ranks", guard.ranks), ("single", guard.single)):
        if ranks is not None:
            wanted[f"scores of {name}"] = (ranks.reference, (tests, ranks.reference.shape[-1]))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{folder / TENSORS}: {name} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        if name != "cuts" and bool(tensor.isnan().any()):
            raise InputError(f"{folder / TENSORS}: {name} holds NaN")
    if edges and not bool(((c.edges >= 0) & (c.edges < n)).all()):
        raise InputError(f"{folder / TENSORS}: an edge names a feature that does not exist")
    rising = guard.statistic.ndim == 1 and bool((guard.statistic.diff() >= 0).all())
    if not rising or not bool((scorer.quantiser.cuts.diff(dim=1).nan_to_num(0.0) >= 0).all()):
        raise InputError(f"{folder / TENSORS}: cuts and statistic must rise")


def _is_ours(path: Path) -> bool:
    try:
        entry = files.read_json(path)
    except InputError:
        return False
    return isinstance(entry, dict) and entry.get("format") == FORMAT
