from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.attribution import Exact, Gradient, SecondOrder, attribute
from assay.core.target import Batch, target
from assay.errors import InputError
from assay.mechanisms.directions import DirectionMechanisms, directions
from assay.mechanisms.directions.forms import quadratic_forms
from assay.mechanisms.directions.power import PowerIteration
from assay.targets import toys


def first_output(output: Any, batch: Batch) -> Tensor:
    return output[:, 0]


def bound(metric: str = "own", amount: float = 0.3) -> DirectionMechanisms:
    generator = torch.Generator().manual_seed(0)
    model = toys.MLP([3, 5, 4], generator, torch.tanh).double()
    batch = Batch(torch.randn(6, 3, generator=generator, dtype=torch.float64))
    return directions(
        target(model, first_output), batch, parameters="layers.*", k=4, amount=amount, metric=metric
    )


def test_gates_at_one_are_the_network_and_at_zero_a_step() -> None:
    mechanisms = bound()
    model, batch = mechanisms.target.model, mechanisms.batch
    plain = model(batch.inputs)[:, 0]
    assert torch.equal(mechanisms.values(mechanisms.ones()), plain)
    gates = mechanisms.ones()["directions"].clone()
    gates[1] = 0
    moved = mechanisms.local.moved(mechanisms.vectors[1], -1.0)[:, 0]
    torch.testing.assert_close(mechanisms.values({"directions": gates}), moved)


def test_attribution_of_an_output_is_its_slope_along_each_direction() -> None:
    mechanisms = bound()
    _, tangents = mechanisms.local.tangents(mechanisms.vectors)
    scores = attribute(mechanisms, Gradient())
    torch.testing.assert_close(scores.values["directions"], tangents[:, :, 0].T)
    exact = attribute(mechanisms, Exact())
    small = attribute(bound(amount=1e-4), Gradient())
    torch.testing.assert_close(
        attribute(bound(amount=1e-4), Exact()).values["directions"],
        small.values["directions"],
        rtol=1e-2,
        atol=1e-8,
    )
    assert exact.values["directions"].shape == (6, 4)


def test_second_order_of_the_divergence_is_one_forward_derivative_and_equals_the_nested_one() -> (
    None
):
    mechanisms = bound("divergence")
    rule = mechanisms.second_rule()
    assert rule is not None
    torch.testing.assert_close(
        rule["directions"], quadratic_forms(mechanisms.local, mechanisms.vectors, "kl")
    )

    class Plain(DirectionMechanisms):
        def second_rule(self) -> None:
            return None

    general = Plain(mechanisms.target, mechanisms.batch, mechanisms.local, mechanisms.vectors)
    quick, slow = (
        attribute(entry, SecondOrder()).values["directions"] for entry in (mechanisms, general)
    )
    torch.testing.assert_close(quick, slow, rtol=1e-10, atol=1e-14)
    first = attribute(mechanisms, Gradient()).values["directions"]
    assert float(first.abs().max()) < 1e-12
    assert bound().second_rule() is None


def test_directions_of_a_hugging_face_model_bind_to_its_parameters() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=30, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(30, (4, 6), generator=torch.Generator().manual_seed(1))
    batch = Batch({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    whole = target(model, lambda output, batch: output.logits[:, -1, 0])
    mechanisms = directions(
        whole,
        batch,
        parameters="transformer.h.1.attn.c_attn.*",
        k=3,
        decomposer=PowerIteration(3, steps=30),
    )
    assert mechanisms.groups["directions"].sites == (
        "transformer.h.1.attn.c_attn.weight",
        "transformer.h.1.attn.c_attn.bias",
    )
    assert torch.equal(mechanisms.values(), model(**batch.inputs).logits[:, -1, 0])
    assert attribute(mechanisms, Gradient()).values["directions"].shape == (4, 3)


def test_bad_input_is_refused() -> None:
    model = nn.Linear(3, 2).double()
    batch = Batch(torch.ones(2, 3, dtype=torch.float64))
    whole = target(model, first_output)
    with pytest.raises(InputError, match="did you mean"):
        directions(whole, batch, parameters="weigth")
    with pytest.raises(InputError, match="between 1 and 8"):
        directions(whole, batch, decomposer=PowerIteration(9))
    with pytest.raises(InputError, match=r"directions \(k, 8\)"):
        directions(whole, batch, found=torch.ones(2, 5))
    with pytest.raises(InputError, match="'own' or 'divergence'"):
        directions(whole, batch, metric="kl")
    with pytest.raises(InputError, match="tensor or keyword"):
        directions(whole, Batch((torch.ones(2, 3), torch.ones(2, 3))))
