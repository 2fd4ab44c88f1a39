"""Exact patching of single nodes in causal language models: only what a patch can change is computed again.

A change at position p of layer l leaves earlier layers, and positions before p, as they are. So a run starts at the patched
value; keys and values before p are those of the clean run; in the first block only position p is projected anew; and the
last block computes the position that the metric reads and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from assay import hooks
from assay.hooks import Seen
from assay.mechanisms.nodes import blocks
from assay.mechanisms.nodes.blocks import Block, Call
from assay.memory import rows_within
from assay.targets import names
from assay.targets.base import Batch, Target
from assay.targets.metrics import AtLast, logit_difference

_TOKENS = 1024  # a chunk whose activations stay in a core's cache: larger ones are slower on a CPU


@dataclass(frozen=True)
class Layer:
    """The clean run at one block: its input, its heads, what they read, and how the model called it."""

    block: Block
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
class Suffix:
    """The clean run of one batch, from which runs with one changed node start."""

    model: nn.Module
    batch: Batch
    metric: AtLast
    layers: list[Layer]
    end: Tensor
    sites: dict[str, Stage]
    values: dict[str, Tensor]
    final_norm: nn.Module
    head: nn.Module

    @cached_property
    def base(self) -> Tensor:
        """The metric of the clean run, (examples,), by the same functions as that of the changed ones."""
        everyone = torch.arange(len(self.batch), device=self.end.device)
        return self.metric_of(self.end[everyone, self.last], everyone)

    def effects(
        self, site: str, difference: Tensor, who: Tensor, positions: Tensor, columns: Tensor | None, budget: int | None = None
    ) -> Tensor:
        """Return F - F(one value less its part) for jobs, in float64.

        Job j changes example `who[j]` at position `positions[j]` by the columns `columns[j]` of the site's `difference`
        (examples, positions, width), all of them without columns.
        """
        stage, last = self.sites[site], self.last[who]
        found = torch.zeros(len(who), dtype=torch.float64, device=who.device)
        # Behind the last block's keys and values nothing moves between positions any more.
        late = stage.layer == len(self.layers) - 1 and stage.piece not in ("pre", "keys")
        alive = (positions == last) if late else (positions <= last)
        for position in positions[alive].unique().tolist():
            jobs = (alive & (positions == position)).nonzero().flatten()
            span = int(last[jobs].max()) + 1 - position
            most = max(1, _TOKENS // span) if who.device.type == "cpu" else 1 << 20
            for chunk in jobs.split(rows_within(self.bytes_per_job(span), budget, device=who.device, most=most)):
                part = difference[who[chunk], position]
                if columns is not None:
                    kept = torch.zeros_like(part).scatter(1, columns[chunk], 1.0)
                    part = part * kept
                x = self.run(stage, part, who[chunk], position)
                found[chunk] = self.base[who[chunk]] - self.metric_of(x, who[chunk])
        return found

    @property
    def last(self) -> Tensor:
        """The position that the metric reads, (examples,)."""
        last: Tensor = self.batch.labels["last"]
        return last

    def run(self, stage: Stage, part: Tensor, who: Tensor, position: int) -> Tensor:
        """Return the final residual stream (jobs, width) at the metric's position, with one value less its part."""
        part = part[:, None]
        depth, layer = stage.layer, self.layers[stage.layer]
        x = layer.x[who, position][:, None]
        match stage.piece:
            case "pre":
                return self._onward(depth, x - part, who, position)
            case "post" | "mlp":
                x = self._after(depth)[who, position][:, None] - part
            case "attention":
                x = self._finish(layer, x, self._attention(layer, who, position) - part)
            case "z":
                x = self._finish(layer, x, layer.block.mix(layer.z[who, position][:, None] - part))
            case "neurons":
                mid = x + self._attention(layer, who, position)
                x = mid + layer.block.mlp(x, mid, {stage.path: lambda seen: seen.written - part})
            case "query" | "keys":
                raw = layer.block.raw(x)
                raw[stage.path] = raw[stage.path] - part
                changed = layer.block.heads(raw, layer.call.at(who, position, 1))
                if stage.piece == "keys":
                    return self._onward(depth, x, who, position, changed)
                at = torch.full_like(who, position)
                z = layer.block.attend(changed[0], layer.key[who], layer.value[who], self._mask(layer, who, at))
                x = self._finish(layer, x, layer.block.mix(z))
        return self._onward(depth + 1, x, who, position)

    def _onward(self, depth: int, x: Tensor, who: Tensor, position: int, heads: blocks.Heads | None = None) -> Tensor:
        # x (jobs, changed positions, width) enters block `depth`; from `position + changed` on the clean run still holds there.
        last = self.last[who]
        stop = int(last.max()) + 1
        for number in range(depth, len(self.layers)):
            layer, until = self.layers[number], position + x.shape[1]
            block = layer.block
            query, key, value = heads or block.heads(block.raw(x), layer.call.at(who, position, x.shape[1]))
            heads = None
            key = _insert(layer.key[who], key, position)
            value = _insert(layer.value[who], value, position)
            query = torch.cat([query, layer.query[who, :, until:stop]], dim=2)
            x = torch.cat([x, layer.x[who, until:stop]], dim=1)
            if number + 1 == len(self.layers):
                jobs, at = torch.arange(len(who), device=who.device), last - position
                query, x = query[jobs, :, at][:, :, None], x[jobs, at][:, None]
                mask = self._mask(layer, who, last)
            else:
                mask = layer.call.mask[:, :, position:stop][_rows(layer.call.mask, who)]
            x = block.finish(x, block.mix(block.attend(query, key, value, mask)))
        return x[:, 0]

    def metric_of(self, x: Tensor, who: Tensor) -> Tensor:
        """Return the metric (jobs,) of final residual streams (jobs, width), in float64."""
        labels: Any = self.batch.take(who).labels
        x = self.final_norm(x)
        if self.metric is logit_difference and type(self.head) is nn.Linear:  # two logits of a large vocabulary are enough
            answers = labels["answers"]
            logits = (self.head.weight[answers] @ x[..., None])[..., 0]
            logits = logits if self.head.bias is None else logits + self.head.bias[answers]
            labels = {**labels, "answers": torch.arange(2, device=x.device).expand(len(who), 2)}
        else:
            logits = self.head(x)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        logits = logits if cap is None else (logits / cap).tanh() * cap
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.metric.function(logits, labels).double()

    def bytes_per_job(self, span: int) -> int:
        """Return about what one job holds at once: keys, values and scores of its positions, and the activations of an MLP."""
        layer = self.layers[0]
        keys = 2 * layer.key[0].numel() * (layer.query.shape[1] // layer.key.shape[1] + 1)
        scores = 3 * span * layer.query.shape[1] * layer.key.shape[2]
        hidden = max(max(parameter.shape) for parameter in layer.block.mlp_module.parameters())
        return layer.x.element_size() * (keys + scores + span * (4 * hidden + 8 * layer.x.shape[-1]) + self.head_width)

    @property
    def head_width(self) -> int:
        weight: Any = self.head.weight
        return 2 * int(weight.shape[0])

    def _after(self, depth: int) -> Tensor:
        return self.end if depth + 1 == len(self.layers) else self.layers[depth + 1].x

    def _attention(self, layer: Layer, who: Tensor, position: int) -> Tensor:
        return layer.block.mix(layer.z[who, position][:, None])

    def _finish(self, layer: Layer, x: Tensor, attention: Tensor) -> Tensor:
        return layer.block.finish(x, attention)

    def _mask(self, layer: Layer, who: Tensor, at: Tensor) -> Tensor:
        return layer.call.mask[_rows(layer.call.mask, who), :, at][:, :, None]


def plan(target: Target, batch: Batch, sites: list[str]) -> Suffix | str:
    """Run the batch once and return where changed runs can start, or the reason why they cannot in this model.

    `sites` that do not lie where a run can start are left out of the answer's `sites`.
    """
    model, metric = target.model, target.metric
    if not isinstance(metric, AtLast):
        return "the metric is not one of the logits at the last position (assay.targets.metrics.AtLast)"
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules()):
        return "modules of the model carry hooks or a forward of their own"
    built = blocks.build(model)
    if built is None:
        return f"no description of a block of family {names.family(model)!r} (there are for {', '.join(blocks.FAMILIES)})"
    if not isinstance(batch.labels, Mapping) or "last" not in batch.labels:
        return "the batch has no label 'last'"
    layout = names.layout(model)
    family = blocks.FAMILIES[names.family(model)]
    assert layout is not None
    paths = [f"{layout.blocks}.{number}" for number in range(len(built))]
    stages = {site: stage for site, stage in _stages(model, layout, paths).items() if site in sites}
    seen: dict[str, Seen] = {}

    def keep(site: str) -> hooks.Edit:
        return lambda now: seen.setdefault(site, now).written

    inputs = [f"{path}:input" for path in paths]
    output = hooks.run(model, batch.inputs, {site: keep(site) for site in [*stages, *inputs, paths[-1]]})
    layers = []
    for path, block in zip(paths, built, strict=True):
        now = seen[f"{path}:input"]
        called = blocks.call(model.get_submodule(path), now)
        future = torch.ones_like(called.mask, dtype=torch.bool).triu(1)
        if bool((future & (called.mask > torch.finfo(called.mask.dtype).min / 2)).any()):
            return "attention is not causal"
        rotation = called.rotation
        query, key, value = block.heads(block.raw(now.value), rotation)
        layers.append(Layer(block, called, now.value, query, key, value, block.attend(query, key, value, called.mask)))
    head, norm = model.get_output_embeddings(), model.get_submodule(family.final_norm)  # type: ignore[operator]
    end = seen[paths[-1]].value
    found = Suffix(model, batch, metric, layers, end, stages, {site: seen[site].value for site in stages}, norm, head)
    return found if _reproduces(found, metric(output, batch)) else "the model's blocks compute something else than their family's"


def _reproduces(found: Suffix, metric: Tensor) -> bool:
    """Whether the pieces give every block's output and the metric of the model's own run, up to rounding."""
    tolerance = min(1e3 * torch.finfo(found.end.dtype).eps, 0.1)
    real = found.batch.inputs.get("attention_mask") if isinstance(found.batch.inputs, Mapping) else None
    for depth, layer in enumerate(found.layers):
        own, theirs = layer.block.finish(layer.x, layer.block.mix(layer.z)), found._after(depth)
        wrong = (own - theirs).abs().amax(-1) > tolerance * theirs.abs().amax(-1)
        if bool((wrong if real is None else wrong & real.bool()).any()):
            return False
    return bool(((found.base - metric.double()).abs() <= tolerance * (1 + metric.double().abs())).all())


def _stages(model: nn.Module, layout: names.Layout, paths: list[str]) -> dict[str, Stage]:
    stages = {layout.embedding: Stage("pre", 0, "")}
    for layer, path in enumerate(paths):
        attention = f"{path}.{layout.attention}"
        stages |= {
            f"{path}:input": Stage("pre", layer, ""),
            path: Stage("post", layer, ""),
            attention: Stage("attention", layer, ""),
            f"{attention} + {path}:input": Stage("attention", layer, ""),
            f"{path}.{layout.mlp}": Stage("mlp", layer, ""),
            f"{path}.{layout.attention_projection}:input": Stage("z", layer, ""),
            f"{path}.{layout.neurons_in}": Stage("neurons", layer, layout.neurons_in.removeprefix("mlp.")),
            f"{path}.{layout.neurons_out}:input": Stage("neurons", layer, layout.neurons_out.removeprefix("mlp.") + ":input"),
        }
        for number, name in enumerate(layout.qkv):
            alone = len(layout.qkv) == 3 and number == 0
            stages[f"{path}.{name}"] = Stage("query" if alone else "keys", layer, f"{path}.{name}")
    return stages


def _rows(mask: Tensor, who: Tensor) -> Tensor:
    return who if len(mask) > 1 else torch.zeros_like(who)


def _insert(clean: Tensor, new: Tensor, position: int) -> Tensor:
    clean[:, :, position : position + new.shape[2]] = new  # `clean` was gathered for these jobs and is theirs
    return clean
