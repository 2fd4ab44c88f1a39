"""The dry run of a features study: memory and time before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from assay.errors import InputError, unknown
from assay.memory import available
from assay.studies.features.config import Config
from assay.studies.rates import measure_rate

_ACTIVE = 2  # features that are active in the clean or the patch run, beside those of one run


def plan(config: Config) -> dict[str, Any]:
    """Return what the network and the dictionaries keep in memory and what scores and exact patches
    cost, by the network's shape alone.

    The shape is that of the model's own configuration where it is a local folder, else of
    `layout`. Raises InputError where neither says it."""
    model, layout = _outline(config), config.layout
    shape: Any = model.config
    width, layers = int(shape.hidden_size), int(shape.num_hidden_layers)
    network = sum(parameter.numel() for parameter in model.parameters())
    pairs, length = config.data.limit, layout.length
    sites = len(config.sites) * layers
    identity = config.kind == "identity"
    size = width if identity else layout.features
    active = width if identity else layout.active
    dictionary = 0 if identity else 4 * 2 * size * width
    parts = pairs * (length - 1) * sites * (active * (1 if identity else _ACTIVE) + 1)
    held = 8 * 4 * parts + pairs * length * width * 4 * sites
    # A forward and backward pass keep about 34 numbers a position and layer of this width.
    activations = 4 * pairs * length * layers * width * 34
    passes = 2 * network * pairs * length
    encode = 2 * 2 * size * width * pairs * length * sites * (0 if identity else 1)
    exact = parts if config.effects.everything else config.effects.exact * pairs
    # A patched run computes, on average, half of the layers on half of the positions.
    patching = exact * 2 * network * length / 4
    rate = measure_rate()
    memory = 4 * network + activations + 2 * dictionary + held
    return {
        "sites": sites,
        "features": sites * size,
        "active_parts": parts,
        "exact_patches": exact,
        "memory_gb": {
            "network": 4 * network / 1e9,
            "one pass forward and backward": activations / 1e9,
            "two dictionaries at a time": 2 * dictionary / 1e9,
            "all dictionaries on disk": sites * dictionary / 1e9,
            "scores and references": held / 1e9,
            "available here": available() / 1e9,
            "fits": memory <= available(),
        },
        "time": {
            "operations_per_second_here": rate,
            "attribution_seconds_here": (4 * passes + encode) / rate,
            "exact_patching_hours_here": patching / rate / 3600,
        },
    }


def _outline(config: Config) -> Any:
    """Return the network without its weights."""
    path = config.target.path
    if path is not None and Path(path).is_dir():
        try:
            found = AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(f"{path} has no config of a model: {first}") from error
    elif config.layout.family is not None:
        family = config.layout.family
        if family not in CONFIG_MAPPING:
            raise unknown("layout.family", family, list(CONFIG_MAPPING))
        given = {
            "hidden_size": config.layout.hidden,
            "num_hidden_layers": config.layout.layers,
            "num_attention_heads": config.layout.heads,
            "vocab_size": config.layout.vocabulary,
        }
        if config.layout.intermediate is not None:
            given["intermediate_size"] = config.layout.intermediate
        found = CONFIG_MAPPING[family](**given)
    else:
        raise InputError(
            "a dry run needs the network's shape: --set target.path=MODEL_DIR with its config, or"
            " layout.family and the sizes in layout"
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(found)
