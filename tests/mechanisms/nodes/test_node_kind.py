"""The node kind against plain forward hooks written here, on every family and on a network
without positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import node_models
import pytest
import torch
from torch import Tensor, nn

from assay.attribution import Exact, Gradient, ablate
from assay.core.sites import read_sites, run_edited
from assay.core.target import Batch, target
from assay.errors import InputError
from assay.mechanisms.nodes import Nodes, nodes
from assay.targets import names
from assay.targets.metrics import logit_difference

HEADS = [
    "blocks.1.attn.hook_q",
    "blocks.1.attn.hook_k",
    "blocks.1.attn.hook_v",
    "blocks.0.attn.hook_z",
]
VECTORS = [
    "blocks.0.hook_mlp_out",
    "blocks.1.hook_attn_out",
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_resid_post",
]


def patched(
    model: nn.Module,
    clean: Batch,
    patch: Batch,
    ref: names.SiteRef,
    change: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The metric with the value at one site replaced by change(clean value, patch value), by
    plain torch hooks.
    """
    path, _, suffix = ref.site.partition(":")
    module = model.get_submodule(path)
    kept: list[Tensor] = []

    def value(out: Any) -> Tensor:
        return out if isinstance(out, Tensor) else out[0]

    def keep(*args: Any) -> None:
        kept.append(value(args[1][0] if suffix else args[2]))

    def swap(*args: Any) -> Any:
        out = args[1][0] if suffix else args[2]
        new = change(value(out), kept[0])
        if suffix:
            return (new, *args[1][1:])
        return new if isinstance(out, Tensor) else (new, *out[1:])

    install = module.register_forward_pre_hook if suffix else module.register_forward_hook
    handle = install(keep)
    with torch.no_grad():
        model(**patch.inputs)
    handle.remove()
    handle = install(swap)
    with torch.no_grad():
        metric = logit_difference(model(**clean.inputs), clean)
    handle.remove()
    return metric


def swap_one(ref: names.SiteRef, place: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    chosen: Any = (slice(None), *place)

    def change(now: Tensor, other: Tensor) -> Tensor:
        new = ref.split(now).clone()
        new[chosen] = ref.split(other)[chosen]
        return ref.merge(now, new)

    return change


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox parallel", "qwen3"])
@pytest.mark.parametrize("name", [*HEADS, *VECTORS])
def test_a_gate_of_zero_is_the_patch(family: str, name: str) -> None:
    model = node_models.build(family)
    clean, patch = node_models.batches()
    bound = nodes(target(model, logit_difference), clean, patch, [name])
    ref = names.resolve(model, name)
    base = logit_difference(model(**clean.inputs), clean).detach()
    places = [(2,), (4,)] if ref.heads is None else [(2, 0), (4, ref.heads - 1)]
    found = ablate(bound, name, torch.tensor(places))
    for row, place in zip(found, places, strict=True):
        expected = base - patched(model, clean, patch, ref, swap_one(ref, place))
        expected = torch.where(node_models.mask()[:, place[0]].bool(), expected, 0)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-9)


def test_names_of_nodes() -> None:
    clean, patch = node_models.batches()
    sites = [
        "blocks.1.attn.hook_z",
        "blocks.0.mlp.hook_post",
        "blocks.0.hook_mlp_out",
        "transformer.h.1.ln_2",
    ]
    bound = nodes(target(node_models.build("gpt2"), logit_difference), clean, patch, sites)
    assert bound.describe("blocks.1.attn.hook_z", (5, 3)) == "blocks.1.attn.hook_z[pos 5, head 3]"
    assert (
        bound.describe("blocks.0.mlp.hook_post", (5, 3))
        == "blocks.0.mlp.hook_post[pos 5, neuron 3]"
    )
    assert bound.describe("transformer.h.1.ln_2", (1,)) == "transformer.h.1.ln_2[pos 1]"
    assert list(bound.groups) == [
        "blocks.0.mlp.hook_post",
        "blocks.0.hook_mlp_out",
        "blocks.1.attn.hook_z",
        "transformer.h.1.ln_2",
    ]


def test_untouched_at_ones_bit_for_bit() -> None:
    model = node_models.build("llama", torch.float32)
    clean, patch = node_models.batches()
    bound = nodes(target(model, logit_difference), clean, patch, names.site_names(model))
    assert torch.equal(bound.values(bound.ones()), bound.values())


def test_padding_and_equal_positions_are_inactive() -> None:
    clean, patch = node_models.batches()
    bound = nodes(
        target(node_models.build("gpt2"), logit_difference),
        clean,
        patch,
        ["blocks.1.hook_resid_post", HEADS[1]],
    )
    differs = (clean.inputs["input_ids"] != patch.inputs["input_ids"]).int().cumsum(1) > 0
    expected = differs & node_models.mask().bool()
    assert not expected.all()
    assert expected.any()
    norms = bound.norms()
    assert torch.equal(norms["blocks.1.hook_resid_post"] > 0, expected)
    assert torch.equal(norms[HEADS[1]] > 0, expected[..., None].expand(-1, -1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_references(dtype: torch.dtype) -> None:
    model = node_models.build("gpt2", dtype)
    clean, patch = node_models.batches()
    name = "blocks.0.hook_mlp_out"
    bound = {
        key: nodes(target(model, logit_difference), clean, patch, [name], key)
        for key in ("counterfactual", "zero", "mean")
    }
    seen = {key: m.spots[name].base for key, m in bound.items()}
    assert torch.equal(seen["zero"], torch.zeros_like(seen["zero"]))
    last = seen["counterfactual"][:, 6][
        node_models.mask()[:, 6].bool()
    ]  # a position that only some examples reach
    torch.testing.assert_close(seen["mean"][0, 6], last.mean(0))
    own = nodes(target(model, logit_difference), clean, None, [name], "mean")
    assert not own.norms()[name][
        :, 0
    ].any()  # every prompt begins alike: their mean is that value, up to rounding
    assert own.norms()[name][:, 1:3].all()


class Plain(nn.Module):
    """No positions: two layers of a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def test_a_network_without_positions() -> None:
    model, x = Plain(), torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    bound = nodes(
        target(model, lambda out, batch: out[:, 0]),
        Batch(x),
        None,
        ["up", "down"],
        "zero",
        neurons=["up"],
    )
    assert bound.groups["up"].shape == (4, 5)
    assert bound.groups["down"].shape == (4,)
    assert bound.describe("down", ()) == "down"
    assert bound.describe("up", (2,)) == "up[neuron 2]"
    hidden = model.up(x).detach()
    exact = Exact().scores(bound).values["up"]
    for neuron in range(5):
        without = hidden.clone()
        without[:, neuron] = 0
        expected = (model(x) - model.down(torch.tanh(without)))[:, 0].detach()
        torch.testing.assert_close(exact[:, neuron].float(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        Exact().scores(bound).values["down"].float(), model(x)[:, 0].detach(), rtol=0, atol=1e-6
    )


def test_attribution_is_exact_where_the_metric_is_linear() -> None:
    model, x = (
        Plain().double(),
        torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )
    bound = nodes(
        target(model, lambda out, batch: out[:, 0]),
        Batch(x),
        Batch(x.flip(0)),
        ["down:input"],
        neurons=["down:input"],
    )
    gradient = Gradient().scores(bound)
    hidden = torch.tanh(model.up(x)).detach()
    expected = (hidden - hidden.flip(0)) * model.down.weight[0].detach()
    torch.testing.assert_close(gradient.values["down:input"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        gradient.indirect_effect()["down:input"], -expected, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        Exact().scores(bound).values["down:input"], expected, rtol=0, atol=1e-12
    )


def test_examples_can_be_taken() -> None:
    clean, patch = node_models.batches()
    bound = nodes(
        target(node_models.build("gpt2"), logit_difference),
        clean,
        patch,
        [*HEADS, *VECTORS],
        "mean",
    )
    part = bound.take(slice(1, 3))
    assert isinstance(part, Nodes)
    whole, piece = Gradient().scores(bound), Gradient().scores(part)
    for name in bound.groups:
        torch.testing.assert_close(
            piece.values[name], whole.values[name][1:3], rtol=1e-9, atol=1e-12
        )


def bad(message: str, **changes: Any) -> None:
    clean, patch = node_models.batches()
    model = node_models.build("gpt2")
    arguments: dict[str, Any] = {"clean": clean, "patch": patch, "sites": VECTORS, **changes}
    with pytest.raises(InputError, match=message):
        nodes(target(model, logit_difference), **arguments)


def test_bad_input() -> None:
    _, patch = node_models.batches()
    bad("did you mean .*resid_post", sites=["blocks.1.hook_resid_past"])
    bad("needs a patch batch", patch=None)
    bad("unknown reference 'zeros'", reference="zeros")
    bad("at least one site", sites=[])
    bad("list of at least one", sites="hook_embed")
    bad("named twice", sites=[VECTORS[0], VECTORS[0]])
    bad("name the same value", sites=["blocks.1.hook_mlp_out", "transformer.h.1.mlp"])
    bad("paired", patch=patch.take(slice(0, 2)))
    bad(
        "equal length",
        patch=Batch({**patch.inputs, "attention_mask": torch.ones_like(node_models.mask())}),
    )
    bad("is a parameter", sites=["transformer.h.0.mlp.c_fc.weight"])
    bad("with 4 examples", sites=["transformer.wpe"])
    bad("unknown site in neurons", neurons=["blocks.0.hook_mlp"])


def test_activations_that_are_not_finite_are_refused() -> None:
    clean, _ = node_models.batches()
    model = node_models.build("gpt2")
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, args, out: out / 0)
    with pytest.raises(InputError, match=r"activation at .*NaN or infinite"):
        nodes(target(model, logit_difference), clean, None, ["blocks.0.hook_mlp_out"], "zero")


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.ELU, nn.LeakyReLU])
@pytest.mark.parametrize("reference", ["counterfactual", "zero", "mean"])
def test_networks_that_compute_in_place(act: type[nn.Module], reference: Any) -> None:
    """The values of the patch run are those that its modules put out, not what became of them."""

    def scores(method: Exact | Gradient, *, inplace: bool) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        layers = [nn.Linear(3, 5), act(inplace=inplace), nn.Linear(5, 5), act(inplace=inplace)]
        model = nn.Sequential(*layers, nn.Linear(5, 2)).double()
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).double()
        clean, patch = torch.randn(2, 4, 3, generator=generator).double()
        other = None if reference == "zero" else Batch(patch)
        tested = target(model, lambda out, batch: out[:, 0] ** 2)
        bound = nodes(tested, Batch(clean), other, ["0", "2"], reference, neurons=["0"])
        return dict(method.scores(bound).values)

    for method in (Exact(), Gradient()):
        found, expected = (scores(method, inplace=inplace) for inplace in (True, False))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nodes_that_differ_by_rounding_alone_are_inactive(dtype: torch.dtype) -> None:
    """Runs agree up to eight units of the largest entry; more is a difference."""
    eps = torch.finfo(dtype).eps
    clean = torch.tensor([[1.0, -0.25, 0.5]]).to(dtype).repeat(6, 1)
    patch = clean.clone()
    for row, units in enumerate([0, 1, 4, 8, 16, 64]):
        patch[row, 0] += units * eps
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2, dtype=dtype))
    tested = target(model, lambda out, batch: out[:, 0])
    bound = nodes(tested, Batch(clean), Batch(patch), ["0"])
    assert bound.spots["0"].active.tolist() == [False, False, False, False, True, True]
    effects = Exact().scores(bound).values["0"]
    assert not effects[:4].any()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_sum_of_sites_is_gated_behind_its_first_summand(family: str) -> None:
    """The middle of a block is attention plus input: what a gate on attention changes is there
    when the gate on the middle acts, in whatever order the two are named.
    """
    model = node_models.build(family)
    clean, patch = node_models.batches()
    sites = ["blocks.1.hook_attn_out", "blocks.1.hook_resid_mid"]
    for given in (sites, sites[::-1]):
        bound = nodes(target(model, logit_difference), clean, patch, given)
        assert list(bound.groups) == sites
        gates = bound.ones()
        gates[sites[0]][:, 3] = 0.25
        gates[sites[1]][:, 3] = 0.5
        attention, middle = (names.resolve(model, name).site for name in sites)
        spots = [bound.spots[name] for name in sites]
        seen = read_sites(model, clean.inputs, [attention, middle])
        before = seen[middle].value - seen[attention].value
        now = seen[attention].value.clone()
        now[:, 3] -= 0.75 * spots[0].difference(seen[attention].value)[:, 3]
        total = before + now
        total[:, 3] -= 0.5 * spots[1].difference(total)[:, 3]
        swapped = run_edited(model, clean.inputs, {attention: lambda _: total - before})
        expected = logit_difference(swapped, clean).detach()
        torch.testing.assert_close(bound.values(gates), expected.double(), rtol=0, atol=1e-10)
