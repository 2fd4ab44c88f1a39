"""AtP* and the relevance rules on every family: the pattern computed anew is the one the model
makes with the node patched.
"""

from __future__ import annotations

from typing import Any

import node_models
import pytest
import torch
from torch import Tensor

from assay.attribution import AtPStar, Gradient, RelP, attribute
from assay.attribution.transformer.patterns import read_patterns
from assay.core.target import Target
from assay.mechanisms.nodes import Nodes, nodes
from assay.targets import families
from assay.targets.metrics import logit_difference

every_family = pytest.mark.parametrize("family", node_models.FAMILIES)


def bound(family: str, *sites: str) -> Nodes:
    return nodes(Target(node_models.build(family), logit_difference), *node_models.batches(), sites)


def pattern_with(mechanisms: Nodes, attention: str, gates: dict[str, Tensor]) -> Tensor:
    """The attention weights that the module returns in a run under the gates."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        kept.append(out[1])

    handle = mechanisms.target.model.get_submodule(attention).register_forward_hook(keep)
    with torch.no_grad():
        mechanisms.values(gates)
    handle.remove()
    return kept[0].double()


@every_family
def test_query_and_key_nodes_move_the_pattern_as_the_model_does(family: str) -> None:
    mechanisms = bound(family, "blocks.1.attn.hook_q", "blocks.1.attn.hook_k")
    model = mechanisms.target.model
    found = families.find_family(model)
    assert found is not None
    attention = f"{found.blocks}.1.{found.attention_projection.rsplit('.', 1)[0]}"
    gradient = read_patterns(mechanisms.target, mechanisms.batch, [attention])[
        attention
    ].gradient.double()
    clean = pattern_with(mechanisms, attention, {})
    scores = attribute(mechanisms, AtPStar(drop=False))
    for name, values in scores.values.items():
        active = mechanisms.spots[name].active
        for position, head in ((3, 0), (4, 1)):
            gates = mechanisms.ones([name])
            gates[name][:, position, head] = 0
            moved = pattern_with(mechanisms, attention, gates) - clean
            expected = -(gradient * moved).flatten(1).sum(1) * active[:, position]
            torch.testing.assert_close(values[:, position, head], expected, rtol=2e-3, atol=2e-7)
        assert values.abs().max() > 1e-6


@every_family
def test_only_query_and_key_nodes_differ_from_the_gradient(family: str) -> None:
    sites = [f"blocks.0.attn.hook_{slot}" for slot in "qkvz"] + ["blocks.2.hook_mlp_out"]
    mechanisms = bound(family, *sites)
    plain, fixed, star = (
        attribute(mechanisms, method) for method in (Gradient(), AtPStar(drop=False), AtPStar())
    )
    for name in sites:
        same = torch.equal(plain.values[name], fixed.values[name])
        assert same == (not name.endswith(("hook_q", "hook_k")))
        assert star.values[name].shape == plain.values[name].shape
        assert (star.values[name] >= 0).all()
    # A node in the last layer has one path when the other layers are dropped: the same as with
    # them.
    torch.testing.assert_close(
        star.values["blocks.2.hook_mlp_out"], fixed.values["blocks.2.hook_mlp_out"].abs()
    )


@every_family
def test_relevance_rules_change_scores_but_not_values(family: str) -> None:
    mechanisms = bound(
        family, "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"
    )
    plain = attribute(mechanisms)
    for rules in ("relp", "frozen"):
        changed = attribute(mechanisms, RelP(rules))
        assert torch.equal(changed.baseline, plain.baseline)
        assert changed.convention == rules
        assert not torch.allclose(
            changed.values["blocks.0.hook_mlp_out"],
            plain.values["blocks.0.hook_mlp_out"],
            rtol=1e-3,
        )
