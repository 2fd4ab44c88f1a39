"""The features study: dictionary features and error nodes of a language model, scored, patched
exactly, and what drives the scores.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from assay.attribution import Exact, Gradient, IntegratedGradients, Scores, attribute
from assay.audit import ExactEffects, exact_top
from assay.audit.drivers import by_node
from assay.audit.selections import TOP_BY_SCORE
from assay.io.runs import Run
from assay.mechanisms.features import FeatureParts
from assay.studies import runner
from assay.studies.features import errors
from assay.studies.features.circuit import find_circuits
from assay.studies.features.config import Config
from assay.studies.features.grouping import require_supernodes
from assay.studies.features.inputs import (
    bind,
    find_dictionaries,
    kinds_of,
    load_model,
    make_batches,
    measure_fit,
    read_limited,
)
from assay.studies.features.labelled import given_text, save_labels
from assay.studies.features.page import headline, sections
from assay.studies.features.plan import plan
from assay.targets.language import LanguageModel

__all__ = ["Config", "check", "contexts", "headline", "load", "plan", "run", "sections"]

PROMISED = ("all", TOP_BY_SCORE, "listed")
LISTED = 24
ESTIMATES = {"attribution patching": "atp", "node paths": "node_path"}


def check(config: Config) -> None:
    """Refuse nothing more than the config does."""


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train or load model and dictionaries, score every feature and error node, patch them
    exactly, and measure how far the scores agree and what drives them.
    """
    model = load_model(config, run)
    text = given_text(config, model)
    pairs = read_limited(config, run, model)
    target, clean, patch = make_batches(config, model, pairs)
    dictionaries = find_dictionaries(config, run, model, target, clean)
    require_supernodes(config, run, model, dictionaries)
    fits = measure_fit(model, dictionaries, target, clean)
    run.save_table("fits.parquet", fits)
    bound = bind(config, dictionaries, target, clean, patch)
    kinds = kinds_of(model, bound)
    scores = attribute(bound, Gradient())
    exact = attribute(bound, Exact()) if config.effects.everything else None
    shares = _shares(config, bound)
    audit = scores.audit(
        exact=max(config.effects.exact, len(bound.groups)),
        alpha=config.effects.alpha,
        seed=config.seed,
        against=shares,
        effects=ExactEffects(bound, everything=exact),
    )
    run.save_table("audit.parquet", audit.table.join(kinds, on="group", maintain_order="left"))
    table = errors.measured_parts(bound, kinds, exact if exact is not None else audit.table)
    table = errors.with_node_paths(table, bound, config)
    change = float((target.values(patch) - target.values(clean)).double().mean())
    agreements = errors.agreements(table, ESTIMATES)
    hidden, counts = errors.missed(table, config.effects.threshold * abs(change))
    whole = errors.whole_residual(config, target, clean, patch, _residual(model, bound))
    recovery = errors.restored(bound, kinds, scores, config)
    listed = (
        audit.top(LISTED)
        if exact is None
        else exact_top(exact, LISTED, seed=config.seed, alpha=config.effects.alpha)
    )
    errors.save_errors(
        run,
        {
            "parts": table.filter(pl.col("part") != "feature"),
            "features": by_node(table.filter(pl.col("part") == "feature")),
            "nodes": by_node(table.filter(pl.col("part") != "feature")),
            "agreement": agreements,
            "missed": hidden,
            "whole": whole,
            "restored": recovery,
            "top": listed,
        },
    )
    circuits = find_circuits(config, run, model, target, dictionaries)
    return {
        "model": {
            "family": model.family,
            "layers": len(model.site_names("mlp")),
            "metric_mean": float(scores.baseline.mean()),
            "mean_change": change,
        },
        "pairs": {"kept": len(pairs), "dropped": dict(pairs.dropped)},
        "dictionaries": _described(config, run, fits),
        "signs": scores.signs,
        "reference": config.reference,
        "convention": config.convention,
        "metric": config.metric,
        "patching": bound.patching,
        "exact_effects": int(table["exact"].is_not_null().sum()),
        "node_paths": int(table["node_path"].is_not_null().sum()),
        "site_paths": _gaps(shares),
        "agreement": agreements.filter(pl.col("kind") == "all").to_dicts(),
        "bars": {
            "guarantee": audit.bars.guarantee,
            "scale": audit.bars.scale.words,
            **{name: audit.promises[name].to_dict() for name in PROMISED if name in audit.promises},
        },
        "error_bars": errors.bars_of_errors(bound, kinds, scores, shares, exact, config),
        "missed": counts,
        "drivers": errors.drivers(table),
        "whole_residual": errors.drivers(whole) if whole.height else {},
        "circuits": circuits,
        "labels": save_labels(config, run, model, dictionaries, text),
    }


def load(run: Run) -> FeatureParts:
    """Bind the features of a saved run to its pairs again."""
    config = runner.config_of(run)
    model = load_model(config, run)
    target, clean, patch = make_batches(config, model, read_limited(config, run, model))
    return bind(config, find_dictionaries(config, run, model, target, clean), target, clean, patch)


def contexts(run: Run) -> pl.DataFrame:
    """Describe the pairs that the run's features were bound to."""
    config = runner.config_of(run)
    texts = read_limited(config, run, load_model(config, run)).texts
    return pl.DataFrame(
        {
            "example": range(len(texts)),
            "clean": [text.clean_prefix for text in texts],
            "patch": [text.patch_prefix for text in texts],
            "answers": [
                f"{text.clean_answer.strip()} / {text.patch_answer.strip()}" for text in texts
            ],
            "case": [text.case for text in texts],
        }
    )


def _shares(config: Config, bound: FeatureParts) -> Scores | None:
    """Return integrated gradients along the paths of whole sites: shares of joint patches, which
    scale the bars and estimate no single effect.
    """
    if not config.effects.shares:
        return None
    return attribute(bound, IntegratedGradients("site", tolerance=config.effects.tolerance))


def _gaps(shares: Scores | None) -> dict[str, Any] | None:
    if shares is None:
        return None
    return {
        "estimand": shares.estimand,
        "largest_gap": max(gap.relative for gap in shares.gaps.values()),
        "gaps": {name: gap.relative for name, gap in shares.gaps.items()},
    }


def _residual(model: LanguageModel, bound: FeatureParts) -> dict[str, int]:
    """Return the residual sites where dictionaries write, with their layers."""
    written = [site for name in bound.dictionaries for site in bound.dictionaries[name].writes]
    refs = {site: model.site(site) for site in dict.fromkeys(written)}
    return {site: ref.layer for site, ref in refs.items() if ref.kind == "residual"}


def _described(config: Config, run: Run, fits: pl.DataFrame) -> dict[str, Any]:
    found = {
        "kind": config.kind,
        "count": fits.height,
        "features": int(fits["features"].sum()),
        "warnings": {
            row["dictionary"]: row["warning"] for row in fits.to_dicts() if row["warning"]
        },
    }
    return found | {
        "evaluation": run.json("evaluation.json") if run.has("evaluation.json") else None
    }
