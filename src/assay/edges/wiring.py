"""Where a language model keeps the ends of the edges between heads and MLPs, for the families
that have TransformerLens names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from assay.edges.graph import SLOTS, EdgeGraph
from assay.errors import InputError
from assay.targets import families, names


@dataclass(frozen=True)
class HeadColumns:
    """Where heads lie in a row of columns: head h owns the `size` columns from `start + h *
    stride` on.
    """

    count: int
    size: int
    start: int = 0
    stride: int = 0

    def split(self, value: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows heads size"]:
        """Return a view of the columns of every head."""
        stride = self.stride or self.size
        return value[..., self.start : self.start + (self.count - 1) * stride + self.size].unfold(
            -1, self.size, stride
        )


@dataclass(frozen=True)
class Reader:
    """The projection that makes q, k or v of a layer's heads; each of its heads serves `repeats`
    query heads.
    """

    path: str
    heads: HeadColumns
    repeats: int

    def weight(self, model: nn.Module) -> Float[Tensor, "heads size width"]:
        """Return the rows of the projection that make each query head's own value."""
        rows = self.heads.split(_matrix(model.get_submodule(self.path)).T).permute(1, 2, 0)
        return rows if self.repeats == 1 else rows.repeat_interleave(self.repeats, dim=0)

    def bias(self, model: nn.Module) -> Float[Tensor, "heads size"] | None:
        """Return the bias, None when the projection has none."""
        bias = getattr(model.get_submodule(self.path), "bias", None)
        return (
            None if bias is None else self.heads.split(bias).repeat_interleave(self.repeats, dim=0)
        )

    @property
    def separate(self) -> HeadColumns:
        """Where the heads lie in the projection's output once every query head has its own."""
        return (
            self.heads
            if self.repeats == 1
            else HeadColumns(self.heads.count * self.repeats, self.heads.size)
        )


@dataclass(frozen=True)
class BlockEnds:
    """The ends of edges in one block, as sites and module paths; `post` is the norm behind
    attention where there is one.
    """

    path: str
    norm: str
    mlp_norm: str
    readers: tuple[Reader, ...]
    output: str
    heads: HeadColumns
    post: str | None
    mlp: str
    attention: str

    @property
    def z(self) -> str:
        """The site of the heads' values before the output projection."""
        return f"{self.output}:input"

    def write(self, model: nn.Module) -> Float[Tensor, "heads size width"]:
        """Return what each head's value is multiplied with to reach the residual stream."""
        return self.heads.split(_matrix(model.get_submodule(self.output))).permute(1, 2, 0)


@dataclass(frozen=True)
class Wiring:
    """The edge graph of a model and its blocks."""

    graph: EdgeGraph
    blocks: tuple[BlockEnds, ...]

    @property
    def start(self) -> str:
        """The site of the node `input`: the residual stream before the first block."""
        return f"{self.blocks[0].path}:input"


def wire(model: nn.Module) -> Wiring:
    """Find the edges between heads and MLPs of a language model.

    Raises InputError for a family without names of heads, and for projections that are not plain
    linear layers."""
    found = families.find_family(model)
    if found is None:
        raise InputError(
            f"edges need a family whose heads are known ({', '.join(families.FAMILIES)}); this"
            f" model is of family {families.model_type(model)!r}"
        )
    blocks = []
    queries = _heads(names.resolve(model, "blocks.0.attn.hook_q"))
    depth = len(model.get_submodule(found.blocks))  # type: ignore[arg-type]
    for layer in range(depth):
        path = f"{found.blocks}.{layer}"
        readers = []
        for slot in SLOTS:
            ref = names.resolve(model, f"blocks.{layer}.attn.hook_{slot}")
            heads = _heads(ref)
            readers.append(Reader(ref.site, heads, queries.count // heads.count))
            _matrix(model.get_submodule(ref.site))
        output = f"{path}.{found.attention_projection}"
        attention = f"{path}.{found.attention_module}"
        added = f"{path}.{found.attention}"
        heads = _heads(names.resolve(model, f"blocks.{layer}.attn.hook_z"))
        norm, mlp_norm = (f"{path}.{name}" for name in (found.before_attention, found.before_mlp))
        post = None if added == attention else added
        blocks.append(
            BlockEnds(
                path,
                norm,
                mlp_norm,
                tuple(readers),
                output,
                heads,
                post,
                f"{path}.{found.mlp}",
                attention,
            )
        )
    parallel = families.is_parallel(model)
    width = _matrix(model.get_submodule(blocks[0].output)).shape[0]
    return Wiring(EdgeGraph(depth, queries.count, width, parallel), tuple(blocks))


@contextmanager
def separate_heads(model: nn.Module, wiring: Wiring) -> Iterator[None]:
    """Give every query head its own copy of the keys and values that heads share, so that edges end
    at query heads.

    The numbers do not change: the model repeats the shared ones itself otherwise.
    """
    with ExitStack() as stack:
        for block in wiring.blocks:
            if block.readers[1].repeats == 1:
                continue
            attention: Any = model.get_submodule(block.attention)
            stack.callback(
                setattr, attention, "num_key_value_groups", attention.num_key_value_groups
            )
            attention.num_key_value_groups = 1
            for reader in block.readers[1:]:
                stack.callback(
                    model.get_submodule(reader.path).register_forward_hook(_repeat(reader)).remove
                )
        yield


def _repeat(reader: Reader) -> Any:
    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return reader.heads.split(out).repeat_interleave(reader.repeats, dim=-2).flatten(-2)

    return hook


def _heads(ref: names.SiteRef) -> HeadColumns:
    columns = ref.columns()
    count, size = columns.shape
    return HeadColumns(count, size, int(columns[0, 0]), ref.stride or size)


def _matrix(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer as (out, in); GPT-2 stores its layers the other way
    round.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise InputError(f"edges need plain linear projections, got a {type(module).__name__}")
    return weight if isinstance(module, nn.Linear) else weight.T
