"""The directories of SAELens: `cfg.json` and `sae_weights.safetensors`, read and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.errors import InputError
from assay.io.files import save_tensors, write_json
from assay.io.weights import Entry, Fields, Given, Tensors, Weights, brief

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ARCHITECTURES = {
    "standard": "relu",
    "gated": "gated",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_NORMS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


def read_saelens(folder: Path, given: Given) -> list[Entry]:
    """Return the dictionary of a directory.

    Raises InputError for missing keys, and for an architecture, a normalisation or a reshaping that
    is not supported, each named."""
    config, metadata = _config(Fields.of_json(folder / CONFIG))
    return [_entry(config, metadata, given, lambda: Tensors.of_file(folder / WEIGHTS))]


def of_object(sae: Any) -> Entry:
    """Return the dictionary of an `SAE` object of SAELens, whose tensors it shares.

    Its scale is folded into the weights already, as `encode` of the object takes it to be. Raises
    InputError as `read_saelens`."""
    source = Path(f"the {type(sae).__name__} object")
    tensors = {key: tensor.detach() for key, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving(tensors)
    config, metadata = _config(Fields(source, dict(sae.cfg.to_dict())))
    return _entry(config, metadata, Given(scale=1.0), lambda: Tensors(source, tensors))


def _entry(config: Fields, metadata: Fields, given: Given, tensors: Callable[[], Tensors]) -> Entry:
    path = config.path
    name = config.choose("architecture", tuple(_ARCHITECTURES))
    transcoder = name.endswith("transcoder")
    norm = config.choose("normalize_activations", _NORMS, "none")
    if transcoder and norm not in ("none", "expected_average_only_in"):
        raise InputError(f"{path}: normalize_activations {norm!r} is not supported in a {name}")
    if "activation_fn" in config and name != "topk":
        config.choose("activation_fn", ("relu",))
    if config.get("finetuning_scaling_factor", bool, False):
        raise InputError(f"{path}: finetuning_scaling_factor is not supported; fold it into W_dec")
    for key in ("hook_head_index", "hook_head_index_out"):
        if key in metadata:
            raise InputError(
                f"{path}: {key} {brief(metadata.data[key])} (a dictionary of one head) is not"
                " supported; supported are whole sites"
            )
    # The value of hook_z is held with its heads side by side, so that there is nothing to reshape.
    config.choose("reshape_activations", ("none", "hook_z"), "none")
    reads, writes = given.sites(
        path,
        None,
        metadata.maybe("hook_name", str),
        metadata.maybe("hook_name_out", str) if transcoder else None,
    )
    scale = given.scale_at(reads) if norm == "expected_average_only_in" else 1.0
    if scale is None:
        raise InputError(
            f"{path}: normalize_activations 'expected_average_only_in' says that values were scaled"
            " in training, and not by how much; give scale=, 1 if it is in the weights already"
        )

    def load() -> Weights:
        return replace(_weights(tensors(), config, name, norm), scale=scale)

    return Entry(reads, (writes,), path.parent if path.name == CONFIG else path, load)


def _config(config: Fields) -> tuple[Fields, Fields]:
    """Return a configuration and its metadata, those before version 6 brought into its form."""
    path = config.path
    if "metadata" in config:
        return config, config.part("metadata")
    flat = {_RENAMED.get(key, key): value for key, value in config.data.items()}
    flat.setdefault("architecture", "standard")
    flat.setdefault("apply_b_dec_to_input", True)
    kwargs = flat.get("activation_fn_kwargs")
    if flat.get("activation_fn") == "topk" and isinstance(kwargs, dict) and "k" in kwargs:
        flat |= {"architecture": "topk", "k": kwargs["k"]}
    scaled = flat.get("normalize_activations")
    if isinstance(scaled, bool):
        flat["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    return Fields(path, flat), Fields(path, flat)


def _weights(file: Tensors, config: Fields, name: str, norm: str) -> Weights:
    d_in, size = config.require("d_in", int), config.require("d_sae", int)
    transcoder = name.endswith("transcoder")
    d_out = config.require("d_out", int) if transcoder else d_in
    subtract = config.get("apply_b_dec_to_input", bool, not transcoder)
    if transcoder and subtract:
        raise InputError(f"{config.path}: apply_b_dec_to_input must be false in a {name}")
    tensors = {
        "W_enc": file.take("W_enc", d_in, size),
        "W_dec": file.take("W_dec", size, d_out),
        "b_dec": file.take("b_dec", d_out),
        "b_enc": file.take("b_gate" if name == "gated" else "b_enc", size),
    }
    settings: dict[str, Any] = {"subtract": subtract}
    architecture = _ARCHITECTURES[name]
    if name == "gated":
        tensors |= {key: file.take(key, size) for key in ("b_mag", "r_mag")}
    if architecture == "jumprelu":
        tensors["threshold"] = file.take("threshold", size)
    if "skip" in name:
        tensors["W_skip"] = file.take("W_skip", d_out, d_in).T
    if name == "topk":
        settings["k"] = config.require("k", int)
        if config.get("rescale_acts_by_decoder_norm", bool, False):
            settings["by_norm"] = True
    factor = file.maybe("scaling_factor", size)
    if factor is not None and bool((factor != 1).any()):
        raise InputError(f"{file.path}: the tensor 'scaling_factor' is not supported unless 1")
    file.finish(name)
    dtype = config.get("dtype", str, str(tensors["W_dec"].dtype)).removeprefix("torch.")
    plain = norm if norm in ("layer_norm", "constant_norm_rescale") else "none"
    return Weights(architecture, _cast(config.path, tensors, dtype), settings, plain)


def _cast(path: Path, tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    import torch

    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise InputError(
            f"{path}: dtype {name[:60]!r} is not supported; supported are float16, bfloat16,"
            " float32, float64"
        )
    return {key: tensor.to(getattr(torch, name)) for key, tensor in tensors.items()}


def put_saelens(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a directory, its configuration last."""
    save_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config)
