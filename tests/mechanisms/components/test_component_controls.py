"""Shares of a batch, singular parts at equal L0, and one component as two halves."""

from __future__ import annotations

import pytest
import torch
from component_networks import TOKENS, draw_masks, mixed, tied

from assay.errors import InputError
from assay.mechanisms.components import (
    Faithfulness,
    LpMinimality,
    Objective,
    Problem,
    Recon,
    Rows,
    decomposition,
)
from assay.mechanisms.components.halves import split_component
from assay.mechanisms.components.masks import Mask, run_masked
from assay.mechanisms.components.reconstruction import open_scene, reconstruct
from assay.mechanisms.components.singular import GATES, gate_scene, singular_parts


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("routing", ["all", "subset"])
def test_the_losses_of_shares_add_up_to_that_of_the_whole(world, routing):
    """The draws of the parts are the rows of the draws of the whole, padding included."""
    model, found = mixed()
    tokens = torch.randint(7, (5, 3), generator=torch.Generator().manual_seed(0))
    weights = (tokens != 0).double()
    whole = Rows(tokens, weights, int(weights.sum()))

    def loss(rows):
        scene = open_scene(model, found, rows, "kl", torch.Generator().manual_seed(4))
        (routes,) = scene.routes(routing)
        return scene.loss(scene.drawn(), routes)

    parts = [loss(whole.share(rank, world)) for rank in range(world)]
    torch.testing.assert_close(sum(parts), loss(whole), rtol=1e-12, atol=0)
    with pytest.raises(InputError, match="5 examples cannot be split over 6 processes"):
        whole.share(0, 6)


@pytest.mark.parametrize("world", [2, 3])
def test_the_gradients_of_shares_add_up_to_that_of_the_whole(world):
    """With a sum over processes that adds other shares without their gradient; logged terms hold
    what the sum gives."""
    model, found = mixed()
    tokens = torch.randint(7, (6, 3), generator=torch.Generator().manual_seed(0))
    objective = Objective((Recon(routing="subset"),), LpMinimality(0.3, p=0.4), Faithfulness(0.2))

    def gradient(rows, **group):
        found.zero_grad()
        drawn = torch.Generator().manual_seed(4)
        loss, terms = Problem(model, found, objective, drawn, **group)(rows, 0.5)
        loss.backward()
        return torch.cat([own.grad.flatten() for own in found.parameters()]), terms

    def reduce(own):
        return own + 10 * own.detach()

    whole, terms = gradient(Rows(tokens))
    shares = [
        gradient(Rows(tokens).share(rank, world), reduce=reduce, world=world)
        for rank in range(world)
    ]
    torch.testing.assert_close(sum(own for own, _ in shares), whole, rtol=1e-9, atol=1e-12)
    for name in ("stochastic_subset", "minimality"):
        total = sum(own[name] for _, own in shares)
        torch.testing.assert_close(total, 11 * terms[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [mixed, tied])
def test_singular_parts_are_the_matrices(make):
    model, found = make()
    parts = singular_parts(model, found)
    for site in parts.sites:
        v, u = parts.factors(site.name)
        matrix = site.matrix(model).detach()
        torch.testing.assert_close(v @ u, matrix.float(), rtol=1e-4, atol=1e-5)
        assert site.components == min(matrix.shape)
        lengths = v.norm(dim=0) * u.norm(dim=1)
        torch.testing.assert_close(
            lengths, torch.linalg.svdvals(matrix).float(), rtol=1e-4, atol=1e-5
        )
    assert [site.tied for site in parts.sites] == [site.tied for site in found.sites]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("together", [False, True])
def test_gates_keep_the_strongest_parts_and_as_many_as_asked(gate, together):
    model, found = mixed()
    model = model.float()
    found = found.float()
    tokens = torch.randint(7, (6, 4), generator=torch.Generator().manual_seed(1))
    kept = torch.arange(4) < 3
    rows = Rows(tokens, kept.expand(6, 4).float(), 18)
    scene = open_scene(model, found, rows, "kl", torch.Generator())
    labels = torch.where(kept, tokens % 3, -100)
    wanted = {"embed": 2.0, "up": 1.0, "out": 1.5}
    parts = singular_parts(model, found)
    own = gate_scene(scene, parts, gate, wanted, labels, together=together)
    counts = {name: float(g.sum()) / 18 for name, g in own.importance.items()}
    assert all(not bool(g[:, 3].any()) for g in own.importance.values())
    if together:
        assert sum(counts.values()) == pytest.approx(4.5)
    else:
        assert counts == pytest.approx(wanted)
    if gate == "size" and not together:
        h = parts.inner(scene.reading)["up"]
        strength = h.abs() * parts.factors("up")[1].norm(dim=1)
        for count in (0.5, 1.0, 1.5, 2.0, 2.5):
            chosen = gate_scene(scene, parts, gate, wanted | {"up": count}, labels)
            on = chosen.importance["up"] > 0
            assert strength[on].min() >= strength[~on & kept[:, None]].max()
    full = dict.fromkeys(wanted, 4.0) | {"out": 3.0}
    everything = gate_scene(scene, parts, gate, full, labels)
    table = reconstruct(everything)
    assert table.filter(table["masks"] == "ci")["divergence"].item() == pytest.approx(0, abs=1e-5)
    with pytest.raises(InputError, match="unknown gate"):
        gate_scene(scene, parts, "loudness", wanted, labels)


@pytest.mark.parametrize("name", ["scalar", "vector", "shared", "relative", "transformer"])
@pytest.mark.parametrize("site", ["embed", "up"])
def test_two_halves_do_what_the_whole_did(name, site):
    model, _ = mixed()
    sizes = {"width": 4, "heads": 1} if name == "transformer" else {}
    found = decomposition(
        model, ["embed", "up", "out"], 3, importance=name, hidden=4, **sizes
    ).double()
    halves = split_component(found, site, 1)
    assert [own.components for own in halves.sites] == [
        3 + (own.name == site) for own in found.sites
    ]
    one, two = found.importances(model, TOKENS), halves.importances(model, TOKENS)
    for key in one:
        torch.testing.assert_close(two[key][..., :3], one[key])
    assert torch.equal(two[site][..., 3], two[site][..., 1])
    masks = draw_masks(found, routed=False)
    twice = dict(masks)
    own = masks[site].components
    twice[site] = Mask(torch.cat([own, own[..., 1:2]], -1), masks[site].delta)
    torch.testing.assert_close(
        run_masked(model, TOKENS, halves, twice), run_masked(model, TOKENS, found, masks)
    )
    with pytest.raises(InputError, match="no site"):
        split_component(found, "nowhere", 0)
