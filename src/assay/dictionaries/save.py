"""Dictionaries into the files of SAELens and circuit-tracer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from assay.dictionaries.base import Dictionary, DictionarySet, Placed
from assay.dictionaries.batchtopk import BatchTopK
from assay.dictionaries.fold import as_jumprelu, fold_norms
from assay.dictionaries.linear import Linear
from assay.dictionaries.load import name_of
from assay.dictionaries.normalised import Normalised
from assay.dictionaries.topk import TopK
from assay.errors import InputError
from assay.io.circuit_tracer import put_circuit_tracer
from assay.io.saelens import put_saelens

_NAMES = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated"}
_TRANSCODERS = {
    ("relu", False): "transcoder",
    ("relu", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")


def save_dictionaries(
    folder: Path | str, dictionaries: DictionarySet, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a set into a folder that is new or empty: a SAELens directory for each dictionary.

    `metadata` (model_name, context_size, prepend_bos and alike) goes into every configuration.
    BatchTopK and Matryoshka dictionaries are written as the JumpReLU ones that they are after
    training, and those that choose features by norm with the norms folded into their encoders.
    Raises InputError for a folder that is in use, and for dictionaries that SAELens does not have.
    """
    folder = _free(folder)
    written = {name: to_saelens(placed, metadata) for name, placed in dictionaries.items()}
    names = {name: _file_name(name) for name in dictionaries}
    if len(set(names.values())) < len(names):
        raise InputError(f"two of the dictionaries {', '.join(names)} have the same file name")
    for name, (config, tensors) in written.items():
        put_saelens(folder / names[name], config, tensors)
    return folder


def to_saelens(
    placed: Placed, metadata: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors of a SAELens directory; InputError for dictionaries
    that SAELens does not have.
    """
    name = name_of(placed.reads, placed.writes)
    dictionary = placed.dictionary
    norm = "none"
    if isinstance(dictionary, Normalised):
        norm, dictionary = dictionary.norm, dictionary.inner
    dictionary = _plain(dictionary)
    transcoder = placed.writes != (placed.reads,)
    kind = dictionary.architecture
    skip = dictionary.W_skip is not None
    architecture = _TRANSCODERS.get((kind, skip)) if transcoder else _NAMES.get(kind)
    if len(placed.writes) > 1:
        raise InputError(f"{name} writes at several sites, which SAELens has no format for")
    if architecture is None or (skip and not transcoder):
        raise InputError(
            f"{name}: SAELens has no {kind} {'transcoder' if transcoder else 'autoencoder'}"
            f"{' with a skip connection' if skip else ''}"
        )
    if transcoder and dictionary.subtract:
        raise InputError(f"{name}: a transcoder of SAELens cannot subtract its bias from its input")
    state = {key: tensor.detach().cpu() for key, tensor in dictionary.state_dict().items()}
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.size,
        "dtype": str(dictionary.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.subtract,
        "normalize_activations": norm,
        "reshape_activations": "hook_z" if placed.reads.endswith("hook_z") else "none",
    }
    stated = {"sae_lens_version": "6.0.0", **(metadata or {}), "hook_name": placed.reads}
    if transcoder:
        config["d_out"] = dictionary.d_out
        stated["hook_name_out"] = placed.writes[0]
    if isinstance(dictionary, TopK):
        config |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}
    if kind == "gated":
        state["b_gate"] = state.pop("b_enc")
    if skip:
        state["W_skip"] = _whole_skip(state["W_skip"], dictionary.d_out).T
    return {**config, "metadata": stated}, state


def save_circuit_tracer(
    folder: Path | str,
    dictionaries: DictionarySet,
    *,
    model_name: str = "",
    scan: str | None = None,
) -> Path:
    """Write transcoders, or one cross-layer transcoder, into a folder that is new or empty.

    Each reads at `blocks.L.HOOK` and writes at `blocks.L.HOOK`, a cross-layer transcoder from L to
    the last layer, and every layer from 0 on has one. Raises InputError for other sites, for
    architectures other than ReLU, JumpReLU, BatchTopK and Matryoshka, for different numbers of
    features, and for a cross-layer transcoder with skip connections, which circuit-tracer would
    leave out."""
    folder = _free(folder)
    layers: dict[int, tuple[Placed, Linear]] = {}
    hooks: set[tuple[str, str]] = set()
    for name, placed in dictionaries.items():
        read, *written = (_HOOK.fullmatch(site) for site in (placed.reads, *placed.writes))
        if read is None or None in written:
            raise InputError(f"{name}: circuit-tracer needs sites named blocks.LAYER.HOOK")
        layer = int(read[1])
        hooks |= {(read[2], site[2]) for site in written if site is not None}
        expected = list(range(layer, layer + len(written)))
        if [int(site[1]) for site in written if site is not None] != expected:
            raise InputError(f"{name} must write from layer {layer} on, one site per layer")
        if layer in layers:
            raise InputError(f"two dictionaries read at layer {layer}")
        layers[layer] = placed, _plain(placed.dictionary)
    count = len(layers)
    if not count or sorted(layers) != list(range(count)):
        raise InputError(f"circuit-tracer needs every layer from 0 on, got {sorted(layers)}")
    if len(hooks) > 1:
        raise InputError(f"all layers must read and write at the same hooks, got {sorted(hooks)}")
    writes = [len(layers[layer][0].writes) for layer in range(count)]
    crossing = count > 1 and writes == list(range(count, 0, -1))
    if not crossing and set(writes) != {1}:
        raise InputError(
            f"the layers must write at one site each or at all later ones, got {writes}"
        )
    files: dict[str, dict[str, Tensor]] = {}
    for layer in range(count):
        placed, dictionary = layers[layer]
        tensors = _circuit_tracer_tensors(layer, dictionary)
        if dictionary.size != layers[0][1].size:
            raise InputError("circuit-tracer needs the same number of features at every layer")
        if crossing:
            files |= _crossing_files(layer, count, placed.width, tensors)
        else:
            files[f"layer_{layer}.safetensors"] = tensors
    read_hook, write_hook = next(iter(hooks))
    config = {
        "model_name": model_name,
        "model_kind": "cross_layer_transcoder" if crossing else "transcoder_set",
        "feature_input_hook": read_hook,
        "feature_output_hook": write_hook,
        "scan": scan,
    }
    put_circuit_tracer(folder, config, files)
    return folder


def _circuit_tracer_tensors(layer: int, dictionary: Linear) -> dict[str, Tensor]:
    kind = dictionary.architecture
    if kind not in ("relu", "jumprelu"):
        raise InputError(f"layer {layer}: circuit-tracer has no {kind} transcoder")
    if dictionary.subtract:
        raise InputError(
            f"layer {layer}: a transcoder of circuit-tracer cannot subtract its bias from its input"
        )
    state = {key: tensor.detach().cpu() for key, tensor in dictionary.state_dict().items()}
    found = {key: state[key] for key in ("W_dec", "b_enc", "b_dec")}
    found["W_enc"] = state["W_enc"].T
    if kind == "jumprelu":
        # circuit-tracer keeps negative features above a negative threshold.
        found["activation_function.threshold"] = state["threshold"].clamp_min(0)
    if "W_skip" in state:
        found["W_skip"] = _whole_skip(state["W_skip"], dictionary.d_out).T
    return found


def _crossing_files(
    layer: int, count: int, width: int, tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    if "W_skip" in tensors:
        raise InputError(
            f"layer {layer}: circuit-tracer leaves out the skip connections of cross-layer"
            " transcoders"
        )
    b_dec = tensors["b_dec"].reshape(-1, width)
    if bool(b_dec[1:].any()):
        raise InputError(
            f"layer {layer}: a cross-layer transcoder of circuit-tracer has a bias at its own layer"
            " alone"
        )
    encoder = {
        f"W_enc_{layer}": tensors["W_enc"],
        f"b_enc_{layer}": tensors["b_enc"],
        f"b_dec_{layer}": b_dec[0],
    }
    if "activation_function.threshold" in tensors:
        encoder[f"threshold_{layer}"] = tensors["activation_function.threshold"]
    decoder = tensors["W_dec"].reshape(-1, count - layer, width)
    return {
        f"W_enc_{layer}.safetensors": encoder,
        f"W_dec_{layer}.safetensors": {f"W_dec_{layer}": decoder},
    }


def _plain(dictionary: Dictionary) -> Linear:
    """Return the dictionary as it is after training, with no choice by norm."""
    if isinstance(dictionary, TopK | BatchTopK) and dictionary.by_norm:
        dictionary = fold_norms(dictionary)
    if isinstance(dictionary, BatchTopK):
        dictionary = as_jumprelu(dictionary)
    if not isinstance(dictionary, Linear):
        raise InputError(
            f"a {dictionary.architecture} dictionary has no format outside Assay; supported are"
            " relu, topk, batchtopk, jumprelu, gated, matryoshka"
        )
    return dictionary


def _whole_skip(skip: Tensor, d_out: int) -> Tensor:
    return functional.pad(skip, (0, d_out - skip.shape[1]))


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".")[:200] or "dictionary"


def _free(folder: Path | str) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already and is not empty; give a new folder")
    return folder
