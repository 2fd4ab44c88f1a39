"""Names of every family against hooks of our own: what the names promise about the residual
stream, heads and neurons.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from assay.core.sites import Edit, read_sites, run_edited
from assay.errors import InputError
from assay.targets import families, names

SMALL = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**SMALL, "n_positions": 32}),
    "gpt_neox parallel": (
        "gpt_neox",
        {**SMALL, "intermediate_size": 40, "use_parallel_residual": True},
    ),
    "gpt_neox sequential": (
        "gpt_neox",
        {**SMALL, "intermediate_size": 40, "use_parallel_residual": False},
    ),
    "llama": ("llama", {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2}),
    "mistral": ("mistral", {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2}),
    "qwen3": ("qwen3", {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 6}),
    "gemma2": (
        "gemma2",
        {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 6},
    ),
}
SEQUENTIAL = [name for name in CONFIGS if name != "gpt_neox parallel"]


def build(name: str) -> nn.Module:
    family, settings = CONFIGS[name]
    config = CONFIG_MAPPING[family](**settings, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in (
        model.parameters()
    ):  # norms too: a norm whose scale is one would hide a site on its wrong side
        parameter.data = (
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
        )
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


@pytest.fixture(scope="module", params=SEQUENTIAL)
def sequential(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def ids() -> dict[str, Any]:
    return {"input_ids": torch.arange(1, 13).reshape(2, 6), "use_cache": False}


def read(model: nn.Module, *wanted: str) -> dict[str, Tensor]:
    refs = {name: names.resolve(model, name) for name in wanted}
    seen = read_sites(model, ids(), {ref.site for ref in refs.values()})
    return {name: ref.split(seen[ref.site].value) for name, ref in refs.items()}


def block_input(model: nn.Module, layer: int) -> Tensor:
    """The block's first input by a plain torch hook: independent of the names and of the hook
    layer.
    """
    found = families.find_family(model)
    assert found is not None
    kept: list[Tensor] = []
    block = model.get_submodule(f"{found.blocks}.{layer}")
    handle = block.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        model(**ids())
    handle.remove()
    return kept[0]


def test_residual_stream_adds_up(sequential: nn.Module) -> None:
    for layer in range(2):
        hooked = [
            f"blocks.{layer}.hook_{name}"
            for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        ]
        pre, attention, mid, mlp, post = read(sequential, *hooked).values()
        torch.testing.assert_close(pre, block_input(sequential, layer), rtol=0, atol=0)
        torch.testing.assert_close(pre + attention, mid, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(mid + mlp, post, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        post, read(sequential, "blocks.1.hook_resid_post")["blocks.1.hook_resid_post"]
    )


def test_parallel_blocks_add_up_without_a_middle() -> None:
    parallel = build("gpt_neox parallel")
    hooked = [
        f"blocks.1.hook_{name}" for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    ]
    pre, attention, mlp, post = read(parallel, *hooked).values()
    torch.testing.assert_close(pre + attention + mlp, post, rtol=1e-13, atol=1e-13)
    with pytest.raises(InputError, match="side by side"):
        names.resolve(parallel, "blocks.0.hook_resid_mid")
    assert "blocks.0.hook_resid_mid" not in names.site_names(parallel)


def test_first_residual_is_the_embedding(model: nn.Module) -> None:
    embedded = read(model, "hook_embed")["hook_embed"]
    if families.model_type(model) == "gpt2":
        embedded = embedded + model.get_submodule("transformer.wpe")(torch.arange(6))
    torch.testing.assert_close(embedded, block_input(model, 0))


def test_writing_the_middle_moves_the_end(sequential: nn.Module) -> None:
    ref = names.resolve(sequential, "blocks.1.hook_resid_mid")
    mid = read(sequential, "blocks.1.hook_resid_mid")["blocks.1.hook_resid_mid"]
    moved = torch.randn(mid.shape, generator=torch.Generator().manual_seed(1), dtype=mid.dtype)
    seen: dict[str, Tensor] = {}
    last = names.resolve(sequential, "blocks.1.hook_resid_post").site
    mlp = names.resolve(sequential, "blocks.1.hook_mlp_out").site
    edits: dict[str, Edit] = {
        ref.site: lambda now: now.written + moved,
        last: lambda now: seen.setdefault("post", now.value),
        mlp: lambda now: seen.setdefault("mlp", now.value),
    }
    with torch.no_grad():
        run_edited(sequential, ids(), edits)
    torch.testing.assert_close(seen["post"], mid + moved + seen["mlp"], rtol=1e-12, atol=1e-12)


def test_heads_give_the_attention_output(model: nn.Module) -> None:
    """The projection of the flattened heads is the attention module's output, and every head is
    one slice of it.
    """
    found = families.find_family(model)
    assert found is not None
    z = read(model, "blocks.0.attn.hook_z")["blocks.0.attn.hook_z"]
    assert z.shape[2] == 4
    projection = model.get_submodule(f"{found.blocks}.0.{found.attention_projection}")
    output = read_sites(model, ids(), [f"{found.blocks}.0.{found.attention_projection}"])
    torch.testing.assert_close(
        projection(z.flatten(-2)), next(iter(output.values())).value, rtol=0, atol=0
    )


def test_query_key_value_make_z_at_the_first_position(model: nn.Module) -> None:
    """The first position attends to itself alone, so that its z is its value vector, repeated
    over grouped heads.
    """
    values = read(model, "blocks.0.attn.hook_v", "blocks.0.attn.hook_z")
    v, z = values["blocks.0.attn.hook_v"][:, 0], values["blocks.0.attn.hook_z"][:, 0]
    torch.testing.assert_close(
        v.repeat_interleave(z.shape[1] // v.shape[1], dim=1), z, rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox sequential"])
def test_fused_query_and_key(name: str) -> None:
    """Zero queries, or zero keys, make attention uniform: each read as one third of a fused
    projection.
    """
    model = build(name)
    z = names.resolve(model, "blocks.0.attn.hook_z")
    v = read(model, "blocks.0.attn.hook_v")["blocks.0.attn.hook_v"]
    for which in "qk":
        ref = names.resolve(model, f"blocks.0.attn.hook_{which}")
        kept: list[Tensor] = []
        edits: dict[str, Edit] = {
            ref.site: lambda now: ref.merge(now.value, torch.zeros_like(ref.split(now.value))),
            z.site: lambda now: kept.append(z.split(now.value)) or now.written,
        }
        with torch.no_grad():
            run_edited(model, ids(), edits)
        uniform = v.cumsum(1) / torch.arange(1, 7)[None, :, None, None]
        torch.testing.assert_close(
            kept[0], uniform, rtol=1e-6, atol=1e-6
        )  # softmax runs in float32


def test_transcoders_read_what_goes_into_the_mlp(model: nn.Module) -> None:
    found = families.find_family(model)
    assert found is not None
    value = read(model, "blocks.1.mlp.hook_in")["blocks.1.mlp.hook_in"]
    path = f"{found.blocks}.1.mlp"
    with torch.no_grad():
        written = model.get_submodule(path)(value)
    torch.testing.assert_close(written, read_sites(model, ids(), [path])[path].value)


def test_neurons_give_the_mlp(model: nn.Module) -> None:
    found = families.find_family(model)
    assert found is not None
    values = read(model, "blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_post")
    pre, post = values["blocks.0.mlp.hook_pre"], values["blocks.0.mlp.hook_post"]
    mlp = model.get_submodule(f"{found.blocks}.0.mlp")
    activation: Any = mlp.act if hasattr(mlp, "act") else mlp.act_fn
    gated = activation(pre)
    if hasattr(mlp, "up_proj"):
        gated = (
            gated
            * read_sites(model, ids(), [f"{found.blocks}.0.mlp.up_proj"])[
                f"{found.blocks}.0.mlp.up_proj"
            ].value
        )
    torch.testing.assert_close(gated, post, rtol=1e-13, atol=1e-13)


def test_every_name_can_be_read_and_is_in_order(model: nn.Module) -> None:
    listed = names.site_names(model)
    refs = [names.resolve(model, name) for name in listed]
    assert len(listed) == 1 + 2 * (
        10
        if families.model_type(model) == "gpt_neox" and model.config.use_parallel_residual
        else 11
    )
    read_sites(model, ids(), {ref.site for ref in refs})
    assert [ref.layer for ref in refs] == sorted(ref.layer for ref in refs)
    assert names.site_names(model, ["attention", "mlp"], [1]) == [
        "blocks.1.hook_attn_out",
        "blocks.1.hook_mlp_out",
    ]


@settings(max_examples=30, deadline=None)
@given(
    heads=st.integers(1, 4),
    width=st.integers(1, 4),
    fused=st.sampled_from(["blocks", "heads"]),
    which=st.integers(0, 2),
)
def test_merge_undoes_split(heads: int, width: int, fused: str, which: int) -> None:
    stride = width if fused == "blocks" else 3 * width
    first = which * (heads * width if fused == "blocks" else width)
    ref = names.SiteRef(
        "x", "head", 0, heads, width, (first, first + (heads - 1) * stride + width), stride
    )
    value = torch.arange(3 * heads * width * 2).reshape(2, -1)
    torch.testing.assert_close(ref.merge(value, ref.split(value)), value)
    changed = ref.merge(value, -1 - ref.split(value))
    assert int((changed != value).sum()) == 2 * heads * width
    triples = (
        value.reshape(2, 3, heads, width)
        if fused == "blocks"
        else value.reshape(2, heads, 3, width).transpose(1, 2)
    )
    torch.testing.assert_close(ref.split(value), triples[:, which])


def test_module_paths_and_parameters() -> None:
    model = build("gpt2")
    assert names.resolve(model, "transformer.h.1.mlp").layer == 1
    assert names.resolve(model, "transformer.h.1.mlp.c_fc.weight") == names.SiteRef(
        "transformer.h.1.mlp.c_fc.weight", "module", 1
    )
    assert names.resolve(model, "transformer.ln_f:input").layer == -1
    assert names.resolve(model, "transformer.h.0.attn + transformer.h.0:input").layer == 0


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("blocks.0.hook_resid_past", "hook_resid_post"),
        ("blocks.7.hook_resid_post", "blocks.1.hook_resid_post"),
        ("transformer.h.0.mpl", "transformer.h.0.mlp"),
        ("transformer.h.0.mlp:output", "transformer.h.0.mlp"),
        ("blocks.0.attn.hook_pattern", "blocks.0.attn"),
        ("", "known"),
    ],
)
def test_unknown_sites_name_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputError, match=near):
        names.resolve(build("gpt2"), name)


def test_bad_questions() -> None:
    model = build("gpt2")
    with pytest.raises(InputError, match="unknown kind of site"):
        names.site_names(model, ["residul"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="layer 2 does not exist"):
        names.site_names(model, layers=[2])
    with pytest.raises(InputError, match="no heads"):
        names.resolve(model, "blocks.0.hook_mlp_out").columns()


def test_other_families_keep_module_paths() -> None:
    config = CONFIG_MAPPING["opt"](
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=24,
        word_embed_proj_dim=16,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(InputError, match=r"family 'opt'.*module paths work"):
        names.resolve(model, "blocks.0.hook_resid_post")
    assert families.find_family(model) is None
    site = names.resolve(model, "model.decoder.layers.0.fc2").site
    assert read_sites(model, ids(), [site])[site].value.shape[-1] == 16
