"""Query and key attributions against mixed second derivatives of the scores that the model's own
softmax is given, and against matrices written out by hand, in float64.
"""

from __future__ import annotations

from dataclasses import replace

import node_models
import polars as pl
import pytest
import torch
from cases import CASES, random_dictionary
from torch.overrides import TorchFunctionMode

from assay.attribution.transformer.relp import SOFTMAX, modified_backward
from assay.core.target import Target
from assay.dictionaries import Placed
from assay.edges import query_key
from assay.errors import InputError
from assay.mechanisms.features import features
from assay.mechanisms.nodes import nodes
from assay.targets.metrics import logit_difference

QUERY, KEY = 4, 2


def bound_to(family, site="blocks.1.hook_resid_post", reads=None, skip=False):
    model = Target(node_models.build(family), logit_difference)
    clean, _ = node_models.batches()
    made = random_dictionary(16, 9, 1, d_out=16 if reads else None).double()
    return features(model, {"d": Placed(made, reads or site, (site,))}, clean, reference="zero")


class Scores(TorchFunctionMode):
    """Keeps what every attention softmax is given, in the graph."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in SOFTMAX:
            self.found.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox parallel", "llama", "qwen3", "mistral"])
def test_pairs_are_mixed_second_derivatives_of_scores(family):
    bound = bound_to(family)
    parts = [("d", (place, k)) for place in (KEY, QUERY) for k in range(0, 9, 2)]
    parts += [("d error", (KEY,)), ("d error", (QUERY,))]
    parts = [(name.replace("d error", next(iter(bound.errors.values()))), at) for name, at in parts]
    found = query_key(bound, parts, 2, 3, QUERY, KEY)
    # Gates of two parts at once: the second derivative of a bilinear function is the pair itself.
    site = next(iter(bound.sites))
    with modified_backward(bound.target.model, "frozen"), torch.enable_grad():
        gates = torch.ones(2, len(parts), dtype=torch.float64, requires_grad=True)
        vectors = {}

        def edit(seen):
            held = bound.parts(site, replace(seen.detach(), earlier={}))
            total = seen.written
            for place, (name, index) in enumerate(parts):
                one = held[name].one(torch.tensor(index).expand(len(total), -1))
                vectors[place] = one
                total = total + (gates[:, place].sum() - 2) * one
            return total

        reader = Scores()
        with reader:
            bound.target.values(bound.batch, {site: edit})
    scores = reader.found[2][:, 3, QUERY, KEY]
    plain = scores.detach()
    torch.testing.assert_close(found.scores, plain.double(), rtol=1e-6, atol=1e-9)
    for example in range(2):
        (slope,) = torch.autograd.grad(scores[example], gates, create_graph=True)
        for place in range(len(parts)):
            if not slope[0, place].requires_grad:
                continue
            (row,) = torch.autograd.grad(slope[0, place], gates, retain_graph=True)
            both = found.values[example, :-1, :-1]
            expected = both[place] + both[:, place]
            torch.testing.assert_close(row[0], expected, rtol=1e-6, atol=1e-9)
    assert (found.values[:, 5:10, :5] != 0).any()
    # Only what stands at the query's position asks, and only what stands at the key's answers.
    assert not found.values[:, :5, :-1].any()
    assert not found.values[:, :, 5:10].any()


def test_pairs_are_products_of_matrices():
    bound = bound_to("gpt2", "blocks.0.hook_mlp_out", reads="blocks.0.mlp.hook_in")
    model, (ids, mask) = bound.target.model, bound.batch.inputs.values()
    block = model.transformer.h[1]
    seen = {}
    handles = [
        block.ln_1.register_forward_pre_hook(lambda m, args: seen.__setitem__("x", args[0])),
        model.transformer.h[0].mlp.register_forward_hook(
            lambda m, args, out: seen.__setitem__("mlp", (args[0], out))
        ),
    ]
    model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    x, (read, written) = seen["x"], seen["mlp"]
    dictionary = bound.dictionaries["d"].dictionary
    codes = dictionary.encode(read)
    error = written - dictionary(read)
    scale = ((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    weight = block.attn.c_attn.weight

    def side(vector, place, first, head):
        normed = (vector - vector.mean(-1, keepdim=True)) * scale[:, place] * block.ln_1.weight
        return normed @ weight[:, first + 4 * head : first + 4 * head + 4]

    for head in range(4):
        parts = [("d", (QUERY, k)) for k in range(9)] + [("d", (KEY, k)) for k in range(9)]
        last = next(iter(bound.errors.values()))
        parts += [(last, (QUERY,)), (last, (KEY,))]
        found = query_key(bound, parts, 1, head, QUERY, KEY)
        vectors = [codes[:, place, k, None] * dictionary.W_dec[k] for _, (place, k) in parts[:18]]
        vectors += [error[:, QUERY], error[:, KEY]]
        asks = torch.stack([side(v, QUERY, 0, head) for v in vectors], 1)
        answers = torch.stack([side(v, KEY, 16, head) for v in vectors], 1)
        asks[:, 9:18], asks[:, 19] = 0, 0
        answers[:, :9], answers[:, 18] = 0, 0
        expected = torch.einsum("eis,ejs->eij", asks, answers) / 2
        torch.testing.assert_close(found.values[:, :-1, :-1], expected, rtol=1e-9, atol=1e-12)
        assert (expected != 0).any(0).sum() > 30
        whole = (
            side(x[:, QUERY], QUERY, 0, head) + block.ln_1.bias @ weight[:, 4 * head : 4 * head + 4]
        )
        whole = whole + block.attn.c_attn.bias[4 * head : 4 * head + 4]
        keys = slice(16 + 4 * head, 20 + 4 * head)
        other = side(x[:, KEY], KEY, 16, head) + block.ln_1.bias @ weight[:, keys]
        other = other + block.attn.c_attn.bias[keys]
        torch.testing.assert_close(found.scores, (whole * other).sum(-1) / 2)
        removed = found.scores - found.removals()[:, 0]
        without = ((whole - asks[:, 0]) * other).sum(-1) / 2
        torch.testing.assert_close(removed, without)


def test_heads_pass_parts_on_to_later_heads():
    clean, patch = node_models.batches()
    model = Target(node_models.build("llama"), logit_difference)
    sites = [f"blocks.{layer}.hook_{name}_out" for layer in (0, 1) for name in ("attn", "mlp")]
    bound = nodes(model, clean, patch, sites)
    parts = [(name, (place,)) for name in bound.groups for place in (KEY, QUERY)]
    found = query_key(bound, parts, 2, 0, QUERY, KEY)
    table = found.table()
    assert set(table["query"]) > {"rest"}
    torch.testing.assert_close(
        torch.tensor(table["score"].sum()), found.scores.mean(), check_dtype=False
    )
    sizes = table["score"].abs()
    assert sizes.to_list() == sizes.sort(descending=True).to_list()
    assert found.top(3).height == 3
    assert table.filter(pl.col("query") != "rest").height > 4


def test_what_is_not_there_is_refused():
    bound = bound_to("gpt2")
    parts = [("d", (KEY, 0))]
    for where, words in (
        ((9, 0, QUERY, KEY), "layer 9 does not exist: there are 3"),
        ((2, 4, QUERY, KEY), "head 4 does not exist"),
        ((2, 0, 9, KEY), "query 9 does not exist"),
        ((2, 0, KEY, QUERY), "lies behind the query position"),
    ):
        with pytest.raises(InputError, match=words):
            query_key(bound, parts, *where)
    with pytest.raises(InputError, match="there is no part"):
        query_key(bound, [("d", (KEY, 99))], 2, 0, QUERY, KEY)
    with pytest.raises(InputError, match="heads of a 'Tiny"):
        query_key(next(iter(CASES.values()))(), [], 0, 0, 1, 0)
