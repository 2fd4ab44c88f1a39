"""The crosscoder study: one dictionary over the residual states of any causal language model, on
any text."""

from __future__ import annotations

import time
from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.core.target import Target
from assay.errors import InputError
from assay.io.runs import Run
from assay.learn.reading import Rows
from assay.learn.streams import Stream
from assay.mechanisms.crosscoder import (
    Crosscoder,
    CrosscoderMechanisms,
    Training,
    crosscoder,
    hash_of,
    save,
    train,
)
from assay.mechanisms.crosscoder import load as load_crosscoder
from assay.mechanisms.crosscoder.evaluation import evaluate, first_layer_counts, stack_states
from assay.mechanisms.crosscoder.files import CONFIG, WEIGHTS
from assay.mechanisms.crosscoder.training import equal_norm_scales
from assay.studies import runner
from assay.studies.crosscoder.config import Config
from assay.studies.crosscoder.page import headline, sections
from assay.studies.windows import split_windows
from assay.targets.language import LanguageModel, load_language_model
from assay.targets.metrics import loss, text_batch
from assay.targets.names import match_names, resolve

__all__ = ["Config", "check", "contexts", "headline", "load", "run", "sections"]

_MEASURED = 256
"""Windows on which the scales of the layers are measured before training."""
_SPARSITY = {"relu": 0.03, "jumprelu": 0.03, "batch_topk": 0.0}


def check(config: Config) -> None:
    """Refuse nothing more than the config does."""


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train a crosscoder over the sites, or load one; save it, and measure what was saved on
    held-out windows.
    """
    began = time.process_time()
    model, rows, held = _inputs(config)
    names = match_names(model.model, config.sites)
    if not run.has(CONFIG):
        made = _trained(config, run, model, rows, names)
        run.write_files(lambda folder: save(folder, made))
    run.checked(WEIGHTS)
    found = load_crosscoder(run.checked(CONFIG).parent)
    shown = held.ids[held.mask.all(1)][: config.data.shown]
    run.save_tensors("windows.safetensors", {"ids": shown})
    measured = evaluate(model.model, found, held)
    begins = first_layer_counts(found, config.share)
    table = measured.to_polars().with_columns(
        pl.Series("features that begin here", begins), pl.Series("name", names)
    )
    run.save_table("evaluation.parquet", table)
    return {
        "family": model.family,
        "sites": names,
        "activation": found.activation,
        "features": found.size,
        "positions": measured.positions,
        "loss": measured.loss,
        "l0": measured.l0,
        "dead": measured.dead,
        "fvu": dict(zip(names, table["unexplained"].to_list(), strict=True)),
        "loss_recovered": dict(zip(names, table["recovered"].to_list(), strict=True)),
        "begins": dict(zip(names, begins, strict=True)),
        "model_hash": found.model_hash,
        "crosscoder": str(run.path(WEIGHTS)),
        "seconds": time.process_time() - began,
    }


def load(run: Run) -> CrosscoderMechanisms:
    """Bind the features of a saved run to some of its held-out windows; the metric is each one's
    loss.
    """
    config = runner.config_of(run)
    model = load_language_model(config.target.path)
    run.checked(WEIGHTS)
    found = load_crosscoder(run.checked(CONFIG).parent)
    batch = text_batch(run.tensors("windows.safetensors")["ids"])
    return crosscoder(Target(model.model, loss, model.path), batch, found, share=config.share)


def contexts(run: Run) -> pl.DataFrame:
    """Return the text of every window that the run's features are bound to."""
    tokenizer = load_language_model(runner.config_of(run).target.path).tokenizer
    ids = run.tensors("windows.safetensors")["ids"].tolist()
    texts = [tokenizer.decode(window) for window in ids]
    return pl.DataFrame({"example": range(len(texts)), "text": texts})


def _inputs(config: Config) -> tuple[LanguageModel, Rows, Rows]:
    assert config.target.path is not None
    model, data = load_language_model(config.target.path), config.data
    assert data.path is not None
    rows, held = split_windows(
        model, data.path, data.length, data.held_out, constant=data.constant, seed=config.seed
    )
    return model, rows, held


def _trained(
    config: Config, run: Run, model: LanguageModel, rows: Rows, names: list[str]
) -> Crosscoder:
    """Return the crosscoder of the config's folder, or train one on streamed states."""
    refs = [resolve(model.model, name) for name in names]
    heads = [name for name, ref in zip(names, refs, strict=True) if ref.heads is not None]
    if heads:
        raise InputError(
            f"{heads[0]!r} names heads; a crosscoder reads whole vectors, such as"
            " blocks.*.hook_resid_post"
        )
    sites = [ref.site for ref in refs]
    digest = hash_of(model.model)
    if config.path is not None:
        found = load_crosscoder(config.path, sites)
        found.require_network(model.model, f"the crosscoder in {config.path}")
        found.model_hash = digest
        return found
    chosen = config.training
    stream = Stream(model.model, rows, sites, batch=chosen.batch, seed=config.seed)
    widths = set(stream.widths.values())
    if len(widths) > 1:
        raise InputError(
            f"the states have different widths, {stream.widths}; a crosscoder reads one"
        )
    width = widths.pop()
    size = 8 * width if config.features is None else config.features
    if config.activation == "batch_topk" and config.k > size:
        raise InputError(f"k = {config.k} is more than the {size} features")
    generator = torch.Generator().manual_seed(config.seed)
    found = Crosscoder(
        sites, width, size, config.activation, k=config.k, model_hash=digest, generator=generator
    )
    first = stack_states(stream.sample(_MEASURED), found)
    with torch.no_grad():
        found.b_dec.copy_(first.mean(0) * equal_norm_scales(first)[:, None])

    def draw(step: int, generator: torch.Generator) -> tuple[Tensor, None]:
        return stack_states(stream(step), found), None

    sparsity = _SPARSITY[config.activation] if chosen.sparsity is None else chosen.sparsity
    training = Training(
        chosen.steps, chosen.rate, sparsity, log_every=20, save_every=chosen.save_every
    )
    train(found, draw, training, scales=equal_norm_scales(first), generator=generator, run=run)
    return found.eval()
