"""The crosscoder proof study: train a network and a crosscoder of it, prove how many points are
answered right from the features, certify and check.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

import assay_check
from assay.core.target import Batch, target
from assay.errors import AssayError, InputError
from assay.io.files import existing
from assay.io.runs import Run
from assay.mechanisms.crosscoder import (
    CrosscoderMechanisms,
    crosscoder,
    residual_states,
    save,
    unexplained,
)
from assay.mechanisms.crosscoder import load as load_crosscoder
from assay.mechanisms.crosscoder.files import CONFIG, WEIGHTS
from assay.proofs.crosscoder.arithmetic import Array
from assay.proofs.crosscoder.certificate import certify_points
from assay.proofs.crosscoder.heuristic import heuristic_estimate
from assay.proofs.crosscoder.independence import independence
from assay.proofs.crosscoder.problem import (
    Network,
    Points,
    Problem,
    claimed_margins,
    features_of,
    true_margins,
)
from assay.proofs.crosscoder.prove import (
    STRATEGIES,
    ProofResult,
    curve,
    evaluation_operations,
    prove,
)
from assay.proofs.crosscoder.sides import strongest_sides
from assay.studies.crosscoder_proof.config import Config
from assay.studies.crosscoder_proof.page import headline, sections
from assay.studies.crosscoder_proof.tasks import Task, digits_task, pairs_task
from assay.studies.crosscoder_proof.training import network_and_crosscoder
from assay.targets import residual_relu
from assay.targets.residual_relu import ResidualReLU

__all__ = ["Config", "check", "contexts", "headline", "load", "run", "sections"]

CERTIFICATE = "certificate.json"
PIXELS, DIGITS = 64, 10
GROWING = ("one_side_compact", "compact", "one_side", "strongest", "exact", "intervals")


def check(config: Config) -> None:
    """Refuse a network or a crosscoder that cannot be proved about."""
    model = None
    if config.model.path is not None:
        model = _load(config, config.model.path)
    if config.crosscoder.path is not None:
        found = load_crosscoder(config.crosscoder.path, ("embed", "blocks.0"))
        width = config.model.width if model is None else model.embed.out_features
        if found.width != width:
            raise InputError(
                f"the crosscoder in {config.crosscoder.path} reads states of width {found.width},"
                f" the network's are of width {width}"
            )
        if model is not None:
            found.require_network(model, f"the crosscoder in {config.crosscoder.path}")


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train or load, prove by every strategy, certify and check; all that the report shows is
    saved.
    """
    path = config.model.path
    given = None if path is None else _load(config, path)
    task = _task(config, given)
    fitted, held = task.split(config.held_out, config.seed)
    model, found = network_and_crosscoder(config, run, task, fitted, given)
    weights = run.write("weights.safetensors", lambda new: residual_relu.save(new, model))
    run.write_files(lambda folder: save(folder, found))
    points = Points(task.inputs.double().numpy(), task.labels.numpy(), pairs=task.pairs)
    problem = Problem(Network.of(model), points, features_of(found, model, points))
    true, outside = true_margins(problem), held.numpy()
    results = [prove(problem, name) for name in STRATEGIES]
    table = _table(results, true, outside)
    run.save_table("proofs.parquet", table)
    rounds = _curve(problem, config.proofs.depth, outside)
    run.save_table("curve.parquet", rounds)
    run.save_table("growth.parquet", _growth(problem, config.seed))
    margins = pl.DataFrame(
        {"true": true, "claimed": claimed_margins(problem)}
        | {result.strategy: result.margins for result in results}
    )
    run.save_table("margins.parquet", margins)
    report = independence(problem, strongest_sides(problem))
    run.save_table("pairs.parquet", report.pairs)
    neurons = pl.DataFrame({"neuron": range(len(report.strengths)), "mean": report.strengths})
    run.save_table("neurons.parquet", neurons.sort("mean", descending=True))
    estimate = heuristic_estimate(problem, fitted.numpy())
    by_name = {row["strategy"]: row for row in table.iter_rows(named=True)}
    codes = problem.features.codes
    states = residual_states(model, task.inputs, found.sites)
    return {
        "task": config.task,
        "cotrained": config.crosscoder.cotrain,
        "points": len(points),
        "held_out": len(outside),
        "right": int((true > 0).sum()),
        "claimed": float((claimed_margins(problem) > 0).mean()),
        "certified": {name: row["share"] for name, row in by_name.items()},
        "certified_held_out": {name: row["held out"] for name, row in by_name.items()},
        "operations": {name: row["operations"] for name, row in by_name.items()},
        "evaluation_operations": evaluation_operations(problem),
        "groups_needed": _needed(rounds),
        "features": found.size,
        "mean_l0": float((codes > 0).sum(1).mean()),
        "fvu": unexplained(found, states).max().item(),
        "certificate": _certify(config, problem, run, weights),
        "estimate": {
            "right": estimate.right,
            "half_width": estimate.width(),
            "stretch": estimate.stretch(true),
        },
        "neuron_pairs_without_interaction": report.free_share,
        "neurons_without_interaction": report.silent,
    }


def load(run: Run) -> CrosscoderMechanisms:
    """Bind the features of a run again, on all of its points; the metric is the lead of the right
    output over the mean of the others.
    """
    model = residual_relu.load(run.checked("weights.safetensors"))
    run.checked(WEIGHTS)
    found = load_crosscoder(run.checked(CONFIG).parent, model.sites)
    task = _task_of_run(run)
    bound = target(model, _lead, "lead of the right output")
    return crosscoder(bound, Batch(task.inputs, task.labels), found)


def contexts(run: Run) -> pl.DataFrame:
    """Return what describes every point: two tokens and the larger one, or the digit."""
    return _task_of_run(run).contexts


def _task_of_run(run: Run) -> Task:
    config = Config.model_validate(run.json("config.json")["config"])
    return _task(config, residual_relu.load(run.checked("weights.safetensors")))


def _task(config: Config, model: ResidualReLU | None) -> Task:
    if config.task == "digits":
        return digits_task()
    tokens = config.model.vocabulary if model is None else model.unembed.out_features
    return pairs_task(tokens)


def _lead(output: Tensor, batch: Batch) -> Tensor:
    """Return the right logit minus the mean of all others."""
    tokens = torch.arange(output.shape[1], device=output.device)
    right = (batch.labels[:, None] == tokens).to(output.dtype)
    return (output * (right - (1 - right) / (output.shape[1] - 1))).sum(1)


def _load(config: Config, path: str) -> ResidualReLU:
    model = residual_relu.load(existing(Path(path)))
    Network.of(model)
    outputs, inputs = model.unembed.out_features, model.embed.in_features
    if config.task == "pairs" and inputs != 2 * outputs:
        raise InputError(
            f"model.path: a network for pairs of {outputs} tokens reads {2 * outputs} inputs, this"
            f" one reads {inputs}"
        )
    if config.task == "digits" and (inputs, outputs) != (PIXELS, DIGITS):
        raise InputError(
            f"model.path: a network for digits reads {PIXELS} pixels and has {DIGITS} outputs, this"
            f" one {inputs} and {outputs}"
        )
    return model


def _table(results: list[ProofResult], true: Array, held: Array) -> pl.DataFrame:
    rows = [
        {
            "strategy": result.strategy,
            "share": result.share,
            "held out": float(result.right[held].mean()),
            "normalised": result.count / max(int((true > 0).sum()), 1),
            "mean gap": float((true - result.margins).mean()),
            "groups": result.groups,
            "operations": result.operations,
            "CPU seconds": result.seconds,
            "about": STRATEGIES[result.strategy].about,
        }
        for result in results
    ]
    for result in results:
        if (result.margins > true + 1e-6 * (1 + np.abs(true))).any():
            raise AssayError(f"a bound of {result.strategy} lies above the true margin")
    return pl.DataFrame(rows)


def _curve(problem: Problem, depth: int, held: Array) -> pl.DataFrame:
    rows = [
        {
            "groups": one.groups,
            "operations": one.operations,
            "share": float(one.right.mean()),
            "held out": float(one.right[held].mean()),
            "bounded in this round": one.bounded,
            "split by": one.about,
        }
        for one in curve(problem, depth)
    ]
    return pl.DataFrame(rows)


def _growth(problem: Problem, seed: int) -> pl.DataFrame:
    """Return the operations of proofs and of running the network on 1/8, 1/4, 1/2 and all of the
    points.
    """
    order = np.random.default_rng(seed).permutation(len(problem.points))
    rows = []
    for part in (8, 4, 2, 1):
        some = problem.take(np.sort(order[: max(len(order) // part, 1)])).at("float64")
        counts = {"running the network": evaluation_operations(some)}
        counts |= {name: prove(some, name).operations for name in GROWING}
        rows += [
            {"points": len(some.points), "what": what, "operations": count}
            for what, count in counts.items()
        ]
    return pl.DataFrame(rows)


def _needed(rounds: pl.DataFrame) -> int:
    """Return the fewest groups with which the curve reaches its highest share."""
    best = rounds["share"].max()
    groups: int = rounds.filter(pl.col("share") == best)["groups"].min()  # type: ignore[assignment]
    return groups


def _certify(config: Config, problem: Problem, run: Run, weights: Path) -> dict[str, Any]:
    """Write the certificate and have the independent checker confirm it; AssayError otherwise."""
    proofs: list[ProofResult] = []
    name = config.proofs.certified
    run.write_files(
        lambda folder: proofs.append(certify_points(problem, name, folder / CERTIFICATE))
    )
    verdict = assay_check.check(run.checked(CERTIFICATE), weights)
    if not verdict.accepted:
        raise AssayError(f"the independent checker refuses {CERTIFICATE}: {verdict.reason}")
    return {
        "strategy": name,
        "count": proofs[0].count,
        "share": proofs[0].share,
        "checked": verdict.reason,
        "measure": verdict.measure,
    }
