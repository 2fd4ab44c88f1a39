"""Importance functions against loops over components, rows and sites."""

from __future__ import annotations

import pytest
import torch
from component_networks import TOKENS, mixed
from torch import Tensor
from torch.nn import functional as f

from assay.errors import InputError
from assay.mechanisms.components import WeightSite, lower
from assay.mechanisms.components import importance as module
from assay.mechanisms.components import scalar as scalar_module
from assay.mechanisms.components.decomposition import read_clean
from assay.mechanisms.components.importance import IMPORTANCES, make_importance
from assay.mechanisms.components.scalar import scalar_nets
from assay.mechanisms.components.sites import Use

SITES = (
    WeightSite("first", (Use("first"),), 4, 5, 3),
    WeightSite("second", (Use("second"),), 5, 2, 6),
    WeightSite("words", (Use("words", lookup=True),), 9, 2, 5),
)


def readings(*lead: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def draw(width: int) -> Tensor:
        return torch.randn(*lead, width, generator=generator, dtype=torch.float64)

    inputs = {"first": draw(4), "second": draw(5)}
    inputs["words"] = torch.randint(9, lead, generator=generator)
    return inputs, {site.name: draw(site.components) for site in SITES}


def make(name: str, **options: int):
    found = make_importance(name, SITES, torch.Generator().manual_seed(0), **options).double()
    for parameter in found.parameters():  # biases too
        noise = torch.Generator().manual_seed(parameter.numel())
        drawn = torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
        parameter.data.add_(0.1 * drawn)
    return found


def test_scalar_nets_are_one_net_per_component():
    found, (inputs, inner) = make("scalar", hidden=7), readings(2, 3)
    answer = found(inputs, inner)
    for index, site in enumerate(SITES):
        w1, b1, w2, b2 = (entry[index] for entry in (found.w1, found.b1, found.w2, found.b2))
        for place in ((i, j) for i in range(2) for j in range(3)):
            for c in range(site.components):
                h = inner[site.name][(*place, c)]
                expected = (w2[c] * f.gelu(w1[c] * h + b1[c])).sum() + b2[c]
                torch.testing.assert_close(answer[site.name][(*place, c)], expected)


def test_vector_nets_read_the_whole_input_of_their_site():
    found, (inputs, inner) = make("vector", hidden=4), readings(2, 3)
    answer = found(inputs, inner)
    for index, site in enumerate(SITES):
        w1, b1, w2, b2 = (entry[index] for entry in (found.w1, found.b1, found.w2, found.b2))
        rows = inner[site.name] if site.lookup else inputs[site.name]
        for c in range(site.components):
            expected = f.gelu(rows @ w1[c].T + b1[c]) @ w2[c] + b2[c]
            torch.testing.assert_close(answer[site.name][..., c], expected)


def test_shared_nets_give_all_components_from_one_hidden_layer():
    found, (inputs, inner) = make("shared", hidden=4), readings(5)
    answer = found(inputs, inner)
    for index, site in enumerate(SITES):
        rows = inner[site.name] if site.lookup else inputs[site.name]
        hidden = f.gelu(rows @ found.w1[index] + found.b1[index])
        torch.testing.assert_close(answer[site.name], hidden @ found.w2[index] + found.b2[index])


def test_relative_nets_read_what_a_component_writes_beside_the_whole():
    """z = a log(|h_c| |U_c| / |h U| + 1e-4) and a net on the normed input, position by position."""
    model, found = mixed(importance="relative", hidden=4)
    nets = found.importance
    for index, entry in enumerate([*nets.w2, *nets.slope]):
        entry.data += 0.3 * torch.randn(
            entry.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64
        )
    reading = read_clean(model, TOKENS, found.sites)
    inner, logits = found.inner(reading), found.logits(reading)
    for index, site in enumerate(found.sites):
        _, u = found.factors(site.name)
        rows = inner[site.name] if site.lookup else reading.inputs[site.name]
        for place in ((i, j) for i in range(2) for j in range(3)):
            h, x = inner[site.name][place], rows[place]
            normed = x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt()
            hidden = f.gelu(normed @ nets.w1[index] + nets.b1[index])
            net = hidden @ nets.w2[index] + nets.b2[index]
            written = torch.stack([(h[c] * u[c]).norm() for c in range(3)])
            share = written / (h @ u).norm()
            expected = nets.slope[index] * (share + 1e-4).log() + net
            torch.testing.assert_close(logits[site.name][place], expected)


def test_relative_nets_start_with_the_largest_shares_above_one_half():
    model, found = mixed(8, importance="relative", hidden=4)
    reading = read_clean(model, TOKENS, found.sites)
    inner = found.inner(reading)
    shares = found.shares(inner)
    found.importance.spread(inner, torch.Generator(), shares)
    z = torch.cat([entry.flatten() for entry in found.logits(reading).values()])
    every = torch.cat([entry.flatten() for entry in shares.values()])
    assert torch.equal(z.argsort(stable=True), every.argsort(stable=True))
    assert float((z > 0.5).double().mean()) == pytest.approx(module.KEPT, abs=1 / len(z))


def test_the_transformer_reads_all_sites_and_both_directions():
    found, (inputs, inner) = make("transformer", width=8, heads=2, hidden=16), readings(2, 6)
    before = found(inputs, inner)
    for changed, entries in (("second", inputs), ("words", inner)):
        entries = {**entries, changed: entries[changed].clone()}
        entries[changed][0, 4] = entries[changed][0, 4] * -1 + 0.3
        after = found(*((entries, inner) if changed == "second" else (inputs, entries)))
        for site in SITES:
            moved = (after[site.name] - before[site.name]).abs().amax(-1)
            assert (moved[0] > 1e-9).all(), (changed, site.name)  # earlier positions too
            assert not moved[1].any()


def test_the_transformer_is_the_plain_one():
    found, (inputs, inner) = make("transformer", width=8, heads=2, hidden=16), readings(1, 4)
    with torch.no_grad():
        stream = torch.zeros(4, 8, dtype=torch.float64)
        for index, site in enumerate(SITES):
            rows = (inner[site.name] if site.lookup else inputs[site.name])[0]
            stream += rows / (rows.square().mean(-1, keepdim=True) + EPS).sqrt() @ found.read[index]
        for block in found.body.blocks:
            normed = stream / (stream.square().mean(-1, keepdim=True) + EPS).sqrt()
            q, k, v = (normed @ block.qkv).reshape(4, 3, 2, 4).unbind(1)
            mixed_heads = []
            for head in range(2):
                turned = [plain_rotation(part[:, head]) for part in (q, k)]
                weights = (turned[0] @ turned[1].T / 2).softmax(-1)
                mixed_heads.append(weights @ v[:, head])
            stream = stream + torch.cat(mixed_heads, -1) @ block.out
            normed = stream / (stream.square().mean(-1, keepdim=True) + EPS).sqrt()
            hidden = f.gelu(normed @ block.up + block.up_bias)
            stream = stream + hidden @ block.down + block.down_bias
        answer = found(inputs, inner)
        for index, site in enumerate(SITES):
            expected = stream @ found.write[index] + found.bias[index]
            torch.testing.assert_close(answer[site.name][0], expected, rtol=1e-9, atol=1e-9)


EPS = torch.finfo(torch.float64).eps


def plain_rotation(x: Tensor) -> Tensor:
    rows = []
    for position, row in enumerate(x):
        turned = row.clone()
        for pair in range(2):
            angle = torch.tensor(position * 10000.0 ** (-pair / 2), dtype=torch.float64)
            a, b = row[pair], row[pair + 2]
            turned[pair] = a * angle.cos() - b * angle.sin()
            turned[pair + 2] = a * angle.sin() + b * angle.cos()
        rows.append(turned)
    return torch.stack(rows)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_every_function_takes_any_positions(name):
    options = {"width": 8, "heads": 2} if name == "transformer" else {}
    found = make(name, hidden=4, **options)
    for lead in ((5,), (2, 3)):
        inputs, inner = readings(*lead)
        shares = {key: h.abs() for key, h in inner.items()} if found.reads_shares else None
        answer = found(inputs, inner, shares)
        assert {key: entry.shape for key, entry in answer.items()} == {
            key: entry.shape for key, entry in inner.items()
        }


@pytest.mark.parametrize("slice_size", [1, 1 << 30])
@pytest.mark.parametrize("name", ["scalar", "vector"])
def test_slices_change_neither_values_nor_gradients(name, slice_size, monkeypatch):
    inputs, inner = readings(4)

    def passed() -> list[Tensor]:
        found = make(name, hidden=4)
        leaves = {key: entry.clone().requires_grad_() for key, entry in inner.items()}
        answer = found(inputs, leaves)
        weights = {key: torch.linspace(-1, 1, entry[0].numel()) for key, entry in answer.items()}
        total = sum((answer[key] * weights[key]).square().sum() for key in answer)
        total.backward()
        gradients = [parameter.grad for parameter in found.parameters()]
        return [*(entry.detach() for entry in answer.values()), *gradients]

    expected = passed()
    monkeypatch.setattr(scalar_module, "SLICE", slice_size)
    monkeypatch.setattr(module, "SLICE", slice_size)
    for ours, theirs in zip(passed(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_fused_nets_have_the_gradients_of_the_plain_ones():
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 3), (3, 4), (3, 4), (3, 4), (3,))
    drawn = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]

    def plain(h, w1, b1, w2, b2):
        return (f.gelu(h.unsqueeze(-1) * w1 + b1) * w2).sum(-1) + b2

    torch.testing.assert_close(scalar_nets(*drawn), plain(*drawn))
    leaves = [entry.requires_grad_() for entry in drawn]
    assert torch.autograd.gradcheck(scalar_nets, leaves)
    assert torch.autograd.gradgradcheck(scalar_nets, leaves)
    ours = torch.autograd.grad(scalar_nets(*leaves).square().sum(), leaves)
    theirs = torch.autograd.grad(plain(*leaves).square().sum(), leaves)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)
    constants = [entry.detach() for entry in drawn]
    tangents = [torch.randn_like(entry) for entry in constants]
    for chosen in range(5):
        only = [t if i == chosen else torch.zeros_like(t) for i, t in enumerate(tangents)]
        _, one = torch.func.jvp(scalar_nets, tuple(constants), tuple(only))
        _, two = torch.func.jvp(plain, tuple(constants), tuple(only))
        torch.testing.assert_close(one, two)
    rows = torch.vmap(lambda h: scalar_nets(h, *constants[1:]))(constants[0])
    torch.testing.assert_close(rows, plain(*constants))


def test_importances_are_the_lower_squashing_of_the_logits_on_a_clean_run():
    model, found = mixed()
    logits = found.logits(read_clean(model, TOKENS, found.sites))
    for name, g in found.importances(model, TOKENS).items():
        assert g.shape == (*TOKENS.shape, 3)
        torch.testing.assert_close(g, lower(logits[name]))


def test_spread_nets_rise_with_the_size_of_their_input_to_one_at_the_largest():
    found, (inputs, inner) = make("scalar", hidden=8), readings(50)
    found.spread(inner, torch.Generator().manual_seed(0))
    for site in SITES:
        low, high = inner[site.name].amin(0), inner[site.name].amax(0)
        assert (low < 0).all()
        assert (high > 0).all()
        for end in (low, high):
            path = {
                **inner,
                site.name: torch.linspace(0, 1, 30, dtype=torch.float64)[:, None] * end,
            }
            values = found(inputs, path)[site.name]
            assert (values[0].abs() < 0.1).all()
            assert (values.diff(dim=0) > -0.02).all()
            assert (values < 1 + 1e-9).all()
        ends = found(inputs, {**inner, site.name: torch.stack([low, high])})[site.name]
        torch.testing.assert_close(ends.amax(0), torch.ones_like(high))


@pytest.mark.parametrize("name", ["vector", "shared", "transformer"])
def test_functions_that_do_not_read_inner_activations_stay_as_they_are(name):
    found, (_, inner) = make(name), readings(4)
    before = [parameter.clone() for parameter in found.parameters()]
    found.spread(inner, torch.Generator().manual_seed(0))
    for one, two in zip(found.parameters(), before, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_bad_importance_functions_are_refused():
    with pytest.raises(InputError, match="did you mean scalar"):
        make_importance("scaler", SITES, torch.Generator())
    with pytest.raises(InputError, match="hidden of the importance function must be at least 1"):
        make_importance("vector", SITES, torch.Generator(), hidden=0)
    with pytest.raises(InputError, match="width 9 cannot be split into 2 heads"):
        make_importance("transformer", SITES, torch.Generator(), width=9, heads=2)
