"""Mask sources and routing: what is drawn, how an adversary ascends, and how its state resumes."""

from __future__ import annotations

import itertools

import pytest
import torch
from component_networks import TOKENS, mixed
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.components import Fresh, Merged, Monitor, Persistent, Rows, Stochastic
from assay.mechanisms.components.masks import make_mask, run_masked
from assay.mechanisms.components.reconstruction import climb_ladder, open_scene, reconstruct
from assay.mechanisms.components.scene import Scene, diverge
from assay.mechanisms.components.sources import Sources


def scene(seed: int = 0, divergence: str = "mse", components: int = 3) -> Scene:
    model, found = mixed(components)
    generator = torch.Generator().manual_seed(seed)
    return open_scene(model, found, TOKENS, divergence, generator)  # type: ignore[arg-type]


def test_drawn_sources_cover_every_position_component_and_delta():
    drawn = scene(components=40).drawn()
    for entry in drawn.values():
        assert entry.shape == (*TOKENS.shape, 41)
        assert 0 <= float(entry.min()) < 0.1
        assert 0.9 < float(entry.max()) <= 1
        assert len(entry.unique()) == entry.numel()
    for entry in scene(components=40).shared().values():
        assert entry.shape == (41,)


def test_binary_sources_are_at_either_end_with_equal_probability():
    drawn = scene(components=400).drawn("binary")
    for entry in drawn.values():
        assert entry.shape == (*TOKENS.shape, 401)
        assert entry.unique().tolist() == [0, 1]
        deviation = 0.5 / entry.numel() ** 0.5
        assert float(entry.mean()) == pytest.approx(0.5, abs=4 * deviation)


def test_the_loss_of_a_scene_is_the_mean_divergence_of_the_masked_run():
    for kind in ("mse", "kl"):
        own = scene(divergence=kind)
        drawn = own.drawn()
        masks = {
            name: make_mask(own.importance[name], drawn[name][..., :-1], drawn[name][..., -1])
            for name in drawn
        }
        with torch.no_grad():
            output = run_masked(own.model, TOKENS, own.found, masks)
            clean = own.model(TOKENS)
            if kind == "mse":
                expected = ((output - clean) ** 2).mean()
            else:
                p, q = clean.softmax(-1), output.softmax(-1)
                expected = (p * (p / q).log()).sum(-1).mean()
        torch.testing.assert_close(own.loss(drawn, dict.fromkeys(drawn)), expected)


def test_kl_is_zero_at_the_clean_output_and_never_negative():
    clean = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert not diverge(clean, clean, "kl").any()
    assert (diverge(clean + torch.randn_like(clean), clean, "kl") > 0).all()


def test_layerwise_routing_masks_one_site_at_a_time():
    own = scene()
    names = list(own.importance)
    assert [list(way) for way in own.routes("layerwise")] == [[name] for name in names]
    assert [list(way) for way in own.routes("all")] == [names]


def test_subset_routing_draws_k_uniformly_and_then_k_of_the_sites():
    model, found = mixed()
    tokens = torch.zeros(4000, 3, dtype=torch.long)
    own = open_scene(model, found, tokens, "mse", torch.Generator().manual_seed(0))
    (way,) = own.routes("subset")
    routed = torch.stack(list(way.values()), -1).double()
    counts = routed.sum(-1).flatten()
    for k in (1, 2, 3):
        assert float((counts == k).double().mean()) == pytest.approx(1 / 3, abs=0.02)
    torch.testing.assert_close(
        routed.mean((0, 1)), torch.full((3,), 2 / 3, dtype=torch.float64), rtol=0, atol=0.02
    )
    one = routed[routed.sum(-1) == 1]
    torch.testing.assert_close(
        one.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0.03
    )


def test_a_fresh_adversary_ascends_and_more_budget_finds_more():
    own = scene()
    routes = dict.fromkeys(own.importance)
    state = own.generator.get_state()
    start = own.loss(own.shared(), routes)
    reached = []
    for steps in (1, 5, 40):
        own.generator.set_state(state)
        reached.append(float(own.loss(own.attacked(Fresh(steps, 0.05), routes), routes).detach()))
    assert float(start.detach()) < reached[0] < reached[1] < reached[2]


def test_a_fresh_adversary_finds_the_worst_case_of_a_grid():
    own = scene(components=1)
    names = list(own.importance)
    worst = 0.0
    for values in itertools.product((0.0, 0.5, 1.0), repeat=6):
        levels = torch.tensor(values, dtype=torch.float64)
        sources = {name: levels[2 * i : 2 * i + 2] for i, name in enumerate(names)}
        worst = max(worst, float(own.loss(sources, dict.fromkeys(names)).detach()))
    best = 0.0
    for seed in range(6):
        own.generator.manual_seed(seed)
        attacked = own.attacked(Fresh(40, 0.05), dict.fromkeys(names))
        assert all(((entry >= 0) & (entry <= 1)).all() for entry in attacked.values())
        best = max(best, float(own.loss(attacked, dict.fromkeys(names)).detach()))
    assert best >= 0.999 * worst


def test_a_persistent_adversary_ascends_with_adam_and_clips():
    sites = mixed()[1].sites
    plan = Persistent(rate=0.3, betas=(0.5, 0.99))
    found = Sources(sites, plan, torch.Generator().manual_seed(0)).double()
    before = {name: leaf.detach().clone() for name, leaf in found.leaves().items()}
    generator = torch.Generator().manual_seed(1)
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    value = dict(before)
    for step in range(1, 4):
        gradients = {
            name: torch.randn(entry.shape, generator=generator, dtype=torch.float64)
            for name, entry in before.items()
        }
        found.ascend(gradients)
        for name, g in gradients.items():
            first[name] = 0.5 * first.get(name, 0.0) + 0.5 * g
            second[name] = 0.99 * second.get(name, 0.0) + 0.01 * g**2
            move = first[name] / (1 - 0.5**step)
            move = move / ((second[name] / (1 - 0.99**step)).sqrt() + 1e-8)
            value[name] = (value[name] + 0.3 * move).clamp(0, 1)
        for name, leaf in found.leaves().items():
            torch.testing.assert_close(leaf.detach(), value[name], rtol=1e-6, atol=1e-7)
    assert any(bool((entry == 1).any()) for entry in value.values())


def test_the_state_of_an_adversary_resumes_where_it_was():
    sites, plan = mixed()[1].sites, Persistent(rate=0.1)
    one = Sources(sites, plan, torch.Generator().manual_seed(0))
    gradients = {name: torch.randn_like(leaf) for name, leaf in one.leaves().items()}
    one.ascend(gradients)
    other = Sources(sites, plan, torch.Generator().manual_seed(9))
    other.load_state_dict(one.state_dict())
    for found in (one, other):
        found.ascend({name: 1 - entry for name, entry in gradients.items()})
    for name, leaf in one.leaves().items():
        assert torch.equal(leaf, other.leaves()[name])


def test_sources_with_positions_have_one_for_each():
    sites = mixed()[1].sites
    found = Sources(sites, Persistent(positions=3), torch.Generator().manual_seed(0))
    assert {leaf.shape for leaf in found.leaves().values()} == {(3, 4)}


def test_merged_examples_take_all_of_one_source():
    own = scene()
    chosen = own.chosen(0.5)
    assert {entry.shape for entry in chosen.values()} == {(2, 1, 1)}
    first, *others = chosen.values()
    assert all(torch.equal(first, entry) for entry in others)
    assert own.chosen(1.0)["embed"].all()
    assert not own.chosen(0.0)["embed"].any()


def test_watched_masks_are_what_they_are_called():
    own = scene()
    for name, g in own.importance.items():
        assert torch.equal(own.watched(Monitor("ci"))[name].components, g)
        assert torch.equal(own.watched(Monitor("rounded"))[name].components, (g > 0.5).double())
        assert (own.watched(Monitor("unmasked"))[name].components == 1).all()
        assert not own.watched(Monitor("zero"))[name].components.any()
        assert not own.watched(Monitor("zero"))[name].delta.any()


def test_reconstruction_measures_cross_entropy_between_the_network_and_nothing():
    labels = torch.tensor([[0, 1, -100], [2, 0, 1]])
    own = scene(divergence="kl")
    table = reconstruct(own, labels)
    rows = {row["masks"]: row for row in table.to_dicts()}
    assert list(rows) == ["unmasked", "ci", "rounded", "zero", "stochastic"]
    assert rows["zero"]["ce_unrecovered"] == pytest.approx(1)
    kept = labels != -100
    with torch.no_grad():
        ce = []
        for output in (own.model(TOKENS), own.model.out.bias.expand(2, 3, 3)):
            logs = output.log_softmax(-1)
            ce.append(-logs[kept].gather(-1, labels[kept].unsqueeze(-1)).mean())
    assert rows["zero"]["ce_difference"] == pytest.approx(float(ce[1] - ce[0]))
    ratio = rows["ci"]["ce_difference"] / rows["zero"]["ce_difference"]
    assert rows["ci"]["ce_unrecovered"] == pytest.approx(ratio)


def test_the_ladder_states_its_budget():
    table = climb_ladder(scene(), (2, 8))
    assert (table["steps"] * table["rate"]).to_list() == [2.0, 2.0]
    assert (table["divergence"] > 0).all()


def test_rows_count_what_they_stand_for():
    model, found = mixed()
    weights = torch.tensor([[1.0, 2.0, 1.0], [4.0, 1.0, 1.0]], dtype=torch.float64)
    own = open_scene(
        model, found, Rows(TOKENS, weights, 10), "mse", torch.Generator().manual_seed(0)
    )
    sources = own.shared()
    each = []
    for index, weight in enumerate(weights.flatten().tolist()):
        place = divmod(index, 3)
        one = open_scene(model, found, TOKENS[place].reshape(1, 1), "mse", own.generator)
        each.append(weight * one.loss(sources, dict.fromkeys(sources)))
    torch.testing.assert_close(own.loss(sources, dict.fromkeys(sources)), sum(each) / 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fresh(0, 0.1), "at least 1 step"),
        (lambda: Fresh(3, 0.0), "rate above 0"),
        (lambda: Persistent(rate=-1.0), "rate above 0"),
        (lambda: Persistent(warm=-1), "warm of at least 0"),
        (lambda: Merged(share=1.5), r"share must lie in \[0, 1\]"),
        (lambda: Monitor("cii"), "did you mean ci"),
        (lambda: Stochastic("binery"), "did you mean binary"),
    ],
)
def test_bad_sources_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
