"""The attribution study: score the heads, MLPs and residual streams of a language model, patch
them exactly, and put bars on the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import torch

from assay.attribution import (
    AtPStar,
    Gradient,
    IntegratedGradients,
    ProbedSecondOrder,
    RelP,
    attribute,
)
from assay.audit import (
    Audit,
    areas,
    budgeted,
    curve,
    heat,
    keep_top,
    scrub,
    top_recall,
    totals,
    worst_case,
)
from assay.audit.agreement import agreement_table
from assay.audit.totals import Interval
from assay.core.target import Batch, Target
from assay.edges import edges
from assay.errors import InputError
from assay.io.circuits import write_circuit, write_graphml
from assay.io.prompts import Pairs, read_pairs
from assay.io.runs import Run
from assay.mechanisms.nodes import Nodes, nodes
from assay.studies import runner
from assay.studies.agreement_model import train_agreement
from assay.studies.attribution.config import Config
from assay.studies.attribution.page import headline, sections
from assay.targets.language import LanguageModel, load_language_model, require_context
from assay.targets.metrics import choose_metric, pair_batch, with_clean_run

__all__ = ["Config", "check", "contexts", "headline", "load", "run", "sections"]


MORE = {"atp-star": AtPStar, "relp": RelP, "probes": ProbedSecondOrder}


def check(config: Config) -> None:
    """Refuse nothing more than the config does."""


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train or load the model, score every node by two methods, audit both, and measure the
    circuit they suggest.
    """
    model = _model(config, run)
    pairs = _pairs(config, run, model)
    clean, patch = _batches(config, model, pairs)
    target = Target(model.model, choose_metric(config.metric), model.path)
    mechanisms = nodes(target, clean, patch, _sites(config, model), config.reference)
    methods = {
        "gradient": attribute(mechanisms),
        "ig": attribute(mechanisms, IntegratedGradients(tolerance=config.audit.tolerance)),
    }
    methods |= {name: attribute(mechanisms, MORE[name]()) for name in config.more}
    audits = {}
    for name, scores in methods.items():
        against = methods["gradient"] if name == "ig" else None
        audits[name] = scores.audit(
            exact=config.audit.exact, alpha=config.audit.alpha, seed=config.seed, against=against
        )
        run.save_table(f"audit-{name}.parquet", _with_kind(audits[name].table, model))
        run.save_table(f"scores-{name}.parquet", scores.table())
    fixed = None
    if config.audit.fix:
        fixed = budgeted(methods["ig"], config.audit.fix, bars=audits["ig"])
        run.save_table("scores-fixed.parquet", fixed.scores.table())
    run.save_table("top.parquet", audits["ig"].top(24))
    run.save_table("heat.parquet", heat(audits["ig"]))
    circuit, found = _circuit(config, model, target, clean, patch, pairs)
    run.save_table("faithfulness.parquet", circuit)
    with torch.no_grad():
        values = target.values(clean).double()
    return {
        "model": {
            "family": model.family,
            "layers": len(model.site_names("mlp")),
            "metric_mean": float(values.mean()),
        },
        "pairs": {"kept": len(pairs), "dropped": dict(pairs.dropped)},
        "patching": mechanisms.patching,
        "methods": {name: _summary(audit, model) for name, audit in audits.items()},
        "completeness_gaps": {name: gap.relative for name, gap in methods["ig"].gaps.items()},
        # Intervals are over pairs: one pair has none.
        "totals": {name: _interval(entry) for name, entry in totals(audits["ig"]).items()}
        if len(pairs) > 1
        else {},
        "top_recall": _recall(config, audits["ig"]) if len(pairs) > 1 else None,
        "fixed": None
        if fixed is None
        else {
            "patches": fixed.patches,
            "share_exact": fixed.share_exact,
            "still_doubtful": fixed.flagged,
        },
        "circuit": found,
        "edges": _edges(config, target, clean, patch, run),
        "reference": config.reference,
        "metric": config.metric,
    }


def load(run: Run) -> Nodes:
    """Bind the nodes of a saved run to its pairs again."""
    config = runner.config_of(run)
    model = _model(config, run)
    clean, patch = _batches(config, model, _pairs(config, run, model))
    target = Target(model.model, choose_metric(config.metric), model.path)
    return nodes(target, clean, patch, _sites(config, model), config.reference)


def contexts(run: Run) -> pl.DataFrame:
    """Describe the pairs that the run's nodes were bound to."""
    config = runner.config_of(run)
    texts = _pairs(config, run, _model(config, run)).texts
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


def _model(config: Config, run: Run) -> LanguageModel:
    if config.target.path is not None:
        return load_language_model(config.target.path)
    trained = run.checked("model") if run.has("model") else None
    return load_language_model(trained or train_agreement(config.target, run, config.seed))


def _pairs(config: Config, run: Run, model: LanguageModel) -> Pairs:
    path: Path | str = (
        config.data.pairs if config.data.pairs is not None else run.checked("pairs.jsonl")
    )
    pairs = read_pairs(path, model.tokenizer, vocab_size=model.vocab_size)
    require_context(model.model, pairs.clean.shape[1])
    if len(pairs) <= config.data.limit:
        return pairs
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(config.seed))[
        : config.data.limit
    ]
    return pairs.take(chosen.sort().values)


def _batches(config: Config, model: LanguageModel, pairs: Pairs) -> tuple[Batch, Batch]:
    clean, patch = pair_batch(pairs, "clean"), pair_batch(pairs, "patch")
    return (
        (with_clean_run(model.model, clean), with_clean_run(model.model, patch, clean))
        if config.metric == "kl"
        else (clean, patch)
    )


def _sites(config: Config, model: LanguageModel) -> list[str]:
    wanted = ("attn.hook_z", "hook_mlp_out", "hook_resid_post")
    return list(config.sites) or [
        name for name in model.site_names() if name.partition(".")[2].partition(".")[2] in wanted
    ]


def _with_kind(table: pl.DataFrame, model: LanguageModel) -> pl.DataFrame:
    kinds = {name: model.site(name).kind for name in table["group"].unique()}
    return table.with_columns(
        pl.col("group").replace_strict(kinds, return_dtype=pl.String).alias("kind")
    )


def _summary(audit: Audit, model: LanguageModel) -> dict[str, Any]:
    by_kind = agreement_table(_with_kind(audit.table, model), "kind")
    return {**audit.summary(), "by_kind": {row.pop("kind"): row for row in by_kind.to_dicts()}}


def _interval(found: Interval) -> dict[str, float]:
    return {"estimate": found.estimate, "low": found.low, "high": found.high, "alpha": found.alpha}


def _recall(config: Config, audit: Audit) -> dict[str, float]:
    """Return how many of a pair's truly largest nodes are among its largest scores, for the
    share of nodes that the circuit keeps.
    """
    nodes_per_pair = sum(values[0].numel() for values in audit.scores.values.values())
    k = max(1, round(config.audit.kept * nodes_per_pair))
    return {"k": k, **_interval(top_recall(audit, k))}


def _edges(config: Config, target: Target, clean: Batch, patch: Batch, run: Run) -> dict[str, Any]:
    """Score the edges between heads and MLPs and save the largest as circuit files, where the
    model's wiring is known.
    """
    if config.reference != "counterfactual":
        return {"not_available": "edges are scored against the patch run only"}
    try:
        found = edges(target, clean, patch)
    except InputError as error:
        return {"not_available": str(error)}
    circuit = found.to_circuit(found.keep_top(config.audit.kept))
    run.write("circuit.json", lambda new: write_circuit(new, circuit))
    run.write("circuit.graphml", lambda new: write_graphml(new, circuit))
    run.save_table("edges.parquet", found.table())
    return {
        "method": found.method,
        "edges": found.graph.edges,
        "gap": None if found.gap is None else found.gap.relative,
    }


def _circuit(
    config: Config, model: LanguageModel, target: Target, clean: Batch, patch: Batch, pairs: Pairs
) -> tuple[pl.DataFrame, dict[str, Any]]:
    # Residual nodes would carry everything upstream of them; a circuit is made of heads and MLPs.
    chosen = [
        name
        for name in _sites(config, model)
        if model.site(name).kind in ("head", "mlp", "attention", "neurons")
    ]
    if not chosen:
        return pl.DataFrame({"share": [], "faithfulness": []}), {}
    bound = nodes(target, clean, patch, chosen, config.reference)
    scores = attribute(bound, Gradient())
    table = curve(scores, (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0), per_example=True)
    keep = keep_top(scores, config.audit.kept, per_example=True)
    worst = worst_case(bound, keep, steps=8, restarts=2)
    labels = sorted(set(pairs.cases))
    classes = torch.tensor([labels.index(case) for case in pairs.cases])
    kept = scrub(bound, keep, classes, draws=4, seed=config.seed)
    return table, {
        **areas(table),
        "kept_share": config.audit.kept,
        "worst_damage_at_least": float(worst.damage.mean()),
        "worst_evaluations": worst.evaluations,
        "scrubbed_share_kept": kept.share,
        "scrubbed_error": kept.error,
    }
