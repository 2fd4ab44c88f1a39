"""Per-token gradients against autograd's Hessians, over every family and every way of sharing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from node_models import FAMILIES, SMALL, build
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from assay.errors import InputError
from assay.mechanisms.directions.local import Local, around
from assay.mechanisms.directions.tokens import TokenFactors, token_gradients


def opt() -> nn.Module:
    """OPT flattens (samples, tokens) in front of its MLP."""
    settings = {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
    config = CONFIG_MAPPING["opt"](**settings, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).double()
    return model


def linear_names(model: nn.Module) -> list[str]:
    """Return the parameters that only linear layers of the last block hold."""
    held: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for value in module._parameters.values():
            held.setdefault(id(value), []).append(module)
    return [
        name
        for name, value in model.named_parameters()
        if ".2." in name and all(isinstance(at, nn.Linear | Conv1D) for at in held[id(value)])
    ]


def hessian_forms(local: Local, directions: Tensor, measure: str) -> Tensor:
    """Return `u^T H_x u` by differentiating the divergence twice, sample by sample."""
    rows = []
    for sample in range(local.samples):
        part = local.take(slice(sample, sample + 1))
        reference = part.output().detach()

        def value(flat: Tensor, part: Local = part, reference: Tensor = reference) -> Tensor:
            weights = part.weights
            moved = part.output(
                {name: weights[name] + step for name, step in part.space.split(flat).items()}
            )
            if measure == "mse":
                return (moved - reference).square().mean(-1).mean()
            then, now = reference.log_softmax(-1), moved.log_softmax(-1)
            return (then.exp() * (then - now)).sum(-1).mean()

        zero = torch.zeros(local.space.size, dtype=torch.float64)
        rows.append(
            torch.stack(
                [
                    u @ torch.autograd.functional.hvp(value, zero, u, strict=False)[1]
                    for u in directions
                ]
            )
        )
    return torch.stack(rows)


def exact_forms(local: Local, directions: Tensor, measure: str) -> tuple[Tensor, TokenFactors]:
    """Return `u^T H_x u` from pair gradients alone.

    KL: over the one-hot labels c, `H_x = sum_c p_c g_c g_c^T`. MSE: towards `z + o e_c / 2` the
    gradient is `-J^T e_c`, and `H_x = (2/o) sum_c g_c g_c^T`."""
    output = local.output().detach()
    classes = output.shape[-1]
    labels = torch.eye(classes, dtype=torch.float64)
    if measure == "kl":
        towards = torch.where(labels > 0, 0.0, -torch.inf)[None, :, None].expand(
            len(output), -1, output.shape[1], -1
        )
        weights = output.softmax(-1)[:, 0]
    else:
        towards = output[:, None] + labels[None, :, None] * classes / 2
        weights = torch.full((len(output), classes), 2 / classes, dtype=torch.float64)
    held = token_gradients(local, measure, towards=towards, dtype=torch.float64, chunk=2)
    return (held.dot(directions).square() * weights[:, :, None]).sum(1), held


@pytest.mark.parametrize("name", [*FAMILIES, "opt"])
def test_every_family_agrees_with_the_hessian(name: str) -> None:
    model = opt() if name == "opt" else build(name)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(31, (3, 5), generator=generator)
    names = linear_names(model)
    assert len(names) >= 4
    local = around(model, tokens, names, positions=torch.tensor([4, 2, 3]))
    directions = torch.randn(2, local.space.size, generator=generator, dtype=torch.float64)
    found, held = exact_forms(local, directions, "kl")
    # Some norms compute in float32 whatever the weights are.
    torch.testing.assert_close(found, hessian_forms(local, directions, "kl"), rtol=1e-6, atol=1e-12)
    assert held.samples == 3
    # The random rows have the same squares on average, and as many samples.
    drawn = token_gradients(local, "kl", draws=2, generator=generator, dtype=torch.float64)
    assert drawn.dot(directions).shape == (3, 2, 2)


class Wired(nn.Module):
    """Small layers in a given wiring, on inputs (samples, tokens, 4)."""

    def __init__(self, forward: Callable[[Wired, Tensor], Tensor], **layers: nn.Module):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.wiring = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def linear(seed: int, bias: bool = True, out: int = 4) -> nn.Linear:
    layer = nn.Linear(4, out, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer


def tied(*, bias: bool = False) -> dict[str, nn.Module]:
    """Two layers that share one weight, and with `bias` one bias too."""
    first, second = linear(0), linear(1)
    second.weight = first.weight
    if bias:
        second.bias = first.bias
    return {"a": first, "b": second}


def head(net: Any, x: Tensor) -> Tensor:
    return net.head(x.tanh().sum(1))


def flattened(net: Any, x: Tensor) -> Tensor:
    """As OPT does: (samples * tokens, d) in, (samples, tokens, d) out."""
    return head(net, net.a(x.reshape(-1, 4)).reshape(x.shape))


def tokens_first(net: Any, x: Tensor) -> Tensor:
    return head(net, net.a(x.transpose(0, 1)).transpose(0, 1))


def in_place(net: Any, x: Tensor) -> Tensor:
    return head(net, net.a(x).tanh_())


WIRINGS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[], dict[str, nn.Module]]]] = {
    "one weight, two layers": (lambda net, x: head(net, net.b(net.a(x).tanh())), tied),
    "one weight and one bias, two layers": (
        lambda net, x: head(net, net.b(net.a(x).tanh())),
        lambda: tied(bias=True),
    ),
    "side by side": (lambda net, x: head(net, net.a(x) * net.b(x + 1)), tied),
    "one layer, twice": (
        lambda net, x: head(net, net.a(net.a(x).tanh())),
        lambda: {"a": linear(0)},
    ),
    "one layer, once with fewer tokens": (
        lambda net, x: head(net, net.a(x) + net.a(x[:, :1]).tanh()),
        lambda: {"a": linear(0)},
    ),
    "samples and tokens flattened": (flattened, lambda: {"a": linear(0)}),
    "flattened and shared": (
        lambda net, x: head(net, net.b(x).tanh() + net.a(x.reshape(-1, 4)).reshape(x.shape)),
        tied,
    ),
    "tokens first": (tokens_first, lambda: {"a": linear(0)}),
    "changed in place": (in_place, lambda: {"a": linear(0)}),
    "by keyword": (lambda net, x: head(net, net.a(input=x)), lambda: {"a": linear(0)}),
    "no tokens": (lambda net, x: net.head(net.a(x[:, 0]).tanh()), lambda: {"a": linear(0)}),
}


@pytest.mark.parametrize("samples", [3, 4])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_every_way_of_sharing_agrees_with_the_hessian(wiring: str, samples: int) -> None:
    forward, layers = WIRINGS[wiring]
    model = Wired(forward, **layers(), head=linear(9, out=3)).double()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 4, 4, generator=generator, dtype=torch.float64)
    local = around(
        model, inputs, ["a.*", "b.*", "head.*"] if "b" in layers() else ["a.*", "head.*"]
    )
    directions = torch.randn(3, local.space.size, generator=generator, dtype=torch.float64)
    held = token_gradients(
        local, "mse", towards=torch.zeros(samples, 1, 3).double(), dtype=torch.float64
    )
    for sample in range(samples):
        model.zero_grad()
        model(inputs[sample : sample + 1])[0].square().mean().backward()
        expected = local.space.join({n: p.grad for n, p in model.named_parameters()})  # type: ignore[misc]
        torch.testing.assert_close(held.dense()[sample, 0], expected)
    torch.testing.assert_close(held.dot(directions), held.dense() @ directions.T)
    torch.testing.assert_close(held.traces(), held.dense().square().sum((1, 2)))
    hessian = hessian_forms(local, directions, "mse")
    basis = local.output().detach()[:, None] + 1.5 * torch.eye(3).double()
    exact = token_gradients(local, "mse", towards=basis, dtype=torch.float64, chunk=2)
    torch.testing.assert_close(exact.dot(directions).square().sum(1) * 2 / 3, hessian)


def mixed(net: Any, x: Tensor) -> Tensor:
    """Rows in an order of their own, as experts with routed tokens read them."""
    tokens = x.reshape(-1, 4)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    rows = net.a(tokens[order])
    return head(net, rows[order.argsort()].reshape(x.shape))


def averaged(net: Any, x: Tensor) -> Tensor:
    return head(net, net.a(x) - net.a(x.mean(0, keepdim=True)))


def constant(net: Any, x: Tensor) -> Tensor:
    return head(net, x + net.a(torch.ones(4, 4, dtype=x.dtype)))


def outside(net: Any, x: Tensor) -> Tensor:
    return head(net, net.a(x) @ net.a.weight)


def unused(net: Any, x: Tensor) -> Tensor:
    return head(net, x)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (mixed, "do not belong to one sample each"),
        (averaged, "do not belong to one sample each"),
        (constant, "do not belong to one sample each"),
        (outside, "'a.weight' is used outside"),
        (unused, "'a' does not run"),
    ],
)
def test_what_would_be_wrong_is_refused(
    forward: Callable[[Any, Tensor], Tensor], message: str
) -> None:
    model = Wired(forward, a=linear(0, bias=False), head=linear(9, out=3)).double()
    inputs = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with pytest.raises(InputError, match=message):
        token_gradients(
            around(model, inputs, ["a.*", "head.*"]), "mse", generator=torch.Generator()
        )


def test_a_weight_shared_with_an_embedding_is_refused_by_name() -> None:
    model = build("gpt2")
    tokens = torch.randint(31, (3, 5), generator=torch.Generator().manual_seed(1))
    with pytest.raises(InputError, match=r"wte.weight \(of Embedding, Linear\)"):
        token_gradients(
            around(model, tokens, "transformer.wte.weight"), generator=torch.Generator()
        )


def test_one_weight_in_a_linear_layer_and_a_transposed_one_is_refused() -> None:
    layers = {"a": linear(0, bias=False), "b": Conv1D(4, 4)}
    layers["b"].weight = layers["a"].weight
    model = Wired(lambda net, x: head(net, net.b(net.a(x))), **layers, head=linear(9, out=3))
    with pytest.raises(InputError, match="of Linear, Conv1D"):
        token_gradients(
            around(model.double(), torch.ones(2, 4, 4).double(), "a.*"),
            "mse",
            generator=torch.Generator(),
        )


def test_float32_networks_pass_the_check() -> None:
    model = opt().float()
    tokens = torch.randint(31, (8, 20), generator=torch.Generator().manual_seed(1))
    held = token_gradients(
        around(model, tokens, linear_names(model)), generator=torch.Generator().manual_seed(0)
    )
    assert held.samples == 8
    assert held.dtype == torch.float32
