import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from assay.errors import InputError
from assay.mechanisms.directions.divergence import DIVERGENCES, KL, MSE, divergence
from assay.mechanisms.directions.forms import jacobian, products, quadratic_forms
from assay.mechanisms.directions.local import around
from assay.mechanisms.directions.nested import nested_quadratic_forms
from assay.mechanisms.directions.space import choose
from assay.targets import toys

NAMES = sorted(DIVERGENCES)


def draw(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return drawn / drawn.norm(dim=1, keepdim=True)


def untrained(name: str) -> tuple[nn.Module, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    match name:
        case "tms":
            return toys.Autoencoder(5, 2, generator).double(), toys.draw_sparse(
                12, 5, 0.3, generator
            ).double()
        case "superposed":
            return toys.Bottleneck(6, 3, 6, generator).double(), toys.draw_sparse(
                12, 6, 0.3, generator
            ).double()
        case "groups":
            return toys.Bottleneck(6, 3, 6, generator).double(), toys.draw_sparse(
                12, 6, 0.3, generator, group=2
            ).double()
        case "xor":
            cases = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).double()
            return toys.MLP([2, 2, 2], generator, nn.functional.gelu).double(), cases
        case "squares":
            return toys.MLP([4, 5, 5, 4], generator).double(), toys.draw_sparse(
                12, 4, 0.5, generator
            ).double()
        case _:
            return toys.MLP([64, 8, 10], generator).double(), torch.rand(
                12, 64, generator=generator
            ).double()


def gpt2(attention: str = "eager", **config: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "vocab_size": 40,
        "n_positions": 16,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(**{**sizes, **config}, attn_implementation=attention)
    ).double()


@pytest.mark.parametrize("measure", NAMES)
@pytest.mark.parametrize("name", ["tms", "superposed", "groups", "xor", "squares", "digits"])
def test_forms_equal_nested_derivatives_on_every_target(name: str, measure: str) -> None:
    model, inputs = untrained(name)
    local = around(model, inputs)
    directions = draw(6, local.space.size)
    nested = nested_quadratic_forms(local, directions, measure)
    forms = quadratic_forms(local, directions, measure, budget=20_000)
    assert float(nested.max()) > 0
    assert float((forms - nested).abs().max()) <= 1e-12 * float(nested.max())


@pytest.mark.parametrize("measure", NAMES)
def test_forms_equal_nested_derivatives_on_a_hugging_face_model(measure: str) -> None:
    tokens = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(1))
    local = around(
        gpt2(),
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        "transformer.h.1.attn.*",
    )
    directions = draw(4, local.space.size)
    nested = nested_quadratic_forms(local, directions, measure)
    assert float(
        (quadratic_forms(local, directions, measure) - nested).abs().max()
    ) <= 1e-12 * float(nested.max())
    kept = quadratic_forms(local, directions, measure, per_position=True)
    assert kept.shape == (3, 4, 7)
    torch.testing.assert_close(kept.mean(2), nested, rtol=1e-10, atol=0)


def test_positions_choose_rows_of_a_sequence_output() -> None:
    tokens = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(1))
    model = gpt2()
    directions = draw(4, choose(model, "transformer.h.0.mlp.*").size)
    every = quadratic_forms(
        around(model, tokens, "transformer.h.0.mlp.*"), directions, per_position=True
    )
    at = torch.tensor([6, 2, 4])
    one = quadratic_forms(around(model, tokens, "transformer.h.0.mlp.*", positions=at), directions)
    torch.testing.assert_close(one, every[torch.arange(3), :, at])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    measure=st.sampled_from(NAMES),
    budget=st.sampled_from([1, 3000, 2**29]),
)
def test_forms_products_and_jacobian_agree(seed: int, measure: str, budget: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    local = around(
        toys.MLP([3, 4, 3], generator, torch.tanh).double(),
        torch.randn(4, 3, generator=generator).double(),
    )
    directions = draw(3, local.space.size, seed)
    forms = quadratic_forms(local, directions, measure, budget=budget)
    whole = products(local, directions, measure, budget=budget)
    torch.testing.assert_close((whole * directions).sum(2), forms, rtol=1e-10, atol=1e-14)
    output, slopes = jacobian(local, budget=max(budget, 100_000))
    tangents = torch.einsum("sop,kp->kso", slopes, directions)
    torch.testing.assert_close(
        divergence(measure).form(tangents, output).T, forms, rtol=1e-10, atol=1e-14
    )
    root = divergence(measure).root(tangents, output)
    torch.testing.assert_close(root.square().sum(-1).T, forms, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("measure", ["kl", "reverse-kl", "cross-entropy"])
@pytest.mark.parametrize("low", [-1e4, -torch.inf])
def test_zero_probabilities_never_give_nan(measure: str, low: float) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4).double()
            self.mask = torch.tensor([0.0, low, 0.0, 0.0], dtype=torch.float64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + self.mask

    torch.manual_seed(0)
    local = around(Masked(), torch.randn(5, 3).double())
    directions = draw(4, local.space.size)
    forms = quadratic_forms(local, directions, measure)
    nested = nested_quadratic_forms(local, directions, measure)
    assert bool(torch.isfinite(forms).all())
    assert bool(torch.isfinite(nested).all())
    torch.testing.assert_close(forms, nested, rtol=1e-11, atol=0)
    assert bool(torch.isfinite(products(local, directions, measure)).all())


@pytest.mark.parametrize("measure", NAMES)
def test_pull_is_the_gradient_of_the_divergence_between_outputs(measure: str) -> None:
    generator = torch.Generator().manual_seed(3)
    output, other = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    output.requires_grad_()
    kind = divergence(measure)
    (gradient,) = torch.autograd.grad(kind.value(output, other).sum(), output)
    torch.testing.assert_close(kind.pull(output.detach(), other), gradient)


def test_variance_survives_a_large_common_shift_of_the_logit_tangents() -> None:
    reference = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64)
    tangent = torch.tensor([[0.1, 0.2, -0.4]], dtype=torch.float64)
    torch.testing.assert_close(
        KL().form(tangent + 1e6, reference), KL().form(tangent, reference), rtol=1e-8, atol=0
    )


def test_split_and_join_are_inverse() -> None:
    space = choose(
        toys.MLP([3, 4, 2], torch.Generator().manual_seed(0)), ["*.weight", "layers.1.bias"]
    )
    flat = torch.arange(2 * space.size, dtype=torch.float64).reshape(2, -1)
    assert space.names == ("layers.0.weight", "layers.1.weight", "layers.1.bias")
    assert torch.equal(space.join(space.split(flat)), flat)
    assert [part.stop - part.start for part in space.slices().values()] == [12, 8, 2]


def test_fused_attention_is_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match="attn_implementation='eager'"):
        around(gpt2("sdpa"), torch.zeros(1, 3, dtype=torch.long))


def test_hidden_fused_attention_is_refused_with_the_way_out() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x).unflatten(-1, (2, 2)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(y, y, y).transpose(1, 2).flatten(2)

    local = around(Attention(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(InputError, match="eager"):
        quadratic_forms(local, draw(2, local.space.size).float(), "mse")


def test_bad_input_is_refused() -> None:
    model = toys.MLP([3, 4, 2], torch.Generator().manual_seed(0))
    x = torch.zeros(2, 3)
    with pytest.raises(InputError, match="did you mean"):
        around(model, x, "layer.0.weight")
    with pytest.raises(InputError, match="no sample"):
        around(model, x[:0])
    with pytest.raises(InputError, match="unknown divergence"):
        divergence("k1")
    with pytest.raises(InputError, match="directions must be"):
        quadratic_forms(around(model, x), torch.zeros(2, 5))
    with pytest.raises(InputError, match="GiB"):
        jacobian(around(model, x), budget=1)

    class Named(nn.Module):
        def __init__(self, result: object) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.result = result

        def forward(self, x: torch.Tensor) -> object:
            return self.result if self.result is not None else (x * self.weight).sum(1)

    with pytest.raises(InputError, match="logits or a vector"):
        around(Named(None), x)
    with pytest.raises(InputError, match="returned dict"):
        around(Named({"y": x}), x)
    with torch.no_grad():
        model.layers[0].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="1 NaN"):
        around(model, x)


def test_a_model_in_training_mode_is_left_in_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2)).double()
    model.train()
    local = around(model, torch.ones(2, 3, dtype=torch.float64))
    directions = draw(2, local.space.size)
    assert torch.equal(
        quadratic_forms(local, directions, MSE()), quadratic_forms(local, directions, MSE())
    )
    assert model.training
    assert model[1].training
