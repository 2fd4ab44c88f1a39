"""What the features study scores: a model, its pairs of prompts, and dictionaries bound to them."""

from __future__ import annotations

from typing import Any

import polars as pl
import torch

from assay.core.target import Batch, Target
from assay.dictionaries import DictionarySet, Placed, architecture
from assay.dictionaries.evaluation import evaluate
from assay.dictionaries.fit import check_fit
from assay.dictionaries.load import load_dictionaries
from assay.dictionaries.save import save_dictionaries
from assay.dictionaries.settings import Training
from assay.dictionaries.training import train
from assay.io.prompts import Pairs
from assay.io.runs import Run
from assay.learn.reading import Reader, Rows, rows_of, widths_of
from assay.mechanisms.features import FeatureParts, features, identities
from assay.studies.features.config import Config
from assay.studies.pairs import model_of, read_some
from assay.targets.agreement import (
    CONSTRUCTIONS,
    agreement_text,
    draw_sentences,
    encode_sentences,
)
from assay.targets.language import LanguageModel
from assay.targets.metrics import choose_metric, pair_batch
from assay.targets.names import match_names, resolve
from assay.targets.reading import read_values, real_positions

SAVED = "dictionaries"
"""The folder of a run that holds the dictionaries that it trained."""


def load_model(config: Config, run: Run) -> LanguageModel:
    """Load the user's model, or the agreement model of the run, which is trained when absent."""
    return model_of(config.target.path, config.target, run, config.seed)


def read_limited(config: Config, run: Run, model: LanguageModel) -> Pairs:
    """Read the run's pairs, a random choice where there are more than its limit."""
    path = config.data.pairs or run.checked("pairs.jsonl")
    return read_some(path, model, config.data.limit, config.seed)


def make_batches(config: Config, model: LanguageModel, pairs: Pairs) -> tuple[Target, Batch, Batch]:
    """Return the target, and the clean and the patch prompts."""
    target = Target(model.model, choose_metric(config.metric), model.path)
    return target, pair_batch(pairs, "clean"), pair_batch(pairs, "patch")


def find_dictionaries(
    config: Config, run: Run, model: LanguageModel, target: Target, clean: Batch
) -> DictionarySet:
    """Return the dictionaries of the config: read one at a time from their files, trained, or
    identities.
    """
    given = config.dictionaries
    match config.kind:
        case "saved":
            assert given.path is not None
            return load_dictionaries(
                given.path, reads=given.reads, writes=given.writes, scale=given.scale, stream=True
            )
        case "identity":
            return identities(target, clean, match_names(model.model, config.sites))
        case _:
            if not run.has(SAVED):
                _train(config, run, model)
            return load_dictionaries(run.checked(SAVED))


def _train(config: Config, run: Run, model: LanguageModel) -> None:
    """Train dictionaries on the sentences of the agreement model, and save them with what they
    explain of sentences that it never saw.
    """
    given = config.dictionaries
    names = match_names(model.model, config.sites)
    rows = encoded_rows(agreement_text(given.sentences, seed=config.seed), model)
    widths = widths_of(Reader(model.model, names), rows.take(slice(0, 8)))
    made: Any = architecture(given.architecture)
    placed = {
        name: Placed(made(width, given.features, k=given.k), name, (name,))
        for name, width in widths.items()
    }
    training = Training(
        steps=given.steps,
        batch=given.batch,
        rate=given.rate,
        end_to_end=given.end_to_end,
        windows=given.windows,
        seed=config.seed,
    )
    trained = train(model.model, rows, placed, training, run=run, name=SAVED)
    held = [
        sentence.text()
        for construction in CONSTRUCTIONS
        for sentence in draw_sentences(
            construction, given.held_out, seed=config.seed + 1, held_out=True
        )
    ]
    found = evaluate(model.model, encoded_rows(held, model), trained)
    run.save_table("evaluation.parquet", found.to_polars())
    worst = found.worst
    run.save_json(
        "evaluation.json",
        {
            "loss_recovered_worst_site": None if worst is None else worst.loss_recovered,
            "worst_site": None if worst is None else worst.name,
            "worst_site_interval": None if worst is None else worst.interval,
            "loss_recovered_absent": found.reasons,
            "loss_recovered_all_sites": found.loss_recovered,
            "pca_loss_recovered_all_sites": found.pca_loss_recovered,
            "largest_l0": max(site.l0 for site in found.sites),
            "largest_dead_share": max(site.dead for site in found.sites),
            "positions": found.positions,
        },
    )
    metadata = {"model_name": "agreement", "context_size": rows.ids.shape[1], "prepend_bos": False}
    run.write_folder(SAVED, lambda new: save_dictionaries(new, trained, metadata))


def encoded_rows(sentences: list[str], model: LanguageModel) -> Rows:
    """Return sentences as windows of tokens, padded on the right."""
    ids = encode_sentences(sentences, model.tokenizer)
    return rows_of(ids, ids != model.tokenizer.pad_token_id)


@torch.no_grad()
def measure_fit(
    model: LanguageModel, dictionaries: DictionarySet, target: Target, batch: Batch
) -> pl.DataFrame:
    """Return how well every dictionary explains the values at its sites on a batch, behind the
    first position.

    Raises InputError, with the likely cause, for one that explains less than nothing."""
    names = {
        site
        for name in dictionaries
        for placed in [dictionaries[name]]
        for site in (placed.reads, *placed.writes)
    }
    refs = {name: resolve(model.model, name).site for name in names}
    values = read_values(target, batch, list(dict.fromkeys(refs.values())), "the clean run's")
    mask = real_positions(batch)
    rows = []
    for name in dictionaries:
        placed = dictionaries[name]
        here = {}
        for site in (placed.reads, *placed.writes):
            value = values[refs[site]]
            kept = torch.ones(value.shape[:2], dtype=torch.bool) if mask is None else mask.clone()
            if value.shape[1] > 1:
                kept[:, 0] = False
            here[site] = value[kept].float()
        crossing = len(placed.writes) > 1 or _shared(name, placed, dictionaries)
        fit = None if crossing else check_fit({name: placed}, here)[name]
        rows.append(
            {
                "dictionary": name,
                "features": placed.dictionary.size,
                "explained variance": None if fit is None else fit.explained_variance,
                "active": None if fit is None else fit.active,
                "silent share": None if fit is None else fit.silent,
                "warning": "" if fit is None or fit.warning is None else fit.warning,
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def _shared(name: str, placed: Placed, dictionaries: DictionarySet) -> bool:
    """Whether a dictionary of another site writes here too, so that neither explains it alone."""
    others = (dictionaries[other] for other in dictionaries if other != name)
    return any(set(placed.writes) & set(other.writes) for other in others)


def bind(
    config: Config,
    dictionaries: DictionarySet,
    target: Target,
    clean: Batch,
    patch: Batch,
) -> FeatureParts:
    """Bind the dictionaries to pairs of prompts."""
    return features(
        target, dictionaries, clean, patch, config.reference, convention=config.convention
    )


def kinds_of(model: LanguageModel, bound: FeatureParts) -> pl.DataFrame:
    """Return the kind of site, the layer and the sort of part (feature, error or rest) of every
    group.
    """
    by_site = {}
    for name in bound.dictionaries:
        placed = bound.dictionaries[name]
        for site in placed.writes:
            ref = resolve(model.model, site)
            by_site[ref.site] = (ref.kind, ref.layer)
    rows = []
    for name, group in bound.groups.items():
        kind, layer = by_site[group.sites[0]]
        part = "feature" if name in bound.spots else "error" if name.endswith("error") else "rest"
        rows.append({"group": name, "kind": str(kind), "layer": layer, "part": part})
    return pl.DataFrame(rows)
