"""One record per family of language models: where the named values, norms and projections are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

Fused = Literal["no", "blocks", "heads"]


@dataclass(frozen=True)
class Family:
    """Where one family of models keeps the named values: paths inside a block, and how query, key
    and value are stored. `embedding`, `blocks` and `final_norm` are paths in the model.

    `attention` and `mlp` are the modules whose outputs are *added to the residual stream*: behind
    the output norm where the family has one. `before_attention` and `before_mlp` are the norms that
    they read. `qkv` holds three paths, or one of a fused projection, cut into three blocks of
    columns (`fused="blocks"`) or into one (query, key, value) triple per head (`fused="heads"`)."""

    embedding: str
    blocks: str
    attention: str
    mlp: str
    attention_projection: str
    qkv: tuple[str, ...]
    neurons_in: str
    neurons_out: str
    before_attention: str
    before_mlp: str
    final_norm: str
    fused: Fused = "no"

    @property
    def attention_module(self) -> str:
        """The module that makes the attention pattern, inside a block."""
        return self.attention_projection.rsplit(".", 1)[0]

    @property
    def mlp_module(self) -> str:
        """The module that holds the MLP's neurons, inside a block."""
        return self.neurons_out.rsplit(".", 1)[0]


_LLAMA = Family(
    embedding="model.embed_tokens",
    blocks="model.layers",
    attention="self_attn",
    mlp="mlp",
    attention_projection="self_attn.o_proj",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    neurons_in="mlp.gate_proj",
    neurons_out="mlp.down_proj",
    before_attention="input_layernorm",
    before_mlp="post_attention_layernorm",
    final_norm="model.norm",
)
_GPT2 = Family(
    embedding="transformer.wte",
    blocks="transformer.h",
    attention="attn",
    mlp="mlp",
    attention_projection="attn.c_proj",
    qkv=("attn.c_attn",),
    neurons_in="mlp.c_fc",
    neurons_out="mlp.c_proj",
    before_attention="ln_1",
    before_mlp="ln_2",
    final_norm="transformer.ln_f",
    fused="blocks",
)
_NEOX = Family(
    embedding="gpt_neox.embed_in",
    blocks="gpt_neox.layers",
    attention="attention",
    mlp="mlp",
    attention_projection="attention.dense",
    qkv=("attention.query_key_value",),
    neurons_in="mlp.dense_h_to_4h",
    neurons_out="mlp.dense_4h_to_h",
    before_attention="input_layernorm",
    before_mlp="post_attention_layernorm",
    final_norm="gpt_neox.final_layer_norm",
    fused="heads",
)
FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": replace(
        _LLAMA,
        attention="post_attention_layernorm",
        mlp="post_feedforward_layernorm",
        before_mlp="pre_feedforward_layernorm",
    ),
}


def find_family(model: nn.Module) -> Family | None:
    """Return the record of a model's family, None when there is none for it."""
    found = FAMILIES.get(model_type(model))
    return found if found is not None and _has_module(model, found.blocks) else None


def model_type(model: nn.Module) -> str:
    """Return the model type that the configuration states, or the class name of a model without
    one.
    """
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def is_parallel(model: nn.Module) -> bool:
    """Say whether the blocks run attention and MLP side by side on the same residual stream."""
    config = getattr(model, "config", None)
    return model_type(model) == "gpt_neox" and bool(getattr(config, "use_parallel_residual", False))


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
