"""Edges between parts against one backward pass a part, and those against a network that is
written out by hand.
"""

from __future__ import annotations

from itertools import product

import cases
import node_models
import pytest
import torch
from cases import random_dictionary, tiny_batch, tiny_target

from assay.attribution import attribute
from assay.core.target import Target
from assay.dictionaries import Placed, make
from assay.edges import part_edges
from assay.edges.chains import find_chain, stations
from assay.edges.cut import run_cut
from assay.errors import InputError
from assay.mechanisms.features import features
from assay.targets.metrics import logit_difference

SHARED = ("parameter shift", "directions", "directions, divergence")


def some_nodes(bound, count=4):
    """Return parts of every group, evenly spread."""
    found = []
    for name, group in bound.groups.items():
        index = list(product(*map(range, group.axes)))
        found += [(name, entry) for entry in index[:: max(1, len(index) // count)]]
    return found


@pytest.mark.parametrize("case", [case for case in cases.CASES if case not in SHARED])
def test_edges_are_those_of_one_backward_pass_a_part(case):
    bound = cases.CASES[case]()
    nodes = some_nodes(bound)
    fast, slow = part_edges(bound, nodes), part_edges(bound, nodes, general=True)
    torch.testing.assert_close(fast.values, slow.values, rtol=1e-9, atol=1e-12)
    assert torch.equal(fast.metric, slow.metric)
    assert fast.metric.any()


def test_edges_are_the_chain_rule_of_a_network_by_hand():
    model = tiny_target()
    clean, patch = tiny_batch(4, positions=2, seed=1), tiny_batch(4, positions=2, seed=2)
    first, second = (random_dictionary(4, 5, seed).double() for seed in (0, 1))
    sites = "blocks.0", "blocks.1"
    placed = {
        site: Placed(dictionary, site, (site,))
        for site, dictionary in zip(sites, (first, second), strict=True)
    }
    bound = features(model, placed, clean, patch)
    network = model.model
    now = network.blocks[0](network.embed(clean.inputs)).detach()
    other = network.blocks[0](network.embed(patch.inputs)).detach()
    codes = first.encode(now) - first.encode(other)
    after = network.blocks[1](now).detach().requires_grad_()
    out = network.head(network.blocks[2](after)).mean(1)
    (gradient,) = torch.autograd.grad((out[:, 0] - 0.3 * out[:, 1] ** 2).sum(), after)
    for feature in range(5):
        nodes = [("blocks.1", (1, feature)), ("blocks.1 error", (1,))]
        found = part_edges(bound, nodes, [("blocks.0", (1, k)) for k in range(5)])
        for place, part in enumerate(("feature", "error")):
            leaf = now.clone().requires_grad_()
            value = network.blocks[1](leaf)
            codes_after = second.encode(value)
            if part == "feature":
                score = codes_after[..., feature] * (gradient @ second.W_dec[feature])
            else:
                score = ((value - second(value)) * gradient).sum(-1)
            (back,) = torch.autograd.grad(score[:, 1].sum(), leaf)
            expected = codes[:, 1] * (back[:, 1] @ first.W_dec.T)
            torch.testing.assert_close(found.values[:, :, place], expected.detach())


def placed_everywhere(model, size=9, kind="relu", hooks=("attn_out", "mlp_out", "resid_post")):
    layers = model.config.num_hidden_layers
    names = [f"blocks.{layer}.hook_{hook}" for layer in range(layers) for hook in hooks]
    options = {"k": 3} if kind == "topk" else {}
    return {
        name: Placed(random_dictionary(16, size, seed, kind, **options), name, (name,))
        for seed, name in enumerate(names)
    }


@pytest.mark.parametrize("family", ["gpt_neox parallel", "gemma2"])
def test_every_family_gives_the_edges_of_backward_passes(family):
    clean, patch = node_models.batches()
    model = Target(node_models.build(family), logit_difference)
    bound = features(model, placed_everywhere(model.model), clean, patch)
    nodes = [node for node in some_nodes(bound, 5) if node[1][0] > 0]
    fast, slow = part_edges(bound, nodes), part_edges(bound, nodes, general=True)
    assert (slow.values != 0).any(0).any(0).double().mean() > 0.3
    scale = slow.values.abs().max()
    # All but GPT-2 and NeoX compute the softmax in float32.
    torch.testing.assert_close(fast.values / scale, slow.values / scale, rtol=1e-6, atol=1e-7)
    small = part_edges(bound, nodes, budget=1)
    torch.testing.assert_close(small.values / scale, fast.values / scale, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["topk", "gated", "jumprelu", "normalised"])
def test_every_architecture_gives_the_edges_of_backward_passes(kind):
    clean, patch = node_models.batches()
    model = Target(node_models.build("gpt2"), logit_difference)
    placed = placed_everywhere(model.model, kind="relu" if kind == "normalised" else kind)
    if kind == "normalised":
        for name, entry in placed.items():
            inner = entry.dictionary
            made = make(
                "normalised", {"norm": "layer_norm", "inner": "relu", "config": inner.config()}
            )
            made.inner.load_state_dict(inner.state_dict())
            placed[name] = Placed(made.double(), name, (name,))
    bound = features(model, placed, clean, patch)
    nodes = [node for node in some_nodes(bound, 5) if node[1][0] > 0]
    fast, slow = part_edges(bound, nodes), part_edges(bound, nodes, general=True)
    scale = slow.values.abs().max()
    assert scale > 0
    torch.testing.assert_close(fast.values / scale, slow.values / scale, rtol=1e-8, atol=1e-10)


def test_attention_is_met_at_queries_keys_and_values():
    clean, patch = node_models.batches()
    for family in ("gpt2", "llama", "gemma2"):
        model = Target(node_models.build(family), logit_difference)
        hooks = ("resid_pre", "attn_out")
        bound = features(model, placed_everywhere(model.model, hooks=hooks), clean, patch)
        run = run_cut(bound)
        before, after = (
            bound.spots[f"blocks.1.hook_{hook}"].reads for hook in ("resid_pre", "attn_out")
        )
        value, leaves = run.seen[after].value, {before: run.leaves[before]}
        layers = stations(model.model)
        chain = find_chain(value, run.kept, layers, leaves)
        assert chain is not None
        assert set(chain.heads) == set(layers[1].heads)
        assert find_chain(value, run.kept, layers[2:], leaves) is None
        assert find_chain(value, run.kept | {layers[1].z: value * 2}, layers, leaves) is None


def test_heads_values_may_be_read_directly():
    clean, patch = node_models.batches()
    model = Target(node_models.build("gpt2"), logit_difference)
    hooks = ("resid_pre",)
    placed = placed_everywhere(model.model, hooks=hooks)
    for layer in range(3):
        name = f"blocks.{layer}.attn.hook_z"
        placed[name] = Placed(random_dictionary(16, 6, layer), name, (name,))
    bound = features(model, placed, clean, patch)
    nodes = [node for node in some_nodes(bound, 5) if node[1][0] > 0]
    fast, slow = part_edges(bound, nodes), part_edges(bound, nodes, general=True)
    assert slow.values.any()
    torch.testing.assert_close(fast.values, slow.values, rtol=1e-9, atol=1e-12)


def test_edges_into_a_part_add_up_to_its_attribution_where_the_way_is_linear():
    """Of an MLP and of the residual stream before it into the residual stream after it."""
    clean, patch = node_models.batches()
    model = Target(node_models.build("gpt2"), logit_difference)
    hooks = ("mlp_out", "attn_out", "resid_pre", "resid_post")
    placed = placed_everywhere(model.model, hooks=hooks)
    placed = {name: placed[name] for name in placed if not name.endswith(".hook_resid_pre")}
    bound = features(model, placed, clean, patch)
    last = "blocks.2.hook_resid_post"
    down = [(last, (position, k)) for position in range(1, 7) for k in range(9)]
    down += [(f"{last} error", (position,)) for position in range(1, 7)]
    before = [
        f"blocks.{place}" for place in ("1.hook_resid_post", "2.hook_attn_out", "2.hook_mlp_out")
    ]
    up = [
        (name, index)
        for name in bound.groups
        if name.removesuffix(" error") in before
        for index in product(*map(range, bound.groups[name].axes))
    ]
    for switches in ("local", "secant"):
        found = part_edges(bound, down, up, switches=switches)
        scores = attribute(bound)
        expected = torch.stack(
            [scores.values[name][(slice(None), *index)] for name, index in down], -1
        )
        errors = (found.values.sum(1) - expected).abs()
        features_apart = errors[:, : 6 * 9].max() / expected.abs().max()
        if switches == "secant":
            switched = _switched(bound, last, down[: 6 * 9])
            assert switched.any()
            kept = errors[:, : 6 * 9][switched].max() / expected.abs().max()
            assert kept < 1e-9
        else:
            assert features_apart > 1e-4  # gates that switch have no derivative


def _switched(bound, name, nodes):
    site = bound.spots[name].reads
    dictionary = bound.dictionaries[name].dictionary
    now = dictionary.encode(bound._clean[site].value)
    other = dictionary.encode(bound.bases[site].value)
    places = [
        ((now == 0) != (other == 0))[(slice(None), *index)] & bound.bases[site].active[:, index[0]]
        for _, index in nodes
    ]
    return torch.stack(places, -1)


def test_tables_name_what_they_list():
    bound = cases.CASES["features"]()
    found = part_edges(bound, some_nodes(bound))
    table = found.table()
    assert {"metric", "blocks.1 error[pos 0]"} <= set(table["receiver"])
    assert table.filter(table["score"] == 0).is_empty()
    top = found.top(3)["score"].abs()
    assert top.is_sorted(descending=True)
    whole = found.over_positions()
    assert float(whole["score"].sum()) == pytest.approx(float(found.mean().sum()))
    assert "blocks.0[0]" in set(whole["source"])
    few = found.table(threshold=float(top[2]))
    assert 0 < few.height < table.height


def test_bad_input_is_refused():
    bound = cases.CASES["features"]()
    with pytest.raises(InputError, match="did you mean"):
        part_edges(bound, [("blocks.7", (0, 0))])
    with pytest.raises(InputError, match=r"there is no part \[0, 9\] of 'blocks.1'"):
        part_edges(bound, [("blocks.1", (0, 9))])
    with pytest.raises(InputError, match="switches must be"):
        part_edges(bound, [("blocks.1", (0, 0))], switches="far")
    with pytest.raises(InputError, match="shared over the batch"):
        part_edges(cases.CASES["directions"](), [])
    spliced = features(
        tiny_target(),
        {"blocks.1": Placed(random_dictionary(4, 5), "blocks.1", ("blocks.1",))},
        tiny_batch(4, positions=2),
        tiny_batch(4, positions=2, seed=2),
        convention="detached_error",
    )
    with pytest.raises(InputError, match="convention='pass_through'"):
        part_edges(spliced, [])
