"""Where a language model keeps the ends of the edges between heads and MLPs, for the families that have TransformerLens names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.attribution.graph import SLOTS, EdgeGraph
from assay.errors import InputError
from assay.targets import names

# The norms in front of attention and MLP; those behind them are in the layout of the family.
_NORMS = {
    "gpt2": ("ln_1", "ln_2"),
    "gpt_neox": ("input_layernorm", "post_attention_layernorm"),
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "mistral": ("input_layernorm", "post_attention_layernorm"),
    "qwen2": ("input_layernorm", "post_attention_layernorm"),
    "qwen3": ("input_layernorm", "post_attention_layernorm"),
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
}


@dataclass(frozen=True)
class Reader:
    """The projection that makes q, k or v of a layer's heads: its path and its columns (heads, head_dim) before any repetition."""

    path: str
    columns: Tensor
    repeats: int

    def weight(self, model: nn.Module) -> Float[Tensor, "heads head_dim width"]:
        """Return the rows of the projection that make each query head's own value."""
        weight = _matrix(model.get_submodule(self.path))
        return weight[self.columns.to(weight.device)].repeat_interleave(self.repeats, dim=0)

    def bias(self, model: nn.Module) -> Tensor | None:
        """Return the bias, (heads, head_dim), None when the projection has none."""
        bias = getattr(model.get_submodule(self.path), "bias", None)
        return None if bias is None else bias[self.columns.to(bias.device)].repeat_interleave(self.repeats, dim=0)

    def places(self) -> Tensor:
        """Return the columns of the projection's output once every query head has its own, (heads, head_dim)."""
        heads, width = self.columns.shape
        return self.columns if self.repeats == 1 else torch.arange(heads * self.repeats * width).reshape(-1, width)


@dataclass(frozen=True)
class Block:
    """The ends of edges in one block, as sites and module paths; `post` is the norm behind attention where there is one."""

    path: str
    norm: str
    mlp_norm: str
    readers: tuple[Reader, ...]
    output: str
    columns: Tensor
    post: str | None
    mlp: str
    attention: str

    @property
    def z(self) -> str:
        """The site of the heads' values before the output projection."""
        return f"{self.output}:input"

    def write(self, model: nn.Module) -> Float[Tensor, "heads head_dim width"]:
        """Return what each head's value is multiplied with to reach the residual stream."""
        weight = _matrix(model.get_submodule(self.output)).T
        return weight[self.columns.to(weight.device)]


@dataclass(frozen=True)
class Wiring:
    """The edge graph of a model and its blocks."""

    graph: EdgeGraph
    blocks: tuple[Block, ...]

    @property
    def start(self) -> str:
        """The site of the node `input`: the residual stream before the first block."""
        return f"{self.blocks[0].path}:input"


def wire(model: nn.Module) -> Wiring:
    """Find the edges between heads and MLPs of a language model.

    Raises InputError for a family without names of heads, and for projections that are not plain linear layers.
    """
    family = names.family(model)
    found = names.layout(model)
    if found is None or family not in _NORMS:
        raise InputError(f"edges need a family whose heads are known ({', '.join(_NORMS)}); this model is of family {family!r}")
    blocks = []
    queries = names.resolve(model, "blocks.0.attn.hook_q").columns()
    depth = len(model.get_submodule(found.blocks))  # type: ignore[arg-type]
    for layer in range(depth):
        path = f"{found.blocks}.{layer}"
        readers = []
        for slot in SLOTS:
            ref = names.resolve(model, f"blocks.{layer}.attn.hook_{slot}")
            columns = ref.columns()
            readers.append(Reader(ref.site, columns, len(queries) // len(columns)))
            _matrix(model.get_submodule(ref.site))
        output = f"{path}.{found.attention_projection}"
        attention = output.rsplit(".", 1)[0]
        added = f"{path}.{found.attention}"
        columns = names.resolve(model, f"blocks.{layer}.attn.hook_z").columns()
        norm, mlp_norm = (f"{path}.{name}" for name in _NORMS[family])
        post = None if added == attention else added
        blocks.append(Block(path, norm, mlp_norm, tuple(readers), output, columns, post, f"{path}.{found.mlp}", attention))
    parallel = family == "gpt_neox" and bool(getattr(model.config, "use_parallel_residual", False))
    width = _matrix(model.get_submodule(blocks[0].output)).shape[0]
    return Wiring(EdgeGraph(depth, len(queries), width, parallel), tuple(blocks))


@contextmanager
def separate_heads(model: nn.Module, wiring: Wiring) -> Iterator[None]:
    """Give every query head its own copy of the keys and values that heads share, so that edges end at query heads.

    The numbers do not change: the model repeats the shared ones itself otherwise.
    """
    with ExitStack() as stack:
        for block in wiring.blocks:
            if block.readers[1].repeats == 1:
                continue
            attention: Any = model.get_submodule(block.attention)
            stack.callback(setattr, attention, "num_key_value_groups", attention.num_key_value_groups)
            attention.num_key_value_groups = 1
            for reader in block.readers[1:]:
                stack.callback(model.get_submodule(reader.path).register_forward_hook(_repeat(reader)).remove)
        yield


def _repeat(reader: Reader) -> Any:
    heads, width = reader.columns.shape

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.unflatten(-1, (heads, width)).repeat_interleave(reader.repeats, dim=-2).flatten(-2)

    return hook


def _matrix(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer as (out, in); GPT-2 stores its layers the other way round."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise InputError(f"edges need plain linear projections, got a {type(module).__name__}")
    return weight if isinstance(module, nn.Linear) else weight.T
