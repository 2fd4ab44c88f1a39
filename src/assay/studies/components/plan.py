"""The dry run of a components study: memory, time and scaled coefficients before anything is
loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from assay.errors import InputError, unknown
from assay.mechanisms.components import match_sites
from assay.mechanisms.components.advice import Setting, advise, batch_table
from assay.mechanisms.components.planning import plan_training
from assay.mechanisms.components.scaling import eps_floor
from assay.memory import available
from assay.studies.components.config import Config, LayoutConfig
from assay.studies.rates import measure_rate


def plan(config: Config) -> dict[str, Any]:
    """Return sites, memory, time and every coefficient with what the change of size asks of it.

    The network is laid out without its weights. Raises InputError for an unknown family, a folder
    without a config, and patterns that match nothing."""
    config.require_lists()
    model = _outline(config)
    chosen, training = config.components, config.training
    sites = match_sites(model, list(config.sites), chosen.per_site)
    before = Setting(config.reference.sites, config.reference.batch, config.reference.length)
    after = Setting(len(sites), training.batch, config.data.length)
    passes = 2 if training.adversary else 1
    options = importance_options(config)
    found = plan_training(
        sites,
        positions=after.positions,
        passes=passes,
        model_parameters=sum(parameter.numel() for parameter in model.parameters()),
        model_activations=_activations(model),
        importance=chosen.importance,
        **options,
    )
    rate = measure_rate()
    penalty = config.penalty
    floor = eps_floor(
        after.positions, p=penalty.p, eps=penalty.eps, beta=penalty.beta, components=chosen.per_site
    )
    return {
        "sites": {
            "count": len(sites),
            "first": sites[0].name,
            "last": sites[-1].name,
            "components_per_site": chosen.per_site,
            "components": len(sites) * chosen.per_site,
        },
        "parameters": {"factors": found.factors, "trained": found.parameters},
        "memory_gb": {
            "trained state": found.state / 1e9,
            "frozen model": found.model / 1e9,
            "activations of one batch": found.activations / 1e9,
            "activations of one window": found.activations / after.batch / 1e9,
            "together": found.memory / 1e9,
            "available here": available() / 1e9,
            "fits": found.memory <= available(),
        },
        "time": {
            "operations_per_step": float(found.flops),
            "operations_per_second_here": rate,
            "seconds_per_step_here": found.flops / rate,
            "days_for_all_steps_here": training.steps * found.flops / rate / 86_400,
        },
        "coefficients": {
            **{key: value for key, value in penalty.model_dump().items() if key != "end"},
            "beta_at_common": _beta(before, after, penalty.beta, 0.1),
            "beta_at_rare": _beta(before, after, penalty.beta, 1e-4),
            "reference_count": before.positions,
            "dead_component_firings": floor.firings,
            "dead_site_loss": floor.loss,
        },
        "terms": [
            asdict(row)
            for row in advise(before, after, beta=penalty.beta, p=penalty.p, eps=penalty.eps)
        ],
        "batch": batch_table(before, after, penalty.beta),
    }


def importance_options(config: Config) -> dict[str, int]:
    """Return the sizes of the importance function that the config names."""
    chosen = config.components
    own = {"hidden": chosen.hidden}
    if chosen.importance == "transformer":
        own |= {"width": chosen.width, "blocks": chosen.blocks, "heads": chosen.heads}
    return own


def _beta(before: Setting, after: Setting, beta: float, mean: float) -> float:
    return batch_table(before, after, beta, (mean,))[0]["beta"]


def _outline(config: Config) -> nn.Module:
    if config.target.path is not None:
        try:
            found = AutoConfig.from_pretrained(config.target.path)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(f"{config.target.path} has no config of a model: {first}") from error
    else:
        found = _config_of(config.target.layout)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(found)
    return model


def _config_of(layout: LayoutConfig) -> Any:
    if layout.family not in CONFIG_MAPPING:
        raise unknown("family", layout.family, list(CONFIG_MAPPING))
    return CONFIG_MAPPING[layout.family](
        hidden_size=layout.hidden,
        intermediate_size=layout.intermediate,
        num_hidden_layers=layout.layers,
        num_attention_heads=layout.heads,
        num_key_value_heads=layout.key_value_heads,
        vocab_size=layout.vocabulary,
        tie_word_embeddings=False,
    )


def _activations(model: nn.Module) -> int:
    """Return about how many numbers a run keeps per position: what every layer writes."""
    total = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2:
            total += weight.shape[1] if type(module).__name__ != "Linear" else weight.shape[0]
    return total
