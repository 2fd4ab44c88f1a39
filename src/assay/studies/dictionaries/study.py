"""The dictionaries study: dictionaries at chosen sites of any causal language model, on any
text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from assay.dictionaries.evaluation import evaluate
from assay.dictionaries.load import load_dictionaries
from assay.dictionaries.save import save_dictionaries
from assay.dictionaries.settings import Training
from assay.dictionaries.training import train
from assay.io.prompts import leading_token
from assay.io.runs import Run
from assay.io.texts import read_text
from assay.learn.language import train_language_model, train_tokenizer
from assay.learn.reading import Reader, Rows, widths_of
from assay.learn.settings import LanguageTraining
from assay.studies.dictionaries.config import Config
from assay.studies.dictionaries.page import headline, sections
from assay.studies.dictionaries.plan import plan
from assay.studies.dictionaries.sites import place
from assay.studies.windows import require_tenth, split_windows
from assay.targets.language import LanguageModel, load_language_model
from assay.targets.names import match_names

__all__ = ["Config", "check", "headline", "plan", "run", "sections"]

SAVED = "dictionaries"
"""The folder of a run in which there is a SAELens directory for every site."""


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
    data = config.data
    assert data.path is not None
    model = load_language_model(config.target.path or _train_model(config, run))
    rows, held = split_windows(
        model,
        data.path,
        data.length,
        data.held_out,
        constant=data.constant,
        seed=config.seed,
        from_end=config.target.train,
    )
    return model, rows, held


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
    first = read_text(config.data.path, tokenizer, length=config.data.length, limit=20)
    require_tenth(first, config.data.path)
    return train_language_model(config.data.path, tokenizer, run, sizes)
