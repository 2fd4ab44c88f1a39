"""The selective-risk promise of channels over repeated calibrations, nominal beside measured.

Run with `python benchmarks/selective_risk.py [--repetitions 200]`. Two bilinear networks are
trained with a weak step loss or none, so that some of their attributions are wrong: one on
scikit-learn's digits, one on classes of random quadratic forms. Their channels are attributed,
ablated and certified on a population of inputs that they were not trained on: for the digits the
test images and their shifts by a pixel, each of which is an input of its own. A repetition draws
inputs from the population, each in one to ten copies, calibrates a threshold on certificate over
|attribution|, and takes the risk of that threshold over the whole population, which is therefore
known and not estimated. The promise: the risk is above `alpha` in at most the share `eta` of the
repetitions. Copies share the group of their content; beside it stands what happens when every copy
is taken for an input of its own. A measured share that is above nominal by more than three standard
errors is marked with a star."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from assay.audit.risk import Promise, SelectiveRisk, calibrate_risk
from assay.learn import cosine, fit
from assay.mechanisms.channels import channels
from assay.mechanisms.channels.objective import Training, make_objective, make_optimizer
from assay.studies.channels.evaluation import evaluate
from assay.targets.bilinear import BilinearNetwork
from assay.targets.data import Data, group_inputs, load_digits, split_data

ALPHA, ETA, TOLERANCE, TOP = 0.1, 0.05, 0.1, 5
PROMISES: tuple[Promise, ...] = ("input", "channel")


@dataclass(frozen=True)
class Population:
    """The largest channels of every input, (inputs, top): scores, whether they are wrong by more
    than the tolerance, and whether they are exact by construction.
    """

    score: np.ndarray
    error: np.ndarray
    exact: np.ndarray

    def risk(self, found: SelectiveRisk) -> float:
        """Return the risk that a threshold has over the population, zero where it trusts none."""
        asked = ~self.exact & (self.score > 0)
        trusted = asked & found.trusts(self.score)
        wrong = trusted & (self.error > found.tolerance)
        if not trusted.any():
            return 0.0
        if found.promise == "input":
            return float(wrong.any(1).sum() / trusted.any(1).sum())
        weight = 1 / np.maximum(asked.sum(1), 1)  # one row of every input, drawn at random
        return float((weight * wrong.sum(1)).sum() / (weight * trusted.sum(1)).sum())


def train(data: Data, blocks: int, lam_delta: float, steps: int = 1000) -> BilinearNetwork:
    """Train a network whose attributions are sometimes wrong."""
    config = Training(lam_delta=lam_delta, steps=steps)
    generator = torch.Generator().manual_seed(0)
    model = BilinearNetwork(data.inputs, data.classes, blocks=blocks, generator=generator)
    objective = make_objective(model, data, config, generator)
    optimizer = make_optimizer(model, config)
    fit(model, objective, optimizer, steps=steps, generator=generator, schedule=cosine)
    return model.double()


def measure(model: BilinearNetwork, x: Tensor, y: Tensor) -> Population:
    """Attribute, ablate and certify the channels of distinct inputs."""
    first = np.unique(group_inputs(x).numpy(), return_index=True)[1]
    x, y = x[first], y[first]
    table = evaluate(
        channels(model, x.double(), y).clean, torch.arange(len(x)), top=TOP, tolerance=TOLERANCE
    ).table
    columns = ("score", "relative_error", "exact_by_construction")
    return Population(*(table[name].to_numpy().reshape(len(x), TOP) for name in columns))


def digits() -> Population:
    """A network of four blocks, on test images and their shifts by a pixel."""
    data = load_digits()
    model = train(data, blocks=4, lam_delta=1.0)
    images = data.test_x.reshape(-1, 8, 8)
    shifts = [images] + [images.roll(by, axis) for axis in (1, 2) for by in (-1, 1)]
    return measure(model, torch.cat(shifts).flatten(1), data.test_y.repeat(len(shifts)))


def quadratic() -> Population:
    """A network of three blocks, on classes by the largest of four random quadratic forms."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4500, 8, generator=generator)
    forms = torch.randn(4, 8, 8, generator=generator)
    y = torch.einsum("ni,cij,nj->nc", x, forms, x).argmax(1)
    data = split_data(x, y, train=1 / 3)
    return measure(train(data, blocks=3, lam_delta=0.0), data.test_x, data.test_y)


TARGETS = {"digits, 4 blocks": digits, "quadratic forms, 3 blocks": quadratic}


def repeat(
    population: Population, promise: Promise, inputs: int, repetitions: int, together: bool
) -> list[tuple[SelectiveRisk, float]]:
    """Calibrate on draws with copies, and return every threshold with its true risk."""
    found = []
    for seed in range(repetitions):
        generator = np.random.default_rng(seed)
        drawn = generator.integers(len(population.score), size=inputs)
        drawn = drawn.repeat(generator.integers(1, 11, inputs))
        group = drawn if together else np.arange(len(drawn))
        threshold = calibrate_risk(
            population.score[drawn].flatten(),
            population.error[drawn].flatten(),
            group.repeat(TOP),
            exact=population.exact[drawn].flatten(),
            promise=promise,
            tolerance=TOLERANCE,
            alpha=ALPHA,
            eta=ETA,
            seed=seed,
        )
        found.append((threshold, population.risk(threshold)))
    return found


def lines(repetitions: int = 200, inputs: int = 200) -> Iterator[str]:
    """Return a line for each target, promise and treatment of copies."""
    for title, make in TARGETS.items():
        population = make()
        needing = ~population.exact
        wrong = (population.error > TOLERANCE)[needing].mean()
        yield (
            f"{title}: {len(population.score):,} inputs, {wrong:.1%} of the {needing.sum():,}"
            " largest channels that need a certificate are wrong"
        )
        for promise in PROMISES:
            for together in (True, False):
                found = repeat(population, promise, inputs, repetitions, together)
                yield _line(found, promise, together)


def _line(found: list[tuple[SelectiveRisk, float]], promise: str, together: bool) -> str:
    given = [risk for threshold, risk in found if threshold.threshold is not None]
    share = sum(risk > ALPHA for risk in given) / len(found)
    error = math.sqrt(max(share * (1 - share), 1e-12) / len(found))
    star = "*" if share > ETA + 3 * error else ""
    risks = f"mean risk {np.mean(given):.3f}" if given else "no threshold"
    about = {"input": "all trusted channels of an input", "channel": "one random channel"}[promise]
    said = f"{about}, copies {'together' if together else 'apart'}"
    return (
        f"  {said:<52}<= {ETA:.2f}   {share:.3f} +- {error:.3f}{star:<1}"
        f"  ({len(given)} of {len(found)} with a threshold, {risks})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--inputs", type=int, default=200, help="drawn in a repetition")
    words = parser.parse_args()
    torch.set_num_threads(1)
    asked = f"share of {words.repetitions} calibrations whose risk is above {ALPHA}"
    print(f"{asked}: nominal, measured +- standard error")
    for line in lines(words.repetitions, words.inputs):
        print(line, flush=True)
