import pytest
import torch

from assay.errors import InputError
from assay.learn import toys
from assay.mechanisms.directions import evaluation
from assay.mechanisms.directions.factors import DenseFactors, fisher_factors
from assay.mechanisms.directions.forms import quadratic_forms
from assay.mechanisms.directions.local import around
from assay.mechanisms.directions.space import Space
from assay.targets.toys import MLP


def test_purity_counts_one_direction_per_circuit_and_leaves_shared_entries_out() -> None:
    owner = torch.tensor([0, 0, 1, 1, -1])
    rows = torch.tensor(
        [[1.0, 0, 0, 0, 3], [0, 1.0, 0, 0, 0], [1.0, 0, 1.0, 0, 0]], dtype=torch.float64
    )
    found = evaluation.recover(rows, owner)
    assert found.purity.tolist() == [1.0, 1.0, 0.5]
    assert found.match == {0: 0}
    assert found.clean == 1
    with pytest.raises(InputError, match="no circuit"):
        evaluation.recover(rows, torch.full((5,), -1))


def test_reconstruction_error_is_what_the_span_leaves() -> None:
    factors = DenseFactors(torch.tensor([[[3.0, 0, 0]], [[0, 4.0, 0]]], dtype=torch.float64))
    assert evaluation.reconstruction_error(
        factors, torch.tensor([[0, 2.0, 0]], dtype=torch.float64)
    ) == pytest.approx(9 / 25)


def test_coefficients_are_recovered_up_to_one_scale_per_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    space = Space(("W_in", "W_out"), ((2, 3), (4, 2)))
    rows = []
    for j in range(3):
        inner = torch.zeros(2, 3, dtype=torch.float64)
        inner[0, j] = -2.0
        outer = torch.zeros(4, 2, dtype=torch.float64)
        outer[:, 0] = 5 * a[:, j]
        rows.append(space.join({"W_in": inner, "W_out": outer}))
    paths = evaluation.path_coefficients(space, torch.stack(rows))
    assert evaluation.coefficient_r2(a, paths, {0: 0, 1: 1, 2: 2}) == pytest.approx(1.0)
    assert evaluation.coefficient_r2(a, paths, {0: 0}) < 0


def test_spans_and_seeds_are_compared_up_to_sign_and_order() -> None:
    basis = torch.linalg.qr(
        torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q
    first, second = basis[:3], -basis[[2, 0, 1]]
    assert evaluation.overlap(first, second) == pytest.approx(1.0)
    assert evaluation.overlap(first, basis[3:]) == pytest.approx(0.0)
    assert evaluation.stability([first, second, first]) == pytest.approx(1.0)
    with pytest.raises(InputError, match="two runs"):
        evaluation.stability([first])


def test_activity_of_one_direction_counts_as_one() -> None:
    activity = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert evaluation.effective_directions(activity).tolist() == [1.0, 2.0]
    assert evaluation.top_inputs(activity, 1, 5) == [(1, 0.5), (0, 0.0)]


def test_small_steps_of_an_intervention_follow_the_quadratic_form() -> None:
    generator = torch.Generator().manual_seed(0)
    model = MLP([3, 5, 4], generator, torch.tanh).double()
    local = around(model, torch.randn(6, 3, generator=generator, dtype=torch.float64))
    u = torch.randn(1, local.space.size, generator=generator, dtype=torch.float64)
    curve = evaluation.intervention_curve(local, u[0], [0.0, 1e-3], "kl")
    assert bool((curve[0].abs() < 1e-12).all())
    torch.testing.assert_close(
        curve[1], 0.5e-6 * quadratic_forms(local, u, "kl")[:, 0], rtol=1e-2, atol=0
    )


def test_top_outputs_name_the_output_that_a_direction_writes_to() -> None:
    model = MLP([3, 5, 4], torch.Generator().manual_seed(0)).double()
    local = around(model, torch.ones(2, 3, dtype=torch.float64), "layers.1.bias")
    (first, change), *_ = evaluation.top_outputs(
        local, torch.tensor([0.0, 0, -1, 0], dtype=torch.float64), sample=1
    )
    assert first == 2
    assert change == pytest.approx(-0.75)


def test_true_circuits_of_a_linear_toy_reconstruct_its_fisher() -> None:
    toy = toys.superposed_circuits(steps=5)
    local = around(toy.model.double(), toy.inputs[:50].double(), "W_in")
    factors = fisher_factors(local, "mse")
    assert evaluation.reconstruction_error(
        factors, torch.eye(local.space.size, dtype=torch.float64)
    ) == pytest.approx(0, abs=1e-12)
