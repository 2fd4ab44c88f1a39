"""What sparsity and the delta loss do to attribution on scikit-learn's digits: accuracy, sparsity,
errors, certified shares.

Run with `python benchmarks/digits_channels.py [--seeds 3]`: means over the seeds, about 7 CPU
seconds a network. With `--choose` the networks are trained on a part of the training inputs and
measured on the rest of them: that is what keys are chosen on, and the test inputs are not read.
With `--widths` the number of channels varies instead, and a threshold on
`certificate / |attribution|` is calibrated for each."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.audit.risk import SelectiveRisk, calibrate_risk
from assay.learn import fit
from assay.learn.loop import cosine
from assay.mechanisms.channels.ablation import ablate_channels
from assay.mechanisms.channels.attribution import attribute_channels, hoyer
from assay.mechanisms.channels.certify import certify_channels, certify_relative
from assay.mechanisms.channels.clean import Clean, run_clean
from assay.mechanisms.channels.objective import Training, make_objective, make_optimizer
from assay.mechanisms.channels.weights import read_weights
from assay.targets.bilinear import BilinearNetwork
from assay.targets.data import Data, load_digits

SETTINGS = [
    (0.0, 0.0, 0.1),
    (1.0, 0.0, 0.1),
    (1.0, 10.0, 0.1),
    (1.0, 100.0, 0.1),
    (1.0, 100.0, 0.03),
]
TOP = 5


@dataclass(frozen=True)
class Figures:
    """One network's figures: medians and shares are over the five largest channels, by
    |attribution|, of each held-out input.

    `scores` are those channels' certificates over |attribution| and `first_errors` their relative
    errors, (inputs, 5)."""

    accuracy: float
    least_sparse: float
    most_sparse: float
    first: float
    within: float
    second: float
    certified: tuple[float, float, float]
    risk: SelectiveRisk
    scores: Tensor
    first_errors: Tensor
    seconds: float


def train_network(
    data: Data,
    config: Training,
    *,
    seed: int = 0,
    width: int = 32,
    hidden: int = 64,
    blocks: int = 4,
) -> BilinearNetwork:
    """Train a network in float32 from a seed: one generator for the weights, one for the
    batches.
    """
    model = BilinearNetwork(
        data.inputs,
        data.classes,
        width=width,
        hidden=hidden,
        blocks=blocks,
        generator=torch.Generator().manual_seed(seed),
    )
    generator = torch.Generator().manual_seed(seed + 1)
    objective = make_objective(model, data, config, generator)
    fit(
        model,
        objective,
        make_optimizer(model, config),
        steps=config.steps,
        generator=generator,
        schedule=cosine,
    )
    return model


@torch.no_grad()
def measure_network(
    model: BilinearNetwork, data: Data, *, tolerance: float = 0.1, seconds: float = 0.0
) -> Figures:
    """Attribute, ablate and certify every channel on the held-out inputs, in float64."""
    clean = run_clean(read_weights(model, torch.float64), data.test_x, data.test_y)
    attribution, errors, found = (
        attribute_channels(clean),
        ablate_channels(clean).errors,
        certify_channels(clean),
    )
    assert found.curvature is not None
    assert found.second is not None
    values, masks = hoyer(attribution)
    sparsity = values.sum(0) / masks.sum(0).clamp(min=1)
    top = attribution.flatten(1).abs().topk(TOP).indices

    def pick(values: Tensor) -> Tensor:
        return values.flatten(1).gather(1, top)

    effects = pick(attribution - errors).abs()
    first, second = pick(errors).abs() / effects, pick(errors - found.curvature).abs() / effects
    certified = tuple(
        float(certify_relative(pick(bound), pick(estimate), tolerance).double().mean())
        for bound, estimate in (
            (found.first, attribution),
            (found.second, attribution - found.curvature),
            (found.first_tight, attribution),
        )
    )
    score = pick(found.first_tight) / pick(attribution).abs()
    rows = torch.arange(len(top)).repeat_interleave(TOP)
    return Figures(
        accuracy=_accuracy(clean),
        least_sparse=float(sparsity.min()),
        most_sparse=float(sparsity.max()),
        first=float(first.median()),
        within=float((first <= tolerance).double().mean()),
        second=float(second.median()),
        certified=(certified[0], certified[1], certified[2]),
        risk=calibrate_risk(
            score.flatten().numpy(), first.flatten().numpy(), rows.numpy(), tolerance=tolerance
        ),
        scores=score,
        first_errors=first,
        seconds=seconds,
    )


def measure(
    lam_sparse: float,
    lam_delta: float,
    tau: float,
    *,
    seed: int = 0,
    hidden: int = 64,
    choose: bool = False,
) -> Figures:
    """Train one network on the digits and measure it on the test or the validation part."""
    data = load_digits().without_test() if choose else load_digits()
    begin = time.process_time()
    model = train_network(data, Training(lam_sparse, lam_delta, tau), seed=seed, hidden=hidden)
    return measure_network(model, data, seconds=time.process_time() - begin)


def print_table(seeds: int = 3, choose: bool = False) -> None:
    """Print one line a setting, means over seeds."""
    print(
        "lam_sparse lam_delta  tau | accuracy  Hoyer/block  median 1st  within 10%  median 2nd "
        " certified: first, second, second + remainder |  CPU s"
    )
    for setting in SETTINGS:
        rows = [measure(*setting, seed=seed, choose=choose) for seed in range(seeds)]

        def mean(name: str, rows: list[Figures] = rows) -> float:
            return sum(getattr(row, name) for row in rows) / len(rows)

        shares = " / ".join(
            f"{sum(row.certified[i] for row in rows) / len(rows):.3f}" for i in range(3)
        )
        sparsity = f"{mean('least_sparse'):.2f}-{mean('most_sparse'):.2f}"
        print(
            f"{setting[0]:10g} {setting[1]:9g} {setting[2]:4g} | {mean('accuracy'):8.3f}   "
            f" {sparsity}  {mean('first'):10.2g}  {mean('within'):10.3f}  {mean('second'):10.1g} "
            f" {shares:>22}   | {mean('seconds'):6.1f}",
            flush=True,
        )


def print_widths() -> None:
    """Print the threshold calibrated at each width and the risk that each keeps at the others.

    The delta loss is weaker here than elsewhere, so that there are wrong attributions to tell
    apart."""
    found = {hidden: measure(1.0, 1.0, 0.1, hidden=hidden) for hidden in (32, 64, 128, 256)}
    print(
        "share of wrong attributions (by more than 10%) below a threshold on"
        " certificate / |attribution|, promised to be at most 5%"
    )
    print(
        "channels a block | accuracy  within 10%  threshold | at "
        + "  ".join(f"{hidden:>5}" for hidden in found)
        + " channels"
    )
    for hidden, row in found.items():
        threshold = row.risk.threshold
        risks = (
            [] if threshold is None else [row_risk(other, threshold) for other in found.values()]
        )
        shown = "none" if threshold is None else f"{threshold:.3f}"
        line = "  ".join(f"{risk:.3f}" for risk in risks)
        print(
            f"{hidden:16} | {row.accuracy:8.3f}  {row.within:10.3f}  {shown:>9} |    {line}",
            flush=True,
        )


def row_risk(found: Figures, threshold: float, tolerance: float = 0.1) -> float:
    """Return the share of wrong attributions among those with a score of at most the threshold."""
    return float((found.first_errors[found.scores <= threshold] > tolerance).double().mean())


def _accuracy(clean: Clean) -> float:
    return float((clean.logits.argmax(-1) == clean.labels).double().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--widths", action="store_true")
    parser.add_argument("--choose", action="store_true", help="measure on the validation part")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.widths:
        print_widths()
    else:
        print_table(given.seeds, given.choose)
