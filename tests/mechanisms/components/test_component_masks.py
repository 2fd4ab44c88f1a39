"""Masked passes against loops over positions and components in float64: linear, Conv1D and
embedding sites, the delta part, routing, tied matrices."""

from __future__ import annotations

import pytest
import torch
from component_networks import (
    TOKENS,
    Mixed,
    Tied,
    draw_masks,
    mixed,
    plain_product,
    run_mixed_plainly,
    tied,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from assay.errors import InputError
from assay.mechanisms.components import decomposition, match_sites
from assay.mechanisms.components.decomposition import read_clean
from assay.mechanisms.components.masks import Mask, make_mask, run_masked
from assay.mechanisms.components.sites import matrix_of


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_masked_pass_is_the_plain_loop(routed, seed):
    model, found = mixed()
    masks = draw_masks(found, routed=routed, seed=seed)
    expected = run_mixed_plainly(model, found, masks)
    torch.testing.assert_close(
        run_masked(model, TOKENS, found, masks), expected, rtol=1e-12, atol=1e-12
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), components=st.integers(1, 9))
def test_a_masked_pass_is_the_plain_loop_for_any_number_of_components(seed, components):
    model, found = mixed(components, generator=torch.Generator().manual_seed(seed))
    masks = draw_masks(found, routed=bool(seed % 2), seed=seed)
    expected = run_mixed_plainly(model, found, masks)
    torch.testing.assert_close(
        run_masked(model, TOKENS, found, masks), expected, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masks_of_one_and_masks_that_route_nothing_are_the_model_bit_for_bit(dtype):
    model = Mixed().to(dtype)
    found = decomposition(model, ["embed", "up", "out"], 4)
    plain = model(TOKENS)
    ones = {
        site.name: Mask(torch.ones(*TOKENS.shape, 4), torch.ones(TOKENS.shape))
        for site in found.sites
    }
    nowhere = {
        name: Mask(entry.components * 0, entry.delta * 0, torch.zeros(TOKENS.shape, dtype=bool))
        for name, entry in ones.items()
    }
    for masks in (ones, nowhere, {}):
        output = run_masked(model, TOKENS, found, masks)
        assert output.dtype == dtype
        assert torch.equal(output, plain)


def test_components_and_delta_add_up_to_the_matrix():
    model, found = mixed()
    for name, delta in found.deltas(model).items():
        v, u = found.factors(name)
        total = delta + sum(torch.outer(v[:, c], u[c]) for c in range(3))
        torch.testing.assert_close(total, found.site(name).matrix(model), rtol=1e-12, atol=1e-12)


def test_everything_off_leaves_the_biases():
    model, found = mixed()
    zero = torch.zeros(*TOKENS.shape, dtype=torch.float64)
    masks = {site.name: Mask(zero[..., None].expand(-1, -1, 3), zero) for site in found.sites}
    expected = (model.out.bias).expand(*TOKENS.shape, 3)
    torch.testing.assert_close(run_masked(model, TOKENS, found, masks), expected)


def test_a_mask_lies_between_importance_and_one():
    g = torch.tensor([[0.0, 0.25, 1.0]], dtype=torch.float64)
    r = torch.tensor([0.5, 0.5, 0.2], dtype=torch.float64)
    mask = make_mask(g, r, torch.tensor(0.3))
    torch.testing.assert_close(mask.components, torch.tensor([[0.5, 0.625, 1.0]]).double())
    assert float(mask.delta) == pytest.approx(0.3)


def test_a_tied_matrix_is_one_site_that_masks_at_all_its_uses():
    model, found = tied()
    (site,) = found.sites
    assert (site.name, site.tied, site.lookup) == ("embed", ("head",), True)
    assert [use.transposed for use in site.uses] == [False, True]
    masks = draw_masks(found, routed=False)
    v, u = found.factors("embed")
    with torch.no_grad():
        rows = []
        for place in ((i, j) for i in range(2) for j in range(3)):
            x = nn.functional.one_hot(TOKENS[place], 7).double()
            x = torch.tanh(plain_product(x, model.embed.weight, v, u, masks["embed"], place))
            rows.append(plain_product(x, model.embed.weight.T, u.T, v.T, masks["embed"], place))
    expected = torch.stack(rows).reshape(2, 3, 7)
    torch.testing.assert_close(run_masked(model, TOKENS, found, masks), expected)


def test_an_embedding_is_looked_up_and_never_multiplied():
    model = nn.Sequential(nn.Embedding(200_000, 2))
    found = decomposition(model, "0", 3, importance="shared", hidden=2)
    reading = read_clean(model, TOKENS, found.sites)
    inner = found.inner(reading)["0"]
    assert torch.equal(inner, found.V[0][TOKENS])


def test_sites_are_found_by_patterns_in_the_order_of_the_model():
    model = Mixed()
    sites = match_sites(model, {"out": 2, "e*": 5})
    assert [(site.name, site.components) for site in sites] == [("embed", 5), ("out", 2)]
    assert [site.lookup for site in sites] == [True, False]
    shapes = {site.name: (site.inputs, site.outputs) for site in match_sites(model, "*", 2)}
    assert shapes == {"embed": (7, 4), "up": (4, 5), "out": (5, 3)}


def test_the_matrix_is_the_one_that_multiplies_rows():
    generator = torch.Generator().manual_seed(0)
    for layer, x in (
        (nn.Linear(4, 3), torch.randn(2, 4, generator=generator)),
        (Conv1D(3, 4), torch.randn(2, 4, generator=generator)),
    ):
        layer.bias.data.zero_()
        torch.testing.assert_close(layer(x), x @ matrix_of(layer))


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x):
        return self.layers[1](self.layers[0](x)).square()


@pytest.mark.parametrize(
    ("patterns", "components", "message"),
    [
        ("layer.*", 3, r"unknown module path .*'layer\.\*'; did you mean layers\.1, layers\.0"),
        (["layers.0", "nothing"], 3, "unknown module path .*'nothing'"),
        ("layers.*", 0, "components of 'layers.*' is 0; a site needs at least 1"),
        ("layers.*", None, "components is missing"),
        ([], 3, "no patterns were given"),
        ({"layers.0": 3, "layers.*": 4}, None, "give it 3 and 4 components"),
    ],
)
def test_bad_patterns_are_refused(patterns, components, message):
    with pytest.raises(InputError, match=message):
        decomposition(Squares(), patterns, components)


def test_tied_matrices_with_two_numbers_of_components_are_refused():
    with pytest.raises(InputError, match="embed, head share one matrix and so are one site"):
        match_sites(Tied(), {"embed": 3, "head": 4})


def test_an_embedding_that_rescales_its_rows_is_refused():
    with pytest.raises(InputError, match="max_norm"):
        match_sites(nn.Sequential(nn.Embedding(4, 2, max_norm=1.0)), "0", 2)


def test_a_site_that_the_model_does_not_reach_is_named():
    model = Squares()
    model.unused = nn.Linear(3, 3)
    found = decomposition(model, ["unused"], 2)
    with pytest.raises(InputError, match="'unused' was not reached"):
        found.importances(model, torch.zeros(2, 3))
