"""The attribution study: score the heads, MLPs and residual streams of a language model, patch
them exactly, and put bars on the rest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from assay.attribution import (
    AtPStar,
    Exact,
    Gradient,
    IntegratedGradients,
    Method,
    ProbedSecondOrder,
    RelP,
    attribute,
)
from assay.audit import (
    Audit,
    ConfidenceInterval,
    ExactEffects,
    apply_bars,
    bars_from_json,
    bars_to_json,
    budgeted,
    choose_method,
    disagreement,
    exact_top,
    heat,
    top_recall,
    totals,
)
from assay.audit.agreement import agreement_table
from assay.audit.selections import TOP_BY_SCORE
from assay.core.target import Batch, Target
from assay.errors import InputError
from assay.io.prompts import Pairs, read_pairs
from assay.io.runs import Run
from assay.mechanisms.nodes import Nodes, nodes
from assay.studies import runner
from assay.studies.agreement_model import train_agreement
from assay.studies.attribution.circuit import circuit, save_edges
from assay.studies.attribution.config import Config
from assay.studies.attribution.page import headline, sections
from assay.targets.language import LanguageModel, load_language_model, require_context
from assay.targets.metrics import choose_metric, pair_batch, with_clean_run

__all__ = ["Config", "apply", "check", "contexts", "headline", "load", "run", "sections"]


ESTIMATES = {
    "gradient": Gradient,
    "ig": IntegratedGradients,
    "atp-star": AtPStar,
    "relp": RelP,
    "probes": ProbedSecondOrder,
}
PROMISED = ("all", TOP_BY_SCORE, "listed")
LISTED = 24


def check(config: Config) -> None:
    """Refuse an unknown metric."""
    choose_metric(config.metric)


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train or load the model, patch every node exactly or score it by an estimate, audit, and
    measure the circuit that the scores suggest.
    """
    model = _model(config, run)
    pairs = _pairs(config, run, model)
    clean, patch = _batches(config, model, pairs)
    target = Target(model.model, choose_metric(config.metric), model.path)
    mechanisms = nodes(target, clean, patch, _sites(config, model), config.reference)
    method = _method(config, run, mechanisms)
    exact = attribute(mechanisms, Exact()) if method["taken"] == "exact" else None
    effects = ExactEffects(mechanisms, everything=exact)
    # The gradient costs one pass: its audit says what a cheap score is worth on this model.
    wanted = dict.fromkeys(("gradient", method["taken"], *config.more))
    methods = {
        name: attribute(mechanisms, _estimate(name, config)) for name in wanted if name != "exact"
    }
    audits = {
        name: scores.audit(
            exact=config.audit.exact,
            alpha=config.audit.alpha,
            seed=config.seed,
            against=methods["gradient"] if name == "ig" else None,
            effects=effects,
        )
        for name, scores in methods.items()
    }
    for name, audit in audits.items():
        run.save_table(f"audit-{name}.parquet", _with_kind(audit.table, model))
        run.save_table(f"scores-{name}.parquet", methods[name].table())
    primary = "gradient" if exact is not None else method["taken"]
    shown = audits[primary]
    run.save_json("bars.json", {**bars_to_json(shown), "estimate": primary})
    fixed = None
    if exact is not None:
        run.save_table("scores-exact.parquet", exact.table())
        listed = exact_top(exact, LISTED, seed=config.seed, alpha=config.audit.alpha)
    else:
        listed = shown.top(LISTED)
        if config.audit.fix:
            fixed = budgeted(methods[primary], config.audit.fix, bars=shown)
            run.save_table("scores-fixed.parquet", fixed.scores.table())
    run.save_table("top.parquet", listed)
    run.save_table("heat.parquet", heat(shown if exact is None else exact))
    run.save_table("input.parquet", shown.largest_of(_example(shown)))
    found, steps = circuit(_circuit_nodes(config, model, mechanisms), method, config, pairs)
    run.save_table("faithfulness.parquet", steps)
    ig = methods.get("ig")
    return {
        "model": {
            "family": model.family,
            "layers": len(model.site_names("mlp")),
            "metric_mean": float(shown.scores.baseline.mean()),
        },
        "pairs": {"kept": len(pairs), "dropped": dict(pairs.dropped)},
        "signs": shown.scores.signs,
        "method": method,
        "coverage": {
            "method": primary,
            **{name: shown.promises[name].to_dict() for name in PROMISED if name in shown.promises},
        },
        "patching": mechanisms.patching,
        "exact_effects": effects.spent if exact is None else shown.table.height,
        "methods": {name: _summary(audit, model) for name, audit in audits.items()},
        "completeness_gaps": {
            name: gap.relative for name, gap in (ig.gaps if ig is not None else {}).items()
        },
        # Intervals are over pairs: one pair has none.
        "totals": {name: _interval(entry) for name, entry in totals(shown).items()}
        if len(pairs) > 1
        else {},
        "top_recall": _recall(config, shown) if len(pairs) > 1 else None,
        "fixed": None
        if fixed is None
        else {
            "patches": fixed.patches,
            "share_exact": fixed.share_exact,
            "still_doubtful": fixed.flagged,
        },
        "circuit": found,
        "edges": save_edges(config, target, clean, patch, run),
        "reference": config.reference,
        "metric": config.metric,
    }


def apply(run: Run, path: Path | str) -> tuple[dict[str, Any], pl.DataFrame]:
    """Put the run's bars on the pairs of another file, and measure whether they hold there.

    Pairs that the run has seen are left out. The largest scores of every pair, with the bars that
    hold at once, are saved as `verb-on-FILE.parquet`; the first of each are returned."""
    config, saved = runner.config_of(run), run.json("bars.json")
    model = _model(config, run)
    pairs = read_pairs(path, model.tokenizer, vocab_size=model.vocab_size)
    require_context(model.model, pairs.clean.shape[1])
    before = set(_pairs(config, run, model).texts)
    fresh = [place for place, text in enumerate(pairs.texts) if text not in before]
    if not fresh:
        raise InputError(f"all {len(pairs)} pairs of {path} were there when the run was made")
    clean, patch = _batches(config, model, pairs.take(fresh))
    target = Target(model.model, choose_metric(config.metric), model.path)
    mechanisms = nodes(target, clean, patch, _sites(config, model), config.reference)
    for name, axes in saved["axes"].items():
        if axes != list(mechanisms.group(name).axes[1:]):
            raise InputError(f"the bars are for other parts of {name!r}: {axes} per position")
    scores = attribute(mechanisms, _estimate(saved["estimate"], config))
    bars = bars_from_json(saved)
    scales = {}
    if bars.scale.name == "disagreement":
        scales["disagreement"] = disagreement(scores, attribute(mechanisms))
    found = apply_bars(bars, scores, exact=saved["exact"], scales=scales, seed=config.seed)
    run.save_table(f"verb-on-{Path(path).stem}.parquet", found.table)
    summary = {
        "pairs": {
            "kept": len(fresh),
            "seen_before": len(pairs) - len(fresh),
            "dropped": dict(pairs.dropped),
        },
        "method": saved["method"],
        **scores.signs,
        **found.summary(),
        "saved_as": f"verb-on-{Path(path).stem}.parquet",
    }
    return summary, found.table.group_by("example", maintain_order=True).head(3)


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


def _circuit_nodes(config: Config, model: LanguageModel, bound: Nodes) -> Nodes | None:
    """Return the nodes that a circuit is made of, heads and MLPs: residual nodes would carry
    everything upstream of them.
    """
    kinds = ("head", "mlp", "attention", "neurons")
    spots = {name: spot for name, spot in bound.spots.items() if model.site(name).kind in kinds}
    return replace(bound, spots=spots) if spots else None


def _with_kind(table: pl.DataFrame, model: LanguageModel) -> pl.DataFrame:
    kinds = {name: model.site(name).kind for name in table["group"].unique()}
    return table.with_columns(
        pl.col("group").replace_strict(kinds, return_dtype=pl.String).alias("kind")
    )


def _method(config: Config, run: Run, mechanisms: Nodes) -> dict[str, Any]:
    """Return which method is taken and why; a decision by measured times is kept with the run, so
    that a resumed run takes the same.
    """
    if config.method != "auto":
        return {"asked": config.method, "taken": config.method, "reason": "it was asked for"}
    if not run.has("method.json"):
        chosen = choose_method(mechanisms, _estimate("ig", config), exact=config.audit.exact)
        taken = {"asked": "auto", "taken": "exact" if chosen.exact else "ig"}
        run.save_json("method.json", {**chosen.to_dict(), **taken})
    found: dict[str, Any] = run.json("method.json")
    return found


def _estimate(name: str, config: Config) -> Method:
    if name == "ig":
        return IntegratedGradients(tolerance=config.audit.tolerance)
    found: Method = ESTIMATES[name]()
    return found


def _example(audit: Audit) -> int:
    """Return the first held-out pair, or the first pair."""
    held = audit.table.filter(pl.col("fold") == "test")["example"]
    return int(held[0]) if len(held) else 0


def _summary(audit: Audit, model: LanguageModel) -> dict[str, Any]:
    by_kind = agreement_table(_with_kind(audit.table, model), "kind")
    return {**audit.summary(), "by_kind": {row.pop("kind"): row for row in by_kind.to_dicts()}}


def _interval(found: ConfidenceInterval) -> dict[str, float]:
    return {"estimate": found.estimate, "low": found.low, "high": found.high, "alpha": found.alpha}


def _recall(config: Config, audit: Audit) -> dict[str, float] | None:
    """Return how many of a pair's truly largest nodes are among its largest scores, for the
    share of active nodes that the circuit keeps; None where a pair has no active node.
    """
    active = np.bincount(audit.parts.example, minlength=audit.parts.examples)
    k = max(1, round(config.audit.kept * int(active.min())))
    if active.min() < 1:
        return None
    return {"k": k, **_interval(top_recall(audit, k))}
