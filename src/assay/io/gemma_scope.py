"""Gemma Scope (`params.npz`) and Gemma Scope 2 (`params.safetensors` with `config.json`, and
cross-layer transcoders in `params_layer_0.safetensors` and on), read.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from assay.errors import InputError
from assay.io.weights import Entry, Fields, Given, Tensors, Weights, with_layer

if TYPE_CHECKING:
    import torch

FIRST, SECOND, CONFIG = "params.npz", "params.safetensors", "config.json"
LAYERS = re.compile(r"params_layer_(\d+)\.safetensors")
_SITES = {
    "res": "blocks.{layer}.hook_resid_post",
    "mlp": "blocks.{layer}.hook_mlp_out",
    "att": "blocks.{layer}.attn.hook_z",
}


def read_gemma_scope(folder: Path, given: Given) -> list[Entry]:
    """Return the dictionary of a folder of the first release, `.../layer_20/width_16k/...`.

    Its site follows from the folders' names (gemma-scope-2b-pt-res, -mlp or -att); where they do
    not say it, as for transcoders, it has to be given. Embedding dictionaries are rescaled by the
    root of the width. Raises InputError without a site."""
    path = folder / FIRST
    parts = folder.absolute().parts
    release = [part.split("-")[-1] for part in parts if "gemma-scope" in part]
    layers = [int(found[1]) for part in parts if (found := re.fullmatch(r"layer_(\d+)", part))]
    layer = layers[-1] if layers else None
    embedding = "embedding" in parts
    stated = "hook_embed" if embedding else _SITES.get(release[-1]) if release else None
    if stated is not None and layer is None and not embedding and given.reads is None:
        stated = None
    reads, writes = given.sites(path, layer, stated, None)
    return [Entry(reads, (writes,), folder, lambda: _weights(path, embedding))]


def read_gemma_scope_2(folder: Path, given: Given) -> list[Entry]:
    """Return the dictionary of a folder of the second release; its sites are in `config.json`."""
    config = _config(folder)
    reads, writes = given.sites(
        folder / CONFIG,
        None,
        _module_path(config.maybe("hf_hook_point_in", str)),
        _module_path(config.maybe("hf_hook_point_out", str)),
    )
    return [Entry(reads, (writes,), folder, lambda: _weights(folder / SECOND))]


def read_gemma_scope_2_layers(folder: Path, given: Given) -> list[Entry]:
    """Return a cross-layer transcoder: one dictionary per layer that reads there and writes at this
    layer and all later ones.

    Raises InputError when a layer is missing, and without sites."""
    files = {
        int(found[1]): path
        for path in folder.iterdir()
        if (found := LAYERS.fullmatch(path.name)) and path.is_file()
    }
    count = len(files)
    if sorted(files) != list(range(count)):
        raise InputError(
            f"{folder}: the files of layers {sorted(files)} are there; those of all layers from 0"
            " on are needed"
        )
    config = _config(folder) if (folder / CONFIG).is_file() else Fields(folder / CONFIG, {})
    stated = [_module_path(config.maybe(f"hf_hook_point_{side}", str)) for side in ("in", "out")]
    entries = []
    for layer in range(count):
        sites = []
        for written in range(layer, count):
            moved = [None if site is None else with_layer(site, written) for site in stated]
            sites.append(given.sites(folder, written, *moved))
        writes = tuple(site for _, site in sites)
        path = files[layer]
        load = lambda path=path, layer=layer: _layer_weights(path, layer, count)  # noqa: E731
        entries.append(Entry(sites[0][0], writes, path, load))
    return entries


def _config(folder: Path) -> Fields:
    config = Fields.of_json(folder / CONFIG)
    config.choose("architecture", ("jump_relu",))
    return config


def _module_path(hook: str | None) -> str | None:
    """Return the site that a path with `.output` or `.input` behind it means."""
    if hook is None:
        return None
    path, _, end = hook.rpartition(".")
    if not path or end not in ("output", "input"):
        raise InputError(f"hook point {hook[:80]!r} must end in .output or .input")
    return path if end == "output" else f"{path}:input"


def _lower(path: Path) -> Tensors:
    """Return the tensors of a file with their names in lower case, as releases differ in it."""
    from assay.io.files import load_tensors

    lower: dict[str, torch.Tensor] = {}
    for key, tensor in load_tensors(path, finite=False).items():
        if key.lower() in lower:
            raise InputError(f"{path}: the tensor {key.lower()!r} is there twice")
        lower[key.lower()] = tensor
    return Tensors(path, lower)


def _weights(path: Path, embedding: bool = False) -> Weights:
    file = _lower(path)
    W_enc = file.take("w_enc", None, None)
    d_in, size = W_enc.shape
    W_dec = file.take("w_dec", size, None)
    d_out = W_dec.shape[1]
    tensors = {
        "W_enc": W_enc,
        "W_dec": W_dec,
        "b_enc": file.take("b_enc", size),
        "b_dec": file.take("b_dec", d_out),
        "threshold": file.take("threshold", size),
    }
    skip = file.maybe("affine_skip_connection", d_in, d_out)
    if skip is not None:
        tensors["W_skip"] = skip
    if embedding:
        tensors |= {"W_enc": W_enc / math.sqrt(d_in), "W_dec": W_dec * math.sqrt(d_in)}
    file.finish("Gemma Scope")
    return Weights("jumprelu", tensors, {"subtract": False})


def _layer_weights(path: Path, layer: int, count: int) -> Weights:
    file = _lower(path)
    W_enc = file.take("w_enc", None, None)
    d_in, size = W_enc.shape
    # The decoders of earlier layers are there, and unused.
    W_dec = file.take("w_dec", size, count, None)[:, layer:]
    width = W_dec.shape[2]
    b_dec = file.take("b_dec", width)
    tensors = {
        "W_enc": W_enc,
        "W_dec": W_dec.reshape(size, -1),
        "b_enc": file.take("b_enc", size),
        # Each layer's bias is added once, by the dictionary that reads there.
        "b_dec": b_dec.new_zeros(W_dec.shape[1] * width).index_copy(0, _first(width), b_dec),
        "threshold": file.take("threshold", size),
    }
    skip = file.maybe("affine_skip_connection", d_in, width)
    if skip is not None:
        tensors["W_skip"] = skip
    file.finish("cross-layer Gemma Scope")
    return Weights("jumprelu", tensors, {"subtract": False})


def _first(count: int) -> torch.Tensor:
    import torch

    return torch.arange(count)
