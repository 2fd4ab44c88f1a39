"""Where runs with one changed node can start in a causal language model: its clean run, cut into
the pieces of its blocks and compared with the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from assay.core.sites import Edit, Seen, run_edited
from assay.core.target import Batch, Target
from assay.targets import blocks, families
from assay.targets.metrics import AtLast
from assay.targets.suffix import CleanLayer, Stage, Suffix


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
    if not _reproduces(clean):
        return "the model's blocks compute something else than their family's"
    return clean


def _reproduces(found: Suffix) -> bool:
    """Whether the pieces give the model's own block outputs, in the first two examples, and all
    its metrics, up to rounding.
    """
    tolerance = min(1e3 * torch.finfo(found.end.dtype).eps, 0.1)
    inputs = found.batch.inputs
    real = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    for depth, layer in enumerate(found.layers):
        own = layer.block.finish(layer.x[:2], layer.block.mix(layer.z[:2]))
        theirs = found.after(depth)[:2]
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
