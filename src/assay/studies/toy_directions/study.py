"""The toy-directions study: train networks with known circuits, find directions in their
weights, count the circuits recovered.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.core.target import Batch, target
from assay.errors import InputError
from assay.io.runs import Run
from assay.mechanisms.directions import (
    BiLevel,
    Decomposer,
    DirectionMechanisms,
    Local,
    NonNegativeFisher,
    PairGradientRefinement,
    PowerIteration,
    around,
    compare_factors,
    fisher_factors,
    pair_gradients,
)
from assay.mechanisms.directions import directions as bind
from assay.mechanisms.directions import evaluation as ev
from assay.mechanisms.directions.bilevel import steepness
from assay.mechanisms.directions.decomposition import Decomposition
from assay.mechanisms.directions.factors import DenseFactors
from assay.mechanisms.directions.space import choose
from assay.studies import runner
from assay.studies.toy_directions.config import Config
from assay.studies.toy_directions.networks import build_network, train_toy
from assay.studies.toy_directions.page import headline, sections
from assay.targets.toys import Toy

__all__ = ["Config", "check", "contexts", "headline", "load", "run", "sections"]


def check(config: Config) -> None:
    """Refuse weights that cannot be read and more directions than parameters."""
    size = choose(build_network(config)).size
    if not 1 <= min(config.method.k) <= max(config.method.k) <= size:
        raise InputError(
            f"method.k = {list(config.method.k)} directions in {size} parameters; k must lie"
            f" between 1 and {size}"
        )


def run(config: Config, run: Run) -> dict[str, Any]:
    """Train, decompose with every k, and compare with the known circuits; the first network's
    last result is kept whole.
    """
    rows: list[dict[str, Any]] = []
    for network in range(1 if config.target.weights else config.target.networks):
        toy = train_toy(config, network, run.child(f"network-{network}"))
        began = time.process_time()
        local = _around(toy)
        factors, taken = _factors(config, toy, local)
        shared = time.process_time() - began
        for k in config.method.k:
            began = time.process_time()
            found = _method(config, k, local)(
                factors, generator=torch.Generator().manual_seed(config.seed + network)
            )
            seconds = time.process_time() - began + shared
            rows.append(
                {
                    "network": network,
                    "k": k,
                    **_row(toy, local, factors, found),
                    "seconds": seconds,
                    "loss": toy.loss,
                }
            )
            if network == 0:
                kept, reason = (toy, local, factors, found), taken
    table = pl.DataFrame(rows)
    run.save_table("runs.parquet", table)
    return _keep(run, *kept) | _summary(config, table, kept[0]) | {"factors": reason}


def load(run: Run) -> DirectionMechanisms:
    """Bind the directions of the first network to its inputs; the metric is each input's largest
    output.
    """
    config = runner.config_of(run)
    tensors = run.tensors("directions.safetensors")
    model = build_network(config)
    model.load_state_dict(run.tensors("model.safetensors"))
    inputs = tensors["inputs"]
    with torch.no_grad():
        labels = model(inputs).argmax(-1)
    whole = target(
        model,
        lambda output, batch: output.gather(-1, batch.labels[:, None])[:, 0],
        config.target.kind,
    )
    return bind(whole, Batch(inputs, labels), found=tensors["directions"], measure=_measure(config))


def contexts(run: Run) -> pl.DataFrame:
    """Describe the inputs that the run's directions were bound to: which entries are active."""
    inputs = run.tensors("directions.safetensors")["inputs"]
    active = [
        ", ".join(f"{index}: {float(row[index]):.2f}" for index in row.nonzero()[:8, 0].tolist())
        for row in inputs
    ]
    return pl.DataFrame({"example": range(len(active)), "active entries": active})


def _around(toy: Toy) -> Local:
    return around(toy.model.double(), toy.inputs.double())


def _measure(config: Config) -> str:
    return "kl" if config.target.kind in ("xor", "digits") else "mse"


def _factors(config: Config, toy: Toy, local: Local) -> tuple[DenseFactors, str]:
    """Return the factors, and why they were taken."""
    method = config.method
    generator = torch.Generator().manual_seed(config.seed)
    if method.factors == "fisher":
        return fisher_factors(local, toy.divergence), "Fisher factors, as asked for."
    if method.factors == "pairs":
        pairs = pair_gradients(
            local, toy.divergence, references=method.references, generator=generator
        )
        return pairs, "Pair gradients, as asked for."
    found, choice = compare_factors(local, toy.divergence, max(method.k), generator=generator)
    assert isinstance(found, DenseFactors)  # the Jacobians of these networks fit the budget
    return found, choice.reason


def _method(config: Config, k: int, local: Local) -> Decomposer:
    methods = {
        "power": PowerIteration(k),
        "refinement": PairGradientRefinement(k, local.space, rank=config.method.rank),
        "bilevel": BiLevel(k),
        "npeff": NonNegativeFisher(k),
    }
    method: Any = methods[config.method.name]
    return method if config.method.steps is None else replace(method, steps=config.method.steps)


def _row(toy: Toy, local: Local, factors: DenseFactors, found: Decomposition) -> dict[str, Any]:
    row: dict[str, Any] = {
        "k chosen": found.count,
        "low": found.interval[0],
        "high": found.interval[1],
        "error": ev.reconstruction_error(factors, found.directions),
        "active per sample": float(ev.effective_directions(found.activity).mean()),
    }
    if not toy.circuits:
        return row
    recovery = ev.recover(found.directions, local.space.join(toy.circuits))
    row |= {"circuits": toy.count, "clean": recovery.clean, "purity": recovery.worst_purity}
    if toy.coefficients is not None and toy.count == toy.coefficients.shape[1]:
        paths = ev.path_coefficients(local.space, found.directions)
        row |= {
            "coefficient r2": ev.coefficient_r2(toy.coefficients, paths, recovery.match),
            "network r2": _own_r2(toy),
        }
    return row


def _own_r2(toy: Toy) -> float:
    """Return r2 between `A` and the trained network's answer to single full inputs: what no
    direction of it can exceed by much.
    """
    assert toy.coefficients is not None
    wanted = toy.coefficients.double()
    with torch.no_grad():
        answer = toy.model(torch.eye(wanted.shape[1], dtype=torch.float64)).T
    return 1 - float((answer - wanted).square().sum() / (wanted - wanted.mean()).square().sum())


def _keep(
    run: Run, toy: Toy, local: Local, factors: DenseFactors, found: Decomposition
) -> dict[str, Any]:
    run.save_tensors("model.safetensors", toy.model.state_dict())
    tensors = {
        "directions": found.directions,
        "scores": found.scores,
        "activity": found.activity,
        "kept": found.kept,
    }
    run.save_tensors("directions.safetensors", {**tensors, "inputs": toy.inputs.double()})
    run.save_table("curves.parquet", _curves(toy, local, found))
    summary: dict[str, Any] = {
        "network": toy.name,
        "parameters": local.space.size,
        "samples": local.samples,
    }
    if toy.circuits:
        owner = local.space.join(toy.circuits)
        shares = pl.DataFrame(_shares(found.directions, owner, toy.count))
        run.save_table("shares.parquet", shares)
        recovery = ev.recover(found.directions, owner)
        if recovery.match and bool((owner >= 0).all()):
            matched = list(recovery.match.values())
            circuits = found.directions[matched]
            steep = PowerIteration(len(circuits), normalised=False)(
                factors, generator=torch.Generator().manual_seed(0)
            ).directions
            summary["steepness"] = {
                "circuits": float(steepness(factors, circuits)),
                "steepest": float(steepness(factors, steep)),
            }
            summary["steepness"]["purity of circuits"] = float(recovery.purity[matched].mean())
            summary["steepness"]["purity of steepest"] = float(
                ev.recover(steep, owner).purity.mean()
            )
    return summary


def _shares(directions: Tensor, owner: Tensor, count: int) -> list[dict[str, Any]]:
    return [
        {
            "direction": index,
            "circuit": circuit,
            "share": float(row[owner == circuit].square().sum()),
        }
        for index, row in enumerate(directions)
        for circuit in range(count)
    ]


def _curves(toy: Toy, local: Local, found: Decomposition, count: int = 4) -> pl.DataFrame:
    """Return what moving along the first directions does to the inputs they are active on and to
    all others.
    """
    amounts = torch.linspace(-1, 1, 21).tolist()
    rows = []
    for index in range(min(count, found.count)):
        own = torch.zeros(local.samples, dtype=torch.bool)
        own[found.kept[found.activity[:, index] > 0.5]] = True
        curve = ev.intervention_curve(local, found.directions[index], amounts, toy.divergence)
        for group, mask in (("its own inputs", own), ("all other inputs", ~own)):
            if bool(mask.any()):
                means = curve[:, mask].mean(1).tolist()
                rows += [
                    {"direction": index, "step": a, "divergence": d, "inputs": group}
                    for a, d in zip(amounts, means, strict=True)
                ]
    return pl.DataFrame(rows)


def _summary(config: Config, table: pl.DataFrame, toy: Toy) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "runs": table.height,
        "k": config.method.k,
        "k_chosen": table["k chosen"].to_list(),
        "error": max(table["error"].to_list()),
        "seconds": max(table["seconds"].to_list()),
    }
    if toy.circuits:
        summary |= {
            "circuits": toy.count,
            "clean_circuits": min(table["clean"].to_list()),
            "purity": min(table["purity"].to_list()),
        }
    if "coefficient r2" in table.columns:
        means = table.select("coefficient r2", "network r2").mean().row(0)
        summary |= {"coefficient_r2": means[0], "network_r2": means[1]}
    return summary
