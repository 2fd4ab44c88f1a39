"""Tiny random language models of every family, saved to disk and loaded as a user's would be,
and a pair of padded batches.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from assay.core.target import Batch
from assay.targets.language import load_language_model

SMALL = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**SMALL, "n_positions": 32}),
    "gpt_neox parallel": (
        "gpt_neox",
        {**SMALL, "intermediate_size": 24, "use_parallel_residual": True},
    ),
    "gpt_neox sequential": (
        "gpt_neox",
        {**SMALL, "intermediate_size": 24, "use_parallel_residual": False},
    ),
    "llama": ("llama", GROUPED),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 3}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 6}),
    "gemma2": (
        "gemma2",
        {
            **GROUPED,
            "head_dim": 6,
            "sliding_window": 3,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
}


@cache
def folder(name: str) -> tempfile.TemporaryDirectory[str]:
    family, settings = FAMILIES[name]
    config = CONFIG_MAPPING[family](**settings, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in (
        model.parameters()
    ):  # norms too: a norm whose scale is one would hide a site on its wrong side
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    kept: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    model.save_pretrained(kept.name)
    return kept


def build(
    name: str, dtype: torch.dtype = torch.float64, device: str = "cpu", attention: str = "eager"
) -> Any:
    return load_language_model(
        Path(folder(name).name), dtype=dtype, device=device, attention=attention
    ).model


def mask() -> Tensor:
    return (torch.arange(7) < torch.tensor([7, 5, 7, 6])[:, None]).long()


def batches(device: str = "cpu") -> tuple[Batch, Batch]:
    """Four pairs of up to seven tokens, padded on the right; the first token is the same
    everywhere, then pairs agree for a while.
    """
    generator = torch.Generator().manual_seed(3)
    clean = torch.randint(1, 31, (4, 7), generator=generator)
    patch = torch.randint(1, 31, (4, 7), generator=generator)
    clean[:, 0] = patch[:, 0] = 1
    patch[0, :3], patch[1, :2] = clean[0, :3], clean[1, :2]
    labels = {
        "answers": torch.randint(1, 31, (4, 2), generator=generator).to(device),
        "last": (mask().sum(1) - 1).to(device),
    }
    sides = (
        {"input_ids": ids.to(device), "attention_mask": mask().to(device)}
        for ids in (clean * mask(), patch * mask())
    )
    first, second = (Batch(inputs, labels) for inputs in sides)
    return first, second
