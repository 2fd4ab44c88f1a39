import pytest
import torch

from assay.errors import InputError
from assay.learn import toys
from assay.mechanisms.directions.bilevel import BiLevel, interference, steepness
from assay.mechanisms.directions.evaluation import recover
from assay.mechanisms.directions.factors import DenseFactors, fisher_factors, pair_gradients
from assay.mechanisms.directions.local import Local, around
from assay.mechanisms.directions.npeff import NonNegativeFisher
from assay.mechanisms.directions.power import PowerIteration
from assay.mechanisms.directions.refinement import PairGradientRefinement, reconstruction_loss
from assay.mechanisms.directions.space import Space
from assay.mechanisms.directions.tucker import Tucker
from assay.targets.toys import MLP


def planted() -> tuple[DenseFactors, torch.Tensor]:
    """Rank-one samples along three directions of two tensors, (3, 4) and (2,), with cosines of
    .5.
    """
    matrices = torch.stack(
        [torch.outer(torch.eye(3)[index], torch.eye(4)[index]) for index in range(3)]
    )
    basis = (
        torch.cat([matrices.flatten(1), torch.tensor([0.6, 0.8]).expand(3, 2)], dim=1).double()
        / 2**0.5
    )
    which = torch.arange(60) % 3
    signs = torch.randn(60, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return DenseFactors(basis[which][:, None] * signs), basis


SPACE = Space(("w", "b"), ((3, 4), (2,)))


def match(found: torch.Tensor, basis: torch.Tensor) -> float:
    return float((found @ basis.T).abs().max(0).values.min())


@pytest.mark.parametrize(
    ("method", "close"),
    [
        (PowerIteration(3), 0.85),
        (NonNegativeFisher(3, steps=300), 0.99),
        (PairGradientRefinement(3, SPACE, kept=1 / 3, steps=300, rate=1e-2), 0.99),
    ],
)
def test_every_method_finds_planted_directions_and_reports_alike(
    method: object, close: float
) -> None:
    factors, basis = planted()
    first = method(factors, generator=torch.Generator().manual_seed(1))  # type: ignore[operator]
    again = method(factors, generator=torch.Generator().manual_seed(1))  # type: ignore[operator]
    assert match(first.directions, basis) > close
    torch.testing.assert_close(first.directions.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert bool((first.scores.diff() <= 0).all())
    assert first.activity.shape == (60, 3)
    assert torch.equal(first.directions, again.directions)


def test_bilevel_steps_raise_steepness_and_lower_interference() -> None:
    factors, _ = planted()
    start, end = (
        BiLevel(3, steps=steps)(factors, generator=torch.Generator().manual_seed(1))
        for steps in (1, 400)
    )
    assert end.history[-1] > 2 * end.history[0]
    ratio = [
        float(interference(factors, run.directions) / steepness(factors, run.directions))
        for run in (start, end)
    ]
    assert ratio[1] < ratio[0]
    torch.testing.assert_close(end.directions.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_methods_that_need_no_orthogonality_beat_it_on_oblique_directions() -> None:
    factors, basis = planted()
    orthogonal = PowerIteration(3)(factors, generator=torch.Generator().manual_seed(1))
    free = PairGradientRefinement(3, SPACE, kept=1 / 3, steps=300, rate=1e-2)(
        factors, generator=torch.Generator().manual_seed(1)
    )
    assert match(free.directions, basis) > match(orthogonal.directions, basis)


def test_tucker_of_full_rank_is_exact_and_of_low_rank_is_low_rank() -> None:
    directions = torch.randn(
        2, SPACE.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    torch.testing.assert_close(Tucker(SPACE, directions, 3)(), directions)
    low = Tucker(SPACE, directions, 1)
    low.rescale()
    torch.testing.assert_close(low().norm(dim=1), torch.ones(2, dtype=torch.float64))
    assert torch.linalg.matrix_rank(SPACE.split(low().detach())["w"]).tolist() == [1, 1]
    with pytest.raises(InputError, match="rank"):
        Tucker(SPACE, directions, 0)


def test_reconstruction_keeps_the_largest_coefficients() -> None:
    gradients = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    assert float(reconstruction_loss(gradients, eye, eye, 0.25)) == pytest.approx(0.1)
    assert float(reconstruction_loss(gradients, eye, eye, 1.0)) == 0.0


def test_interference_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = DenseFactors(torch.randn(5, 2, 6, generator=generator, dtype=torch.float64))
    rows = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    shares = factors.dot(rows).square().sum(1)
    total = sum(
        float((shares[:, i] * shares[:, j] * (rows[i] @ rows[j])).square().sum())
        for i in range(3)
        for j in range(i)
    )
    assert float(interference(factors, rows)) == pytest.approx(total**0.5)


@pytest.fixture(scope="module")
def superposed() -> tuple[Local, torch.Tensor, DenseFactors]:
    toy = toys.tms(steps=800)
    local = around(toy.model.double(), toy.inputs.double())
    return local, local.space.join(toy.circuits), fisher_factors(local, "mse")


def test_steepness_is_higher_at_mixtures_of_circuits_than_at_the_circuits(
    superposed: tuple[Local, torch.Tensor, DenseFactors],
) -> None:
    """The known failure of the bi-level objective: no weight of the interference term can repair
    it.
    """
    _, owner, factors = superposed
    circuits = PowerIteration(10)(factors, generator=torch.Generator().manual_seed(0)).directions[
        :5
    ]
    steep = PowerIteration(5, normalised=False)(
        factors, generator=torch.Generator().manual_seed(0)
    ).directions
    assert recover(circuits, owner).worst_purity > 0.998
    assert float(recover(steep, owner).purity.mean()) < 0.99
    assert float(steepness(factors, steep)) > 1.02 * float(steepness(factors, circuits))


@pytest.mark.slow
def test_bilevel_directions_specialise_on_xor_inputs() -> None:
    toy = toys.xor()
    factors = fisher_factors(around(toy.model.double(), toy.inputs.double()), "kl")
    found = BiLevel(3)(factors, generator=torch.Generator().manual_seed(0))
    strongest = found.activity.max(0)
    assert float(strongest.values[:2].min()) > 0.5
    assert strongest.indices[0] != strongest.indices[1]


@pytest.mark.slow
def test_baseline_and_refinement_find_superposed_features(
    superposed: tuple[Local, torch.Tensor, DenseFactors],
) -> None:
    local, owner, factors = superposed
    npeff = NonNegativeFisher(7, steps=400)(factors, generator=torch.Generator().manual_seed(0))
    assert recover(npeff.directions, owner).clean >= 4
    pairs = pair_gradients(local, "mse", generator=torch.Generator().manual_seed(0))
    refined = PairGradientRefinement(7, local.space, steps=200)(
        pairs, generator=torch.Generator().manual_seed(0)
    )
    assert recover(refined.directions, owner).clean == 5
    assert refined.encoder is not None
    assert refined.top(5).encoder.shape == (5, 15)  # type: ignore[union-attr]


def test_bad_input_is_refused() -> None:
    factors, _ = planted()
    generator = torch.Generator().manual_seed(0)
    for method in (BiLevel(15), NonNegativeFisher(15), PairGradientRefinement(15, SPACE)):
        with pytest.raises(InputError, match="between 1 and 14"):
            method(factors, generator=generator)
    with pytest.raises(InputError, match="share"):
        PairGradientRefinement(3, SPACE, kept=0)(factors, generator=generator)
    model = MLP([3, 4, 3], generator)
    with pytest.raises(InputError, match="kind of reference"):
        pair_gradients(around(model, torch.ones(3, 3)), references="one")
