"""The components study: chosen weight matrices of any causal language model as rank-one
components, on any text, by as many processes as there are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.core.target import Batch, Target
from assay.io.runs import Run
from assay.mechanisms.components import (
    ComponentMechanisms,
    Decomposition,
    Faithfulness,
    Objective,
    Persistent,
    Recon,
    Rows,
    Training,
    decomposition,
    start_at_data,
    start_at_singular,
    train,
)
from assay.mechanisms.components import components as bind
from assay.mechanisms.components.comparison import match_components
from assay.mechanisms.components.minimality import Minimality
from assay.mechanisms.components.reconstruction import climb_ladder, reconstruct
from assay.mechanisms.components.recovery import ALIVE
from assay.mechanisms.components.scene import Scene
from assay.studies import runner
from assay.studies.component_penalty import make_penalty
from assay.studies.component_tables import spectrum
from assay.studies.components import measure
from assay.studies.components.config import Config
from assay.studies.components.inputs import Inputs, opened_inputs, prepare, wait_for_inputs
from assay.studies.components.page import headline, sections
from assay.studies.components.plan import importance_options, plan
from assay.targets.language import LanguageModel
from assay.targets.metrics import loss

__all__ = ["Config", "assist", "check", "contexts", "headline", "load", "plan", "run", "sections"]


@dataclass(frozen=True)
class Job:
    """One training of a run: its folder there ("" is the run's own), seed and coefficient."""

    name: str
    seed: int
    coefficient: float


def check(config: Config) -> None:
    """Refuse nothing more than the config does."""


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train the decomposition, and measure on held-out windows what it explains and what an
    adversary finds.
    """
    began = time.process_time()
    inputs = prepare(config, run)
    first, *others = _jobs(config)
    found = _decompose(config, inputs, first, run)
    again = {job.name: _decompose(config, inputs, job, run.child(job.name)) for job in others}
    run.save_tensors("decomposition.safetensors", dict(found.state_dict()))
    run.save_tensors("windows.safetensors", {"ids": inputs.held})
    scene = measure.open_held_out(config, inputs, found)
    masks = reconstruct(scene, inputs.labels)
    run.save_table("reconstruction.parquet", masks)
    ladder = climb_ladder(scene, config.pgd)
    run.save_table("ladder.parquet", ladder)
    run.save_table("importance.parquet", measure.count_kept(scene))
    run.save_table("spectrum.parquet", spectrum(scene, measure.kept_importance(scene)))
    run.save_table("top.parquet", _top(scene, inputs.model, inputs.held))
    own = {row["masks"]: row for row in masks.to_dicts()}
    l0, ranks = sum(measure.l0_by_site(scene).values()), measure.count_ranks(found)
    summary: dict[str, Any] = {
        "family": inputs.model.family,
        "sites": [site.name for site in found.sites],
        "tied": {site.name: list(site.tied) for site in found.sites if site.tied},
        "components": sum(site.components for site in found.sites),
        "alive": measure.count_alive(scene),
        "alive_definition": f"largest importance on the held-out windows above {ALIVE}",
        "l0": l0,
        "ranks": ranks,
        "l0_share_of_ranks": l0 / ranks,
        "ce_unrecovered_ci": own["ci"]["ce_unrecovered"],
        "ce_difference": {name: row["ce_difference"] for name, row in own.items()},
        "kl": {name: row["divergence"] for name, row in own.items()},
        "pgd": {str(row["steps"]): row["divergence"] for row in ladder.to_dicts()},
    }
    if config.singular:
        table = measure.compare_singular(config, inputs, scene)
        run.save_table("singular.parquet", table)
        summary["singular_pgd"] = table[f"kl_pgd_{config.pgd[0]}"].min()
        summary["pgd_over_singular"] = ladder["divergence"][0] / summary["singular_pgd"]
    if config.split:
        table = measure.compare_split(config, inputs, found, _penalty(config, first))
        run.save_table("split.parquet", table)
        summary["split"] = _worst_split(table)
    if config.frontier:
        points = [
            (first, found),
            *((job, again[job.name]) for job in others if job.name.startswith("coefficient")),
        ]
        table = _frontier(config, inputs, points)
        run.save_table("frontier.parquet", table)
        summary["frontier"] = table.to_dicts()
    if config.seeds > 1:
        rivals = [again[job.name] for job in others if not job.name.startswith("coefficient")]
        table = _match(config, inputs, found, rivals)
        run.save_table("seeds.parquet", table)
        summary["seeds"] = _similarity(table)
    return {**summary, "seconds": time.process_time() - began}


def assist(config: Config, folder: Path) -> None:
    """Take part in every training of a run, as another process than the first."""
    inputs = wait_for_inputs(config, folder)
    for job in _jobs(config):
        _decompose(config, inputs, job, None)


def load(run: Run) -> ComponentMechanisms:
    """Bind the components of a saved run to its held-out windows; the metric is each one's loss."""
    config = runner.config_of(run)
    inputs = opened_inputs(config, run.folder)
    found = _undecomposed(config, inputs.model, torch.Generator().manual_seed(0))
    found.load_state_dict(run.tensors("decomposition.safetensors"))
    last = inputs.kept(inputs.held).sum(1) - 1
    batch = Batch(dict(inputs.rows(inputs.held).inputs), {"last": last})
    return bind(Target(inputs.model.model, loss, inputs.model.path), batch, found)


def contexts(run: Run) -> pl.DataFrame:
    """Describe the windows that the run's components were bound to."""
    tokenizer = opened_inputs(runner.config_of(run), run.folder).model.tokenizer
    ids = run.tensors("windows.safetensors")["ids"]
    return pl.DataFrame(
        {"example": range(len(ids)), "text": [tokenizer.decode(row.tolist()) for row in ids]}
    )


def _jobs(config: Config) -> list[Job]:
    """Return all trainings of a run, the reported one first."""
    coefficient = config.penalty.coefficient
    points = [Job(f"coefficient-{value:g}", config.seed, value) for value in config.frontier]
    seeds = [Job(f"seed-{k}", config.seed + 1000 * k, coefficient) for k in range(1, config.seeds)]
    return [Job("", config.seed, coefficient), *points, *seeds]


def _decompose(config: Config, inputs: Inputs, job: Job, run: Run | None) -> Decomposition:
    """Train one decomposition, or go on with it; without a run, as another process."""
    generator = torch.Generator().manual_seed(job.seed)
    model, training = inputs.model.model, config.training
    found = _undecomposed(config, inputs.model, generator)
    if config.components.frozen:
        found.V.requires_grad_(False)
        found.U.requires_grad_(False)

    def draw(generator: torch.Generator) -> Rows:
        chosen = torch.randint(len(inputs.ids), (training.batch,), generator=generator)
        return inputs.rows(inputs.ids[chosen])

    start = start_at_data if config.components.start == "data" else start_at_singular
    start(model, found, draw(generator).inputs, generator)
    recon = [Recon(routing="subset")]
    if training.adversary:
        source = Persistent(training.adversary_rate, training.adversary_warm)
        recon.append(Recon(source, coefficient=training.adversary))
    faithfulness = Faithfulness(training.faithfulness) if training.faithfulness else None
    train(
        model,
        found,
        Objective(tuple(recon), _penalty(config, job), faithfulness, divergence="kl"),
        draw,
        Training(
            steps=training.steps,
            rate=training.rate,
            importance_rate=training.importance_rate,
            warmup_steps=0 if config.components.frozen else training.warmup_steps,
            save_every=100,
        ),
        generator=generator,
        run=run,
    )
    return found


def _penalty(config: Config, job: Job) -> Minimality:
    references = config.reference.batch * config.reference.length
    chosen = config.penalty.model_copy(update={"coefficient": job.coefficient})
    return make_penalty(chosen, references)


def _frontier(
    config: Config, inputs: Inputs, points: list[tuple[Job, Decomposition]]
) -> pl.DataFrame:
    """Return one row per coefficient: what is important, how far the masked network is off, and, if
    asked for, the least of gated singular parts at equal L0.
    """
    rows = []
    for job, found in points:
        numbers = measure.measure(config, inputs, found)
        row: dict[str, Any] = {"coefficient": job.coefficient, **numbers}
        if config.singular:
            scene = measure.open_held_out(config, inputs, found)
            table = measure.compare_singular(config, inputs, scene)
            key = f"kl_pgd_{config.pgd[0]}"
            row |= {"kl_ci_singular": table["kl_ci"].min(), f"{key}_singular": table[key].min()}
        rows.append(row)
    return pl.DataFrame(rows).sort("coefficient")


def _match(
    config: Config, inputs: Inputs, found: Decomposition, others: list[Decomposition]
) -> pl.DataFrame:
    """Return the alive components of every two seeds matched one to one."""
    every = [found, *others]
    at = [measure.kept_importance(measure.open_held_out(config, inputs, one)) for one in every]
    frames = [
        match_components(every[i], every[j], (at[i], at[j])).with_columns(
            pl.lit(f"{i} and {j}").alias("seeds")
        )
        for i in range(len(every))
        for j in range(i + 1, len(every))
    ]
    return pl.concat(frames)


def _similarity(table: pl.DataFrame) -> dict[str, Any]:
    cosines = table["cosine"]
    return {
        "components": len(cosines),
        "matched": len(cosines.drop_nulls()),
        "mean_cosine_of_matched": cosines.mean(),
        "matched_above_0.9": int((cosines > 0.9).sum()),
    }


def _worst_split(table: pl.DataFrame) -> dict[str, Any]:
    known = table.filter(pl.col("expected").is_not_null())
    error = (known["after"] - known["expected"]).abs() / known["expected"].abs().clip(1e-6)
    return {
        "component": table["component"][0],
        "as_expected_within": error.max(),
        "invariant": known.filter(pl.col("why") == measure.EXACT)["number"].to_list(),
    }


def _undecomposed(
    config: Config, model: LanguageModel, generator: torch.Generator
) -> Decomposition:
    return decomposition(
        model.model,
        list(config.sites),
        config.components.per_site,
        importance=config.components.importance,
        generator=generator,
        **importance_options(config),
    )


def _top(scene: Scene, model: LanguageModel, held: Tensor, most: int = 3) -> pl.DataFrame:
    """Return, for the components that matter most often, the tokens where they matter most."""
    rows = []
    for site in scene.found.sites:
        importance = scene.importance[site.name]
        inner = scene.found.inner(scene.reading)[site.name].detach()
        kept = scene.rows.kept(importance)
        means = importance[kept].mean(0)
        for component in means.topk(min(most, len(means))).indices.tolist():
            strength = importance[..., component] * inner[..., component].abs()
            strength = torch.where(kept, strength, -1.0).flatten()
            places = strength.topk(min(5, len(strength))).indices
            tokens = [model.tokenizer.decode([int(held.flatten()[place])]) for place in places]
            rows.append(
                {
                    "component": f"{site.name}[{component}]",
                    "mean importance": float(means[component]),
                    "strongest at": " | ".join(tokens),
                }
            )
    return pl.DataFrame(rows)
