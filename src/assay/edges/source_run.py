"""Gradient times difference of outputs for every edge between heads and MLPs, from one forward and
one backward of the unchanged model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from assay.attribution.transformer.norms import read_norm
from assay.core.sites import Edit, Seen
from assay.core.target import Batch, Target
from assay.edges.wiring import BlockEnds, Wiring, separate_heads


def read_sources(target: Target, batch: Batch, wiring: Wiring) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the metric of a batch and the values at the input, the heads (z) and the MLPs,
    without gradients.
    """
    kept: dict[str, Tensor] = {}
    sites = [wiring.start, *(site for block in wiring.blocks for site in (block.z, block.mlp))]
    with torch.no_grad():
        values = target.values(batch, {site: _keep(kept, site) for site in sites})
    return values, kept


class SourceRun:
    """The clean run, at several inputs on the way to the patch: adds up gradient times
    difference of outputs.
    """

    def __init__(self, target: Target, clean: Batch, wiring: Wiring, theirs: Mapping[str, Tensor]):
        self.target, self.clean, self.wiring, self.theirs = target, clean, wiring, theirs
        size = (len(clean), len(wiring.graph.sources), len(wiring.graph.receivers))
        self.scores = torch.zeros(size, dtype=torch.float64, device=target.device)
        self.baseline = torch.empty(0)
        self.differences = torch.empty(0)
        self.written: dict[int, Tensor] = {}
        heads = [reader.path for block in wiring.blocks for reader in block.readers]
        self.readers = [
            *dict.fromkeys(heads),
            *(f"{block.mlp_norm}:input" for block in wiring.blocks),
            wiring.blocks[-1].path,
        ]

    def add(self, alphas: Tensor) -> None:
        """Add the scores at the inputs `patch + alpha (clean - patch)`, side by side."""
        count, examples, model = len(alphas), len(self.clean), self.target.model
        tape: dict[str, Tensor] = {}
        weights = alphas.repeat_interleave(examples).to(self.target.device)
        batch = self.clean.take(torch.arange(examples, device=self.target.device).repeat(count))
        with separate_heads(model, self.wiring), torch.enable_grad():
            values = self.target.values(batch, self._edits(tape, weights))
            found = torch.autograd.grad(
                values.double().sum(), [tape[site] for site in self.readers], allow_unused=True
            )
        gradients = dict(zip(self.readers, found, strict=True))
        if not self.baseline.numel():
            self.baseline = values[:examples].detach().double()
            self._subtract({site: value[:examples].detach() for site, value in tape.items()})
        for layer, block in enumerate(self.wiring.blocks):
            if block.post is not None:
                self._write(layer, block, tape, count)
        graph = self.wiring.graph
        for layer, block in enumerate(self.wiring.blocks):
            self._read_heads(layer, block, tape, gradients, count)
            self._read(
                gradients[f"{block.mlp_norm}:input"],
                graph.seen_by_mlp(layer),
                graph.of_mlp(layer),
                count,
            )
        self._read(
            gradients[self.wiring.blocks[-1].path], len(graph.sources), slice(-1, None), count
        )

    def _edits(self, tape: dict[str, Tensor], weights: Tensor) -> dict[str, Edit]:
        start = self.theirs[self.wiring.start]

        def begin(seen: Seen) -> Tensor:
            mixed = seen.written.detach()
            place = weights.to(mixed.dtype)[:, None, None]
            tape[self.wiring.start] = mixed
            other = start.repeat(len(mixed) // len(start), 1, 1)
            # The clean run is the untouched one.
            mixed = torch.where(place == 1, mixed, other + place * (mixed - other))
            return mixed.requires_grad_()

        edits: dict[str, Edit] = {self.wiring.start: begin}
        for block in self.wiring.blocks:
            edits[f"{block.norm}:input"] = _keep(tape, f"{block.norm}:input")
            for path in dict.fromkeys(reader.path for reader in block.readers):
                edits[path] = _keep(tape, path)
            for site in (block.z, *([f"{block.post}:input"] if block.post else []), block.mlp):
                edits[site] = _keep(tape, site)
            edits[f"{block.mlp_norm}:input"] = _branch(tape, f"{block.mlp_norm}:input")
        edits[self.wiring.blocks[-1].path] = _keep(tape, self.wiring.blocks[-1].path)
        return edits

    def _subtract(self, ours: Mapping[str, Tensor]) -> None:
        """Set the differences of all sources, (1, examples, positions, sources, width), in
        float64.
        """
        model, graph = self.target.model, self.wiring.graph
        first = self.theirs[self.wiring.start] - ours[self.wiring.start]
        found = first.new_empty(
            1, *first.shape[:2], len(graph.sources), first.shape[2], dtype=torch.float64
        )
        found[0, :, :, 0] = first
        for layer, block in enumerate(self.wiring.blocks):
            difference = block.heads.split(self.theirs[block.z] - ours[block.z])
            self.written[layer] = torch.einsum("bphk,hkd->bphd", difference, block.write(model))
            found[0, :, :, graph.from_heads(layer)] = self.written[layer]
            found[0, :, :, graph.from_heads(layer).stop] = self.theirs[block.mlp] - ours[block.mlp]
        self.differences = found

    def _write(self, layer: int, block: BlockEnds, tape: Mapping[str, Tensor], count: int) -> None:
        """Carry the heads' differences through the norm behind attention, whose derivative
        differs from input to input.
        """
        norm = self.target.model.get_submodule(block.post or "")
        value = tape[f"{block.post}:input"].detach()
        tangent = self.written[layer].repeat(count, 1, 1, 1)
        rows = value.unsqueeze(-2).expand_as(tangent).contiguous()
        carried = torch.func.jvp(norm.forward, (rows,), (tangent,))[1]
        if len(self.differences) != count:
            self.differences = self.differences[:1].repeat(count, 1, 1, 1, 1)
        self.differences[:, :, :, self.wiring.graph.from_heads(layer)] = carried.unflatten(
            0, (count, -1)
        ).double()

    def _read_heads(
        self,
        layer: int,
        block: BlockEnds,
        tape: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor | None],
        count: int,
    ) -> None:
        """Score the edges into q, k and v of a layer's heads.

        The norm in front pulls a cotangent c back to `scale (c' - mean(c') - unit <unit, c'> /
        width)` with c' = gain * c. The scale is a number per position, so that the first two terms
        are summed over steps before they are multiplied with the projections; in the last, `<unit,
        c'>` is the product of a head's gradient with its own value."""
        model, graph = self.target.model, self.wiring.graph
        sources, receivers = graph.seen_by_heads(layer), graph.of_heads(layer)
        normed = read_norm(model.get_submodule(block.norm), tape[f"{block.norm}:input"].detach())
        rows, products = [], []
        for reader in block.readers:
            weight, bias, given = reader.weight(model), reader.bias(model), gradients[reader.path]
            value = reader.separate.split(tape[reader.path].detach())
            scaled = (
                torch.zeros_like(value)
                if given is None
                else reader.separate.split(given) * normed.scale.unsqueeze(-1)
            )
            constant = weight @ normed.offset + (0 if bias is None else bias)
            products.append((scaled * (value - constant)).sum(-1, dtype=torch.float64))
            steps = scaled.unflatten(0, (count, -1))
            summed = (
                steps.double() if self._moving else steps.sum(0, keepdim=True, dtype=torch.float64)
            )
            rows.append(torch.einsum("sbphk,hkd->sbphd", summed, (weight * normed.gain).double()))
        pulled = torch.cat(rows, dim=-2)
        product = torch.cat(products, dim=-1).unflatten(0, (count, -1))
        if normed.centred:
            pulled -= pulled.mean(-1, keepdim=True)
        unit = normed.unit.unflatten(0, (count, -1)).double() / normed.unit.shape[-1]
        if self._moving:
            unit, product = unit.unsqueeze(-1), product.unsqueeze(-2)
        else:
            unit = unit.permute(1, 2, 3, 0).unsqueeze(0)
            product = product.permute(1, 2, 0, 3).unsqueeze(0)
        before = self.differences[:, :, :, :sources]
        # steps, examples, positions, sources, receivers
        each = before @ pulled.mT - (before @ unit) @ product
        self.scores[:, :sources, receivers] += each.sum((0, 2))

    def _read(self, gradient: Tensor | None, sources: int, receivers: slice, count: int) -> None:
        """Score the edges into one receiver whose gradient is known at its input."""
        if gradient is not None:
            steps = gradient.unflatten(0, (count, -1))
            rows = (
                steps.double() if self._moving else steps.sum(0, keepdim=True, dtype=torch.float64)
            )
            each = self.differences[:, :, :, :sources] @ rows.unsqueeze(-1)
            self.scores[:, :sources, receivers] += each.sum((0, 2))

    @property
    def _moving(self) -> bool:
        """Whether the differences of outputs depend on the step: behind a norm they do."""
        return any(block.post is not None for block in self.wiring.blocks)


def _keep(kept: dict[str, Tensor], site: str) -> Edit:
    def edit(seen: Seen) -> Tensor:
        kept[site] = seen.written
        return seen.written

    return edit


def _branch(kept: dict[str, Tensor], site: str) -> Edit:
    # A view of its own: the gradient at it is that of the norm's branch, without the residual
    # stream beside it.
    def edit(seen: Seen) -> Tensor:
        kept[site] = seen.written.view_as(seen.written)
        return kept[site]

    return edit


def bytes_per_step(model: nn.Module, theirs: Mapping[str, Tensor], wiring: Wiring) -> int:
    """Return about how many bytes a forward and backward of the batch holds: block values,
    attention patterns, logits.
    """
    examples, positions, width = theirs[wiring.start].shape
    vocabulary = max(size for parameter in model.parameters() for size in parameter.shape)
    inner = max(
        size
        for parameter in model.get_submodule(wiring.blocks[0].path).parameters()
        for size in parameter.shape
    )
    block = 16 * width + 4 * inner + 3 * wiring.graph.heads * (positions + 2 * width)
    return (
        theirs[wiring.start].element_size()
        * examples
        * positions
        * (wiring.graph.layers * block + 3 * vocabulary)
    )
