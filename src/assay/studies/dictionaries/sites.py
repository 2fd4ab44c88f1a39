"""The dictionaries that stand at the sites of a run."""

from __future__ import annotations

from collections.abc import Mapping

from assay.dictionaries import Placed, architecture
from assay.errors import InputError
from assay.studies.dictionaries.config import Config


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
