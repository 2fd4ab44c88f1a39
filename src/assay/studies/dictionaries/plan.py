"""The dry run of a dictionaries study: sizes, memory and time before any weight is loaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from assay.errors import InputError
from assay.memory import available
from assay.studies.dictionaries.config import Config
from assay.studies.dictionaries.sites import features_at
from assay.studies.rates import measure_rate
from assay.targets.names import match_names, resolve


def plan(config: Config) -> dict[str, Any]:
    """Return the sites with their sizes, what training keeps in memory, and its operations.

    Raises InputError without a model, for a folder without a config, and for patterns that match
    nothing."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_shape(config))
    names = match_names(model, config.sites)
    widths = {name: _width(model, name) for name in names}
    sizes = {name: features_at(config, width) for name, width in widths.items()}
    parameters = sum(2 * widths[name] * sizes[name] for name in names)
    network = sum(parameter.numel() for parameter in model.parameters())
    batch, steps = config.training.batch, config.training.steps
    before = 4 * batch * max(sizes.values())
    memory = 4 * network + 16 * parameters + before
    # The encoder's product; what is sparse costs a tenth of it. Then the network's own pass.
    per_step = batch * (2.2 * parameters / 2 * 2 + 2 * network)
    rate = measure_rate()
    return {
        "sites": [{"site": name, "width": widths[name], "features": sizes[name]} for name in names],
        "parameters": {"dictionaries": parameters, "network": network},
        "memory_gb": {
            "network": 4 * network / 1e9,
            "dictionaries with gradients and moments": 16 * parameters / 1e9,
            "features of one batch": before / 1e9,
            "available here": available() / 1e9,
            "fits": memory <= available(),
        },
        "time": {
            "operations_per_step": float(per_step),
            "operations_per_second_here": rate,
            "seconds_per_step_here": per_step / rate,
            "hours_for_all_steps_here": steps * per_step / rate / 3600,
        },
    }


def _shape(config: Config) -> Any:
    """Return the config of the network."""
    chosen = config.target
    if chosen.train:
        return GPT2Config(
            n_layer=chosen.layers,
            n_embd=chosen.width,
            n_head=chosen.heads,
            n_positions=config.data.length,
            vocab_size=chosen.vocabulary,
        )
    if chosen.path is None:
        raise InputError("a dry run needs the model's config: --set target.path=MODEL_DIR")
    try:
        return AutoConfig.from_pretrained(chosen.path)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{chosen.path} has no config of a model: {first}") from error


def _width(model: Any, name: str) -> int:
    """Return the width of a site, from the network's config."""
    ref = resolve(model, name)
    config = model.config
    hidden = int(config.hidden_size)
    if ref.heads is not None and ref.head_dim is not None:
        return ref.heads * ref.head_dim
    if ref.kind == "neurons":
        inner = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", None)
        return int(inner or 4 * hidden)
    return hidden
