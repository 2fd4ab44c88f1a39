"""The folders of dictionary_learning: `ae.pt` and `config.json`, read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.errors import InputError
from assay.io.torch_files import load_state_dict
from assay.io.weights import Entry, Fields, Given, Tensors, Weights

if TYPE_CHECKING:
    import torch

WEIGHTS, CONFIG = "ae.pt", "config.json"
_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
)
_SITES = {
    "resid_post": "blocks.{layer}.hook_resid_post",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "attention_out": "blocks.{layer}.hook_attn_out",
}


def read_dictionary_learning(folder: Path, given: Given) -> list[Entry]:
    """Return the dictionary of a folder.

    Its site follows from `submodule_name`, `resid_post_layer_3` and alike; others have to be given.
    Raises InputError for missing keys, an unknown class, and files that need unpickling."""
    path = folder / CONFIG
    config = Fields.of_json(path)
    trainer = config.part("trainer")
    name = trainer.choose("dict_class", _CLASSES)
    submodule = trainer.get("submodule_name", str, "")
    layer = trainer.maybe("layer", int)
    found = re.fullmatch(r"(\w+?)(?:_layer_(\d+))?", submodule)
    stated = _SITES.get(found[1]) if found else None
    if found and found[2] is not None:
        if layer is not None and layer != int(found[2]):
            raise InputError(f"{path}: submodule_name {submodule!r} and layer {layer} disagree")
        layer = int(found[2])
    if layer is None:
        stated = None
    if "buffer" in config and config.part("buffer").get("io", str, "out") != "out":
        stated = None  # what goes into the module has another name
    reads, writes = given.sites(path, layer, stated, None)
    return [Entry(reads, (writes,), folder, lambda: _weights(folder / WEIGHTS, trainer, name))]


def _weights(path: Path, trainer: Fields, name: str) -> Weights:
    d_in, size = trainer.require("activation_dim", int), trainer.require("dict_size", int)
    file = Tensors(path, load_state_dict(path))
    settings: dict[str, Any] = {"subtract": name not in ("AutoEncoderNew", "JumpReluAutoEncoder")}
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        tensors = {
            "W_enc": file.take("W_enc", d_in, size),
            "W_dec": file.take("W_dec", size, d_in),
            "b_enc": file.take("b_enc", size),
            "b_dec": file.take("b_dec", d_in),
        }
    else:
        bias, encoder = _BIASES.get(name, ("b_dec", "encoder.bias"))
        tensors = {
            "W_enc": file.take("encoder.weight", size, d_in).T,
            "W_dec": file.take("decoder.weight", d_in, size).T,
            "b_enc": file.take(encoder, size),
            "b_dec": file.take(bias, d_in),
        }
    match name:
        case "AutoEncoder" | "AutoEncoderNew":
            architecture = "relu"
        case "GatedAutoEncoder":
            architecture = "gated"
            tensors |= {"r_mag": file.take("r_mag", size), "b_mag": file.take("mag_bias", size)}
        case "JumpReluAutoEncoder":
            architecture = "jumprelu"
            tensors["threshold"] = file.take("threshold", size)
        case "AutoEncoderTopK":
            # Its threshold is stored for another use: features are chosen by their number.
            architecture = "topk"
            settings["k"] = _integers(file, "k", trainer.maybe("k", int))[0]
            file.drop("threshold")
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            architecture = "batchtopk"
            settings["k"] = _integers(file, "k", trainer.maybe("k", int))[0]
            # Negative before training has set it: every positive feature is active.
            tensors["threshold"] = file.take("threshold").clamp_min(0)
            if name == "MatryoshkaBatchTopKSAE":
                architecture = "matryoshka"
                groups = _integers(file, "group_sizes", None)
                settings["nested"] = [sum(groups[: end + 1]) for end in range(len(groups))]
    file.finish(name)
    return Weights(architecture, tensors, settings)


_BIASES = {
    "AutoEncoder": ("bias", "encoder.bias"),
    "AutoEncoderNew": ("decoder.bias", "encoder.bias"),
    "GatedAutoEncoder": ("decoder_bias", "gate_bias"),
}
"""The names of the decoder's and the encoder's bias; those of the others are b_dec and
encoder.bias."""


def _integers(file: Tensors, key: str, configured: int | None) -> list[int]:
    """Return the integers of a tensor, which must agree with the configuration's."""
    if key not in file:
        if configured is None:
            raise InputError(f"{file.path}: {key!r} is neither there nor in {CONFIG}")
        return [configured]
    tensor: torch.Tensor = file.take_integers(key)
    values = [int(value) for value in tensor.reshape(-1)]
    if configured is not None and values != [configured]:
        raise InputError(f"{file.path}: {key} is {values}, and {configured} in {CONFIG}")
    return values
