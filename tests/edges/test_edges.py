"""Edges between heads and MLPs against a network written out edge by edge, and on every family
by finite differences.
"""

from __future__ import annotations

import pytest
import torch
from plain_gpt2 import Plain, pair, target_of, tiny_gpt2
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from assay.core.target import Batch, Target
from assay.edges.graph import EdgeGraph
from assay.edges.patching import _Circuit, exact_edges, patch_edges
from assay.edges.scores import edges
from assay.edges.source_run import read_sources
from assay.edges.wiring import wire
from assay.errors import InputError

SMALL = {
    "vocab_size": 19,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
}
FAMILIES = {
    "gpt_neox parallel": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt_neox sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "llama": ("llama", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 6}),
    "gemma2": ("gemma2", {"num_key_value_heads": 2, "head_dim": 6}),
}


def build(name: str) -> Target:
    family, settings = FAMILIES[name]
    config = CONFIG_MAPPING[family](
        **SMALL, **settings, bos_token_id=0, eos_token_id=0, pad_token_id=0, use_cache=False
    )
    model = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        .double()
        .eval()
        .requires_grad_(False)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = (
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
        )
    return target_of(model)


@pytest.fixture(scope="module")
def gpt2():
    model = tiny_gpt2()
    return model, target_of(model), *pair()


def test_eap_is_the_gradient_at_each_receivers_own_input(gpt2):
    model, target, clean, patch = gpt2
    plain = Plain(model)
    _, ours = plain.run(clean)
    _, theirs = plain.run(patch)
    graph = wire(model).graph
    shifts = {
        place: torch.zeros(*ours[0].shape, dtype=torch.float64, requires_grad=True)
        for place in range(len(graph.receivers))
    }
    values, _ = plain.run(clean, shifts=shifts)
    gradients = torch.autograd.grad(values.sum(), list(shifts.values()))
    found = edges(target, clean, patch, method="eap")
    expected = torch.stack(
        [
            torch.stack([((p - c) * g).sum((1, 2)) for g in gradients], -1)
            for c, p in zip(ours, theirs, strict=True)
        ],
        1,
    )
    torch.testing.assert_close(found.values, expected * graph.mask, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.baseline, values.detach(), rtol=1e-10, atol=1e-12)


def test_steps_average_the_gradient_over_the_inputs_on_the_way(gpt2):
    _, target, clean, patch = gpt2
    once = edges(target, clean, patch, steps=4)
    chunked = edges(target, clean, patch, steps=4, budget=1)
    torch.testing.assert_close(once.values, chunked.values, rtol=1e-11, atol=1e-12)
    assert torch.equal(
        edges(target, clean, patch, steps=1).values,
        edges(target, clean, patch, method="eap").values,
    )
    gaps = [edges(target, clean, patch, steps=steps).gap.relative for steps in (1, 8, 64)]
    assert gaps[2] < gaps[1] < gaps[0]
    assert gaps[2] < 0.05


@pytest.mark.parametrize("circuit", range(3))
def test_a_circuit_is_the_network_with_the_other_edges_cut(gpt2, circuit):
    model, target, clean, patch = gpt2
    graph = wire(model).graph
    keep = (
        torch.rand(graph.mask.shape, generator=torch.Generator().manual_seed(circuit))
        < 0.3 + 0.2 * circuit
    )
    plain = Plain(model)
    _, theirs = plain.run(patch)
    expected, _ = plain.run(clean, theirs, keep)
    torch.testing.assert_close(
        patch_edges(target, clean, patch, keep), expected, rtol=1e-10, atol=1e-12
    )
    pruned = graph.prune(keep)
    assert pruned.sum() <= (keep & graph.mask).sum()
    torch.testing.assert_close(
        patch_edges(target, clean, patch, pruned), expected, rtol=1e-10, atol=1e-12
    )


def test_exact_edges_cut_one_edge_at_a_time(gpt2):
    model, target, clean, patch = gpt2
    plain = Plain(model)
    _, theirs = plain.run(patch)
    clean_value, _ = plain.run(clean)
    found = exact_edges(target, clean, patch, rows=7)
    for source, receiver in wire(model).graph.mask.nonzero()[::7].tolist():
        keep = torch.ones(wire(model).graph.mask.shape, dtype=torch.bool)
        keep[source, receiver] = False
        expected, _ = plain.run(clean, theirs, keep)
        torch.testing.assert_close(
            found.values[:, source, receiver], expected - clean_value, rtol=1e-9, atol=1e-11
        )
    assert found.exact
    assert (found.values * ~wire(model).graph.mask == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_cuts_all_or_nothing_and_scores_by_its_derivative(name):
    target = build(name)
    clean, patch = pair()
    wiring = wire(target.model)
    graph = wiring.graph
    full = target.values(clean)
    assert torch.equal(
        patch_edges(target, clean, patch, torch.ones(graph.mask.shape, dtype=torch.bool)), full
    )
    none = torch.zeros(graph.mask.shape, dtype=torch.bool)
    torch.testing.assert_close(
        patch_edges(target, clean, patch, none), target.values(patch), rtol=1e-5, atol=1e-6
    )
    found = edges(target, clean, patch, method="eap")
    # A patch run a small step away from the clean one, so that the exact effect of an edge is its
    # derivative. Most families take their softmax in float32 whatever the model's dtype: the step
    # must be well above that rounding.
    _, ours = read_sources(target, clean, wiring)
    _, theirs = read_sources(target, patch, wiring)
    step = 1e-2
    up, down = (
        {site: value + sign * step * (theirs[site] - value) for site, value in ours.items()}
        for sign in (1, -1)
    )
    size = float(found.values.abs().max())
    for source, receiver in graph.mask.nonzero()[::5].tolist():
        keep = torch.ones(graph.mask.shape, dtype=torch.bool)
        keep[source, receiver] = False
        with torch.no_grad():
            high, low = (
                _Circuit(target, wiring, other).values(clean, keep) for other in (up, down)
            )
        slope = (high - low) / (2 * step)
        torch.testing.assert_close(
            found.values[:, source, receiver], slope, rtol=1e-2, atol=1e-3 * size
        )
    assert edges(target, clean, patch, steps=48).gap.relative < 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_an_mlp_reads_the_heads_of_its_block_unless_they_run_side_by_side(name):
    target = build(name)
    wiring = wire(target.model)
    heads, known = range(wiring.graph.heads), set(wiring.graph.names())
    for layer, block in enumerate(wiring.blocks):
        inside = {f"a{layer}.h{head}->m{layer}" for head in heads}
        assert known & inside == (set() if "parallel" in name else inside)
        if "parallel" in name or block.post is not None:
            continue
        clean, patch = pair()
        found = exact_edges(target, clean, patch)
        ours, theirs = (read_sources(target, side, wiring)[1][block.z] for side in (clean, patch))
        difference, rows = block.heads.split(theirs - ours), block.write(target.model)
        written = torch.einsum("bphk,hkd->hbpd", difference, rows)
        for head in heads:
            edit = {f"{block.mlp_norm}:input": lambda seen, x=written[head]: seen.written + x}
            effect = target.values(clean, edit) - target.values(clean)
            place = wiring.graph.place(f"a{layer}.h{head}->m{layer}")
            torch.testing.assert_close(found.values[:, *place], effect, rtol=1e-5, atol=1e-6)


def test_the_graph_counts_the_edges_of_the_circuit_track():
    assert EdgeGraph(4, 4, 128).edges == 479
    assert EdgeGraph(12, 12, 768).edges == 32491
    graph = EdgeGraph(2, 2, 8)
    assert len(set(graph.names())) == graph.edges
    assert all(graph.mask[graph.place(name)] for name in graph.names())
    with pytest.raises(InputError, match="did you mean"):
        graph.place("m1->a0.h0<q>")
    with pytest.raises(InputError, match="is no edge"):
        graph.place("m1->a0.h0")


def test_tables_show_edges_by_size(gpt2):
    _, target, clean, patch = gpt2
    found = edges(target, clean, patch)
    table = found.top(5)
    assert table["score"].abs().is_sorted(descending=True)
    row = table.row(0, named=True)
    source, receiver = found.graph.place(row["edge"])
    assert row["score"] == pytest.approx(float(found.values[:, source, receiver].mean()))
    assert found.keep_top(0.1).sum() == round(0.1 * found.graph.edges)
    assert "indirect effect" in found._repr_html_()


def test_bad_batches_and_models_are_refused(gpt2):
    _, target, clean, patch = gpt2
    with pytest.raises(InputError, match="same examples"):
        edges(target, clean, patch.take(slice(2)))
    mask = patch.inputs["attention_mask"].clone()
    mask[0, -1] = 0
    with pytest.raises(InputError, match="masks differ"):
        edges(target, clean, Batch({**patch.inputs, "attention_mask": mask}, patch.labels))
    with pytest.raises(InputError, match="did you mean eap"):
        edges(target, clean, patch, method="eapig")
    with pytest.raises(InputError, match="steps"):
        edges(target, clean, patch, steps=0)
    with pytest.raises(InputError, match="family"):
        wire(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="boolean"):
        patch_edges(target, clean, patch, torch.ones(3, 3))
    broken = Target(target.model, lambda output, batch: target.metric(output, batch) / 0)
    with pytest.raises(InputError, match="NaN or infinite"):
        edges(broken, clean, patch)
