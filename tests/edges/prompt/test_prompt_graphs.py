"""Attribution graphs of prompts against one backward pass a target through the model itself."""

from __future__ import annotations

import json

import jsonschema
import prompt_models as models
import pytest
import torch
from cases import random_dictionary, tiny_target
from graph_schema import SCHEMA
from node_models import FAMILIES
from torch import nn

from assay.attribution import ablate
from assay.core.target import Batch, Target
from assay.dictionaries import Placed, make
from assay.edges.prompt import prompt_graph
from assay.errors import InputError
from assay.io.attribution_graphs import LOGIT, read_graph, write_graph
from assay.mechanisms.features import features

FORMS = {
    "cross-layer": {"crossing": True},
    "skip connections": {"skip": True},
    "in front of attention": {"hook": "hook_resid_pre"},
    "some layers alone": {"layers": (0, 2)},
    "topk": {"kind": "topk", "k": 3},
    "gated": {"kind": "gated", "subtract": False},
}


def check(target, dictionaries, **options):
    graph = prompt_graph(target, dictionaries, models.TOKENS, **options)
    first = options.get("first", 1)
    edges, values, found = models.by_hand(
        target, dictionaries, models.TOKENS, graph.logits, first=first
    )
    assert torch.equal(graph.features, found)
    torch.testing.assert_close(graph.edges, edges, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(graph.values, values)
    assert (edges != 0).double().mean() > 0.1
    torch.testing.assert_close(graph.edges.sum(1) + graph.rest, graph.values)
    return graph


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_edges_of_backward_passes(family):
    parallel = family == "gpt_neox parallel"
    hook, out = "mlp.hook_in" if parallel else "hook_resid_mid", "hook_mlp_out"
    if family == "gemma2":  # what is written in front of a norm
        hook, out = "mlp.hook_in", "mlp.hook_out"
    check(models.target(family), models.transcoders(hook, out=out, crossing=True))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_transcoder_has_the_edges_of_backward_passes(form):
    check(models.target(), models.transcoders(**FORMS[form]))


def test_skips_in_parallel_blocks_and_behind_norms():
    check(models.target("gpt_neox parallel"), models.transcoders(skip=True), first=0)
    check(models.target("gemma2"), models.transcoders(out="mlp.hook_out", skip=True))


def test_rows_do_not_depend_on_how_many_fit(monkeypatch):
    target, dictionaries = models.target(), models.transcoders(crossing=True)
    graph = prompt_graph(target, dictionaries, models.TOKENS)
    small = prompt_graph(target, dictionaries, models.TOKENS, budget=1)
    torch.testing.assert_close(small.edges, graph.edges)
    monkeypatch.setattr("assay.edges.prompt.rows._PUSHED", 0)
    pulled = prompt_graph(target, dictionaries, models.TOKENS)
    torch.testing.assert_close(pulled.edges, graph.edges)


def test_nothing_is_left_where_nothing_is_constant():
    target = models.target()
    dictionaries = models.transcoders()
    model = target.model
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and ".mlp." not in name:
                parameter.zero_()
        for placed in dictionaries.values():
            placed.dictionary.b_enc.zero_()
            placed.dictionary.b_dec.zero_()
    graph = prompt_graph(target, dictionaries, models.TOKENS, first=0)
    assert graph.values.abs().min() > 1e-4
    torch.testing.assert_close(graph.rest, torch.zeros_like(graph.rest))


def test_all_features_that_are_asked_for_are_the_most_influential_ones():
    target, dictionaries = models.target(), models.transcoders()
    whole = prompt_graph(target, dictionaries, models.TOKENS)
    some = prompt_graph(target, dictionaries, models.TOKENS, most=9)
    assert some.layout.features == 9
    assert some.active == whole.active == len(whole.features)
    places = [whole.features.tolist().index(row) for row in some.features.tolist()]
    rows = torch.tensor([*places, *range(whole.active, len(whole.edges))])
    columns = torch.tensor([*places, *range(whole.active, whole.edges.shape[1])])
    torch.testing.assert_close(some.edges, whole.edges[rows][:, columns])


def test_exact_effects_are_those_of_gates():
    target, dictionaries = models.target(), models.transcoders(crossing=True)
    graph = prompt_graph(target, dictionaries, models.TOKENS, targets=[7, 3], exact=60, budget=1)
    ids = torch.tensor([models.TOKENS])

    def centred(output, batch):
        return output.logits[:, -1, 7] - output.logits[:, -1].mean(-1)

    bound = features(
        Target(target.model, centred), dictionaries, Batch({"input_ids": ids}), reference="zero"
    )
    checked = set()
    for place, effect in zip(graph.removed, graph.exact, strict=True):
        node = graph.node(place)
        if node.kind == "feature":
            group, index = graph.dictionaries[node.layer], (node.position, node.index)
        elif node.kind == "error":
            group, index = f"blocks.{node.layer}.hook_mlp_out error", (node.position,)
        else:
            embedded = target.model.transformer.wte.weight[node.index]
            changed = target.model.transformer.wte(ids).clone()
            changed[0, node.position] -= embedded
            output = target.model(inputs_embeds=changed)
            full = centred(target.model(ids), None) - centred(output, None)
            torch.testing.assert_close(effect[0], full[0])
            checked.add(node.kind)
            continue
        expected = ablate(bound, group, torch.tensor(index)[None, None])
        torch.testing.assert_close(effect[0], expected[0, 0])
        checked.add(node.kind)
    assert checked == {"feature", "error", "embedding"}
    table = graph.removals()
    assert table.height == 2 * len(graph.removed)


def test_a_pruned_graph_is_one_of_neuronpedia(tmp_path):
    graph = prompt_graph(models.target(), models.transcoders(), models.TOKENS, exact=3)
    pruned = graph.prune(0.8, 0.9)
    path = write_graph(tmp_path / "graph.json", pruned.to_graph("a prompt!"))
    data = json.loads(path.read_text())
    jsonschema.validate(data, SCHEMA)
    again = read_graph(path)
    nodes, edges = pruned.nodes(), pruned.edges()
    assert [node.id for node in again.nodes] == nodes["node"].to_list()
    assert len(again.links) == edges.height > 10
    assert {"feature", "error", "embedding", "logit"} == set(nodes["kind"])
    assert again.tokens == tuple(map(str, models.TOKENS))
    assert nodes["exact"].drop_nulls().len() == len(
        [place for place in graph.removed if pruned.kept.nodes[place]]
    )
    chances = [node.probability for node in again.nodes if node.type == LOGIT]
    assert chances == pytest.approx(graph.probabilities.tolist())
    everything = graph.prune(1.0, 1.0)
    assert everything.edges().height == int((graph.edges != 0).sum()) - _deadends(graph)


def _deadends(graph):
    """Edges into features that feed nothing."""
    feeds = (graph.edges[:, : graph.layout.features] != 0).any(0)
    return int((graph.edges[: graph.layout.features][~feeds] != 0).sum())


def autoencoder(site="blocks.0.hook_mlp_out"):
    return {site: Placed(random_dictionary(16, 9, 0).double(), site, (site,))}


def normalised():
    made = models.transcoders()["layer 1"]
    inner = random_dictionary(16, 9, 1)
    norm = make("normalised", {"norm": "layer_norm", "inner": "relu", "config": inner.config()})
    norm.inner.load_state_dict(inner.state_dict())
    return {"layer 1": Placed(norm.double(), made.reads, made.writes)}


def broken():
    made = models.transcoders()
    made["layer 1"].dictionary.W_dec.data[3, 2] = float("nan")
    return made


def twice():
    return {"one": models.transcoders()["layer 1"], "two": models.transcoders()["layer 1"]}


def backwards():
    made = models.transcoders()["layer 2"]
    return {"back": Placed(made.dictionary, made.reads, ("blocks.1.hook_mlp_out",))}


def narrow():
    made = random_dictionary(8, 9, 0, d_out=8).double()
    return {"narrow": Placed(made, "blocks.0.mlp.hook_in", ("blocks.0.hook_mlp_out",))}


DICTIONARIES = {
    "an autoencoder": (autoencoder, "takes transcoders"),
    "one of the residual stream": (
        lambda: autoencoder("blocks.1.hook_resid_post"),
        "takes transcoders, which read what goes into an MLP",
    ),
    "features of normalised values": (normalised, "not linear in what they read"),
    "a weight that is none": (broken, "W_dec of the dictionary 'layer 1' holds 1 NaN"),
    "two of a layer": (twice, "both read in layer 1"),
    "one that writes before it reads": (backwards, "reads in layer 2 and writes before it"),
    "one of another width": (narrow, "vectors of width 8"),
    "none": (dict, "at least one"),
}


@pytest.mark.parametrize("case", DICTIONARIES)
def test_dictionaries_that_do_not_fit_are_named(case):
    make_them, words = DICTIONARIES[case]
    with pytest.raises(InputError, match=words):
        prompt_graph(models.target(), make_them(), models.TOKENS)


PROMPTS = {
    "no token": ([], {}, "a prompt of 0 tokens"),
    "one token": ([3], {}, "nothing to attribute"),
    "a token outside": ([1, 31], {}, "prompt: token 31 is outside of the vocabulary of 31"),
    "a negative token": ([1, -1], {}, "token -1 is outside"),
    "half tokens": (torch.tensor([1.5, 2]), {}, "token ids of one prompt"),
    "two prompts": (torch.ones(2, 3, dtype=torch.long), {}, "token ids of one prompt"),
    "a text without a tokenizer": ("one two", {}, "text needs a tokenizer"),
    "more than the context": ([1] * 33, {}, "context of 32"),
    "a target outside": ([1, 2], {"targets": [99]}, "targets: token 99"),
    "no target": ([1, 2], {"targets": []}, "at least one"),
    "a target twice": ([1, 2], {"targets": [3, 3]}, "stands twice"),
    "no feature": ([1, 2], {"most": 0}, "at least 1 feature"),
    "no probability": ([1, 2], {"probability": 0.0}, "probability must be above 0"),
    "less than none": ([1, 2], {"exact": -1}, "exact must be a whole number"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_bad_prompts_are_refused(case):
    prompt, options, words = PROMPTS[case]
    with pytest.raises(InputError, match=words):
        prompt_graph(models.target(), models.transcoders(), prompt, **options)


class Strange(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float64))

    def forward(self, x):
        return x / x.abs().amax(-1, keepdim=True) * self.weight


def test_models_that_cannot_be_frozen_are_named(monkeypatch):
    with pytest.raises(InputError, match="this model is of family 'Tiny"):
        prompt_graph(tiny_target(), models.transcoders(), models.TOKENS)
    target = models.target()
    block = target.model.transformer.h[1]
    monkeypatch.setattr(block, "ln_2", Strange(16))
    with pytest.raises(InputError, match=r"'transformer.h.1.ln_2' of this gpt2 model is a Strange"):
        prompt_graph(target, models.transcoders(), models.TOKENS)
    monkeypatch.undo()
    target = models.target()
    block = target.model.transformer.h[1]
    plain = block.attn.forward
    monkeypatch.setattr(block.attn, "forward", lambda x, **more: (2 * plain(x, **more)[0], None))
    with pytest.raises(InputError, match=r"not linear .* or compute something else"):
        prompt_graph(target, models.transcoders(), models.TOKENS)


def test_thresholds_outside_are_refused():
    graph = prompt_graph(models.target(), models.transcoders(), models.TOKENS)
    with pytest.raises(InputError, match="node_threshold must be between 0 and 1"):
        graph.prune(1.2)
