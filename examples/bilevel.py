"""Where the bi-level search for directions works, and why it fails on features in superposition.

The bi-level method looks for steep directions that do not interfere. On XOR its directions
specialise on inputs. On TMS 5-2 its objective is higher at mixtures of circuits than at the
circuits, so no weight of the interference term can repair it."""

from __future__ import annotations

import torch

from assay.learn import toys
from assay.mechanisms.directions import BiLevel, PowerIteration, around, fisher_factors
from assay.mechanisms.directions.bilevel import steepness
from assay.mechanisms.directions.evaluation import recover

NETWORKS = 3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def xor() -> None:
    toy = toys.xor(seed=3)
    factors = fisher_factors(around(toy.model.double(), toy.inputs.double()), "kl")
    found = BiLevel(3)(factors, generator=generator())
    print("XOR, bi-level, three directions: share of each input's curvature")
    print(f"{'input':<10}" + "".join(f"{f'direction {index}':>14}" for index in range(3)))
    for index, row in zip(found.kept.tolist(), found.activity.tolist(), strict=True):
        name = " ".join(f"{value:.0f}" for value in toy.inputs[index].tolist())
        print(f"{name:<10}" + "".join(f"{value:>14.2f}" for value in row))


def superposition() -> None:
    print(
        f"\nTMS 5-2, {NETWORKS} networks: circuits found of 5 and mean curvature squared (what the"
        " bi-level method maximises)"
    )
    names = (
        "network",
        "bi-level",
        "power",
        "at the circuits",
        "at the bi-level's",
        "at the steepest",
        "purity there",
    )
    print("".join(f"{name:>18}" for name in names))
    for seed in range(NETWORKS):
        toy = toys.tms(seed=seed)
        local = around(toy.model.double(), toy.inputs.double())
        owner = local.space.join(toy.circuits)
        factors = fisher_factors(local, "mse")
        bilevel = BiLevel(5)(factors, generator=generator()).directions
        power = PowerIteration(7)(factors, generator=generator()).directions
        circuits = power[list(recover(power, owner).match.values())]
        steepest = PowerIteration(5, normalised=False)(factors, generator=generator()).directions
        clean = [recover(rows, owner).clean for rows in (bilevel, power)]
        steep = [float(steepness(factors, rows)) for rows in (circuits, bilevel, steepest)]
        purity = float(recover(steepest, owner).purity.mean())
        print(
            "".join(
                f"{value:>18}"
                for value in (seed, *clean, *(f"{value:.4g}" for value in steep), f"{purity:.3f}")
            )
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    xor()
    superposition()
