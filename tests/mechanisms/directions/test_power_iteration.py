import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.errors import InputError
from assay.learn import toys
from assay.mechanisms.directions.factors import (
    DenseFactors,
    fisher_factors,
    normalise,
    pair_gradients,
)
from assay.mechanisms.directions.local import around
from assay.mechanisms.directions.power import PowerIteration, polar
from assay.targets.toys import MLP


def planted(
    samples: int = 60, size: int = 12, count: int = 4, noise: float = 0.05
) -> tuple[DenseFactors, torch.Tensor]:
    """Each sample's curvature lies along one of `count` orthonormal directions, plus noise."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64)).Q.T
    which = torch.randint(count, (samples,), generator=generator)
    values = basis[which][:, None] * torch.rand(
        samples, 1, 1, generator=generator, dtype=torch.float64
    )
    values = torch.cat(
        [values, noise * torch.randn(samples, 1, size, generator=generator, dtype=torch.float64)],
        dim=1,
    )
    return DenseFactors(values), basis


def test_planted_directions_are_found_and_counted() -> None:
    factors, basis = planted()
    found = PowerIteration(7)(factors, generator=torch.Generator().manual_seed(1))
    assert found.count == 4
    assert found.interval[0] <= 4 <= found.interval[1]
    overlap = (found.directions[:4] @ basis.T).abs()
    assert float(overlap.max(0).values.min()) > 0.98
    assert sorted(overlap.argmax(1).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("restarts", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_all_restarts_is_kept(restarts: int, seed: int) -> None:
    """Starts that are cut off after one step reach different heights."""
    factors = planted()[0]
    method = PowerIteration(3, steps=1, restarts=restarts)
    unit, _ = method.check(factors)
    generator = torch.Generator().manual_seed(seed)
    climbs = [method.climb(unit, generator) for _ in range(restarts)]
    heights = [history[-1] for _, history in climbs]
    assert len(set(heights)) == restarts
    found = method(factors, generator=torch.Generator().manual_seed(seed))
    assert found.history[-1] == max(heights)
    best = climbs[heights.index(max(heights))][0]
    overlap = (found.directions @ best.T).abs()
    torch.testing.assert_close(overlap.amax(1), torch.ones(3, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, 6))
def test_the_ascent_is_monotone_and_the_directions_orthonormal(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = DenseFactors(torch.randn(9, 3, 6, generator=generator, dtype=torch.float64))
    found = PowerIteration(k, steps=40)(factors, generator=generator)
    steps = torch.tensor(found.history, dtype=torch.float64)
    assert bool((steps.diff() >= -1e-12).all())
    torch.testing.assert_close(
        found.directions @ found.directions.T, torch.eye(k, dtype=torch.float64)
    )
    assert bool((found.activity >= 0).all())
    assert bool((found.activity.sum(1) <= 1 + 1e-9).all())
    assert bool((found.scores.diff() <= 0).all())


def test_the_same_seed_gives_the_same_bytes() -> None:
    factors, _ = planted()
    first, second = (
        PowerIteration(6)(factors, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first.directions, second.directions)
    assert first.interval == second.interval


def test_polar_factor_is_the_nearest_orthonormal_matrix() -> None:
    rows = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(polar(rows), left @ right)


def test_dense_factors_are_a_matrix_and_its_adjoint() -> None:
    generator = torch.Generator().manual_seed(2)
    factors = DenseFactors(torch.randn(5, 3, 8, generator=generator, dtype=torch.float64))
    directions = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    weights = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        (factors.dot(directions) * weights).sum(), (factors.add(weights) * directions).sum()
    )
    kept, index = normalise(factors)
    torch.testing.assert_close(kept.traces(), torch.ones(len(index), dtype=torch.float64))


def test_fisher_factors_square_to_the_hessian_of_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    model = MLP([3, 4, 3], generator).double()
    local = around(model, torch.randn(2, 3, generator=generator, dtype=torch.float64))
    values = fisher_factors(local, "kl").values
    for sample in range(2):
        part = local.take(slice(sample, sample + 1))
        reference = part.output().log_softmax(-1)

        def measure(flat: torch.Tensor) -> torch.Tensor:
            now = part.output(local.space.split(flat)).log_softmax(-1)
            return (reference.exp() * (reference - now)).sum()

        hessian = torch.autograd.functional.hessian(measure, local.space.join(local.weights))
        torch.testing.assert_close(
            values[sample].T @ values[sample], hessian, rtol=1e-9, atol=1e-12
        )


def test_pair_gradients_are_gradients_towards_other_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    model = MLP([3, 4, 3], generator).double()
    inputs = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    values = pair_gradients(around(model, inputs), "mse", references=1, generator=generator).values
    for sample in range(2):
        model.zero_grad()
        # With two samples the only other one is the reference.
        (model(inputs[sample]) - model(inputs[1 - sample]).detach()).square().mean().backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        torch.testing.assert_close(values[sample, 0], expected)


def test_bad_input_is_refused() -> None:
    factors, _ = planted()
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(InputError, match="between 1 and 12"):
        PowerIteration(13)(factors, generator=generator)
    with pytest.raises(InputError, match="no sample has curvature"):
        PowerIteration(2)(DenseFactors(torch.zeros(3, 2, 5)), generator=generator)
    with pytest.raises(InputError, match="NaN"):
        PowerIteration(2)(DenseFactors(torch.full((3, 2, 5), torch.nan)), generator=generator)
    model = MLP([3, 4, 3], generator)
    with pytest.raises(InputError, match="two samples"):
        pair_gradients(around(model, torch.zeros(1, 3)), generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_superposed_features_are_found_one_by_one(seed: int) -> None:
    toy = toys.tms(seed=seed)
    local = around(toy.model.double(), toy.inputs.double())
    factors = fisher_factors(local, "mse")
    owner = local.space.join(toy.circuits)
    for k in (5, 7, 10):
        found = PowerIteration(k)(factors, generator=torch.Generator().manual_seed(k))
        shares = torch.stack(
            [found.directions.square()[:5, owner == circuit].sum(1) for circuit in range(5)], dim=1
        )
        purity, circuit = shares.max(1)
        assert float(purity.min()) >= 0.998
        assert sorted(circuit.tolist()) == [0, 1, 2, 3, 4]
        if k > 5:
            assert found.count == 5


@pytest.mark.parametrize("filled", [0, 1, 3, 6])
def test_products_leave_out_rows_of_zeros_and_nothing_else(filled: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 6, 4, generator=generator, dtype=torch.float64)
    values[1:, filled:] = 0
    factors = DenseFactors(values)
    directions = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 6, 3, generator=generator, dtype=torch.float64)
    expected = torch.einsum("srp,kp->srk", values, directions)
    torch.testing.assert_close(factors.dot(directions), expected, rtol=1e-12, atol=1e-12)
    added = torch.einsum("srk,srp->kp", weights, values)
    torch.testing.assert_close(factors.add(weights), added, rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad((factors.dot(directions) * weights).sum(), directions)
    torch.testing.assert_close(slope, added, rtol=1e-12, atol=1e-12)
    kept = torch.tensor([4, 1])
    scaled = factors.scaled(kept, torch.tensor([2.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(
        scaled.dot(directions), expected[kept] * torch.tensor([2.0, 3.0])[:, None, None]
    )
