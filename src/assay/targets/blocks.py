"""One pre-norm transformer block of a Hugging Face model, in pieces that run on some positions
only.

Every norm, projection, MLP, rotation and softmax is the model's own function; only the order in
which they are called is written here. What the pieces give is compared with the model's own forward
pass before it is used (see `suffix`)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.core.sites import Edit, Seen, run_edited
from assay.targets import families, names

HeadValues = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class BlockPieces:
    """The pieces of one block, for values (..., tokens, width) and heads (..., heads, tokens, head
    width).

    `after_attention` and `after_mlp` are the output norms of families that have them. `parallel`
    blocks run attention and MLP side by side on the same input."""

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
        """Return the outputs of the query, key and value projections by path: one entry where
        they are fused.
        """
        normed = self.before_attention(x)
        return {path: projection(normed) for path, projection in self.projections.items()}

    def heads(
        self, raw: Mapping[str, Tensor], rotation: tuple[Tensor, Tensor] | None
    ) -> HeadValues:
        """Return query, key and value heads, normed and rotated to their positions where the
        family does so.
        """
        query, key, value = (_split(ref, raw[ref.site]) for ref in self.slices)
        own: Any = self.attention
        if hasattr(own, "q_norm"):
            query, key = own.q_norm(query), own.k_norm(key)
        query, key, value = (entry.transpose(1, 2) for entry in (query, key, value))
        if rotation is not None:
            query, key = _own(own, "apply_rotary_pos_emb")(query, key, *rotation)
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return what the heads read, (jobs, queries, heads, head width), under an additive mask
        (jobs or 1, 1, queries, keys).
        """
        own: Any = self.attention
        options = (
            {"softcap": own.attn_logit_softcapping}
            if hasattr(own, "attn_logit_softcapping")
            else {}
        )
        found: Tensor = _own(own, "eager_attention_forward")(
            own, query, key, value, mask, scaling=own.scaling, dropout=0.0, **options
        )[0]
        return found

    def mix(self, z: Tensor) -> Tensor:
        """Return what attention adds to the residual stream."""
        out = self.output(z)
        return out if self.after_attention is None else self.after_attention(out)

    def mlp(self, x: Tensor, mid: Tensor, edits: Mapping[str, Edit] | None = None) -> Tensor:
        """Return what the MLP adds to the residual stream, with edits at sites inside it."""
        normed = self.before_mlp(x if self.parallel else mid)
        out = run_edited(self.mlp_module, normed, edits) if edits else _mlp(self.mlp_module, normed)
        return out if self.after_mlp is None else self.after_mlp(out)

    def finish(self, x: Tensor, attention: Tensor) -> Tensor:
        """Return the block's output, given its input and what attention adds."""
        mid = x + attention
        return mid + self.mlp(x, mid)


@dataclass(frozen=True)
class Query:
    """Attention of one query a job without keys and values: with no rotation between them, their
    matrices move to the query.

    softmax(q (h W_k)^T) (h W_v) = (softmax((q W_k^T) h^T) h) W_v for the normed inputs h of the
    block. The key bias adds the same to every score of a query and drops out."""

    weights: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor, Tensor]
    scaling: float

    def __call__(self, query: Tensor, normed: Tensor, mask: Tensor) -> Tensor:
        """Return what the heads read, (jobs, heads, head width), for normed queries (jobs,
        width) and inputs (jobs, keys, width).
        """
        ask, key, value = self.weights
        asked = (query @ ask + self.biases[0][:, None]) @ key.transpose(1, 2)
        scores = asked.transpose(0, 1) @ normed.transpose(1, 2) * self.scaling + mask[:, :, 0]
        read = (scores.softmax(-1) @ normed).transpose(0, 1) @ value
        return read.transpose(0, 1) + self.biases[1]


@dataclass(frozen=True)
class Call:
    """What the model handed to a block beside its input: the additive mask and the rotation of
    every position.
    """

    mask: Tensor
    rotation: tuple[Tensor, Tensor] | None

    def turn(self, examples: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the rotation of single tokens, given their example and position: (1, tokens,
        width).
        """
        if self.rotation is None:
            return None
        cos, sin = (entry[_rows(entry, examples), positions][None] for entry in self.rotation)
        return cos, sin

    def masks(self, examples: Tensor, first: int, stop: int) -> Tensor:
        """Return the masks of the queries from `first` to `stop`, (examples or 1, 1, queries,
        keys).
        """
        mask = self.mask[:, :, first:stop]
        return mask if len(mask) == 1 else mask[examples]

    def mask_at(self, examples: Tensor, positions: Tensor) -> Tensor:
        """Return the masks of one query an example, (examples, 1, 1, keys)."""
        return self.mask[_rows(self.mask, examples), :, positions][:, :, None]


def build(model: nn.Module) -> list[BlockPieces] | None:
    """Return the blocks of a model, None when its family is not described here."""
    family = families.find_family(model)
    if family is None:
        return None
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    found = []
    for layer, block in enumerate(blocks):
        path = f"{family.blocks}.{layer}"
        query, key, value = (
            names.resolve(model, f"blocks.{layer}.attn.hook_{letter}") for letter in "qkv"
        )
        found.append(
            BlockPieces(
                attention=block.get_submodule(family.attention_module),
                before_attention=block.get_submodule(family.before_attention),
                before_mlp=block.get_submodule(family.before_mlp),
                after_attention=None
                if family.attention == family.attention_module
                else block.get_submodule(family.attention),
                after_mlp=None
                if family.mlp == family.mlp_module
                else block.get_submodule(family.mlp),
                mlp_module=block.get_submodule(family.mlp_module),
                output=block.get_submodule(family.attention_projection),
                projections={f"{path}.{name}": block.get_submodule(name) for name in family.qkv},
                slices=(query, key, value),
                parallel=families.is_parallel(model),
            )
        )
    return found


def last_query(block: BlockPieces) -> Query | None:
    """Return the cheap attention of a block to one query, None where a rotation or another kind
    of score forbids it.
    """
    own: Any = block.attention
    if type(own).__name__ != "GPT2Attention":
        return None
    weight, bias = own.c_attn.weight, own.c_attn.bias
    weights, biases = zip(
        *((weight[:, ref.columns()].transpose(0, 1), bias[ref.columns()]) for ref in block.slices),
        strict=True,
    )
    return Query(
        tuple(entry.contiguous() for entry in weights), (biases[0], biases[2]), own.scaling
    )


def call(block: nn.Module, seen: Seen) -> Call:
    """Return what a block was called with; the mask becomes additive whatever the attention
    implementation takes.
    """
    given = inspect.signature(block.forward).bind(*seen.inputs, **seen.kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    mask, positions, x = given.get("attention_mask"), seen.value.shape[1], seen.value
    if mask is None:
        mask = torch.ones(1, 1, positions, positions, dtype=torch.bool, device=x.device).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=x.dtype, device=x.device).where(mask, torch.finfo(x.dtype).min)
    return Call(mask, given.get("position_embeddings"))


def _mlp(module: Any, x: Tensor) -> Tensor:
    if type(module).__name__ == "GPT2MLP" and type(module.act).__name__ == "NewGELUActivation":
        # The same function in one pass over memory instead of eight, and in place.
        hidden = module.c_fc(x)
        out: Tensor = module.c_proj(torch.ops.aten.gelu_(hidden, approximate="tanh"))
        return out
    return module(x)


def _split(ref: names.SiteRef, value: Tensor) -> Tensor:
    if ref.heads is None or ref.head_dim is None or ref.stride not in (None, ref.head_dim):
        return ref.split(value)
    first = ref.slice[0] if ref.slice else 0
    return value[..., first : first + ref.heads * ref.head_dim].unflatten(
        -1, (ref.heads, ref.head_dim)
    )


def _own(module: nn.Module, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(sys.modules[type(module).__module__], name)
    return function


def _rows(values: Tensor, examples: Tensor) -> Tensor:
    return examples if len(values) > 1 else torch.zeros_like(examples)
