"""Files of crosscoders: safetensors with a JSON config beside them, and the layout of
dictionary_learning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from assay.errors import InputError
from assay.io import files
from assay.io.ours import require_ours
from assay.mechanisms.crosscoder.coder import Activation, Crosscoder

WEIGHTS = "crosscoder.safetensors"
CONFIG = "crosscoder.json"
FORMAT = "assay-crosscoder/1"
OUTSIDE = ("ae.pt", "ae.safetensors")
_OUTSIDE_SHAPES = {
    "encoder.weight": "(layers, width, size)",
    "encoder.bias": "(size,)",
    "decoder.weight": "(layers, size, width)",
    "decoder.bias": "(layers, width)",
}


def save(folder: Path | str, found: Crosscoder) -> Path:
    """Write a crosscoder into a folder as `crosscoder.safetensors` and `crosscoder.json`.

    Raises InputError where the folder holds another file under one of the names."""
    folder = Path(folder)
    config = require_ours(folder / CONFIG, {"format": FORMAT})
    files.save_tensors(folder / WEIGHTS, found.state_dict())
    entry = {
        "format": FORMAT,
        "sites": found.sites,
        "width": found.width,
        "size": found.size,
        "activation": found.activation,
        "k": found.k,
        "model_hash": found.model_hash,
        "sha256": files.sha256(folder / WEIGHTS),
    }
    files.write_json(config, entry)
    return folder


def load(folder: Path | str, sites: Sequence[str] | None = None) -> Crosscoder:
    """Read a crosscoder that `save` wrote, or, with the `sites` of its layers, one in the layout of
    dictionary_learning (`ae.pt` or `ae.safetensors`).

    Raises InputError for missing or damaged files, files that need unpickling, NaN, shapes that do
    not fit the layers, and other sites than those in the file."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        return _load_outside(folder, sites)
    entry = files.read_json(folder / CONFIG)
    keys = {"format", "sites", "width", "size", "activation", "k", "model_hash", "sha256"}
    if not isinstance(entry, dict) or entry.keys() != keys or entry["format"] != FORMAT:
        raise InputError(f"{folder / CONFIG} is no crosscoder's config; it needs {sorted(keys)}")
    _require_types(folder / CONFIG, entry)
    if sites is not None and tuple(sites) != tuple(entry["sites"]):
        raise InputError(
            f"the crosscoder in {folder} reads {entry['sites']}, not the sites {list(sites)}"
        )
    tensors = files.load_tensors(folder / WEIGHTS)
    if files.sha256(folder / WEIGHTS) != entry["sha256"]:
        raise InputError(f"{folder / WEIGHTS} is not the file that its config was written with")
    shape = (entry["size"], len(entry["sites"]), entry["width"])
    if "W_dec" not in tensors or tuple(tensors["W_dec"].shape) != shape:
        # Before a crosscoder of that size is made, which may not fit into memory.
        raise InputError(f"{folder / WEIGHTS} does not fit its config: W_dec must be {shape}")
    found = Crosscoder(
        entry["sites"],
        entry["width"],
        entry["size"],
        entry["activation"],
        k=entry["k"],
        model_hash=entry["model_hash"],
    )
    return _filled(found, tensors, folder / WEIGHTS)


def _load_outside(folder: Path, sites: Sequence[str] | None) -> Crosscoder:
    path = next((folder / name for name in OUTSIDE if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder} holds no {CONFIG} and none of {', '.join(OUTSIDE)}")
    if sites is None:
        raise InputError(
            f"{path} does not say which layers it reads; give sites=, one for each of its layers"
        )
    tensors = _unpickled(path) if path.suffix == ".pt" else files.load_tensors(path)
    missing = [name for name in _OUTSIDE_SHAPES if name not in tensors]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; it is no crosscoder")
    encoder = tensors["encoder.weight"]
    if encoder.ndim != 3 or len(encoder) != len(sites):
        raise InputError(
            f"{path}: encoder.weight has shape {tuple(encoder.shape)}; with {len(sites)} sites it"
            f" must be ({len(sites)}, width, size)"
        )
    layers, width, size = encoder.shape
    shapes = {
        "encoder.bias": (size,),
        "decoder.weight": (layers, size, width),
        "decoder.bias": (layers, width),
    }
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise InputError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)} and must be {shape}"
            )
    if "threshold" in tensors and tensors["threshold"].numel() not in (1, size):
        raise InputError(f"{path}: threshold must hold 1 number or {size}")
    threshold = tensors.get("threshold", torch.zeros(1)).reshape(-1)
    kinds: dict[bool, Activation] = {True: "jumprelu", False: "batch_topk"}
    activation: Activation = "relu"
    if "threshold" in tensors:
        activation = kinds[len(threshold) == size]
    found = Crosscoder(sites, width, size, activation)
    state = {
        "W_enc": encoder,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].transpose(0, 1),
        "b_dec": tensors["decoder.bias"],
        "threshold": threshold,
    }
    return _filled(found, state, path)


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Read a state dict without unpickling anything but tensors."""
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader raise anything
        reason = " ".join(str(error).split()).partition(". ")[0][:160]
        raise InputError(
            f"{path} cannot be read without unpickling objects; save its state dict: {reason}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise InputError(f"{path} is no state dict of tensors")
    for name, tensor in found.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise InputError(
                f"{path}: tensor {name!r} must be a plain dense tensor; save it as one"
            )
        files.require_finite(tensor, f"{path}: tensor {name!r}")
    return found


def _filled(found: Crosscoder, tensors: dict[str, Tensor], path: Path) -> Crosscoder:
    narrow = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{path}: {name} must hold real numbers, got {tensor.dtype}")
        narrow[name] = tensor.float()
        files.require_finite(narrow[name], f"{path}: {name} in float32")
    try:
        found.load_state_dict(narrow)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} does not fit its config: {reason[:300]}") from error
    return found.eval()


def _require_types(path: Path, entry: dict[str, Any]) -> None:
    counts = all(type(entry[name]) is int and entry[name] > 0 for name in ("width", "size", "k"))
    names = isinstance(entry["sites"], list) and all(isinstance(s, str) for s in entry["sites"])
    known = entry["activation"] in get_args(Activation) and isinstance(entry["model_hash"], str)
    if not (counts and names and known and isinstance(entry["sha256"], str)):
        raise InputError(
            f"{path}: sites must be names, width, size and k whole numbers above 0, activation one"
            f" of {', '.join(get_args(Activation))}"
        )
