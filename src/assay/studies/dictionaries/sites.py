"""Which sites of a network patterns mean, and the dictionaries that stand there."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import nn

from assay.dictionaries import Placed, architecture
from assay.errors import InputError, unknown
from assay.studies.dictionaries.config import Config
from assay.targets.families import find_family
from assay.targets.names import site_names


def match_sites(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names that match, TransformerLens names first, then module paths.

    Raises InputError, with the nearest names, for a pattern that matches nothing."""
    known = site_names(model) if find_family(model) is not None else []
    paths = [path for path, _ in model.named_modules() if path]
    found: dict[str, None] = {}
    for pattern in patterns:
        names = fnmatch.filter(known, pattern) or fnmatch.filter(paths, pattern)
        if not names:
            raise unknown("site", pattern, [*known, *paths])
        found |= dict.fromkeys(names)
    order = {name: place for place, name in enumerate([*known, *paths])}
    return sorted(found, key=lambda name: order[name])


def place(config: Config, widths: Mapping[str, int]) -> dict[str, Placed]:
    """Return a dictionary for every site, as the config asks for it."""
    made = architecture(config.architecture)
    placed = {}
    for name, width in widths.items():
        size = features_at(config, width)
        options: dict[str, object] = {}
        if config.architecture in ("topk", "batchtopk", "matryoshka"):
            if config.k > size:
                raise InputError(f"k = {config.k} is more than the {size} features at {name!r}")
            options["k"] = config.k
        if config.architecture == "matryoshka":
            options["nested"] = [max(size // 4, 1), max(size // 2, 2), size]
        placed[name] = Placed(made(width, size, **options), name, (name,))
    return placed


def features_at(config: Config, width: int) -> int:
    """Return the size of the dictionary at a site of some width."""
    return 8 * width if config.features is None else config.features
