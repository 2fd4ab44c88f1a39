"""Exact patching of edges: run a circuit with every edge outside it at its value in the patch
run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from assay.core.sites import Edit, Seen
from assay.core.target import Batch, Target
from assay.edges.scores import EdgeScores, require_pair
from assay.edges.source_run import read_sources
from assay.edges.wiring import BlockEnds, Reader, Wiring, separate_heads, wire
from assay.errors import InputError
from assay.progress import progress


@torch.no_grad()
def patch_edges(
    target: Target,
    clean: Batch,
    patch: Batch,
    keep: Bool[Tensor, "*examples sources receivers"],
    *,
    wiring: Wiring | None = None,
) -> Float[Tensor, " examples"]:
    """Return the metric when every edge that is not kept carries its source's output in the patch
    run, in float64.

    `keep` is (sources, receivers), or (examples, sources, receivers) for a circuit of its own in
    each example. A receiver's input is its residual stream with `(patch output) - (present output)`
    added for each of its edges that is not kept, so that what changed earlier is carried on along
    the kept ones (arXiv 2304.14997)."""
    wiring = wire(target.model) if wiring is None else wiring
    require_pair(clean, patch)
    _, theirs = read_sources(target, patch, wiring)
    return _Circuit(target, wiring, theirs).values(clean, keep)


@torch.no_grad()
def exact_edges(target: Target, clean: Batch, patch: Batch, *, rows: int = 16) -> EdgeScores:
    """Return m(clean, edge := patch) - m(clean) of every edge by patching one edge at a time,
    `rows` of them side by side.
    """
    began = time.process_time()
    graph = wire(target.model).graph
    require_pair(clean, patch)
    with torch.no_grad():
        baseline, patched = (target.values(batch).double() for batch in (clean, patch))
    places = graph.mask.nonzero()
    masks = [_one(graph.mask, place) for place in places]
    values = torch.zeros(len(clean), *graph.mask.shape, dtype=torch.float64, device=target.device)
    values[:, places[:, 0], places[:, 1]] = patch_sets(target, clean, patch, masks, rows=rows)
    spent = time.process_time() - began
    return EdgeScores(graph, values, baseline, patched, "exact", exact=True, cpu_seconds=spent)


@torch.no_grad()
def patch_sets(
    target: Target,
    clean: Batch,
    patch: Batch,
    sets: Sequence[Bool[Tensor, "sources receivers"]],
    *,
    rows: int = 16,
) -> Float[Tensor, "examples sets"]:
    """Return m(clean, edges of a set := patch) - m(clean) for every set, in float64; `rows` of them
    run side by side. All edges out of one node are the patch of that node.
    """
    wiring = wire(target.model)
    require_pair(clean, patch)
    circuit = _Circuit(target, wiring, read_sources(target, patch, wiring)[1])
    examples, found = len(clean), []
    for start in progress(range(0, len(sets), rows), "patching edges"):
        # A first row without any patch: batched rows differ from a single run by rounding.
        some = [torch.zeros_like(wiring.graph.mask), *sets[start : start + rows]]
        batch = clean.take(torch.arange(examples, device=target.device).repeat(len(some)))
        keep = ~torch.stack(some)
        values = circuit.values(batch, keep.repeat_interleave(examples, dim=0))
        values = values.unflatten(0, (-1, examples))
        found.append((values[1:] - values[0]).T)
    return torch.cat(found, 1)


def _one(mask: Tensor, place: Tensor) -> Tensor:
    found = torch.zeros_like(mask)
    found[place[0], place[1]] = True
    return found


class _Circuit:
    """One target with the outputs of a patch run, ready to run circuits."""

    def __init__(self, target: Target, wiring: Wiring, theirs: Mapping[str, Tensor]):
        self.target, self.wiring, self.theirs = target, wiring, theirs
        self.writes = [block.write(target.model) for block in wiring.blocks]

    def values(self, batch: Batch, keep: Tensor) -> Tensor:
        mask = self.wiring.graph.mask
        keep = keep.cpu().expand(len(batch), *mask.shape) if keep.shape[-2:] == mask.shape else keep
        if keep.dtype != torch.bool or keep.shape != (len(batch), *mask.shape):
            raise InputError(
                f"keep must be a boolean mask of shape {tuple(mask.shape)}, got {keep.dtype}"
                f" {tuple(keep.shape)}"
            )
        run = _PatchedRun(self, (mask & ~keep).to(self.target.device), len(batch))
        with separate_heads(self.target.model, self.wiring):
            return self.target.values(batch, run.edits()).double()


class _PatchedRun:
    """One forward pass: collects (patch output) - (present output) of the sources and adds what
    each receiver lacks.
    """

    def __init__(self, circuit: _Circuit, removed: Tensor, examples: int):
        self.model, self.wiring, self.theirs = circuit.target.model, circuit.wiring, circuit.theirs
        self.writes, self.removed, self.examples = circuit.writes, removed, examples
        self.singles: list[tuple[int, Tensor]] = []  # place among the sources, difference
        self.heads: list[tuple[slice, Tensor, tuple[str, Tensor] | None]] = []
        self.streams: dict[str, Tensor] = {}

    def edits(self) -> dict[str, Edit]:
        graph, wiring = self.wiring.graph, self.wiring
        found: dict[str, Edit] = {wiring.start: self._source(wiring.start, 0)}
        for layer, block in enumerate(wiring.blocks):
            found[f"{block.norm}:input"] = self._stream(block)
            by_path: dict[str, list[tuple[Reader, slice]]] = {}
            for slot, reader in enumerate(block.readers):
                first = graph.of_heads(layer).start + slot * graph.heads
                by_path.setdefault(reader.path, []).append(
                    (reader, slice(first, first + graph.heads))
                )
            for path, readers in by_path.items():
                found[path] = self._read_heads(block, readers)
            found[block.z] = self._source_heads(layer, block)
            if block.post is not None:
                found[f"{block.post}:input"] = self._through(block)
            found[f"{block.mlp_norm}:input"] = self._read(graph.of_mlp(layer))
            found[block.mlp] = self._source(block.mlp, graph.from_heads(layer).stop)
        return {**found, wiring.blocks[-1].path: self._read(slice(len(graph.receivers) - 1, None))}

    def _other(self, site: str) -> Tensor:
        other = self.theirs[site]
        return other.repeat(self.examples // len(other), *[1] * (other.ndim - 1))

    def _source(self, site: str, place: int) -> Edit:
        def edit(seen: Seen) -> Tensor:
            self.singles.append((place, self._other(site) - seen.written))
            return seen.written

        return edit

    def _source_heads(self, layer: int, block: BlockEnds) -> Edit:
        def edit(seen: Seen) -> Tensor:
            difference = block.heads.split(self._other(block.z) - seen.written)
            carried = torch.einsum("bphk,hkd->bphd", difference, self.writes[layer])
            self.heads.append((self.wiring.graph.from_heads(layer), carried, None))
            return seen.written

        return edit

    def _through(self, block: BlockEnds) -> Edit:
        # Behind attention stands a norm: heads add up in front of it, so their differences pass it
        # together.
        def edit(seen: Seen) -> Tensor:
            place, carried, _ = self.heads[-1]
            self.heads[-1] = (place, carried, (str(block.post), seen.written))
            return seen.written

        return edit

    def _stream(self, block: BlockEnds) -> Edit:
        def edit(seen: Seen) -> Tensor:
            self.streams[block.path] = seen.written
            return seen.written

        return edit

    def _lacking(self, receivers: slice) -> Tensor | None:
        """Return what the receivers' inputs lack, (examples, positions, receivers, width); None
        when they lack nothing.
        """
        if not self.removed[:, :, receivers].any():
            return None
        total = torch.zeros(())
        for place, difference in self.singles:
            weight = self.removed[:, place, receivers].to(difference.dtype)
            total = total + weight[:, None, :, None] * difference.unsqueeze(-2)
        for places, carried, behind in self.heads:
            weight = self.removed[:, places, receivers].to(carried.dtype)
            if not weight.any():
                continue
            mixed = torch.einsum("bhr,bphd->bprd", weight, carried)
            if behind is not None:
                norm, value = self.model.get_submodule(behind[0]), behind[1]
                mixed = norm.forward(value.unsqueeze(-2) + mixed) - norm.forward(value).unsqueeze(
                    -2
                )
            total = total + mixed
        return total

    def _read(self, receiver: slice) -> Edit:
        def edit(seen: Seen) -> Tensor:
            lacking = self._lacking(receiver)
            return seen.written if lacking is None else seen.written + lacking.squeeze(-2)

        return edit

    def _read_heads(self, block: BlockEnds, readers: list[tuple[Reader, slice]]) -> Edit:
        def edit(seen: Seen) -> Tensor:
            value = seen.written
            for reader, receivers in readers:
                lacking = self._lacking(receivers)
                if lacking is not None:
                    norm = self.model.get_submodule(block.norm)
                    inputs = norm.forward(self.streams[block.path].unsqueeze(-2) + lacking)
                    made = torch.einsum("bphd,hkd->bphk", inputs, reader.weight(self.model))
                    bias = reader.bias(self.model)
                    value = value.clone()
                    reader.separate.split(value).copy_(made if bias is None else made + bias)
            return value

        return edit
