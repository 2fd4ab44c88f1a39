"""How far the masked network is from the clean one: fixed masks, drawn masks, and an adversary
whose budget is stated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from assay.mechanisms.components.decomposition import Decomposition, read_clean
from assay.mechanisms.components.masks import Mask, make_mask, run_masked
from assay.mechanisms.components.objective import Divergence
from assay.mechanisms.components.scene import Rows, Scene, widened
from assay.mechanisms.components.sites import read_uses
from assay.mechanisms.components.sources import Fresh, Monitor, Watch

WATCHED: tuple[Watch, ...] = ("unmasked", "ci", "rounded", "zero")
LADDER = (20, 40, 80, 160, 320)
BUDGET = 2.0


def open_scene(
    model: nn.Module,
    found: Decomposition,
    inputs: Any,
    divergence: Divergence,
    generator: torch.Generator,
) -> Scene:
    """Return a batch as the terms of the objective see it, outside the autograd graph."""
    rows = inputs if isinstance(inputs, Rows) else Rows(inputs)
    read_uses(model, rows.inputs, found.sites)
    with torch.no_grad():
        reading = read_clean(model, rows.inputs, found.sites)
        importance = found.importances_of(reading)
    return Scene(model, found, rows, reading, importance, divergence, generator)


def count_important(
    importance: Mapping[str, Float[Tensor, "*positions components"]],
    thresholds: Sequence[float] = (0.0, 0.01, 0.1),
) -> pl.DataFrame:
    """Return CI-L0 per site: the mean number of components above each threshold at a position."""
    rows = [
        {
            "site": name,
            **{f"above {t:g}": float((g > t).sum(-1).double().mean()) for t in thresholds},
        }
        for name, g in importance.items()
    ]
    return pl.DataFrame(rows)


@torch.no_grad()
def reconstruct(scene: Scene, labels: Int[Tensor, "*positions"] | None = None) -> pl.DataFrame:
    """Return one row per kind of mask: "unmasked", "ci", "rounded" and "zero" (the delta part at
    zero), and "stochastic" (everything drawn).

    `divergence` is the scene's, a mean over positions. With `labels` (an output class for every
    position, -100 for none) `ce_difference` is the cross-entropy above the clean network's and
    `ce_unrecovered` that difference over the one under "zero": 0 is the network, 1 is nothing."""
    masks: dict[str, Mapping[str, Mask]] = {name: scene.watched(Monitor(name)) for name in WATCHED}
    drawn = scene.drawn()
    masks["stochastic"] = {
        name: make_mask(g, drawn[name][..., :-1], drawn[name][..., -1])
        for name, g in scene.importance.items()
    }
    rows = []
    for name, own in masks.items():
        row: dict[str, Any] = {"masks": name, "divergence": float(scene.under(own))}
        if labels is not None:
            output = run_masked(scene.model, scene.rows.inputs, scene.found, own)
            row["ce_difference"] = _loss(output, labels) - _loss(scene.reading.output, labels)
        rows.append(row)
    table = pl.DataFrame(rows)
    if labels is None:
        return table
    nothing = table.filter(pl.col("masks") == "zero")["ce_difference"].item()
    return table.with_columns((pl.col("ce_difference") / nothing).alias("ce_unrecovered"))


def climb_ladder(
    scene: Scene, steps: Sequence[int] = LADDER, budget: float = BUDGET
) -> pl.DataFrame:
    """Return the divergence that fresh projected gradient ascent reaches, with one source per
    component shared over the batch, for each number of steps at `steps * rate = budget`.

    An estimate of the worst case from below: an adversary with more steps may find more."""
    rows = []
    for count in steps:
        plan = Fresh(count, budget / count)
        routes = dict.fromkeys(scene.importance)
        sources = scene.attacked(plan, routes)
        with torch.no_grad():
            rows.append(
                {
                    "steps": count,
                    "rate": plan.rate,
                    "divergence": float(scene.loss(sources, routes)),
                }
            )
    return pl.DataFrame(rows)


def _loss(output: Tensor, labels: Tensor) -> float:
    return float(cross_entropy(widened(output).flatten(0, -2), labels.flatten(), ignore_index=-100))
