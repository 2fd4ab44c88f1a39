"""Small files in the layout of each outside format, with what they compute written out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

D, M = 5, 9
METADATA = {"hook_name": "blocks.1.hook_resid_post", "sae_lens_version": "6.5.0"}


@dataclass(frozen=True)
class Expected:
    """What a set of one dictionary, or of one per layer, must compute."""

    sites: dict[str, tuple[str, tuple[str, ...]]]
    features: Callable[[Tensor, str], Tensor]
    rebuilt: Callable[[Tensor, Tensor, str], Tensor]
    given: dict = field(default_factory=dict)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def steps(*shape: int, seed: int) -> Tensor:
    return draw(*shape, seed=seed).abs()


def step(before: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where(before > threshold, before.clamp_min(0), 0.0)


def largest(before: Tensor, k: int) -> Tensor:
    """Return the k largest of each row, those above zero, in a loop."""
    out = torch.zeros_like(before)
    for row, values in enumerate(before):
        for place in values.argsort(descending=True)[:k]:
            out[row, place] = max(values[place], 0)
    return out


def write_saelens(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    kept = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(kept, folder / "sae_weights.safetensors")


def saelens(folder: Path, name: str, **changes) -> Expected:
    """Write a SAELens directory of an architecture; `changes` go into its configuration."""
    transcoder = name.endswith("transcoder")
    d_out = 3 if transcoder else D
    t = {
        "W_enc": draw(D, M, seed=1),
        "W_dec": draw(M, d_out, seed=2),
        "b_enc": draw(M, seed=3),
        "b_dec": draw(d_out, seed=4),
    }
    config = {
        "architecture": name,
        "d_in": D,
        "d_sae": M,
        "dtype": "float64",
        "device": "cpu",
        "apply_b_dec_to_input": not transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": dict(METADATA),
    }
    site, writes = METADATA["hook_name"], METADATA["hook_name"]
    if transcoder:
        config["d_out"] = d_out
        writes = config["metadata"]["hook_name_out"] = "blocks.1.hook_mlp_out"
    if "jumprelu" in name:
        t["threshold"] = steps(M, seed=5)
    if "skip" in name:
        t["W_skip"] = draw(d_out, D, seed=6)
    if name == "topk":
        config["k"] = 3
    if name == "gated":
        t = {key: tensor for key, tensor in t.items() if key != "b_enc"}
        t |= {key: draw(M, seed=7 + i) for i, key in enumerate(("b_gate", "b_mag", "r_mag"))}
    config |= changes
    write_saelens(folder, config, t)
    by_norm = config.get("rescale_acts_by_decoder_norm", False)
    norms = t["W_dec"].norm(dim=1)

    def features(x: Tensor, _: str) -> Tensor:
        centred = x - t["b_dec"] if config["apply_b_dec_to_input"] else x
        if name == "gated":
            gate = centred @ t["W_enc"] + t["b_gate"]
            size = centred @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]
            return torch.where(gate > 0, size.clamp_min(0), 0.0)
        before = centred @ t["W_enc"] + t["b_enc"]
        if name == "topk":
            return largest(before * norms, 3) / norms if by_norm else largest(before, 3)
        return step(before, t.get("threshold", 0.0))

    def rebuilt(codes: Tensor, x: Tensor, _: str) -> Tensor:
        out = codes @ t["W_dec"] + t["b_dec"]
        return out + x @ t["W_skip"].T if "W_skip" in t else out

    label = site if site == writes else f"{site} -> {writes}"
    return Expected({label: (site, (writes,))}, features, rebuilt)


def gemma_scope(folder: Path, kind: str = "res", upper: bool = False) -> Expected:
    """Write `params.npz` of the first release in the folders that name its site."""
    parts = {
        "embedding": "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_21",
        "mlp": "models--google--gemma-scope-2b-pt-mlp/snapshots/1a2b/layer_7/width_16k/l0_8",
        "transcoders": "gemma-scope-2b-pt-transcoders/layer_7/width_16k/average_l0_8",
    }
    folder = folder / parts.get(kind, f"gemma-scope-2b-pt-{kind}/layer_7/width_16k/average_l0_8")
    folder.mkdir(parents=True)
    t = {
        "w_enc": draw(D, M, seed=1).float(),
        "w_dec": draw(M, D, seed=2).float(),
        "b_enc": draw(M, seed=3).float(),
        "b_dec": draw(D, seed=4).float(),
        "threshold": steps(M, seed=5).float(),
    }
    names = {key: key.replace("w_", "W_") if upper else key for key in t}
    np.savez(folder / "params.npz", **{names[key]: tensor.numpy() for key, tensor in t.items()})
    root = D**0.5 if kind == "embedding" else 1.0

    def features(x: Tensor, _: str) -> Tensor:
        return step(x @ t["w_enc"].double() / root + t["b_enc"], t["threshold"].double())

    def rebuilt(codes: Tensor, x: Tensor, _: str) -> Tensor:
        return codes @ t["w_dec"].double() * root + t["b_dec"]

    site = {
        "res": "blocks.7.hook_resid_post",
        "mlp": "blocks.7.hook_mlp_out",
        "att": "blocks.7.attn.hook_z",
        "embedding": "hook_embed",
    }.get(kind)
    given = {}
    name, writes = site, site
    if site is None:
        given = {"reads": "model.layers.{layer}.mlp:input", "writes": "model.layers.{layer}.mlp"}
        site, writes = "model.layers.7.mlp:input", "model.layers.7.mlp"
        name = f"{site} -> {writes}"
    return Expected({name: (site, (writes,))}, features, rebuilt, given)


def gemma_scope_2(folder: Path, skip: bool = True) -> Expected:
    """Write a transcoder of the second release."""
    folder.mkdir(parents=True, exist_ok=True)
    t = {
        "w_enc": draw(D, M, seed=1),
        "w_dec": draw(M, 3, seed=2),
        "b_enc": draw(M, seed=3),
        "b_dec": draw(3, seed=4),
        "threshold": steps(M, seed=5),
    }
    if skip:
        t["affine_skip_connection"] = draw(D, 3, seed=6)
    save_file(t, folder / "params.safetensors")
    config = {
        "architecture": "jump_relu",
        "hf_hook_point_in": "model.layers.4.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.4.post_feedforward_layernorm.output",
    }
    (folder / "config.json").write_text(json.dumps(config))
    site = "model.layers.4.pre_feedforward_layernorm"
    writes = "model.layers.4.post_feedforward_layernorm"

    def features(x: Tensor, _: str) -> Tensor:
        return step(x @ t["w_enc"] + t["b_enc"], t["threshold"])

    def rebuilt(codes: Tensor, x: Tensor, _: str) -> Tensor:
        out = codes @ t["w_dec"] + t["b_dec"]
        return out + x @ t["affine_skip_connection"] if skip else out

    return Expected({f"{site} -> {writes}": (site, (writes,))}, features, rebuilt)


def _crossing(layers: list[dict[str, Tensor]], reads: str, writes: str) -> Expected:
    """Return what a cross-layer transcoder computes, one decoder per written layer."""
    count = len(layers)
    sites = {}
    for layer in range(count):
        written = tuple(writes.format(later) for later in range(layer, count))
        last = f" .. {written[-1]}" if len(written) > 1 else ""
        sites[f"{reads.format(layer)} -> {written[0]}{last}"] = (reads.format(layer), written)
    names = list(sites)

    def features(x: Tensor, name: str) -> Tensor:
        t = layers[names.index(name)]
        return step(x @ t["W_enc"] + t["b_enc"], t.get("threshold", 0.0))

    def rebuilt(codes: Tensor, x: Tensor, name: str) -> Tensor:
        layer = names.index(name)
        t = layers[layer]
        out = [codes @ t["W_dec"][:, place] for place in range(count - layer)]
        out[0] = out[0] + t["b_dec"]
        if "W_skip" in t:
            out[0] = out[0] + x @ t["W_skip"]
        return torch.cat(out, -1)

    return Expected(sites, features, rebuilt)


def _layers(count: int, threshold: bool, skip: bool) -> list[dict[str, Tensor]]:
    found = []
    for layer in range(count):
        t = {
            "W_enc": draw(D, M, seed=10 * layer + 1),
            "W_dec": draw(M, count - layer, D, seed=10 * layer + 2),
            "b_enc": draw(M, seed=10 * layer + 3),
            "b_dec": draw(D, seed=10 * layer + 4),
        }
        if threshold:
            t["threshold"] = steps(M, seed=10 * layer + 5)
        if skip:
            t["W_skip"] = draw(D, D, seed=10 * layer + 6)
        found.append(t)
    return found


def gemma_scope_2_layers(folder: Path) -> Expected:
    folder.mkdir(parents=True, exist_ok=True)
    layers = _layers(3, threshold=True, skip=True)
    for layer, t in enumerate(layers):
        unused = draw(M, layer, D, seed=77)
        save_file(
            {
                "w_enc": t["W_enc"],
                "w_dec": torch.cat([unused, t["W_dec"]], 1),
                "b_enc": t["b_enc"],
                "b_dec": t["b_dec"],
                "threshold": t["threshold"],
                "affine_skip_connection": t["W_skip"],
            },
            folder / f"params_layer_{layer}.safetensors",
        )
    config = {
        "architecture": "jump_relu",
        "hf_hook_point_in": "model.layers.0.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.0.post_feedforward_layernorm.output",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return _crossing(
        layers,
        "model.layers.{}.pre_feedforward_layernorm",
        "model.layers.{}.post_feedforward_layernorm",
    )


def circuit_tracer_layers(folder: Path, threshold: bool = True) -> Expected:
    """Write a cross-layer transcoder of circuit-tracer."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = _layers(3, threshold, skip=threshold)
    for layer, t in enumerate(layers):
        encoder = {
            f"W_enc_{layer}": t["W_enc"].T.contiguous(),
            f"b_enc_{layer}": t["b_enc"],
            f"b_dec_{layer}": t["b_dec"],
        }
        for key in ("threshold", "W_skip"):
            if key in t:
                encoder[f"{key}_{layer}"] = t[key]
        save_file(encoder, folder / f"W_enc_{layer}.safetensors")
        save_file({f"W_dec_{layer}": t["W_dec"]}, folder / f"W_dec_{layer}.safetensors")
    config = {
        "model_name": "gpt2",
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return _crossing(layers, "blocks.{}.hook_resid_mid", "blocks.{}.hook_mlp_out")


def circuit_tracer(folder: Path, listed: bool = False) -> Expected:
    """Write two transcoders of circuit-tracer, one with a skip and one with thresholds."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = []
    for layer in range(2):
        t = {
            "W_enc": draw(M, D, seed=10 * layer + 1),
            "W_dec": draw(M, D, seed=10 * layer + 2),
            "b_enc": draw(M, seed=10 * layer + 3),
            "b_dec": draw(D, seed=10 * layer + 4),
        }
        if layer == 0:
            t["W_skip"] = draw(D, D, seed=6)
        else:
            t["activation_function.threshold"] = steps(M, seed=5)
        save_file(t, folder / (f"some_{layer}.st" if listed else f"layer_{layer}.safetensors"))
        layers.append(t)
    config = {
        "model_name": "gpt2",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    if listed:
        config["transcoders"] = ["some_0.st", "some_1.st"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    sites = {
        f"blocks.{layer}.mlp.hook_in -> blocks.{layer}.hook_mlp_out": (
            f"blocks.{layer}.mlp.hook_in",
            (f"blocks.{layer}.hook_mlp_out",),
        )
        for layer in range(2)
    }
    names = list(sites)

    def features(x: Tensor, name: str) -> Tensor:
        t = layers[names.index(name)]
        return step(x @ t["W_enc"].T + t["b_enc"], t.get("activation_function.threshold", 0.0))

    def rebuilt(codes: Tensor, x: Tensor, name: str) -> Tensor:
        t = layers[names.index(name)]
        out = codes @ t["W_dec"] + t["b_dec"]
        return out + x @ t["W_skip"].T if "W_skip" in t else out

    return Expected(sites, features, rebuilt)


def dictionary_learning(folder: Path, name: str) -> Expected:
    """Write `ae.pt` and `config.json` of a class."""
    folder.mkdir(parents=True, exist_ok=True)
    W_enc, W_dec, b_enc = draw(D, M, seed=1), draw(M, D, seed=2), draw(M, seed=3)
    b_dec, more = draw(D, seed=4), {}
    flat = name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
    linear = {"encoder.weight": W_enc.T.contiguous(), "decoder.weight": W_dec.T.contiguous()}
    state = {"W_enc": W_enc, "W_dec": W_dec} if flat else linear
    trainer = {
        "dict_class": name,
        "activation_dim": D,
        "dict_size": M,
        "layer": 3,
        "submodule_name": "resid_post_layer_3",
    }
    threshold = steps(M, seed=5) if name.startswith("Jump") else torch.tensor(0.8).double()
    match name:
        case "AutoEncoder":
            state |= {"bias": b_dec, "encoder.bias": b_enc}
        case "AutoEncoderNew":
            state |= {"decoder.bias": b_dec, "encoder.bias": b_enc}
        case "GatedAutoEncoder":
            more = {"r_mag": draw(M, seed=8), "mag_bias": draw(M, seed=9)}
            state |= {"decoder_bias": b_dec, "gate_bias": b_enc, **more}
        case "JumpReluAutoEncoder":
            state |= {"b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
        case _:
            trainer["k"] = 2
            state |= {"b_dec": b_dec, "k": torch.tensor(2, dtype=torch.int)}
            state |= {"threshold": threshold, ("b_enc" if flat else "encoder.bias"): b_enc}
    if flat and name.startswith("Matryoshka"):
        state["group_sizes"] = torch.tensor([2, 3, 4])
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    subtract = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")

    def features(x: Tensor, _: str) -> Tensor:
        plain = (x - b_dec if subtract else x) @ W_enc
        if name == "GatedAutoEncoder":
            size = (plain * more["r_mag"].exp() + more["mag_bias"]).clamp_min(0)
            return torch.where(plain + b_enc > 0, size, 0.0)
        before = plain + b_enc
        if name == "AutoEncoderTopK":
            return largest(before, 2)
        return step(before, threshold if flat or name == "BatchTopKSAE" else 0.0)

    def rebuilt(codes: Tensor, x: Tensor, _: str) -> Tensor:
        return codes @ W_dec + b_dec

    site = "blocks.3.hook_resid_post"
    return Expected({site: (site, (site,))}, features, rebuilt)


DICTIONARY_LEARNING = (
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
)
SAELENS = (
    "standard",
    "gated",
    "topk",
    "jumprelu",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
FILES: dict[str, Callable[[Path], Expected]] = {
    **{f"SAELens {name}": (lambda path, name=name: saelens(path, name)) for name in SAELENS},
    "SAELens topk by norm": lambda path: saelens(path, "topk", rescale_acts_by_decoder_norm=True),
    "SAELens without subtraction": lambda path: saelens(
        path, "standard", apply_b_dec_to_input=False
    ),
    "Gemma Scope residual": lambda path: gemma_scope(path),
    "Gemma Scope MLP": lambda path: gemma_scope(path, "mlp", upper=True),
    "Gemma Scope attention": lambda path: gemma_scope(path, "att"),
    "Gemma Scope embedding": lambda path: gemma_scope(path, "embedding"),
    "Gemma Scope transcoder": lambda path: gemma_scope(path, "transcoders", upper=True),
    "Gemma Scope 2": lambda path: gemma_scope_2(path),
    "Gemma Scope 2 without skip": lambda path: gemma_scope_2(path, skip=False),
    "Gemma Scope 2 cross-layer": gemma_scope_2_layers,
    **{
        f"dictionary_learning {name}": (lambda path, name=name: dictionary_learning(path, name))
        for name in DICTIONARY_LEARNING
    },
    "circuit-tracer": lambda path: circuit_tracer(path),
    "circuit-tracer listed": lambda path: circuit_tracer(path, listed=True),
    "circuit-tracer cross-layer": lambda path: circuit_tracer_layers(path),
    "circuit-tracer cross-layer ReLU": lambda path: circuit_tracer_layers(path, threshold=False),
}
