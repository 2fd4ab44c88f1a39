"""The dictionaries study: dictionaries at chosen sites of any causal language model, on any
text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.dictionaries.evaluation import evaluate
from assay.dictionaries.load import load_dictionaries
from assay.dictionaries.save import save_dictionaries
from assay.dictionaries.settings import Training
from assay.dictionaries.training import train
from assay.errors import InputError
from assay.io.prompts import leading_token, read_text
from assay.io.runs import Run
from assay.learn.language import train_language_model, train_tokenizer
from assay.learn.reading import Reader, Rows, rows_of, widths_of
from assay.learn.settings import LanguageTraining
from assay.studies.dictionaries.config import Config
from assay.studies.dictionaries.page import headline, sections
from assay.studies.dictionaries.plan import plan
from assay.studies.dictionaries.sites import place
from assay.targets.language import LanguageModel, load_language_model, require_context
from assay.targets.names import match_names

__all__ = ["Config", "check", "headline", "plan", "run", "sections"]

SAVED = "dictionaries"
"""The folder of a run in which there is a SAELens directory for every site."""

_MOST_UNKNOWN = 0.5


def check(config: Config) -> None:
    """Refuse nothing more than the config does."""


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train a dictionary at every site, save them, and measure the saved ones on held-out
    windows.
    """
    began = time.process_time()
    model, rows, held = _inputs(config, run)
    names = match_names(model.model, config.sites)
    placed = place(config, widths_of(Reader(model.model, names), held))
    if not run.has(SAVED):
        settings = config.training.model_dump()
        trained = train(
            model.model, rows, placed, Training(**settings, seed=config.seed), run=run, name=SAVED
        )
        metadata = {
            "model_name": config.target.path or "a small language model",
            "context_size": config.data.length,
            "prepend_bos": leading_token(model.tokenizer) is not None,
        }
        run.write_folder(SAVED, lambda new: save_dictionaries(new, trained, metadata))
    found = evaluate(model.model, held, load_dictionaries(run.checked(SAVED)))
    run.save_table("evaluation.parquet", found.to_polars())
    worst = found.worst
    return {
        "family": model.family,
        "sites": names,
        "architecture": config.architecture,
        "features": {name: one.dictionary.size for name, one in placed.items()},
        "dictionaries": str(run.path(SAVED)),
        "positions": found.positions,
        "loss": found.loss,
        "loss_recovered": {site.name: site.loss_recovered for site in found.sites},
        "worst": {
            "site": None if worst is None else worst.name,
            "loss_recovered": None if worst is None else worst.loss_recovered,
            "interval": None if worst is None else worst.interval,
        },
        "loss_recovered_absent": found.reasons,
        "loss_recovered_all": found.loss_recovered,
        "pca_loss_recovered_all": found.pca_loss_recovered,
        "l0": {site.name: site.l0 for site in found.sites},
        "dead": {site.name: site.dead for site in found.sites},
        "explained": {site.name: site.explained for site in found.sites},
        "seconds": time.process_time() - began,
    }


def _inputs(config: Config, run: Run) -> tuple[LanguageModel, Rows, Rows]:
    """Return the model, and the windows to train on and to evaluate on."""
    assert config.data.path is not None
    model = load_language_model(config.target.path or _train_model(config, run))
    require_context(model.model, config.data.length, "set data.length lower")
    ids = read_text(config.data.path, model.tokenizer, length=config.data.length)
    require_vocabulary(ids, model, config.data.path)
    held_out = config.data.held_out
    if len(ids) < 2 * held_out:
        raise InputError(
            f"{config.data.path} fills {len(ids)} windows of {config.data.length} tokens;"
            f" data.held_out = {held_out} needs twice as many"
        )
    constant, generator = config.data.constant, torch.Generator().manual_seed(config.seed)
    if config.target.train:  # what its training held out
        kept = len(ids) - len(ids) // 10
        test = ids[kept:][torch.randperm(len(ids) - kept, generator=generator)[:held_out]]
        return model, rows_of(ids[:kept], constant=constant), rows_of(test, constant=constant)
    ids = ids[torch.randperm(len(ids), generator=generator)]
    return (
        model,
        rows_of(ids[held_out:], constant=constant),
        rows_of(ids[:held_out], constant=constant),
    )


def _train_model(config: Config, run: Run) -> Path:
    """Train the run's own small language model on the text, or go on with it."""
    assert config.data.path is not None
    chosen = config.target
    sizes = LanguageTraining(
        layers=chosen.layers,
        width=chosen.width,
        heads=chosen.heads,
        context=config.data.length,
        steps=chosen.steps,
        batch=chosen.batch,
        rate=chosen.rate,
        seed=config.seed,
    )
    tokenizer = train_tokenizer(config.data.path, chosen.vocabulary)
    return train_language_model(config.data.path, tokenizer, run, sizes)


def require_vocabulary(ids: Tensor, model: LanguageModel, path: str) -> None:
    """Raise InputError for tokens that the model has no embedding for, and for a text most of whose
    words its tokenizer does not know.
    """
    largest = int(ids.max())
    if largest >= model.vocab_size:
        raise InputError(
            f"{path} holds token {largest}, and the model has {model.vocab_size} tokens: its"
            " tokenizer is that of another vocabulary"
        )
    unknown = model.tokenizer.unk_token_id
    if unknown is None:
        return
    share = float((ids == unknown).double().mean())
    if share > _MOST_UNKNOWN:
        raise InputError(
            f"{share:.0%} of the tokens of {path} are unknown to the model's tokenizer; give a text"
            " in its vocabulary"
        )
