"""A transformer on one prompt with its attention patterns, its norms and what its MLPs put out held
fixed: what is left is linear, block by block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.attribution.transformer.norms import is_norm, read_norm
from assay.attribution.transformer.patterns import attention_weights
from assay.attribution.transformer.relp import modified_backward
from assay.core.sites import Edit, Seen, read_sites, run_edited
from assay.edges.wiring import Wiring, wire
from assay.errors import InputError
from assay.targets import families


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with its scale held fixed at every position: `y = gain * scale * (x - mean(x))`,
    without the mean where `centred` is false; `gains` is gain * scale. The offset is no part of it.
    """

    gains: Float[Tensor, "positions width"]
    scale: Float[Tensor, "positions 1"]
    unit: Float[Tensor, "positions width"]
    centred: bool

    def push(self, x: Tensor, at: Tensor | slice | int) -> Tensor:
        """Return what becomes of vectors (..., positions, width) at some of the positions."""
        inner = x - x.mean(-1, keepdim=True) if self.centred else x
        return inner * self.gains[at]

    def pull(self, gradient: Tensor, at: Tensor | slice | int) -> Tensor:
        """Return the gradient (..., positions, width) in front of the norm, the adjoint of
        `push`.
        """
        inner = gradient * self.gains[at]
        return inner - inner.mean(-1, keepdim=True) if self.centred else inner

    def without_gain(self) -> FrozenNorm:
        """Return the same norm before its gain multiplies."""
        gains = self.scale.expand_as(self.gains)
        return FrozenNorm(gains, self.scale, self.unit, self.centred)


@dataclass(frozen=True)
class FrozenBlock:
    """One block: its norms, the attention pattern (heads, queries, keys), the value rows (key heads
    * size, width) and the output rows (heads * size, width) of its heads.

    `parallel` blocks read attention and MLP from the same residual stream."""

    before_attention: FrozenNorm
    before_mlp: FrozenNorm
    after_attention: FrozenNorm | None
    after_mlp: FrozenNorm | None
    pattern: Float[Tensor, "heads queries keys"]
    value: Float[Tensor, "columns width"]
    output: Float[Tensor, "rows width"]
    parallel: bool

    def pull(self, gradient: Float[Tensor, "queries n width"], first: int = 0) -> Tensor:
        """Return what a gradient behind attention, at queries from `first` on, is in the residual
        stream in front of it by way of the heads alone, (keys, n, width).
        """
        queries, count, width = gradient.shape
        stop = first + queries
        if self.after_attention is not None:
            turned = self.after_attention.pull(gradient.transpose(0, 1), slice(first, stop))
            gradient = turned.transpose(0, 1)
        heads = len(self.pattern)
        at_z = (gradient.reshape(-1, width) @ self.output.T).reshape(queries, count, heads, -1)
        at_z = at_z.permute(2, 0, 1, 3).reshape(heads, queries, -1)
        weights = self.pattern[:, first:stop, :stop].transpose(1, 2)
        at_value = torch.bmm(weights, at_z).reshape(heads, stop, count, -1)
        size = at_value.shape[-1]
        shared = heads * size // len(self.value)  # query heads that share a key head
        if shared > 1:
            at_value = at_value.unflatten(0, (-1, shared)).sum(1)
        flat = at_value.permute(1, 2, 0, 3).reshape(stop * count, -1)
        back = (flat @ self.value).reshape(stop, count, width)
        return self.before_attention.pull(back.transpose(0, 1), slice(0, stop)).transpose(0, 1)

    def push(self, x: Float[Tensor, "keys n width"]) -> Float[Tensor, "queries keys n width"]:
        """Return what the heads carry from every key to every query, for vectors at the keys."""
        keys, _, width = x.shape
        normed = self.before_attention.push(x.transpose(0, 1), slice(0, keys)).transpose(0, 1)
        heads = len(self.pattern)
        values = (normed @ self.value.T).unflatten(-1, (-1, self.output.shape[0] // heads))
        values = values.repeat_interleave(heads // values.shape[-2], dim=-2)
        rows = self.output.reshape(heads, -1, width)
        out = torch.einsum("hqk,knhs,hsw->qknw", self.pattern[:, :keys, :keys], values, rows)
        if self.after_attention is not None:
            turned = self.after_attention.push(out.permute(1, 2, 0, 3), slice(0, keys))
            out = turned.permute(2, 0, 1, 3)
        return out


@dataclass(frozen=True)
class FrozenNetwork:
    """All blocks, the last norm, and the factor between an embedding and what it adds to the
    residual stream. `seen` holds the values that were read, by site, (positions, width).
    """

    blocks: tuple[FrozenBlock, ...]
    final: FrozenNorm
    embedding_scale: float
    seen: Mapping[str, Tensor]
    logits: Float[Tensor, " vocabulary"]

    def pull_all(self, gradient: Float[Tensor, "positions width"]) -> list[Tensor]:
        """Return a gradient at the final norm's output in the residual stream behind every block,
        last first, and in front of the first: (positions, width) each.
        """
        everywhere = slice(0, len(gradient))
        now = self.final.pull(gradient, everywhere)[:, None]
        found = [now[:, 0]]
        for block in reversed(self.blocks):
            now = now + block.pull(now)
            found.append(now[:, 0])
        return found


def freeze(model: nn.Module, ids: Tensor) -> FrozenNetwork:
    """Run a model once on token ids (1, positions) and return it with everything fixed that is not
    linear; checked against the model's own derivatives.

    Raises InputError, with the family, where blocks are not known, where a norm or a pattern
    cannot be held fixed, and where the blocks compute something else than their family's."""
    wiring = wire(model)
    family = families.find_family(model)
    assert family is not None
    paths = [block.path for block in wiring.blocks]
    sites = [f"{path}:input" for path in paths]
    for block in wiring.blocks:
        sites += [f"{block.norm}:input", f"{block.mlp_norm}:input", block.mlp_norm, block.mlp]
        sites += [block.attention] if block.post else []
        sites += [f"{block.path}.{family.mlp_module}:input", f"{block.path}.{family.mlp_module}"]
    sites += [family.embedding, f"{family.final_norm}:input", family.final_norm]
    inputs = {"input_ids": ids}
    wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    read = read_sites(model, inputs, dict.fromkeys(sites))
    seen = {site: one.value[0].to(wide) for site, one in read.items()}
    output, weights = attention_weights(model, inputs, [block.attention for block in wiring.blocks])
    frozen = [_block(model, wiring, layer, seen, weights) for layer in range(len(paths))]
    final = _norm(model, family.final_norm, seen)
    logits = output.logits[0, -1].to(wide)
    found = FrozenNetwork(tuple(frozen), final, 1.0, seen, logits)
    scale = _require_same(model, inputs, found, wiring)
    return FrozenNetwork(found.blocks, final, scale, seen, logits)


def _block(
    model: nn.Module,
    wiring: Wiring,
    layer: int,
    seen: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> FrozenBlock:
    ends = wiring.blocks[layer]
    family = families.find_family(model)
    assert family is not None
    wide = seen[f"{ends.path}:input"].dtype
    value = ends.readers[2]
    # A head that is shared stands once, whatever the number of query heads that read it.
    rows = value.weight(model)[:: value.repeats]
    inner = f"{ends.path}.{family.mlp_module}"
    after = (
        None
        if ends.mlp == inner
        else _norm(model, ends.mlp, {**seen, f"{ends.mlp}:input": seen[inner]})
    )
    post = None
    if ends.post is not None:
        post = _norm(model, ends.post, {**seen, f"{ends.post}:input": seen[ends.attention]})
    return FrozenBlock(
        _norm(model, ends.norm, seen),
        _norm(model, ends.mlp_norm, seen),
        post,
        after,
        weights[ends.attention][0].to(wide),
        rows.flatten(0, 1).to(wide).contiguous(),
        ends.write(model).flatten(0, 1).to(wide).contiguous(),
        wiring.graph.parallel,
    )


def _norm(model: nn.Module, path: str, seen: Mapping[str, Tensor]) -> FrozenNorm:
    module = model.get_submodule(path)
    if not is_norm(module):
        raise InputError(
            f"the norm {path!r} of this {families.model_type(model)} model is a"
            f" {type(module).__name__}, whose scale cannot be held fixed; LayerNorm and RMSNorm are"
            " supported"
        )
    x = seen[f"{path}:input"]
    found = read_norm(module, x)
    gains = found.gain.to(x.dtype) * found.scale
    return FrozenNorm(gains, found.scale, found.unit, found.centred)


def _require_same(
    model: nn.Module, inputs: Mapping[str, Tensor], found: FrozenNetwork, wiring: Wiring
) -> float:
    """Compare the frozen blocks with the model's own derivatives for a random cotangent, and return
    the factor behind the embedding; InputError where they differ.
    """
    family = families.find_family(model)
    assert family is not None
    cut = [block.mlp for block in wiring.blocks]
    leaves: dict[str, Tensor] = {}
    ends: dict[str, Tensor] = {}

    def leaf(site: str) -> Edit:
        def act(seen: Seen) -> Tensor:
            leaves[site] = seen.value.detach().clone().requires_grad_()
            return leaves[site]

        return act

    def keep(seen: Seen) -> Tensor:
        ends["final"] = seen.value
        return seen.written

    edits = {**{site: leaf(site) for site in [family.embedding, *cut]}, family.final_norm: keep}
    with modified_backward(model, "frozen"), torch.enable_grad():
        run_edited(model, inputs, edits)
    end = ends["final"]
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(end.shape, generator=generator, dtype=torch.float64).to(end)
    gradients = torch.autograd.grad(
        end, [leaves[family.embedding], *(leaves[s] for s in cut)], cotangent
    )
    *behind, front = found.pull_all(cotangent[0].to(found.final.gains.dtype))
    theirs, first = [one[0].to(front) for one in gradients[1:]], gradients[0][0].to(front)
    scale = float((first * front).sum() / front.square().sum())
    # Softmax and norms run in float32 in many families, whatever the dtype.
    tolerance = max(1e4 * torch.finfo(end.dtype).eps, 1e-5)
    pairs = [*zip(reversed(behind), theirs, strict=True), (front * scale, first)]
    for own, other in pairs:
        if float((own - other).abs().max()) > tolerance * float(other.abs().max()):
            raise InputError(
                f"the blocks of this {families.model_type(model)} model are not linear with"
                " attention, norms and MLPs held fixed, or compute something else than their"
                " family's: no attribution graph of it can be exact"
            )
    return scale
