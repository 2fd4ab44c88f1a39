"""Patching that computes only what changes, against the general rule, which runs the model with
hooks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import node_models
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import assay.audit  # noqa: F401  scores are audited once the room is there
from assay.attribution import Exact, Gradient, ablate
from assay.core.target import Batch, target
from assay.mechanisms.nodes import Nodes, nodes
from assay.targets import names
from assay.targets.metrics import AtLast, logit_difference, loss, probability


def bind(
    family: str, sites: list[str] | None = None, dtype: torch.dtype = torch.float64, **options: Any
) -> Nodes:
    model = node_models.build(
        family, dtype, options.pop("device", "cpu"), options.pop("attention", "eager")
    )
    clean, patch = node_models.batches(str(next(model.parameters()).device))
    metric = options.pop("metric", logit_difference)
    return nodes(target(model, metric), clean, patch, sites or names.site_names(model), **options)


def agree(bound: Nodes, tolerance: float) -> dict[str, Tensor]:
    assert bound.patching == "suffix only"
    fast, general = Exact().scores(bound).values, Exact().scores(replace(bound, fast=False)).values
    for name in bound.groups:
        torch.testing.assert_close(
            fast[name],
            general[name],
            rtol=0,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    return {name: values.cpu() for name, values in fast.items()}


@pytest.mark.parametrize("family", node_models.FAMILIES)
def test_every_site_of_every_family(family: str) -> None:
    # Layer 0 has blocks before and behind it, layer 2 is the last one: both ends of the suffix.
    model = node_models.build(family)
    found = agree(bind(family, ["hook_embed", *names.site_names(model, layers=[0, 2])]), 1e-10)
    assert all(values.any() for values in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", node_models.FAMILIES)
@pytest.mark.parametrize("reference", ["zero", "mean"])
def test_other_references_and_single_precision(family: str, reference: str) -> None:
    agree(bind(family, reference=reference), 1e-10)
    # A residual stream set to zero is rounding noise before a norm, which blows it up: it has no
    # value to agree on.
    sites = [
        name
        for name in names.site_names(node_models.build(family))
        if not (reference == "zero" and "resid" in name)
    ]
    agree(bind(family, sites, torch.float32, reference=reference, metric=probability), 1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # the general rule's vmap over fused attention
def test_single_precision_and_fused_attention(attention: str) -> None:
    sites = [
        "blocks.0.hook_resid_pre",
        "blocks.1.attn.hook_q",
        "blocks.1.attn.hook_v",
        "blocks.1.hook_mlp_out",
    ]
    agree(bind("gpt2", sites, torch.float32, attention=attention), 1e-5)


def test_metrics_that_read_the_whole_vocabulary() -> None:
    sites = ["blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"]
    plain = AtLast("logit_difference", logit_difference.function, ("answers",))
    reference = agree(bind("gemma2", sites), 1e-10)
    for name, values in agree(bind("gemma2", sites, metric=plain), 1e-10).items():
        torch.testing.assert_close(
            values, reference[name], rtol=0, atol=1e-12
        )  # the two columns alone, or all of them
    agree(bind("gemma2", sites, metric=probability), 1e-10)


def test_padding_on_the_left() -> None:
    model = node_models.build("gpt2", torch.float32)
    clean, patch = node_models.batches()
    shifts = 7 - node_models.mask().sum(1)

    def left(batch: Batch) -> Batch:
        rows = {
            key: torch.stack([row.roll(int(s)) for row, s in zip(value, shifts, strict=True)])
            for key, value in batch.inputs.items()
        }
        return Batch(rows, {**batch.labels, "last": torch.full((4,), 6)})

    bound = nodes(
        target(model, logit_difference),
        left(clean),
        left(patch),
        names.site_names(model, layers=[1]),
    )
    if bound.patching.startswith("suffix"):
        agree(bound, 1e-5)
    assert not bound.norms()["blocks.1.hook_mlp_out"][1, :2].any()


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_rows_under_any_budget(data: st.DataObject) -> None:
    """Parts of their own in every example, in any order and number, in chunks of any size."""
    bound = SHARED.setdefault(
        "bound", bind("qwen3", ["blocks.1.attn.hook_k", "blocks.1.attn.hook_z"])
    )
    name = data.draw(st.sampled_from(list(bound.groups)))
    whole = SHARED.setdefault(
        name, Exact().scores(replace(bound, fast=False)).at(name, everywhere(bound, name))
    )
    rows = data.draw(st.integers(1, 5))
    choice = torch.tensor(
        [
            data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=4, max_size=4))
            for _ in range(rows)
        ]
    )
    index = everywhere(bound, name)[choice, torch.arange(4)]
    found = ablate(bound, name, index, budget=data.draw(st.sampled_from([1, 20_000, None])))
    torch.testing.assert_close(found, whole[choice, torch.arange(4)], rtol=0, atol=1e-10)


SHARED: dict[str, Any] = {}


def everywhere(bound: Nodes, name: str) -> Tensor:
    axes = bound.groups[name].axes
    rows = torch.cartesian_prod(*(torch.arange(size) for size in axes)).reshape(-1, len(axes))
    return rows[:, None].expand(-1, len(bound.batch), -1)


def test_an_audit_patches_by_the_same_rule() -> None:
    bound = bind("llama", ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"])
    scores = Gradient().scores(bound)
    slow = Gradient().scores(replace(bound, fast=False)).audit(exact=12)
    fast = scores.audit(exact=12)
    assert fast.table["part"].to_list() == slow.table["part"].to_list()
    torch.testing.assert_close(
        torch.tensor(fast.table["exact"]), torch.tensor(slow.table["exact"]), rtol=0, atol=1e-10
    )


def test_inactive_nodes_have_no_effect_at_all() -> None:
    bound = bind("gpt2", ["blocks.0.hook_mlp_out", "blocks.0.attn.hook_z"], torch.float32)
    norms = bound.norms()
    for name, values in Exact().scores(bound).values.items():
        assert not values[norms[name] == 0].any()


def test_neurons_of_a_whole_vector_site() -> None:
    agree(
        bind(
            "llama",
            ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"],
            neurons=["blocks.1.hook_resid_post"],
        ),
        1e-10,
    )


def test_module_paths_are_known_too() -> None:
    agree(
        bind(
            "gpt2",
            [
                "transformer.h.1.mlp",
                "transformer.h.0.attn.c_attn",
                "transformer.h.2",
                "transformer.wte",
            ],
        ),
        1e-10,
    )


def general(bound: Nodes, reason: str) -> None:
    assert bound.patching.startswith("general")
    assert reason in bound.patching
    name = next(iter(bound.groups))
    assert bound.ablate_rule(name, everywhere(bound, name)) is None
    assert torch.isfinite(ablate(bound, name, everywhere(bound, name)[:2])).all()


def test_what_is_not_known_takes_the_general_path() -> None:
    sites = ["blocks.1.hook_mlp_out"]
    general(bind("gpt2", sites, metric=loss), "last position")
    general(replace(bind("gpt2", sites), fast=False), "fast=False")
    elsewhere = bind("gpt2", ["transformer.h.1.ln_2", *sites])
    assert elsewhere.patching == "suffix only; general for transformer.h.1.ln_2"
    assert torch.isfinite(Exact().scores(elsewhere).values["transformer.h.1.ln_2"]).all()

    hooked = bind("gpt2", sites)
    hooked.target.model.transformer.h[0].register_forward_hook(lambda module, args, out: out)
    general(hooked, "hooks")

    renamed = bind("gpt2", sites)
    renamed.target.model.config.model_type = "gpt3"
    general(renamed, "no description of a block of family 'gpt3'")


def test_blocks_that_compute_something_else_are_noticed() -> None:
    changed = bind("gpt2", ["blocks.1.hook_mlp_out"])
    block: Any = changed.target.model.transformer.h[2]

    class Other(type(block)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(hidden_states, *args, **kwargs) * 1.01

    block.__class__ = Other
    general(changed, "compute something else")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox sequential"])
def test_single_columns_of_a_fused_projection(family: str) -> None:
    """Columns of queries move their own position alone, those of keys and values all behind it; the
    jobs of one call mix them.
    """
    path = {"gpt2": "transformer.h.{}.attn.c_attn"}.get(
        family, "gpt_neox.layers.{}.attention.query_key_value"
    )
    for layer in (0, 2):
        site = path.format(layer)
        agree(bind(family, [site], neurons=[site]), 1e-10)


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("everyone", [True, False])
def test_attention_to_later_positions_takes_the_general_path(ahead: int, everyone: bool) -> None:
    """One token may look ahead, in all examples or in one: the suffix is not all that changes."""
    looking = bind("gpt2", ["blocks.1.hook_mlp_out"])
    model: Any = looking.target.model

    class Ahead(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
            size = input_ids.shape[1]
            allowed = torch.ones(len(input_ids), 1, size, size, dtype=torch.bool).tril()
            allowed[slice(None) if everyone else 2, :, 0, ahead] = True
            allowed &= attention_mask[:, None, None].bool()
            dtype = self.dtype
            mask = torch.zeros((), dtype=dtype).where(allowed, torch.finfo(dtype).min)
            return super().forward(input_ids, attention_mask=mask, **kwargs)

    causal = Exact().scores(looking).values["blocks.1.hook_mlp_out"]
    model.__class__ = Ahead
    again = nodes(looking.target, looking.batch, node_models.batches()[1], list(looking.groups))
    general(again, "not causal")
    assert not torch.equal(Exact().scores(again).values["blocks.1.hook_mlp_out"], causal)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_same_numbers_on_a_gpu(family: str) -> None:
    sites = names.site_names(node_models.build(family), layers=[0, 2])
    ours, theirs = (
        agree(bind(family, sites, torch.float32, device=device), 1e-5) for device in ("cpu", "cuda")
    )
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
