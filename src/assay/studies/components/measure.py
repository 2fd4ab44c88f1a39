"""What a decomposition of a language model is measured by, on held-out windows."""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.mechanisms.components import Decomposition
from assay.mechanisms.components.halves import split_component
from assay.mechanisms.components.minimality import Minimality
from assay.mechanisms.components.reconstruction import (
    climb_ladder,
    count_important,
    open_scene,
    reconstruct,
)
from assay.mechanisms.components.recovery import ALIVE, alive
from assay.mechanisms.components.scene import Scene
from assay.mechanisms.components.singular import GATES, gate_scene, singular_parts
from assay.mechanisms.components.squash import upper
from assay.studies.components.config import Config
from assay.studies.components.inputs import Inputs


def open_held_out(config: Config, inputs: Inputs, found: Decomposition) -> Scene:
    """Return the held-out windows as a scene, with the draws of an evaluation."""
    seen = torch.Generator().manual_seed(config.seed + 54321)
    return open_scene(inputs.model.model, found, inputs.rows(inputs.held), "kl", seen)


def kept_importance(scene: Scene) -> dict[str, Tensor]:
    """Return the importances (positions, components) at the positions that count."""
    return {name: g[scene.rows.kept(g)].double() for name, g in scene.importance.items()}


def count_ranks(found: Decomposition) -> int:
    """Return the summed ranks of the matrices: how many singular parts they have."""
    return sum(min(site.inputs, site.outputs) for site in found.sites)


def l0_by_site(scene: Scene) -> dict[str, float]:
    """Return the mean number of components above 0.1 per position, for every site."""
    return {
        name: float((g > ALIVE).sum(-1).double().mean())
        for name, g in kept_importance(scene).items()
    }


def count_alive(scene: Scene) -> int:
    """Return how many components have an importance above 0.1 anywhere."""
    return sum(int(alive(g).sum()) for g in kept_importance(scene).values())


def measure(config: Config, inputs: Inputs, found: Decomposition) -> dict[str, float]:
    """Return the numbers that decompositions are compared by: L0 (above 0.1), alive components, KL
    and cross-entropy under fixed masks, KL under drawn ones and under the first adversary.
    """
    scene = open_held_out(config, inputs, found)
    masks = {row["masks"]: row for row in reconstruct(scene, inputs.labels).to_dicts()}
    numbers = {"l0": sum(l0_by_site(scene).values()), "alive": float(count_alive(scene))}
    for name, row in masks.items():
        numbers[f"kl_{name}"] = row["divergence"]
    numbers["ce_difference_ci"] = masks["ci"]["ce_difference"]
    ladder = climb_ladder(scene, config.pgd[:1]).to_dicts()[0]
    return {**numbers, f"kl_pgd_{ladder['steps']}": ladder["divergence"]}


def compare_singular(config: Config, inputs: Inputs, scene: Scene) -> pl.DataFrame:
    """Return one row per gating of singular parts at the L0 of a scene, by site or in all: the KL
    with their masks and under the first adversary.
    """
    parts = singular_parts(inputs.model.model, scene.found)
    l0 = l0_by_site(scene)
    rows = []
    for gate in GATES:
        for together in (False, True):
            own = gate_scene(scene, parts, gate, l0, inputs.labels, together=together)
            masks = {row["masks"]: row for row in reconstruct(own).to_dicts()}
            attacked = climb_ladder(own, config.pgd[:1])["divergence"].item()
            rows.append(
                {
                    "gate": gate,
                    "chosen": "over all sites" if together else "by site",
                    "l0": sum(l0_by_site(own).values()),
                    "kl_ci": masks["ci"]["divergence"],
                    f"kl_pgd_{config.pgd[0]}": attacked,
                }
            )
    return pl.DataFrame(rows)


DRAWS = "an estimate from draws: two sources of halves average, so that it falls or stays"
CLIMB = "the supremum is invariant, the climb to it is not"
COUNTS = "counts components, and there is one more"
EXACT = "invariant: the halves have one mask"


def compare_split(
    config: Config, inputs: Inputs, found: Decomposition, penalty: Minimality
) -> pl.DataFrame:
    """Return every reported number before and after the component of the largest mean importance
    is split into two equal halves, and what mathematics says of it.
    """
    scene = open_held_out(config, inputs, found)
    means = {name: g.mean(0) for name, g in kept_importance(scene).items()}
    site = max(means, key=lambda name: float(means[name].max()))
    component = int(means[site].argmax())
    halves = split_component(found, site, component)
    before, after = measure(config, inputs, found), measure(config, inputs, halves)
    for numbers, own in ((before, found), (after, halves)):
        numbers["minimality"] = _price(config, inputs, own, penalty)
    alone = _price(config, inputs, found, penalty, only=(site, component))
    rows: list[dict[str, Any]] = []
    for name, value in before.items():
        if name == "minimality":
            expected, why = value + alone, "the split component is paid for twice"
        elif name == "alive":
            expected, why = value + float(alive(kept_importance(scene)[site])[component]), COUNTS
        elif name == "l0":
            share = (kept_importance(scene)[site][:, component] > ALIVE).double().mean()
            expected, why = value + float(share), COUNTS
        elif name.startswith("kl_pgd"):
            expected, why = None, CLIMB
        elif name == "kl_stochastic":
            expected, why = None, DRAWS
        else:
            expected, why = value, EXACT
        rows.append(
            {
                "number": name,
                "before": value,
                "after": after[name],
                "expected": expected,
                "why": why,
            }
        )
    schema = {"number": pl.String, "before": pl.Float64, "after": pl.Float64}
    schema |= {"expected": pl.Float64, "why": pl.String}
    table = pl.DataFrame(rows, schema=schema)
    return table.with_columns(pl.lit(f"{site}[{component}]").alias("component"))


def _price(
    config: Config,
    inputs: Inputs,
    found: Decomposition,
    penalty: Minimality,
    only: tuple[str, int] | None = None,
) -> float:
    """Return the importance minimality on the held-out windows, of one component if named."""
    scene = open_held_out(config, inputs, found)
    with torch.no_grad():
        values = {name: upper(z) for name, z in found.logits(scene.reading).items()}
    kept = {name: a[scene.rows.kept(a)].double() for name, a in values.items()}
    if only is not None:
        kept = {only[0]: kept[only[0]][:, only[1], None]}
    return float(penalty(kept, count=len(next(iter(kept.values())))))


def count_kept(scene: Scene) -> pl.DataFrame:
    """Return CI-L0 per site at the three thresholds, padding left out."""
    return count_important(kept_importance(scene))
