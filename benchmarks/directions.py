"""The decomposers' time to take TMS 5-2 apart: circuits recovered, purity and CPU seconds over
five networks.
"""

from __future__ import annotations

import time

import torch

from assay.learn.toys import tms
from assay.mechanisms.directions import (
    BiLevel,
    Decomposer,
    NonNegativeFisher,
    PairGradientRefinement,
    PowerIteration,
    around,
    fisher_factors,
    pair_gradients,
)
from assay.mechanisms.directions.evaluation import recover

NETWORKS = 5


def main() -> None:
    torch.set_num_threads(1)
    rows: dict[str, list[tuple[int, float, float]]] = {}
    for seed in range(NETWORKS):
        toy = tms(seed=seed)
        local = around(toy.model.double(), toy.inputs.double())
        owner = local.space.join(toy.circuits)
        methods: dict[str, tuple[str, Decomposer]] = {
            "power iteration, Fisher, k = 7": ("fisher", PowerIteration(7)),
            "power iteration, Fisher, k = 10": ("fisher", PowerIteration(10)),
            "power iteration, pairs, k = 7": ("pairs", PowerIteration(7)),
            "refinement, pairs, k = 7": ("pairs", PairGradientRefinement(7, local.space)),
            "NPEFF, Fisher, k = 10": ("fisher", NonNegativeFisher(10)),
            "bi-level, Fisher, k = 7": ("fisher", BiLevel(7)),
        }
        for name, (kind, method) in methods.items():
            generator = torch.Generator().manual_seed(seed)
            began = time.process_time()
            factors = (
                fisher_factors(local, "mse")
                if kind == "fisher"
                else pair_gradients(local, "mse", generator=generator)
            )
            found = method(factors, generator=generator)
            seconds = time.process_time() - began
            recovery = recover(found.directions, owner)
            rows.setdefault(name, []).append((recovery.clean, recovery.worst_purity, seconds))
    print(f"{'method':<34}{'clean of 5':>14}{'lowest purity':>15}{'CPU s':>8}")
    for name, found_rows in rows.items():
        clean = "/".join(str(clean) for clean, _, _ in found_rows)
        purity, seconds = min(row[1] for row in found_rows), max(row[2] for row in found_rows)
        print(f"{name:<34}{clean:>14}{purity:>15.4f}{seconds:>8.2f}")


if __name__ == "__main__":
    main()
