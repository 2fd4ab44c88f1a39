"""One pre-norm transformer block of a Hugging Face model, in pieces that run on some positions only.

Every norm, projection, MLP, rotation and softmax is the model's own function; only the order in which they are called is
written here. What the pieces give is compared with the model's own forward pass before it is used (see `suffix`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from assay import hooks
from assay.hooks import Seen
from assay.targets import names

Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Family:
    """Where a family keeps what is no site: the attention module, the norms before it and the MLP, the norm behind the last block."""

    attention: str
    before_attention: str
    before_mlp: str
    final_norm: str


_LLAMA = Family("self_attn", "input_layernorm", "post_attention_layernorm", "model.norm")
FAMILIES: dict[str, Family] = {
    "gpt2": Family("attn", "ln_1", "ln_2", "transformer.ln_f"),
    "gpt_neox": Family("attention", "input_layernorm", "post_attention_layernorm", "gpt_neox.final_layer_norm"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": replace(_LLAMA, before_mlp="pre_feedforward_layernorm"),
}


@dataclass(frozen=True)
class Block:
    """The pieces of one block. Tensors are (jobs, positions, width), heads (jobs, heads, positions, head width).

    `after_attention` and `after_mlp` are the output norms of families that have them. `parallel` blocks run attention and MLP
    side by side on the same input.
    """

    attention: nn.Module
    before_attention: nn.Module
    before_mlp: nn.Module
    after_attention: nn.Module | None
    after_mlp: nn.Module | None
    mlp_module: nn.Module
    output: nn.Module
    projections: Mapping[str, nn.Module]
    slices: tuple[names.SiteRef, names.SiteRef, names.SiteRef]
    parallel: bool

    def raw(self, x: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the query, key and value projections by path: one entry where they are fused."""
        normed = self.before_attention(x)
        return {path: projection(normed) for path, projection in self.projections.items()}

    def heads(self, raw: Mapping[str, Tensor], rotation: tuple[Tensor, Tensor] | None) -> Heads:
        """Return query, key and value heads, normed and rotated to their positions where the family does so."""
        query, key, value = (_split(ref, raw[ref.site]) for ref in self.slices)
        own: Any = self.attention
        if hasattr(own, "q_norm"):
            query, key = own.q_norm(query), own.k_norm(key)
        query, key, value = (entry.transpose(1, 2) for entry in (query, key, value))
        if rotation is not None:
            query, key = _own(own, "apply_rotary_pos_emb")(query, key, *rotation)
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return what the heads read, (jobs, positions, heads * head width), under an additive mask (jobs, 1, queries, keys)."""
        own: Any = self.attention
        options = {"softcap": own.attn_logit_softcapping} if hasattr(own, "attn_logit_softcapping") else {}
        found = _own(own, "eager_attention_forward")(own, query, key, value, mask, scaling=own.scaling, dropout=0.0, **options)[0]
        return found.flatten(2)

    def mix(self, z: Tensor) -> Tensor:
        """Return what attention adds to the residual stream."""
        out = self.output(z)
        return out if self.after_attention is None else self.after_attention(out)

    def mlp(self, x: Tensor, mid: Tensor, edits: Mapping[str, hooks.Edit] | None = None) -> Tensor:
        """Return what the MLP adds to the residual stream, with edits at sites inside it."""
        normed = self.before_mlp(x if self.parallel else mid)
        out = hooks.run(self.mlp_module, normed, edits) if edits else self.mlp_module(normed)
        return out if self.after_mlp is None else self.after_mlp(out)

    def finish(self, x: Tensor, attention: Tensor) -> Tensor:
        """Return the block's output, given its input and what attention adds."""
        mid = x + attention
        return mid + self.mlp(x, mid)


@dataclass(frozen=True)
class Call:
    """What the model handed to a block beside its input: the additive mask and the rotation of every position."""

    mask: Tensor
    rotation: tuple[Tensor, Tensor] | None

    def at(self, examples: Tensor, first: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Return the rotation of the `count` positions from `first` on, for the given examples."""
        if self.rotation is None:
            return None
        cos, sin = ((entry if len(entry) == 1 else entry[examples])[:, first : first + count] for entry in self.rotation)
        return cos, sin


def build(model: nn.Module) -> list[Block] | None:
    """Return the blocks of a model, None when its family is not described here."""
    layout, family = names.layout(model), FAMILIES.get(names.family(model))
    if layout is None or family is None:
        return None
    blocks = model.get_submodule(layout.blocks)
    assert isinstance(blocks, nn.ModuleList)
    found = []
    for layer, block in enumerate(blocks):
        path = f"{layout.blocks}.{layer}"
        query, key, value = (names.resolve(model, f"blocks.{layer}.attn.hook_{letter}") for letter in "qkv")
        found.append(
            Block(
                attention=block.get_submodule(family.attention),
                before_attention=block.get_submodule(family.before_attention),
                before_mlp=block.get_submodule(family.before_mlp),
                after_attention=None if layout.attention == family.attention else block.get_submodule(layout.attention),
                after_mlp=None if layout.mlp == "mlp" else block.get_submodule(layout.mlp),
                mlp_module=block.get_submodule("mlp"),
                output=block.get_submodule(layout.attention_projection),
                projections={f"{path}.{name}": block.get_submodule(name) for name in layout.qkv},
                slices=(query, key, value),
                parallel=bool(getattr(model.config, "use_parallel_residual", False)),
            )
        )
    return found


def call(block: nn.Module, seen: Seen) -> Call:
    """Return what a block was called with; the mask becomes additive whatever the attention implementation takes."""
    given = inspect.signature(block.forward).bind(*seen.inputs, **seen.kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    mask, positions, x = given.get("attention_mask"), seen.value.shape[1], seen.value
    if mask is None:
        mask = torch.ones(1, 1, positions, positions, dtype=torch.bool, device=x.device).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=x.dtype, device=x.device).where(mask, torch.finfo(x.dtype).min)
    return Call(mask, given.get("position_embeddings"))


def _split(ref: names.SiteRef, value: Tensor) -> Tensor:
    if ref.heads is None or ref.head_dim is None or ref.stride not in (None, ref.head_dim):
        return ref.split(value)
    first = ref.slice[0] if ref.slice else 0
    return value[..., first : first + ref.heads * ref.head_dim].unflatten(-1, (ref.heads, ref.head_dim))


def _own(module: nn.Module, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(sys.modules[type(module).__module__], name)
    return function
