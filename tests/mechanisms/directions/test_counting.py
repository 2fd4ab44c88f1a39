"""The number of directions and the choice of factors: planted directions, noise, and too few."""

from __future__ import annotations

import pytest
import torch

from assay.learn import toys
from assay.mechanisms.directions import (
    PowerIteration,
    around,
    compare_factors,
    count_directions,
    decompose,
    fisher_factors,
)
from assay.mechanisms.directions.evaluation import recover
from assay.mechanisms.directions.factors import DenseFactors, normalise


def planted(
    count: int, samples: int = 300, size: int = 20, noise: float = 0.1, seed: int = 0
) -> tuple[DenseFactors, torch.Tensor]:
    """One of `count` orthonormal directions is active in every sample, beside Gaussian noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q[:count]
    owner = torch.arange(samples) % count
    drawn = torch.randn(samples, size, generator=generator).double()
    values = rows[owner] + noise * drawn / size**0.5
    return normalise(DenseFactors(values[:, None]))[0], rows


def gaussian(samples: int, size: int, seed: int) -> DenseFactors:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, 1, size, generator=generator).double()
    return normalise(DenseFactors(drawn))[0]


@pytest.mark.parametrize("k", [4, 7])
def test_planted_directions_are_counted_and_marked(k: int) -> None:
    factors, rows = planted(4)
    found = decompose(factors, PowerIteration(k), generator=torch.Generator().manual_seed(0))
    counted = count_directions(
        factors, found.directions, generator=torch.Generator().manual_seed(1)
    )
    assert counted.count == 4
    assert counted.interval == (4, 4)
    # Those marked are the planted ones, one each.
    same = (found.directions[counted.clear] @ rows.T).abs()
    assert sorted(same.argmax(1).tolist()) == [0, 1, 2, 3]
    assert float(same.amax(1).min()) > 0.99
    assert counted.strength == pytest.approx(4 * 0.99, rel=0.05)


def test_there_is_no_upper_end_where_fewer_were_asked_for_than_there_are() -> None:
    factors, _ = planted(6)
    found = decompose(factors, PowerIteration(3), generator=torch.Generator().manual_seed(0))
    assert found.interval[1] is None
    assert found.interval[0] <= 3
    assert found.answer.startswith("at least")


@pytest.mark.slow
def test_noise_has_no_directions() -> None:
    for seed in range(5):
        factors = gaussian(200, 12, seed)
        found = decompose(factors, PowerIteration(6), generator=torch.Generator().manual_seed(seed))
        assert found.answer == "none"


def test_a_direction_active_in_many_inputs_is_in_the_upper_end_alone() -> None:
    """It is a direction of the gradients, and not one of a few inputs."""
    factors, rows = planted(8, size=40, noise=0.05)
    last = torch.linalg.svd(rows).Vh[-1]  # orthogonal to those of a few inputs
    active = torch.rand(300, 1, 1, generator=torch.Generator().manual_seed(3)) < 0.4
    shared = 0.98 * active * last.expand(300, 1, -1)
    mixed = normalise(DenseFactors(torch.cat([factors.values, shared], 1)))[0]
    found = decompose(mixed, PowerIteration(12), generator=torch.Generator().manual_seed(0))
    counted = count_directions(mixed, found.directions, generator=torch.Generator().manual_seed(1))
    assert counted.count == 8
    assert counted.interval == (8, 9)
    assert float((found.directions[counted.clear] @ last).abs().max()) < 0.1


@pytest.mark.slow
def test_the_factors_are_chosen_in_which_directions_stand_out_most() -> None:
    toy = toys.superposed_circuits(6, 4, seed=0, steps=400, samples=200)
    local = around(toy.model.double(), toy.inputs.double())
    generator = torch.Generator().manual_seed(0)
    factors, choice = compare_factors(local, toy.divergence, 9, generator=generator)
    assert choice.strengths[choice.name] == max(choice.strengths.values()) > 0
    assert choice.name in choice.reason
    assert factors.samples == local.samples  # the check is on some inputs, the choice for all
    owner = local.space.join(toy.circuits)

    def clean(chosen: DenseFactors) -> int:
        found = decompose(chosen, PowerIteration(9), generator=torch.Generator().manual_seed(0))
        return recover(found.directions, owner).clean

    assert isinstance(factors, DenseFactors)
    assert clean(factors) >= clean(fisher_factors(local, toy.divergence))
