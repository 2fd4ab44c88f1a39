"""The channels study: train a bilinear classifier, attribute and ablate every channel, bound and
calibrate the error.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl
import torch

from assay.attribution import Gradient, SecondOrder, attribute
from assay.audit import Audit, areas, curve, keep_top, worst_case
from assay.errors import InputError
from assay.io.runs import Run
from assay.mechanisms.channels import ChannelMechanisms, channels
from assay.mechanisms.channels.attribution import hoyer
from assay.studies import runner
from assay.studies.brackets import BRACKETED, save_brackets
from assay.studies.channels.comparison import compare_networks
from assay.studies.channels.config import Config
from assay.studies.channels.evaluation import Evaluation, evaluate, summarise_constants
from assay.studies.channels.faces import draw_eigenvectors
from assay.studies.channels.networks import build_network, read_data, train_network
from assay.studies.channels.page import headline, sections
from assay.studies.channels.promises import (
    Promises,
    calibrate_promises,
    compare_rules,
    describe_promises,
    judge_promises,
    measure_promises,
    put_on,
    resplit,
    summarise_resplits,
)
from assay.studies.names import applied_table
from assay.targets.bilinear import BilinearNetwork
from assay.targets.data import Data, group_inputs, load_new

__all__ = ["Config", "apply", "check", "contexts", "headline", "load", "run", "sections"]


def check(config: Config) -> None:
    """Refuse data or sizes that cannot be trained on, and too few examples for the bars."""
    data = read_data(config)
    build_network(config, data)
    config.audit.require_bars(len(data.distinct_test()[0]))


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train, open and report; every table is saved for the report and for the verbs over saved
    runs.
    """
    data = read_data(config)
    model = train_network(config, data, run)
    mechanisms = _bind(config, model, data)
    clean = mechanisms.clean
    with torch.no_grad():
        accuracy = float(
            (model.double()(data.test_x.double()).argmax(-1) == data.test_y).double().mean()
        )
    sparsity, defined = hoyer(mechanisms.attributions())
    by_block = (sparsity.sum(0) / defined.sum(0).clamp(min=1)).tolist()
    found, promises = _evaluate(config, mechanisms, run)
    first = attribute(mechanisms, Gradient())
    audits = {
        "first": first.audit(exact=config.audit.exact, alpha=config.audit.alpha, seed=config.seed)
    }
    if clean.weights.gate is None:
        second = attribute(mechanisms, SecondOrder())
        scales = (
            {"certificate": mechanisms.by_group(found.second_bound)}
            if found.second_bound is not None
            else None
        )
        audits["second"] = second.audit(
            exact=config.audit.exact, alpha=config.audit.alpha, seed=config.seed, scales=scales
        )
    for name, audit in audits.items():
        run.save_table(f"audit-{name}.parquet", audit.table)
    run.save_table("scores.parquet", first.table())
    faithful = curve(first, (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0), per_example=True)
    run.save_table("faithfulness.parquet", faithful)
    faces = draw_eigenvectors(mechanisms, data)
    if faces is not None:
        run.save_table("faces.parquet", faces)
    run.save_table("coverage.parquet", _coverage(audits, config.audit.resplits))
    run.save_table("networks.parquet", compare_networks(config, data, run))
    worst = worst_case(mechanisms, keep_top(first, 0.2, per_example=True), steps=10, restarts=3)
    parts = sum(values[0].numel() for values in first.values.values())
    counts = [max(1, parts * share // 100) for share in (20, 40, 80)]
    if parts <= BRACKETED:
        save_brackets(run, mechanisms, first.values, counts, examples=2)
    return {
        "accuracy": accuracy,
        "hoyer": sum(by_block) / len(by_block),
        "hoyer_by_block": by_block,
        "top": found.summary,
        "certified_share": found.certified,
        "not_available": found.refused,
        "agreement": {name: audit.pooled.to_dict() for name, audit in audits.items()},
        "bars": {name: audit.summary()["bars"] for name, audit in audits.items()},
        **promises,
        "faithfulness": areas(faithful),
        "worst_case": {
            "kept_share": 0.2,
            "mean_damage_at_least": float(worst.damage.mean()),
            "evaluations": worst.evaluations,
        },
        "functional": config.audit.functional,
        "examples": len(mechanisms.batch),
        "repeated_inputs": data.repeated,
    }


def apply(run: Run, path: Path | str) -> tuple[dict[str, Any], pl.DataFrame]:
    """Put the run's threshold and bars on the inputs of another file with `x` and `y`, and measure
    whether they hold there.

    Inputs that the run has seen are left out; `example` is an input's place in the file. The
    largest channels of every input, with what is promised of each, are saved as
    `verb-on-FILE.parquet`, and the largest of all are returned. Raises InputError when every input
    was there before, and for data that the network cannot read."""
    config = runner.config_of(run)
    data, promises = read_data(config), Promises.from_dict(run.json("promises.json"))
    x, y = load_new(path, data)
    seen = group_inputs(torch.cat([data.train_x, data.test_x, x]))
    old, new = seen[: len(seen) - len(x)], seen[len(seen) - len(x) :]
    fresh = (new > old.max()).nonzero()[:, 0]
    if not len(fresh):
        raise InputError(f"all {len(x)} inputs of {path} were there when the run was made")
    model = build_network(config, data)
    model.load_state_dict(run.tensors("model.safetensors"))
    bound = channels(model, x[fresh], y[fresh], config.audit.functional)
    audit = config.audit
    found = evaluate(bound.clean, new[fresh], top=audit.top, tolerance=audit.tolerance)
    place = pl.Series("example", fresh.tolist())
    table = put_on(found.table.with_columns(place[found.table["example"]]), promises)
    saved_as = applied_table(path)
    run.save_table(saved_as, table)
    measured = measure_promises(table, promises)
    summary = {
        "inputs": {"kept": len(fresh), "seen_before": len(x) - len(fresh)},
        "functional": audit.functional,
        "promises": describe_promises(promises),
        "measured": measured,
        "verdict": judge_promises(measured, promises),
        "saved_as": saved_as,
    }
    columns = ["example", "block", "channel", "attribution", "low", "high", "trusted", "exact"]
    shown = table.select(name for name in columns if name in table.columns)
    return summary, shown.sort(pl.col("attribution").abs(), descending=True).head(20)


def load(run: Run) -> ChannelMechanisms:
    """Bind the channels of a saved run to its held-out examples again."""
    config = runner.config_of(run)
    data = read_data(config)
    model = build_network(config, data)
    model.load_state_dict(run.tensors("model.safetensors"))
    return _bind(config, model, data)


def contexts(run: Run) -> pl.DataFrame:
    """Describe the examples that the run's channels were bound to: label and prediction."""
    mechanisms = load(run)
    names = read_data(runner.config_of(run)).names
    clean = mechanisms.clean
    labels, guesses = clean.labels.tolist(), clean.logits.argmax(-1).tolist()
    return pl.DataFrame(
        {
            "example": range(len(labels)),
            "label": [names[index] for index in labels],
            "prediction": [names[index] for index in guesses],
        }
    )


def _evaluate(
    config: Config, mechanisms: ChannelMechanisms, run: Run
) -> tuple[Evaluation, dict[str, Any]]:
    """Measure, certify and calibrate the largest channels, save what was found, and return it with
    the summary of the promises.
    """
    audit, groups = config.audit, group_inputs(mechanisms.batch.inputs)
    found = evaluate(mechanisms.clean, groups, top=audit.top, tolerance=audit.tolerance)
    promises = calibrate_promises(found.table, audit, config.seed)
    splits = resplit(found.table, audit)
    run.save_table("channels.parquet", put_on(found.table, promises))
    run.save_table("resplits.parquet", splits)
    run.save_table("constants.parquet", summarise_constants(found.table))
    run.save_table("rules.parquet", compare_rules(found.table, promises))
    run.save_json("promises.json", promises.to_dict())
    summary = {
        "calibrated_threshold": None
        if promises.threshold is None
        else promises.threshold.to_dict(),
        "list_bars": {
            "alpha": promises.bars.alpha,
            "quantile": promises.bars.quantile if math.isfinite(promises.bars.quantile) else None,
            "inputs": promises.bars.inputs,
        },
        "promises": describe_promises(promises),
        "over_resplits": summarise_resplits(splits, audit.risk),
    }
    return found, summary


def _bind(config: Config, model: BilinearNetwork, data: Data) -> ChannelMechanisms:
    x, y = data.distinct_test(config.audit.examples)
    return channels(model.double(), x.double(), y, config.audit.functional)


def _coverage(audits: dict[str, Audit], resplits: int) -> pl.DataFrame:
    """Return coverage and width of the bars by level, means over random resplits of the inputs,
    and the coverage two standard deviations of the resplits either way: these share their inputs.
    """
    rows = []
    for name, audit in audits.items():
        for alpha in (0.5, 0.4, 0.3, 0.2, 0.1, 0.05):
            again = [audit.at_level(alpha, seed=seed) for seed in range(resplits)]
            coverage, width = (
                torch.tensor([getattr(entry, key) for entry in again])
                for key in ("coverage", "width")
            )
            spread = 2 * float(coverage.std())
            mean = float(coverage.mean())
            bounds = {"low": max(mean - spread, 0.0), "high": min(mean + spread, 1.0)}
            rows.append(
                {
                    "estimate": name,
                    "nominal": 1 - alpha,
                    "measured": mean,
                    **bounds,
                    "width": float(width.mean()),
                    "resplits": resplits,
                }
            )
    return pl.DataFrame(rows)
