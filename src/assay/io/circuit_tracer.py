"""The folders of circuit-tracer: transcoders, one file per layer, and cross-layer transcoders, both
with `config.yaml`; read and written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from assay.errors import InputError, shown
from assay.io.files import existing, read_text, save_tensors, write_text
from assay.io.weights import Entry, Fields, Given, Tensors, Weights, brief

if TYPE_CHECKING:
    import torch

CONFIG = "config.yaml"
_MOST_BYTES = 1_000_000
_KINDS = ("transcoder_set", "cross_layer_transcoder")
_ENCODER = re.compile(r"W_enc_(\d+)\.safetensors")
_LAYER = re.compile(r"layer_(\d+)\.safetensors")


def read_circuit_tracer(folder: Path, given: Given) -> list[Entry]:
    """Return the dictionaries of a folder, which read and write at the hooks that its configuration
    declares.

    Raises InputError for missing keys, files outside the folder, and missing layers."""
    path = folder / CONFIG
    if existing(path).stat().st_size > _MOST_BYTES:
        raise InputError(f"{path} is larger than any configuration of circuit-tracer")
    try:
        config = Fields(path, yaml.safe_load(read_text(path)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from error
    crossing = config.choose("model_kind", _KINDS, _KINDS[0]) == _KINDS[1]
    if "transcoders" in config:
        files = _listed(folder, config)
    else:
        pattern = _ENCODER if crossing else _LAYER
        files = {
            int(match[1]): file
            for file in folder.iterdir()
            if (match := pattern.fullmatch(file.name)) and file.is_file()
        }
    count = len(files)
    if not count or sorted(files) != list(range(count)):
        raise InputError(
            f"{folder}: the files of layers {sorted(files)} are there; those of all layers from 0"
            " on are needed"
        )
    hooks = [
        f"blocks.{{layer}}.{config.require(f'feature_{side}_hook', str)}"
        for side in ("input", "output")
    ]
    entries = []
    for layer in range(count):
        last = count if crossing else layer + 1
        sites = [given.sites(path, written, *hooks) for written in range(layer, last)]
        entries.append(
            Entry(
                sites[0][0],
                tuple(site for _, site in sites),
                files[layer],
                _reader(files[layer], layer, count if crossing else None),
            )
        )
    return entries


def _reader(path: Path, layer: int, count: int | None) -> Any:
    return lambda: _weights(path) if count is None else _crossing_weights(path, layer, count)


def _listed(folder: Path, config: Fields) -> dict[int, Path]:
    """Return the files that a configuration lists, by layer; all lie in its folder."""
    found: dict[int, Path] = {}
    for place, item in enumerate(config.require("transcoders", list)):
        layer, name = place, item
        if isinstance(item, dict):
            entry = Fields(config.path, item, "transcoders")
            layer, name = entry.require("layer", int), entry.require("filepath", str)
        if not isinstance(name, str):
            raise InputError(f"{config.path}: transcoders must list files, got {brief(name)}")
        if "://" in name:
            raise InputError(
                f"{config.path} lists {shown(name)}, a file of the hub; download the files, and"
                " list them by their names in this folder"
            )
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise InputError(f"{config.path} lists {shown(name)}, which lies outside its folder")
        if layer in found:
            raise InputError(f"{config.path} lists layer {layer} twice")
        found[layer] = folder / path
    return found


def _weights(path: Path) -> Weights:
    file = Tensors.of_file(path)
    W_enc = file.take("W_enc", None, None)
    size, d_in = W_enc.shape
    W_dec = file.take("W_dec", size, None)
    d_out = W_dec.shape[1]
    tensors = {
        "W_enc": W_enc.T,
        "W_dec": W_dec,
        "b_enc": file.take("b_enc", size),
        "b_dec": file.take("b_dec", d_out),
    }
    _add_threshold(file, tensors, "activation_function.threshold", size)
    skip = file.maybe("W_skip", d_out, d_in)
    if skip is not None:
        tensors["W_skip"] = skip.T
    file.finish("transcoder's")
    return _as_weights(tensors)


def _crossing_weights(path: Path, layer: int, count: int) -> Weights:
    file = Tensors.of_file(path)
    W_enc = file.take(f"W_enc_{layer}", None, None)
    size, d_in = W_enc.shape
    b_dec = file.take(f"b_dec_{layer}", None)
    (width,) = b_dec.shape
    decoders = Tensors.of_file(path.with_name(f"W_dec_{layer}.safetensors"))
    W_dec = decoders.take(f"W_dec_{layer}", size, count - layer, width)
    later = b_dec.new_zeros((count - layer - 1) * width)
    tensors = {
        "W_enc": W_enc.T,
        "W_dec": W_dec.reshape(size, -1),
        "b_enc": file.take(f"b_enc_{layer}", size),
        # Each layer's bias is added once, by the dictionary that reads there.
        "b_dec": _joined(b_dec, later),
    }
    _add_threshold(file, tensors, f"threshold_{layer}", size)
    skip = file.maybe(f"W_skip_{layer}", d_in, width)
    if skip is not None:
        tensors["W_skip"] = skip
    file.finish("cross-layer")
    decoders.finish("cross-layer")
    return _as_weights(tensors)


def _add_threshold(file: Tensors, tensors: dict[str, torch.Tensor], key: str, size: int) -> None:
    if key not in file:
        return
    threshold = file.take(key, size)
    if bool((threshold < 0).any()):
        raise InputError(
            f"{file.path}: tensor {key!r} is below 0, where circuit-tracer keeps negative features;"
            " this is not supported"
        )
    tensors["threshold"] = threshold


def _as_weights(tensors: dict[str, torch.Tensor]) -> Weights:
    architecture = "jumprelu" if "threshold" in tensors else "relu"
    return Weights(architecture, tensors, {"subtract": False})


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([first, second])


def put_circuit_tracer(
    folder: Path, config: Mapping[str, Any], files: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    """Write a folder, its configuration last."""
    for name, tensors in files.items():
        save_tensors(folder / name, tensors)
    write_text(folder / CONFIG, yaml.safe_dump(dict(config), sort_keys=False))
