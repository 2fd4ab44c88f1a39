"""The attribution study: score the heads, MLPs and residual streams of a language model, patch
them exactly, and put bars on the rest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from assay.attribution import Exact, Method, attribute
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
from assay.errors import InputError, unknown
from assay.io.runs import Run
from assay.mechanisms.nodes import Nodes
from assay.studies import runner
from assay.studies.attribution.circuit import circuit, save_edges
from assay.studies.attribution.config import Config
from assay.studies.attribution.inputs import (
    bind,
    circuit_nodes,
    load_model,
    make_batches,
    read_limited,
)
from assay.studies.attribution.page import headline, sections
from assay.studies.brackets import save_brackets
from assay.studies.methods import ESTIMATES
from assay.studies.methods import method as method_of
from assay.studies.names import applied_table
from assay.studies.pairs import read_all
from assay.targets.language import LanguageModel

__all__ = ["Config", "apply", "check", "contexts", "headline", "load", "run", "sections"]


PROMISED = ("all", TOP_BY_SCORE, "listed")
LISTED = 24


def check(config: Config) -> None:
    """Refuse nothing more than the config does."""


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train or load the model, patch every node exactly or score it by an estimate, audit, and
    measure the circuit that the scores suggest.
    """
    model = load_model(config, run)
    pairs = read_limited(config, run, model)
    mechanisms = bind(config, model, pairs)
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
    chosen = circuit_nodes(model, mechanisms)
    found, steps = circuit(chosen, method, config, pairs)
    if chosen is not None and config.target.path is None:  # the agreement model is small
        sizes, pins = attribute(chosen).values, 0 if config.target.size == "short" else 12
        save_brackets(run, chosen, sizes, (3, 6), examples=1, low=0.5, pins=pins)
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
        "totals": {name: _interval(entry) for name, entry in totals(shown).items()},
        "top_recall": _recall(config, shown),
        "fixed": None
        if fixed is None
        else {
            "patches": fixed.patches,
            "share_exact": fixed.share_exact,
            "still_doubtful": fixed.flagged,
        },
        "circuit": found,
        "edges": save_edges(config, mechanisms.target, *make_batches(config, model, pairs), run),
        "reference": config.reference,
        "metric": config.metric,
    }


def apply(run: Run, path: Path | str) -> tuple[dict[str, Any], pl.DataFrame]:
    """Put the run's bars on the pairs of another file, and measure whether they hold there.

    Pairs that the run has seen are left out. The largest scores of every pair, with the bars that
    hold at once, are saved as `verb-on-FILE.parquet`; the first of each are returned."""
    config, saved = runner.config_of(run), _saved_bars(run)
    bars = bars_from_json(saved)
    model = load_model(config, run)
    pairs = read_all(path, model)
    # A pair is its words: a label of its case makes no new one.
    words = [replace(text, case="") for text in pairs.texts]
    before = {replace(text, case="") for text in read_limited(config, run, model).texts}
    fresh = [place for place, text in enumerate(words) if text not in before]
    if not fresh:
        raise InputError(f"all {len(pairs)} pairs of {path} were there when the run was made")
    mechanisms = bind(config, model, pairs.take(fresh))
    if saved["axes"].keys() != mechanisms.groups.keys():
        raise InputError(f"the bars are for other groups: {', '.join(saved['axes'])}")
    for name, axes in saved["axes"].items():
        if axes != list(mechanisms.group(name).axes[1:]):
            raise InputError(f"the bars are for other parts of {name!r}: {axes} per position")
    scores = attribute(mechanisms, _estimate(saved["estimate"], config))
    scales = {}
    if bars.scale.name == "disagreement":
        scales["disagreement"] = disagreement(scores, attribute(mechanisms))
    found = apply_bars(bars, scores, exact=saved["exact"], scales=scales, seed=config.seed)
    run.save_table(applied_table(path), found.table)
    summary = {
        "pairs": {
            "kept": len(fresh),
            "seen_before": len(pairs) - len(fresh),
            "dropped": dict(pairs.dropped),
        },
        "method": saved["method"],
        **scores.signs,
        **found.summary(),
        "saved_as": applied_table(path),
    }
    return summary, found.table.group_by("example", maintain_order=True).head(3)


def _saved_bars(run: Run) -> dict[str, Any]:
    """Return what the run saved of its bars; InputError where a key is missing or wrong."""
    saved = run.json("bars.json")
    kinds = {"estimate": str, "method": str, "axes": dict, "exact": int | None}
    for key, kind in kinds.items():
        if not isinstance(saved, dict) or key not in saved or not isinstance(saved[key], kind):
            raise InputError(f"{run.path('bars.json')} has no {key!r} that can be read")
    if saved["estimate"] not in ESTIMATES:
        raise unknown("estimate", saved["estimate"], ESTIMATES)
    if saved["exact"] is not None and saved["exact"] < 1:
        raise InputError(f"{run.path('bars.json')}: 'exact' must be positive")
    return saved


def load(run: Run) -> Nodes:
    """Bind the nodes of a saved run to its pairs again."""
    config = runner.config_of(run)
    model = load_model(config, run)
    return bind(config, model, read_limited(config, run, model))


def contexts(run: Run) -> pl.DataFrame:
    """Describe the pairs that the run's nodes were bound to."""
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
    return method_of(name, **({"tolerance": config.audit.tolerance} if name == "ig" else {}))


def _example(audit: Audit) -> int:
    """Return the first held-out pair, or the first pair."""
    held = audit.table.filter(pl.col("fold") == "test")["example"]
    return int(held[0]) if len(held) else 0


def _summary(audit: Audit, model: LanguageModel) -> dict[str, Any]:
    by_kind = agreement_table(_with_kind(audit.table, model), "kind")
    return {**audit.summary(), "by_kind": {row.pop("kind"): row for row in by_kind.to_dicts()}}


def _interval(found: ConfidenceInterval) -> dict[str, float | str | None]:
    interval: dict[str, float | str | None] = {
        "estimate": found.estimate,
        "low": found.low,
        "high": found.high,
        "alpha": found.alpha,
        "inputs": found.inputs,
    }
    return {**interval, "reason": found.reason} if found.reason else interval


def _recall(config: Config, audit: Audit) -> dict[str, Any]:
    """Return how many of a pair's truly largest nodes are among its largest scores, for the
    share of active nodes that the circuit keeps.
    """
    active = np.bincount(audit.parts.example, minlength=audit.parts.examples)
    if active.min() < 1:
        return {"estimate": None, "reason": "a pair has no active node"}
    k = max(1, round(config.audit.kept * int(active.min())))
    return {"k": k, **_interval(top_recall(audit, k))}
