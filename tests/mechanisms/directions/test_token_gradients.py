import pytest
import torch
from torch import nn

from assay.errors import InputError
from assay.mechanisms.directions.decomposition import activities, decompose
from assay.mechanisms.directions.factors import DenseFactors, normalise
from assay.mechanisms.directions.forms import quadratic_forms
from assay.mechanisms.directions.local import around
from assay.mechanisms.directions.power import PowerIteration
from assay.mechanisms.directions.span import span
from assay.mechanisms.directions.steps import (
    divergence_of_step,
    step_of_divergence,
    top_eigenvector,
)
from assay.mechanisms.directions.tokens import TokenFactors, token_gradients


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config).double().eval()


def factors(draws: int = 3, pattern: str = "*.attn.c_*") -> TokenFactors:
    tokens = torch.randint(30, (5, 6), generator=torch.Generator().manual_seed(1))
    local = around(gpt2(), tokens, pattern)
    generator = torch.Generator().manual_seed(2)
    return token_gradients(
        local, "kl", draws=draws, generator=generator, dtype=torch.float64, chunk=2
    )


def test_factored_operations_equal_those_of_the_rows() -> None:
    held = factors()
    rows = held.dense()
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(4, held.size, generator=generator, dtype=torch.float64)
    weights = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(held.dot(directions), rows @ directions.T)
    torch.testing.assert_close(held.add(weights), torch.einsum("srk,srp->kp", weights, rows))
    torch.testing.assert_close(held.traces(), rows.square().sum((1, 2)))
    kept = torch.tensor([0, 3])
    torch.testing.assert_close(
        held.scaled(kept, torch.tensor([2.0, 0.5]).double()).dense(),
        rows[kept] * torch.tensor([[[2.0]], [[0.5]]]),
    )


def test_low_rank_products_equal_dense_ones() -> None:
    held = factors(pattern="*.attn.c_proj.weight")
    name = held.space.names[0]
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(4, 8, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    whole = torch.einsum("kor,kir->kio", left, right)
    torch.testing.assert_close(
        held.dot_low_rank(name, left, right), held.dot(held.space.join({name: whole}))
    )


@pytest.mark.parametrize("measure", ["kl", "mse"])
def test_rows_are_gradients_whose_mean_square_is_the_quadratic_form(measure: str) -> None:
    tokens = torch.randint(30, (2, 5), generator=torch.Generator().manual_seed(1))
    local = around(gpt2(), tokens, "*.mlp.c_proj.*")
    generator = torch.Generator().manual_seed(2)
    held = token_gradients(local, measure, draws=1500, generator=generator, dtype=torch.float64)
    directions = torch.randn(3, local.space.size, generator=generator, dtype=torch.float64)
    estimate = held.dot(directions).square().sum(1)
    torch.testing.assert_close(
        estimate, quadratic_forms(local, directions, measure), rtol=0.2, atol=0
    )


def test_power_iteration_runs_on_factored_gradients() -> None:
    held = factors()
    found = PowerIteration(3, steps=60)(held, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        found.directions @ found.directions.T, torch.eye(3, dtype=torch.float64)
    )
    assert bool((torch.tensor(found.history).diff() >= -1e-9).all())


def test_parameters_of_other_layers_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"ln_1.weight.*choose parameters"):
        factors(pattern="transformer.h.0.ln_1.*")


def test_pair_gradients_towards_given_outputs_are_those_of_autograd() -> None:
    tokens = torch.randint(30, (3, 5), generator=torch.Generator().manual_seed(1))
    model = gpt2()
    local = around(model, tokens, "*.mlp.c_fc.*", positions=torch.tensor([4, 2, 1]))
    towards = torch.randn(
        3, 2, 1, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    held = token_gradients(local, "kl", towards=towards, dtype=torch.float64, chunk=2).dense()
    for sample, position in enumerate((4, 2, 1)):
        for reference in range(2):
            model.zero_grad()
            now = model(tokens[sample : sample + 1]).logits[0, position].log_softmax(-1)
            other = towards[sample, reference, 0].log_softmax(-1)
            (other.exp() * (other - now)).sum().backward()
            layer = model.transformer.h[0].mlp.c_fc
            torch.testing.assert_close(
                held[sample, reference], torch.cat([layer.weight.grad.flatten(), layer.bias.grad])
            )
    with pytest.raises(InputError, match="towards holds outputs for 2"):
        token_gradients(local, "kl", towards=towards[:2])


def test_the_span_keeps_inner_products_and_lifts_directions_back() -> None:
    held = factors()
    inner = span(held, budget=20_000)
    rows = held.dense().flatten(0, 1)
    coordinates = inner.factors.values.flatten(0, 1)
    torch.testing.assert_close(coordinates @ coordinates.T, rows @ rows.T, rtol=1e-6, atol=1e-9)
    basis = inner.lift(torch.eye(inner.factors.size, dtype=torch.float64))
    torch.testing.assert_close(
        basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), rtol=1e-6, atol=1e-6
    )
    found = decompose(held, PowerIteration(4), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        activities(normalise(held)[0], found.directions), found.activity, rtol=1e-4, atol=1e-6
    )


def test_directions_against_others_are_those_of_the_whitened_rows() -> None:
    held, against = (
        factors(),
        factors(pattern="*.attn.c_*").scaled(
            torch.arange(3), torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64)
        ),
    )
    found = decompose(
        held,
        PowerIteration(4),
        generator=torch.Generator().manual_seed(0),
        against=against,
        ridge=0.2,
    )
    rows = against.dense().flatten(0, 1)
    mean = rows.T @ rows / 3
    values, vectors = torch.linalg.eigh(
        mean + 0.2 * torch.linalg.eigvalsh(mean)[-1] * torch.eye(len(mean), dtype=torch.float64)
    )
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
    moved = found.directions @ root
    moved /= moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        moved @ moved.T, torch.eye(4, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )
    whitened = normalise(DenseFactors(held.dense() @ inverse))[0]
    torch.testing.assert_close(activities(whitened, moved), found.activity, rtol=1e-5, atol=1e-7)


def test_directions_against_what_does_not_fit_are_refused() -> None:
    held, generator = factors(), torch.Generator()
    for against, ridge, message in (
        (factors(draws=2), 0.1, "rows per sample"),
        (factors(), 0.0, "ridge must be positive"),
    ):
        with pytest.raises(InputError, match=message):
            decompose(held, PowerIteration(2), generator=generator, against=against, ridge=ridge)
    with pytest.raises(InputError, match="rows per sample"):
        decompose(
            held, PowerIteration(2), generator=generator, against=factors(pattern="*.attn.c_proj.*")
        )
    with pytest.raises(InputError, match="per-token"):
        decompose(DenseFactors(held.dense()), PowerIteration(2), generator=generator, against=held)


def test_the_top_eigenvector_is_that_of_the_mean() -> None:
    held = factors()
    rows = held.dense().flatten(0, 1)
    expected = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
    assert float((top_eigenvector(held) @ expected).abs()) == pytest.approx(1.0, abs=1e-6)


def test_a_step_of_given_divergence_has_it() -> None:
    tokens = torch.randint(30, (3, 5), generator=torch.Generator().manual_seed(1))
    local = around(gpt2(), tokens, "*.attn.c_proj.*")
    direction = torch.randn(
        local.space.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    amount = step_of_divergence(local, direction, 0.01)
    assert float(divergence_of_step(local, direction, amount).sum(1).mean()) == pytest.approx(
        0.01, rel=1e-4
    )
    with pytest.raises(InputError, match="no step"):
        step_of_divergence(local, torch.zeros_like(direction), 0.01)
