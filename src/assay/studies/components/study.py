"""The components study: chosen weight matrices of any causal language model as rank-one
components, on any text."""

from __future__ import annotations

import time
from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.core.target import Target
from assay.errors import InputError
from assay.io.prompts import read_text
from assay.io.runs import Run
from assay.mechanisms.components import (
    ComponentMechanisms,
    Decomposition,
    Objective,
    Persistent,
    Recon,
    Rows,
    Training,
    decomposition,
    start_at_data,
    train,
)
from assay.mechanisms.components import components as bind
from assay.mechanisms.components.reconstruction import (
    climb_ladder,
    count_important,
    open_scene,
    reconstruct,
)
from assay.mechanisms.components.recovery import ALIVE
from assay.mechanisms.components.scene import Scene
from assay.studies import runner
from assay.studies.component_penalty import make_penalty
from assay.studies.component_tables import spectrum
from assay.studies.components.config import Config
from assay.studies.components.page import headline, sections
from assay.studies.components.plan import importance_options, plan
from assay.targets.language import LanguageModel, load_language_model, require_context
from assay.targets.metrics import loss, text_batch

__all__ = ["Config", "check", "contexts", "headline", "load", "plan", "run", "sections"]


def check(config: Config) -> None:
    """Refuse nothing more than the config does."""


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train the decomposition, and measure on held-out windows what it explains and what an
    adversary finds.
    """
    began = time.process_time()
    model, ids, held = _inputs(config)
    generator = torch.Generator().manual_seed(config.seed)
    found = _undecomposed(config, model, generator)
    training = config.training

    def draw(generator: torch.Generator) -> Rows:
        chosen = torch.randint(len(ids), (training.batch,), generator=generator)
        return Rows(_windows(ids[chosen]))

    start_at_data(model.model, found, draw(generator).inputs, generator)
    adversary = (Recon(Persistent(), coefficient=training.adversary),) if training.adversary else ()
    references = config.reference.batch * config.reference.length
    train(
        model.model,
        found,
        Objective(
            (Recon(routing="subset"), *adversary),
            make_penalty(config.penalty, references),
            divergence="kl",
        ),
        draw,
        Training(
            steps=training.steps,
            rate=training.rate,
            importance_rate=training.importance_rate,
            warmup_steps=training.warmup_steps,
            save_every=100,
        ),
        generator=generator,
        run=run,
    )
    run.save_tensors("decomposition.safetensors", dict(found.state_dict()))
    run.save_tensors("windows.safetensors", {"ids": held})
    seen = torch.Generator().manual_seed(config.seed + 54321)
    scene = open_scene(model.model, found, _windows(held), "kl", seen)
    labels = torch.full_like(held, -100)
    labels[:, :-1] = held[:, 1:]
    masks = reconstruct(scene, labels)
    run.save_table("reconstruction.parquet", masks)
    run.save_table("ladder.parquet", climb_ladder(scene, config.pgd))
    run.save_table("importance.parquet", count_important(scene.importance))
    rows = {name: entry.flatten(0, -2).double() for name, entry in scene.importance.items()}
    ranked = spectrum(scene, rows)
    run.save_table("spectrum.parquet", ranked)
    run.save_table("top.parquet", _top(scene, model, held))
    ci = masks.filter(pl.col("masks") == "ci").to_dicts()[0]
    return {
        "family": model.family,
        "sites": [site.name for site in found.sites],
        "tied": {site.name: list(site.tied) for site in found.sites if site.tied},
        "components": sum(site.components for site in found.sites),
        "alive": int((ranked["state"] == "alive").sum()),
        "alive_definition": f"largest importance on the held-out windows above {ALIVE}",
        "l0": float(
            torch.stack(
                [(g > ALIVE).sum(-1).double().mean() for g in scene.importance.values()]
            ).sum()
        ),
        "ce_unrecovered_ci": ci["ce_unrecovered"],
        "kl": {row["masks"]: row["divergence"] for row in masks.to_dicts()},
        "pgd": {
            str(row["steps"]): row["divergence"] for row in run.table("ladder.parquet").to_dicts()
        },
        "seconds": time.process_time() - began,
    }


def load(run: Run) -> ComponentMechanisms:
    """Bind the components of a saved run to its held-out windows; the metric is each one's loss."""
    config = runner.config_of(run)
    model = load_language_model(config.target.path)
    found = _undecomposed(config, model, torch.Generator().manual_seed(0))
    found.load_state_dict(run.tensors("decomposition.safetensors"))
    ids = run.tensors("windows.safetensors")["ids"]
    return bind(Target(model.model, loss, model.path), text_batch(ids), found)


def contexts(run: Run) -> pl.DataFrame:
    """Describe the windows that the run's components were bound to."""
    config = runner.config_of(run)
    tokenizer = load_language_model(config.target.path).tokenizer
    ids = run.tensors("windows.safetensors")["ids"]
    return pl.DataFrame(
        {"example": range(len(ids)), "text": [tokenizer.decode(row.tolist()) for row in ids]}
    )


def _inputs(config: Config) -> tuple[LanguageModel, Tensor, Tensor]:
    assert config.target.path is not None
    assert config.data.path is not None
    model = load_language_model(config.target.path)
    require_context(model.model, config.data.length, "set data.length lower")
    ids = read_text(config.data.path, model.tokenizer, length=config.data.length)
    if len(ids) < 2 * config.data.held_out:
        raise InputError(
            f"{config.data.path} fills {len(ids)} windows of {config.data.length} tokens;"
            f" data.held_out = {config.data.held_out} needs twice as many"
        )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(config.seed))
    ids = ids[order]
    return model, ids[config.data.held_out :], ids[: config.data.held_out]


def _windows(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _undecomposed(
    config: Config, model: LanguageModel, generator: torch.Generator
) -> Decomposition:
    return decomposition(
        model.model,
        list(config.components.modules),
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
        means = importance.flatten(0, -2).mean(0)
        for component in means.topk(min(most, len(means))).indices.tolist():
            strength = (importance[..., component] * inner[..., component].abs()).flatten()
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
