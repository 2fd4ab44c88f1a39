"""When directions fail: circuits found, and the number stated, as features become correlated,
dense or unequal.

Run with `python benchmarks/directions_failures.py [--networks 5]`; about 3 CPU seconds a network
and setting. Correlated: an active feature makes the next one active with this probability. Dense:
every feature is active with this probability. Unequal: the first feature is active with probability
0.05
and the last with this share of it, geometrically in between. A circuit is found when more than nine
tenths of one direction's squared length lie on its parameters."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from assay.learn import toys
from assay.mechanisms.directions import (
    PowerIteration,
    around,
    compare_factors,
    fisher_factors,
    pair_gradients,
)
from assay.mechanisms.directions.evaluation import recover
from assay.mechanisms.directions.factors import Factors
from assay.targets.toys import Toy

NETWORKS: dict[str, tuple[Callable[..., Toy], int, int]] = {
    "TMS 5-2": (toys.tms, 5, 8),
    "superposed circuits 10-5-10": (toys.superposed_circuits, 10, 14),
}
SETTINGS: dict[str, tuple[float, ...]] = {
    "correlated": (0.0, 0.3, 0.6, 0.9),
    "dense": (0.1, 0.2, 0.4),
    "unequal": (0.3, 0.1, 0.03),
}


def inputs(setting: str, value: float, features: int) -> dict[str, float | Tensor]:
    """Return how the features of a setting are drawn."""
    if setting == "correlated":
        return {"correlation": value}
    if setting == "dense":
        return {"probability": value}
    return {"probability": 0.05 * value ** torch.linspace(0, 1, features)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"circuits found by power iteration, of all in {given.networks} networks")
    print(
        f"{'network':<29}{'features':<18}{'Fisher':>9}{'others':>9}{'zero':>9}{'chosen':>9}"
        "  numbers stated"
    )
    for name, (make, truth, k) in NETWORKS.items():
        for setting, values in SETTINGS.items():
            for value in values:
                row(name, make, truth, k, setting, value, given.networks, given.steps)


def row(
    name: str,
    make: Callable[..., Toy],
    truth: int,
    k: int,
    setting: str,
    value: float,
    networks: int,
    steps: int,
) -> None:
    """Print one line of the table."""
    found: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    for seed in range(networks):
        toy = make(seed=seed, steps=steps, **inputs(setting, value, truth))
        local = around(toy.model.double(), toy.inputs.double())
        owner = local.space.join(toy.circuits)
        generator = torch.Generator().manual_seed(seed)
        chosen, _ = compare_factors(local, toy.divergence, k, generator=generator)
        ways: dict[str, Factors] = {
            "Fisher": fisher_factors(local, toy.divergence),
            "others": pair_gradients(local, toy.divergence, generator=generator),
            "zero": pair_gradients(local, toy.divergence, references="zero"),
            "chosen": chosen,
        }
        for way, factors in ways.items():
            unit, _ = PowerIteration(k).check(factors)
            directions, _ = PowerIteration(k).climb(unit, generator)
            found[way] += recover(directions, owner).clean
        answers[PowerIteration(k)(chosen, generator=generator).answer] += 1
    counts = "".join(f"{found[way]:>6}/{truth * networks:<2}" for way in ways)
    stated = ", ".join(f"{answer}: {count}" for answer, count in answers.most_common())
    print(f"{name:<29}{f'{setting} {value:g}':<18}{counts}  {stated}", flush=True)


if __name__ == "__main__":
    main()
