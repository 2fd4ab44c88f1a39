"""Where first order fails and what repairs it: saturated softmax, cancelling paths, curvature;
and the relevance rules.
"""

from __future__ import annotations

import node_models
import pytest
import torch
from cases import KINDS, dictionary, displacements
from plain_gpt2 import pair, target_of, tiny_gpt2
from toy_attention import Cancelling, plain_target, prompts
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from assay.attribution import (
    AtPStar,
    Exact,
    Gradient,
    IntegratedGradients,
    ProbedSecondOrder,
    RelP,
    SecondOrder,
    attribute,
)
from assay.attribution.probes import draw_signs
from assay.attribution.transformer.relp import modified_backward
from assay.core.target import Batch, Target
from assay.errors import InputError
from assay.mechanisms.nodes import nodes
from assay.targets.metrics import logit_difference

HOOKS = [f"blocks.0.attn.hook_{slot}" for slot in "qkvz"]


def attention_nodes(reference="counterfactual", **options):
    return nodes(plain_target(**options), *prompts(), HOOKS[:3], reference)


@pytest.mark.parametrize("method", [Gradient(), AtPStar(drop=False)], ids=["AtP", "QK fix"])
def test_on_a_linear_network_first_order_is_exact(method):
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
    batch = Batch(
        torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    bound = nodes(
        Target(network, lambda output, batch: output[:, 0]),
        batch,
        None,
        ["0"],
        "zero",
        neurons=["0"],
    )
    torch.testing.assert_close(
        attribute(bound, method).values["0"],
        attribute(bound, Exact()).values["0"],
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("reference", ["counterfactual", "zero", "mean"])
@pytest.mark.parametrize("sharpness", [1.0, 60.0])
def test_queries_and_keys_are_exact_where_the_pattern_is_read_out_linearly(reference, sharpness):
    bound = attention_nodes(reference, attention=sharpness)
    fixed, exact = attribute(bound, AtPStar(drop=False)), attribute(bound, Exact())
    for name in HOOKS[:3]:
        torch.testing.assert_close(fixed.values[name], exact.values[name], rtol=1e-9, atol=1e-11)


def test_a_saturated_softmax_has_no_gradient_but_an_effect():
    bound = attention_nodes(attention=3000.0)
    plain, fixed, exact = (
        attribute(bound, method) for method in (Gradient(), AtPStar(drop=False), Exact())
    )
    for name in HOOKS[:2]:
        assert plain.values[name].abs().max() < 1e-6
        assert exact.values[name].abs().max() > 0.1
        torch.testing.assert_close(fixed.values[name], exact.values[name], rtol=1e-9, atol=1e-11)


def test_shared_keys_move_all_their_query_heads():
    config = CONFIG_MAPPING["llama"](
        vocab_size=19,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=12,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
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
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
        )
    clean, patch = pair()
    # What attention adds is read linearly, so that the pattern computed anew gives the exact
    # effect.
    added: list[torch.Tensor] = []
    model.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, out: added.append(out[0])
    )
    bound = nodes(
        Target(model, lambda output, batch: added[-1][:, 1:4, :3].sum((1, 2))),
        clean,
        patch,
        HOOKS[:3],
    )
    fixed = attribute(bound, AtPStar(drop=False))
    assert fixed.values[HOOKS[1]].shape[-1] == 2
    for name in HOOKS[:2]:
        for head in range(bound.group(name).axes[1]):
            gates = bound.ones([name])
            gates[name][:, 1, head] = 0  # the prompts differ at position 1
            effect = (bound.values() - bound.values(gates)).detach()
            assert effect.abs().max() > 1e-4
            torch.testing.assert_close(fixed.values[name][:, 1, head], effect, rtol=1e-3, atol=1e-6)


def test_fused_attention_is_refused_where_the_pattern_is_needed():
    model = tiny_gpt2()
    model.set_attn_implementation("sdpa")
    bound = nodes(target_of(model), *pair(), HOOKS[:1])
    with pytest.raises(InputError, match="attn_implementation='eager'"):
        attribute(bound, AtPStar())


def test_dropping_layers_finds_paths_that_cancel():
    target = Target(Cancelling().double(), lambda output, batch: output)
    clean = Batch(torch.zeros(3, 2, 1, dtype=torch.float64))
    patch = Batch(torch.full((3, 2, 1), 2.0, dtype=torch.float64))
    bound = nodes(target, clean, patch, ["start"])
    first, exact = attribute(bound), attribute(bound, Exact())
    assert (first.values["start"] == 0).all()
    assert (exact.values["start"].abs() > 0.5).all()
    dropped = attribute(bound, AtPStar(layers=[["bend"], ["back"]]))
    torch.testing.assert_close(
        dropped.values["start"], torch.full((3, 2), 2.0, dtype=torch.float64)
    )
    assert dropped.estimand == "size of single removal"
    cut = attribute(
        bound, AtPStar(layers=[["bend", "back"]])
    )  # nothing is left of the metric's gradient
    assert (cut.values["start"] == 0).all()


def test_a_layer_is_not_dropped_for_its_own_nodes():
    bound = nodes(
        plain_target(layers=2, power=2),
        *prompts(),
        ["blocks.0.hook_resid_pre", *HOOKS, "blocks.1.attn.hook_q"],
    )
    star, plain = attribute(bound, AtPStar()), attribute(bound, AtPStar(drop=False))
    assert (star.method, plain.method) == ("AtP*", "AtP, QK fix")
    # One layer is left for nodes inside a layer: the gradient that does not pass the other one.
    for own, other in ((0, 1), (1, 0)):
        name = f"blocks.{own}.attn.hook_q"
        block = bound.target.model.transformer["h"][other]
        handles = [module.register_forward_hook(_stop) for module in (block.attn, block.mlp)]
        alone = attribute(bound, AtPStar(drop=False)).values[name]
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(star.values[name], alone.abs())
    assert all((values >= 0).all() for values in star.values.values())
    assert any((values < 0).any() for values in plain.values.values())
    with pytest.raises(InputError, match="are not known; name them"):
        attribute(dictionary(), AtPStar())
    with pytest.raises(InputError, match="at least one layer"):
        attribute(dictionary(), AtPStar(layers=[]))
    with pytest.raises(InputError, match="unknown site"):
        attribute(dictionary(), AtPStar(layers=[["blocks.9"]]))


def _stop(module, args, out):
    return out.detach() if isinstance(out, torch.Tensor) else (out[0].detach(), *out[1:])


def test_probes_estimate_the_diagonal_without_bias_and_exactly_once_there_are_enough():
    bound = nodes(
        plain_target(power=2),
        *prompts(examples=2, positions=3),
        ["blocks.0.hook_mlp_out", "blocks.0.mlp.hook_pre"],
    )
    exact = attribute(bound, SecondOrder())
    enough = attribute(bound, ProbedSecondOrder(probes=32))
    for name, values in exact.values.items():
        torch.testing.assert_close(enough.values[name], values, rtol=1e-9, atol=1e-11)
    bound = dictionary()
    truth = attribute(bound, SecondOrder()).values["features"]
    few = torch.stack(
        [
            attribute(bound, ProbedSecondOrder(probes=2, seed=seed)).values["features"]
            for seed in range(80)
        ]
    )
    error = (few.mean(0) - truth).abs()
    assert (error <= 4.5 * few.std(0) / 80**0.5 + 1e-9).all()
    assert (few.std(0) > 0).any()


def test_second_order_is_exact_on_a_quadratic_network_by_probes_too():
    bound = nodes(plain_target(power=2), *prompts(positions=2), ["blocks.0.mlp.hook_pre"], "zero")
    truth, first = attribute(bound, Exact()), attribute(bound)
    for method in (SecondOrder(), ProbedSecondOrder(probes=16)):
        torch.testing.assert_close(
            attribute(bound, method).values, truth.values, rtol=1e-10, atol=1e-12
        )
    assert not torch.allclose(
        first.values["blocks.0.mlp.hook_pre"], truth.values["blocks.0.mlp.hook_pre"], rtol=0.1
    )


def test_probes_of_different_colours_are_orthogonal():
    signs = draw_signs((4, 4), 16, torch.Generator().manual_seed(0)).flatten(1)
    assert torch.equal(signs.T @ signs, 16 * torch.eye(16, dtype=torch.float64))
    for bad, match in ((3, "power of two"), (0, "power of two")):
        with pytest.raises(InputError, match=match):
            attribute(dictionary(), ProbedSecondOrder(probes=bad))
    with pytest.raises(InputError, match="shared"):
        attribute(displacements(), ProbedSecondOrder())


@pytest.mark.parametrize("kind", ["counterfactual", "weight site", "two sites"])
def test_probes_serve_every_kind_with_gates_per_example(kind):
    bound = KINDS[kind]()
    exact, probed = attribute(bound, SecondOrder()), attribute(bound, ProbedSecondOrder(probes=32))
    for name, values in exact.values.items():
        torch.testing.assert_close(probed.values[name], values, rtol=1e-9, atol=1e-11)


def llama():
    config = CONFIG_MAPPING["llama"](
        vocab_size=19,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
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
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
        )
    return target_of(model)


def test_relevance_is_conserved_from_layer_to_layer_without_biases():
    target = llama()
    sites = [
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_mid",
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_resid_post",
    ]
    bound = nodes(target, *pair(), sites, "zero")
    relevance, plain = attribute(bound, RelP()), attribute(bound)
    full = target.values(bound.batch)
    for name in sites:
        torch.testing.assert_close(relevance.values[name].sum(1), full, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain.values[sites[0]].sum(1), full, rtol=0.2)
    assert relevance.convention == "relp"
    assert plain.convention == "pass_through"


@pytest.mark.parametrize("rules", ["relp", "frozen"])
def test_the_forward_pass_is_the_same_to_the_bit(rules):
    for target in (llama(), target_of(tiny_gpt2())):
        clean, _ = pair()
        before = target.values(clean)
        with modified_backward(target.model, rules):
            during = target.values(clean)
        assert torch.equal(before, during)
        assert torch.equal(before, target.values(clean))


def test_frozen_patterns_leave_the_direct_effect_alone():
    bound = attention_nodes(attention=2.0)
    frozen, exact = attribute(bound, RelP("frozen")), attribute(bound, Exact())
    assert all((frozen.values[name] == 0).all() for name in HOOKS[:2])
    torch.testing.assert_close(
        frozen.values[HOOKS[2]], exact.values[HOOKS[2]], rtol=1e-10, atol=1e-12
    )
    # A metric that takes a softmax of its own keeps its gradient.
    chances = Target(bound.target.model, lambda output, batch: output.softmax(-1)[:, 0])
    bound = nodes(chances, *prompts(), HOOKS[2:3])
    assert attribute(bound, RelP("frozen")).values[HOOKS[2]].abs().max() > 0


def test_rules_on_single_modules():
    value = torch.tensor([[0.7, -1.3, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    for module in (torch.nn.GELU(), torch.nn.SiLU(), torch.nn.Tanh()):
        with modified_backward(torch.nn.Sequential(module), "relp"):
            (slope,) = torch.autograd.grad(module(value).sum(), value)
        ratio = (module(value) / value).detach()
        torch.testing.assert_close(slope[value != 0], ratio[value != 0])
        assert slope[0, 2] == pytest.approx(
            1.0 if isinstance(module, torch.nn.Tanh) else 0.5, abs=1e-3
        )
    norm = torch.nn.LayerNorm(4).double()
    with modified_backward(torch.nn.Sequential(norm), "frozen"):
        (slope,) = torch.autograd.grad(norm(value)[0, 0], value)
    scale = 1 / (value.detach().var(correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(slope[0], scale * (torch.eye(4, dtype=torch.float64)[0] - 0.25))
    with pytest.raises(InputError, match="did you mean relp"):
        attribute(dictionary(), RelP("rlp"))


def test_integrated_gradients_of_a_site_add_up_to_its_joint_patch():
    bound = nodes(
        target_of(tiny_gpt2()),
        *pair(),
        ["blocks.0.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre"],
    )
    scores = attribute(bound, IntegratedGradients())
    for name, values in scores.values.items():
        joint = bound.values() - bound.values(bound.full(0.0, [name]))
        assert (values.flatten(1).sum(1) - joint).abs().mean() <= 0.01 * joint.abs().mean()
        assert scores.gaps[name].relative <= 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_models_are_accumulated_in_float64(dtype):
    clean, patch = node_models.batches()
    sites = ["blocks.0.attn.hook_z", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"]
    for method in (Gradient(), IntegratedGradients(), Exact()):
        low, high = (
            attribute(
                nodes(
                    Target(node_models.build("gpt2", kind), logit_difference), clean, patch, sites
                ),
                method,
            )
            for kind in (dtype, torch.float64)
        )
        for site in sites:
            assert low.values[site].dtype == torch.float64
            error = (low.values[site] - high.values[site]).abs().max() / high.values[
                site
            ].abs().max()
            assert (
                float(error) < 64 * torch.finfo(dtype).eps
            )  # some tens of roundings on the way through three blocks
