"""Exact patching of single nodes in causal language models: only what a patch can change is
computed again.

A change at position p of layer l leaves earlier layers, and positions before p, as they are. So a
run starts at the patched value; keys and values before p are those of the clean run; in the first
block only position p is projected anew; and the last block computes the position that the metric
reads and no other. Jobs with suffixes of different lengths run side by side: everything but
attention works on a flat list of the tokens that may have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from assay.core.sites import Edit, Seen, run_edited
from assay.core.target import Batch, Target
from assay.memory import rows_within
from assay.progress import progress
from assay.targets import blocks, families
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
            layer, block, call = (
                self.layers[number],
                self.layers[number].block,
                self.layers[number].call,
            )
            if number + 1 == len(self.layers):
                z = self._read_at_last(layer, x, heads, who, now, here)
                end = here == last[now]
                x_last = pick(layer.x, who, last).index_copy_(0, now[end], x[0, end])[None]
                return block.finish(x_last, block.mix(z.flatten(1)[None]))[0]
            query, key, value = heads or block.heads(block.raw(x), call.turn(who[now], here))
            heads = None
            keys, values = (
                _put(layer.key.index_select(0, who), key, now, here),
                _put(layer.value.index_select(0, who), value, now, here),
            )
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
        keys, values = (
            _put(layer.key.index_select(0, who), key, now, here),
            _put(layer.value.index_select(0, who), value, now, here),
        )
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
        if (
            self.metric is logit_difference and type(self.head) is nn.Linear
        ):  # two logits of a large vocabulary are enough
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


def plan(target: Target, batch: Batch, sites: list[str]) -> Suffix | str:
    """Run the batch once and return where changed runs can start, or the reason why they cannot in
    this model.

    `sites` that do not lie where a run can start are left out of the answer's `sites`.
    """
    model, metric = target.model, target.metric
    if not isinstance(metric, AtLast):
        return (
            "the metric is not one of the logits at the last position"
            " (assay.targets.metrics.AtLast)"
        )
    if any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules()
    ):
        return "modules of the model carry hooks or a forward of their own"
    built = blocks.build(model)
    if built is None:
        return (
            f"no description of a block of family {families.model_type(model)!r} (there are for"
            f" {', '.join(families.FAMILIES)})"
        )
    if not isinstance(batch.labels, Mapping) or "last" not in batch.labels:
        return "the batch has no label 'last'"
    family = families.find_family(model)
    assert family is not None
    paths = [f"{family.blocks}.{number}" for number in range(len(built))]
    stages = {site: stage for site, stage in _stages(model, family, paths).items() if site in sites}
    seen: dict[str, Seen] = {}

    def keep(site: str) -> Edit:
        return lambda now: seen.setdefault(site, now).written

    inputs = [f"{path}:input" for path in paths]
    output = run_edited(
        model, batch.inputs, {site: keep(site) for site in [*stages, *inputs, paths[-1]]}
    )
    layers = []
    for path, block in zip(paths, built, strict=True):
        now = seen[f"{path}:input"]
        called = blocks.call(model.get_submodule(path), now)
        future = torch.ones_like(called.mask, dtype=torch.bool).triu(1)
        if bool((future & (called.mask > torch.finfo(called.mask.dtype).min / 2)).any()):
            return "attention is not causal"
        query, key, value = (
            entry.contiguous() for entry in block.heads(block.raw(now.value), called.rotation)
        )
        z = block.attend(query, key, value, called.mask).flatten(2)
        layers.append(CleanLayer(block, called, now.value, query, key, value, z))
    norm = model.get_submodule(family.final_norm)
    head = model.get_output_embeddings()  # type: ignore[operator]
    end = seen[paths[-1]].value
    values = {site: seen[site].value for site in stages}
    clean = Suffix(
        model, batch, metric, layers, end, stages, values, metric(output, batch), norm, head
    )
    return (
        clean
        if _reproduces(clean)
        else "the model's blocks compute something else than their family's"
    )


def _reproduces(found: Suffix) -> bool:
    """Whether the pieces give the model's own block outputs, in the first two examples, and all
    its metrics, up to rounding.
    """
    tolerance = min(1e3 * torch.finfo(found.end.dtype).eps, 0.1)
    real = (
        found.batch.inputs.get("attention_mask")
        if isinstance(found.batch.inputs, Mapping)
        else None
    )
    for depth, layer in enumerate(found.layers):
        own, theirs = (
            layer.block.finish(layer.x[:2], layer.block.mix(layer.z[:2])),
            found.after(depth)[:2],
        )
        wrong = (own - theirs).abs().amax(-1) > tolerance * theirs.abs().amax(-1)
        if bool((wrong if real is None else wrong & real[:2].bool()).any()):
            return False
    metric = found.baseline.double()
    return bool(((found.base - metric).abs() <= tolerance * (1 + metric.abs())).all())


def _stages(model: nn.Module, family: families.Family, paths: list[str]) -> dict[str, Stage]:
    stages = {family.embedding: Stage("pre", 0, "")}
    for layer, path in enumerate(paths):
        attention = f"{path}.{family.attention}"
        stages |= {
            f"{path}:input": Stage("pre", layer, ""),
            path: Stage("post", layer, ""),
            attention: Stage("attention", layer, ""),
            f"{attention} + {path}:input": Stage("attention", layer, ""),
            f"{path}.{family.mlp}": Stage("mlp", layer, ""),
            f"{path}.{family.attention_projection}:input": Stage("z", layer, ""),
            f"{path}.{family.neurons_in}": Stage(
                "neurons", layer, family.neurons_in.removeprefix("mlp.")
            ),
            f"{path}.{family.neurons_out}:input": Stage(
                "neurons", layer, family.neurons_out.removeprefix("mlp.") + ":input"
            ),
        }
        for number, name in enumerate(family.qkv):
            alone = len(family.qkv) == 3 and number == 0
            stages[f"{path}.{name}"] = Stage("query" if alone else "keys", layer, f"{path}.{name}")
    return stages


def pick(values: Tensor, who: Tensor, at: Tensor) -> Tensor:
    """Return single tokens (tokens, ...) of values (examples, positions, ...)."""
    return values.flatten(0, 1).index_select(
        0, who * values.shape[1] + at
    )  # rows are copied whole; indexing goes by entries


def _put(clean: Tensor, new: Tensor, job: Tensor, at: Tensor) -> Tensor:
    """Put the heads of new tokens (1, heads, tokens, width) into heads (jobs, heads, positions,
    width) gathered for these jobs.
    """
    _, heads, positions, width = clean.shape
    rows = (job * heads + torch.arange(heads, device=job.device)[:, None]) * positions + at
    clean.view(-1, width).index_copy_(0, rows.flatten(), new.reshape(-1, width))
    return clean
