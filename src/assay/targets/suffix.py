"""Exact patching of single nodes in causal language models: only what a patch can change is
computed again.

A change at position p of layer l leaves earlier layers, and positions before p, as they are. So a
run starts at the patched value; keys and values before p are those of the clean run; in the first
block only position p is projected anew; and the last block computes the position that the metric
reads and no other. Jobs with suffixes of different lengths run side by side: everything but
attention works on a flat list of the tokens that may have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from assay.core.target import Batch
from assay.memory import rows_within
from assay.progress import progress
from assay.targets import blocks
from assay.targets.blocks import BlockPieces, Call
from assay.targets.metrics import AtLast, logit_difference

_TOKENS = 2048  # tokens whose activations stay in a core's cache: larger chunks are slower on a CPU


@dataclass(frozen=True)
class CleanLayer:
    """The clean run at one block: its input, its heads (examples, heads, positions, head width),
    what they read, and the call.
    """

    block: BlockPieces
    call: Call
    x: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    z: Tensor


@dataclass(frozen=True)
class Stage:
    """Where in the network a site lies: `piece` of the block `layer`, at `path`."""

    piece: str
    layer: int
    path: str


@dataclass(frozen=True)
class Jobs:
    """Runs with one changed value each: job j changes the value at `site` of example `who[j]` at
    position `positions[j]`.

    `part` gives the vectors (some jobs, width) that are taken away there. `columns` (jobs, columns)
    says which columns of the value can differ, any of them without."""

    site: str
    part: Callable[[Tensor], Tensor]
    who: Tensor
    positions: Tensor
    columns: Tensor | None = None


@dataclass(frozen=True)
class Suffix:
    """The clean run of one batch, from which runs with one changed node start."""

    model: nn.Module
    batch: Batch
    metric: AtLast
    layers: list[CleanLayer]
    end: Tensor
    sites: dict[str, Stage]
    values: dict[str, Tensor]
    baseline: Tensor
    final_norm: nn.Module
    head: nn.Module

    @cached_property
    def base(self) -> Tensor:
        """The metric of the clean run, (examples,), by the same functions as that of the changed
        ones.
        """
        everyone = torch.arange(len(self.batch), device=self.end.device)
        return self.metric_of(self.end[everyone, self.last], everyone)

    def effects(self, jobs: Jobs, budget: int | None = None) -> Tensor:
        """Return F - F(one value less its part) for jobs, in float64."""
        stage, found, chunks = self._planned(jobs, budget)
        for chunk in chunks:
            x = self.run(stage, jobs.part(chunk), jobs.who[chunk], jobs.positions[chunk])
            found[chunk] = self.base[jobs.who[chunk]] - self.metric_of(x, jobs.who[chunk])
        return found

    def slopes(self, jobs: Jobs, gate: float, budget: int | None = None) -> Tensor:
        """Return dF/dgate for jobs, in float64, where the part of each is multiplied by its gate
        and the gate is at one value.
        """
        stage, found, chunks = self._planned(jobs, None if budget is None else budget // 4)
        for chunk in chunks:
            part, who = jobs.part(chunk).detach(), jobs.who[chunk]
            with torch.enable_grad():
                gates = torch.full((len(chunk), 1), gate, dtype=part.dtype, device=part.device)
                gates.requires_grad_()
                x = self.run(stage, (1 - gates) * part, who, jobs.positions[chunk])
                (slope,) = torch.autograd.grad(self.metric_of(x, who).sum(), gates)
            found[chunk] = slope[:, 0].double()
        return found

    def _planned(self, jobs: Jobs, budget: int | None) -> tuple[Stage, Tensor, Iterable[Tensor]]:
        """Return where jobs start, room for what is found, and the jobs that can change anything,
        in chunks.
        """
        stage, last = self._stage(jobs.site, jobs.columns), self.last[jobs.who]
        found = torch.zeros(len(jobs.who), dtype=torch.float64, device=last.device)
        # Behind the last block's keys and values nothing moves between positions any more.
        late = stage.layer == len(self.layers) - 1 and stage.piece not in ("pre", "keys")
        positions = jobs.positions
        alive = (positions == last) if late else (positions <= last)
        chunks = self._chunks(alive.nonzero().flatten(), positions, last, budget)
        return stage, found, progress(chunks, f"patching {jobs.site}")

    def _stage(self, site: str, columns: Tensor | None) -> Stage:
        # The columns of a fused projection that are queries move their own position only, as a
        # query projection does.
        stage = self.sites[site]
        query = self.layers[stage.layer].block.slices[0]
        if columns is None or stage.piece != "keys" or query.site != site:
            return stage
        asks = torch.isin(columns, query.columns().to(columns.device)).all()
        return replace(stage, piece="query") if asks else stage

    def _chunks(
        self, jobs: Tensor, positions: Tensor, last: Tensor, budget: int | None
    ) -> list[Tensor]:
        # Neighbours in position share a chunk, so that attention is computed for few queries that
        # have not changed.
        jobs = jobs[positions[jobs].argsort(stable=True)]
        if not len(jobs):
            return []
        spans = last[jobs] + 1 - positions[jobs]
        tokens = _TOKENS if jobs.device.type == "cpu" else 1 << 16
        counts = ((spans.cumsum(0) - 1) // tokens).unique_consecutive(return_counts=True)[1]
        rows = rows_within(
            self.bytes_per_job(int(spans.max())), budget, device=jobs.device, most=len(jobs)
        )
        return [part for chunk in jobs.split(counts.tolist()) for part in chunk.split(rows)]

    @property
    def last(self) -> Tensor:
        """The position that the metric reads, (examples,)."""
        last: Tensor = self.batch.labels["last"]
        return last

    def run(self, stage: Stage, part: Tensor, who: Tensor, position: Tensor) -> Tensor:
        """Return the final residual stream (jobs, width) at the metric's position, with one
        value less its part.
        """
        depth, layer, block = stage.layer, self.layers[stage.layer], self.layers[stage.layer].block
        x, part = pick(layer.x, who, position)[None], part[None]
        match stage.piece:
            case "pre":
                return self._onward(depth, x - part, who, position)
            case "post" | "mlp":
                x = pick(self.after(depth), who, position)[None] - part
            case "attention":
                x = block.finish(x, block.mix(pick(layer.z, who, position)[None]) - part)
            case "z":
                x = block.finish(x, block.mix(pick(layer.z, who, position)[None] - part))
            case "neurons":
                mid = x + block.mix(pick(layer.z, who, position)[None])
                x = mid + block.mlp(x, mid, {stage.path: lambda seen: seen.written - part})
            case "query" | "keys":
                raw = block.raw(x)
                raw[stage.path] = raw[stage.path] - part
                changed = block.heads(raw, layer.call.turn(who, position))
                if stage.piece == "keys":
                    return self._onward(depth, x, who, position, changed)
                query = changed[0][0].transpose(0, 1)[:, :, None]
                z = block.attend(
                    query,
                    layer.key.index_select(0, who),
                    layer.value.index_select(0, who),
                    layer.call.mask_at(who, position),
                )
                x = block.finish(x, block.mix(z.flatten(2).transpose(0, 1)))
        return self._onward(depth + 1, x, who, position)

    def _onward(
        self,
        depth: int,
        x: Tensor,
        who: Tensor,
        position: Tensor,
        heads: blocks.HeadValues | None = None,
    ) -> Tensor:
        # x (1, tokens, width) holds the changed tokens that enter block `depth`: at first one a
        # job, later its whole suffix.
        last, jobs = self.last[who], torch.arange(len(who), device=who.device)
        low, stop = int(position.min()), int(last.max()) + 1
        grid = torch.arange(low, stop, device=who.device)
        suffix = ((grid >= position[:, None]) & (grid <= last[:, None])).nonzero(as_tuple=True)
        job, at = suffix[0], suffix[1] + low
        now, here = jobs, position
        for number in range(depth, len(self.layers)):
            layer = self.layers[number]
            block, call = layer.block, layer.call
            if number + 1 == len(self.layers):
                z = self._read_at_last(layer, x, heads, who, now, here)
                end = here == last[now]
                x_last = pick(layer.x, who, last).index_copy_(0, now[end], x[0, end])[None]
                return block.finish(x_last, block.mix(z.flatten(1)[None]))[0]
            query, key, value = heads or block.heads(block.raw(x), call.turn(who[now], here))
            heads = None
            keys = _put(layer.key.index_select(0, who), key, now, here)
            values = _put(layer.value.index_select(0, who), value, now, here)
            queries = _put(layer.query[:, :, low:stop].index_select(0, who), query, now, here - low)
            if number == depth:
                x_all = pick(layer.x, who[job], at)
                x_all[at == position[job]] = x[0]
                x, now, here = x_all[None], job, at
            z = block.attend(queries, keys, values, call.masks(who, low, stop))
            x = block.finish(x, block.mix(pick(z, now, here - low).flatten(1)[None]))
        return x[0]

    def _read_at_last(
        self,
        layer: CleanLayer,
        x: Tensor,
        heads: blocks.HeadValues | None,
        who: Tensor,
        now: Tensor,
        here: Tensor,
    ) -> Tensor:
        # What the heads of the last block read at the metric's position, (jobs, heads, head width).
        last, block = self.last[who], layer.block
        mask = layer.call.mask_at(who, last)
        if heads is None and self.last_query is not None:
            normed = self.last_normed.index_select(0, who)
            normed.flatten(0, 1).index_copy_(
                0, now * normed.shape[1] + here, block.before_attention(x[0])
            )
            return self.last_query(
                pick(normed, torch.arange(len(who), device=who.device), last), normed, mask
            )
        query, key, value = heads or block.heads(block.raw(x), layer.call.turn(who[now], here))
        keys = _put(layer.key.index_select(0, who), key, now, here)
        values = _put(layer.value.index_select(0, who), value, now, here)
        end = here == last[now]
        queries = layer.query[who, :, last].index_copy_(
            0, now[end], query[0, :, end].transpose(0, 1)
        )
        return block.attend(queries[:, :, None], keys, values, mask)[:, 0]

    @cached_property
    def last_query(self) -> blocks.Query | None:
        """The cheap attention of the last block, where its family allows it."""
        return blocks.last_query(self.layers[-1].block)

    @cached_property
    def last_normed(self) -> Tensor:
        """What the last block's projections read in the clean run, (examples, positions, width)."""
        found: Tensor = self.layers[-1].block.before_attention(self.layers[-1].x)
        return found

    def metric_of(self, x: Tensor, who: Tensor) -> Tensor:
        """Return the metric (jobs,) of final residual streams (jobs, width), in float64."""
        labels: Any = {
            name: (
                value[who]
                if isinstance(value, Tensor) and value.ndim and len(value) == len(self.batch)
                else value
            )
            for name, value in self.batch.labels.items()
        }
        x = self.final_norm(x)
        # Two logits of a large vocabulary are enough.
        if self.metric is logit_difference and type(self.head) is nn.Linear:
            answers = labels["answers"]
            logits = (self.head.weight[answers] * x[:, None]).sum(-1)
            logits = logits if self.head.bias is None else logits + self.head.bias[answers]
            labels = {**labels, "answers": torch.arange(2, device=x.device).expand(len(who), 2)}
        else:
            logits = self.head(x)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        logits = logits if cap is None else (logits / cap).tanh() * cap
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.metric.function(logits, labels).double()

    def bytes_per_job(self, span: int) -> int:
        """Return about what one job holds at once: keys, values and scores of its positions, and
        the activations of an MLP.
        """
        layer = self.layers[0]
        keys = 2 * layer.key[0].numel() * (layer.query.shape[1] // layer.key.shape[1] + 1)
        scores = 3 * span * layer.query.shape[1] * layer.key.shape[2]
        hidden = max(max(parameter.shape) for parameter in layer.block.mlp_module.parameters())
        return layer.x.element_size() * (
            keys + scores + span * (4 * hidden + 8 * layer.x.shape[-1]) + self.head_width
        )

    @property
    def head_width(self) -> int:
        weight: Any = self.head.weight
        return 2 * int(weight.shape[0])

    def after(self, depth: int) -> Tensor:
        """Return what the clean run puts behind the block `depth`."""
        return self.end if depth + 1 == len(self.layers) else self.layers[depth + 1].x


def pick(values: Tensor, who: Tensor, at: Tensor) -> Tensor:
    """Return single tokens (tokens, ...) of values (examples, positions, ...)."""
    # Rows are copied whole; indexing goes by entries.
    return values.flatten(0, 1).index_select(0, who * values.shape[1] + at)


def _put(clean: Tensor, new: Tensor, job: Tensor, at: Tensor) -> Tensor:
    """Put the heads of new tokens (1, heads, tokens, width) into heads (jobs, heads, positions,
    width) gathered for these jobs.
    """
    _, heads, positions, width = clean.shape
    rows = (job * heads + torch.arange(heads, device=job.device)[:, None]) * positions + at
    clean.view(-1, width).index_copy_(0, rows.flatten(), new.reshape(-1, width))
    return clean
