"""How often the stated number of directions is right: intervals, "none" and "at least" over
networks with a known number of circuits, and over noise.

Run with `python benchmarks/number_of_directions.py [--runs 200]`; about 6 CPU seconds a run. Every
run trains its networks from its own seed. `k` directions are asked for, below, at and above the
number of circuits; the factors are those that `compare_factors` chooses. With noise, every input's
factors get independent Gaussian rows of half their norm. Correlated features make the next one
active with probability 0.3."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from assay.learn import toys
from assay.mechanisms.directions import Decomposition, PowerIteration, around, compare_factors
from assay.mechanisms.directions.factors import DenseFactors
from assay.targets.toys import Toy

NETWORKS: dict[str, tuple[Callable[..., Toy], int, tuple[int, int, int]]] = {
    "TMS 5-2": (toys.tms, 5, (3, 5, 8)),
    "superposed circuits 10-5-10": (toys.superposed_circuits, 10, (6, 10, 14)),
}
DATA = ("plain", "noise", "correlated")
NOISE: dict[str, tuple[int, int, int]] = {
    "noise, 500 inputs in 15 dimensions": (500, 2, 15),
    "noise, 500 inputs in 110 dimensions": (500, 1, 110),
    "noise, 60 inputs in 200 dimensions": (60, 4, 200),
    "noise of unequal variance, 200 inputs in 40 dimensions": (200, 1, 40),
}


@dataclass
class Cell:
    """Answers in one setting: how many intervals reach the truth, and which answers were given."""

    truth: int
    reached: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, found: Decomposition, seconds: float) -> None:
        low, high = found.interval
        inside = low <= self.truth and (high is None or self.truth <= high)
        self.reached += inside if self.truth else found.answer == "none"
        self.answers[found.answer] += 1
        self.seconds += seconds


def with_noise(factors: DenseFactors, share: float, generator: torch.Generator) -> DenseFactors:
    """Add to every sample's factors independent Gaussian rows of `share` times their norm."""
    values = factors.values
    drawn = torch.randn(values.shape, generator=generator, dtype=values.dtype)
    sizes = values.square().sum((1, 2), keepdim=True) / drawn.square().sum((1, 2), keepdim=True)
    return DenseFactors(values + share * drawn * sizes.sqrt())


def run(seed: int, cells: dict[tuple[str, str, int], Cell], steps: int = 1000) -> None:
    """Train this seed's networks and add their answers to the cells."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for name, (make, truth, ks) in NETWORKS.items():
        for correlation in (0.0, 0.3):
            toy = make(seed=seed, steps=steps, correlation=correlation)
            local = around(toy.model.double(), toy.inputs.double())
            factors, _ = compare_factors(local, toy.divergence, ks[-1], generator=generator)
            assert isinstance(factors, DenseFactors)
            data = {"correlated": factors} if correlation else {"plain": factors}
            if not correlation:
                data["noise"] = with_noise(factors, 0.5, generator)
            for kind, given in data.items():
                for k in ks:
                    _count(cells, (name, kind, k), truth, given, generator)
    for name, shape in NOISE.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "unequal" in name:
            values = values * torch.linspace(0.1, 2, shape[2], dtype=torch.float64)
        for k in (3, 8):
            _count(cells, (name, "noise", k), 0, DenseFactors(values), generator)


def _count(
    cells: dict[tuple[str, str, int], Cell],
    key: tuple[str, str, int],
    truth: int,
    factors: DenseFactors,
    generator: torch.Generator,
) -> None:
    began = time.process_time()
    found = PowerIteration(key[2])(factors, generator=generator)
    cells.setdefault(key, Cell(truth)).add(found, time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="seed of the first run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells: dict[tuple[str, str, int], Cell] = {}
    for seed in range(given.first, given.first + given.runs):
        run(seed, cells)
    print(f"{given.runs} runs; nominal 95 %")
    print(f"{'network':<56}{'inputs':<12}{'k':>3}{'truth':>7}{'reached':>9}{'CPU s':>7}  answers")
    for (name, kind, k), cell in cells.items():
        answers = ", ".join(f"{answer}: {count}" for answer, count in cell.answers.most_common(4))
        share, seconds = cell.reached / given.runs, cell.seconds / given.runs
        truth = cell.truth or "none"
        print(f"{name:<56}{kind:<12}{k:>3}{truth:>7}{share:>9.3f}{seconds:>7.2f}  {answers}")


if __name__ == "__main__":
    main()
