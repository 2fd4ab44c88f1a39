"""Files of dictionaries that are damaged, incomplete or hostile are refused with the file and the
key, before anything is computed and without running what they hold.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from format_files import (
    FILES,
    D,
    M,
    circuit_tracer,
    circuit_tracer_layers,
    dictionary_learning,
    draw,
    gemma_scope,
    gemma_scope_2,
    gemma_scope_2_layers,
    saelens,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from assay.dictionaries.load import load_dictionaries
from assay.errors import InputError

# Lists that would hold 3 ** 40 entries if they were written out.
BOMB = "b0: &b0 [x, x, x]\n" + "".join(
    f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}, *b{i - 1}]\n" for i in range(1, 40)
)
WEIGHTS = "sae_weights.safetensors"


def refused(path: Path, match: str, **given) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load_dictionaries(path, **given)
    assert "\n" not in str(caught.value)


def change_config(path: Path, **changes) -> None:
    """Change entries of a JSON or YAML file; None deletes one."""
    text = path.read_text()
    config = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    for key, value in changes.items():
        part = config
        *outer, last = key.split("__")
        for name in outer:
            part = part[name]
        if value is None:
            del part[last]
        else:
            part[last] = value
    path.write_text(json.dumps(config) if path.suffix == ".json" else yaml.safe_dump(config))


@pytest.mark.parametrize("key", ["architecture", "d_in", "d_sae", "metadata__hook_name"])
def test_missing_keys_of_saelens_are_named(tmp_path: Path, key: str):
    saelens(tmp_path, "standard")
    change_config(tmp_path / "cfg.json", **{key: None})
    named = "at which site" if key == "metadata__hook_name" else f"the key '{key}' is missing"
    refused(tmp_path, named)


BAD_CONFIGS = {
    "architecture": ({"architecture": "temporal"}, "architecture 'temporal' is not supported"),
    "those that are": (
        {"architecture": "abstopk"},
        "supported are standard, gated, topk",
    ),
    "whitening": (
        {"normalize_activations": "covariance_whitening"},
        "normalize_activations 'covariance_whitening' is not supported",
    ),
    "reshaping": ({"reshape_activations": "heads"}, "reshape_activations 'heads'"),
    "one head": ({"metadata__hook_head_index": 3}, "hook_head_index 3 .a dictionary of one head"),
    "tuned": ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor is not supported"),
    "text": ({"d_in": "5"}, "d_in must be int, got '5'"),
    "boolean": ({"d_sae": True}, "d_sae must be int, got True"),
    "negative": ({"d_sae": -9}, "d_sae must not be negative"),
    "huge": ({"d_sae": 10**30}, "tensor 'W_enc' has shape"),
    "subtraction": ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input must be bool"),
    "list": ({"metadata": [1]}, "metadata must be an object"),
    "site": ({"metadata__hook_name": 3}, "hook_name must be str, got 3"),
    "control": ({"metadata__hook_name": "a\nb"}, r"'a\\nb' is no name of a site"),
    "width": ({"d_in": 6}, r"tensor 'W_enc' has shape \(5, 9\), expected \(6, 9\)"),
    "type": ({"dtype": "float4"}, "dtype 'float4' is not supported"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations_of_saelens_are_named(tmp_path: Path, case: str):
    changes, match = BAD_CONFIGS[case]
    saelens(tmp_path, "standard")
    change_config(tmp_path / "cfg.json", **changes)
    refused(tmp_path, match)


def test_transcoders_that_subtract_or_normalise_are_refused(tmp_path: Path):
    saelens(tmp_path, "transcoder", apply_b_dec_to_input=True)
    refused(tmp_path, "apply_b_dec_to_input must be false in a transcoder")
    saelens(tmp_path, "transcoder", normalize_activations="layer_norm")
    refused(tmp_path, "normalize_activations 'layer_norm' is not supported in a transcoder")
    saelens(tmp_path, "topk", k=0)
    refused(tmp_path, "k must be between 1 and the 9 features, got 0")
    saelens(tmp_path, "topk")
    change_config(tmp_path / "cfg.json", k=None)
    refused(tmp_path, "the key 'k' is missing")


BAD_TENSORS = {
    "missing": ({"b_enc": None}, "the tensor 'b_enc' is missing; there are W_dec, W_enc, b_dec"),
    "unknown": ({"W_gate": torch.zeros(3)}, "the tensor 'W_gate' is none of a standard"),
    "shape": ({"b_dec": torch.zeros(D, 1)}, r"'b_dec' has shape \(5, 1\), expected \(5\)"),
    "transposed": ({"W_dec": draw(D, M)}, r"'W_dec' has shape \(5, 9\), expected \(9, 5\)"),
    "integers": ({"W_enc": torch.ones(D, M, dtype=torch.int64)}, "'W_enc' is of type int64"),
    "complex": ({"b_enc": torch.ones(M, dtype=torch.complex64)}, "'b_enc' is of type complex64"),
    "NaN": ({"b_enc": torch.full((M,), torch.nan)}, "'b_enc' holds 9 NaN or infinite values"),
    "infinity": ({"b_dec": torch.tensor([1.0, 2, 3, 4, torch.inf])}, "'b_dec' holds 1 NaN"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_named(tmp_path: Path, case: str):
    changes, match = BAD_TENSORS[case]
    saelens(tmp_path, "standard")
    tensors = {**load_file(tmp_path / WEIGHTS), **changes}
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / WEIGHTS)
    refused(tmp_path, match)


def test_every_truncation_is_named(tmp_path: Path):
    saelens(tmp_path / "whole", "jumprelu")
    data = (tmp_path / "whole" / WEIGHTS).read_bytes()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for size in [*range(0, 60, 7), *range(60, len(data), 61)]:
        (tmp_path / "cut" / WEIGHTS).write_bytes(data[:size])
        refused(tmp_path / "cut", "cut/sae_weights.safetensors is neither safetensors")
    for text in ("", "{", "[]", '{"metadata": ', "\x00", "{'a': 1}"):
        (tmp_path / "cut" / "cfg.json").write_text(text)
        refused(tmp_path / "cut", "cfg.json")


def test_headers_that_promise_too_much_are_refused(tmp_path: Path):
    saelens(tmp_path, "standard")
    header = json.dumps(
        {"W_enc": {"dtype": "F64", "shape": [10**9, 10**9], "data_offsets": [0, 8 * 10**18]}}
    ).encode()
    for size in (len(header), 2**63 - 1, 2**40):
        (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", size) + header)
        refused(tmp_path, "neither safetensors")
    with (tmp_path / WEIGHTS).open("wb") as stream:
        stream.truncate(2**43)  # a file with a hole
    refused(tmp_path, "of memory are available|neither safetensors")


class Harm:
    def __reduce__(self):
        return (os.system, ("touch /tmp/assay-harm-was-done",))


@pytest.mark.parametrize("harm", ["pickle", "module", "plain pickle"])
def test_files_that_need_unpickling_are_refused(tmp_path: Path, harm: str):
    dictionary_learning(tmp_path, "AutoEncoder")
    path = tmp_path / "ae.pt"
    done = Path("/tmp/assay-harm-was-done")
    done.unlink(missing_ok=True)
    if harm == "plain pickle":
        path.write_bytes(pickle.dumps(Harm()))
        refused(tmp_path, "ae.pt is no file of torch.save")
    else:
        torch.save(Harm() if harm == "pickle" else torch.nn.Linear(2, 2), path)
        refused(tmp_path, "ae.pt holds objects that only unpickling could restore.*save its state")
    assert not done.exists()


def test_torch_files_with_other_things_are_refused(tmp_path: Path):
    dictionary_learning(tmp_path, "AutoEncoder")
    path = tmp_path / "ae.pt"
    state = torch.load(path, weights_only=True)
    for saved, match in (
        ([1, 2], "holds a list, not tensors by name"),
        ({**state, "steps": 3}, "the entry 'steps' is a int, not a tensor"),
        ({**state, 3: state["bias"]}, "the entry '3' is a Tensor"),
        ({**state, "bias": state["bias"].to_sparse()}, "'bias' is sparse"),
        ({**state, "bias": torch.empty(D, device="meta")}, "'bias' is sparse or holds no values"),
        (
            {**state, "encoder.weight": torch.zeros(1, 1).expand(10**6, 10**6)},
            "'encoder.weight' of shape .* is larger than the file",
        ),
    ):
        torch.save(saved, path)
        refused(tmp_path, match)
    whole = path.read_bytes()
    for size in range(0, len(whole), 199):
        path.write_bytes(whole[:size])
        refused(tmp_path, "ae.pt is no file of torch.save")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**24)
    refused(tmp_path, "ae.pt")


def test_what_dictionary_learning_does_not_say_is_asked_for(tmp_path: Path):
    config = tmp_path / "config.json"
    for changes, match in (
        ({"trainer": None}, "the key 'trainer' is missing"),
        ({"trainer__dict_class": None}, "the key 'trainer.dict_class' is missing"),
        ({"trainer__dict_class": "CrossCoder"}, "'CrossCoder' is not supported; .* AutoEncoder, "),
        ({"trainer__activation_dim": None}, "the key 'trainer.activation_dim' is missing"),
        ({"trainer__submodule_name": "fancy_3"}, "at which site its dictionary reads"),
        ({"trainer__submodule_name": None, "trainer__layer": None}, "at which site"),
        ({"trainer__submodule_name": "resid_post_layer_4"}, "and layer 3 disagree"),
        ({"trainer__k": 3}, r"k is \[2\], and 3 in config.json"),
        ({"trainer__dict_size": M + 1}, r"'encoder.weight' has shape \(9, 5\), expected \(10, 5\)"),
    ):
        dictionary_learning(tmp_path, "AutoEncoderTopK")
        change_config(config, **changes)
        refused(tmp_path, match)
    dictionary_learning(tmp_path, "AutoEncoderTopK")
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "buffer": {"io": "in"}}))
    refused(tmp_path, "at which site its dictionary reads")
    assert list(load_dictionaries(tmp_path, reads="blocks.{layer}.ln")) == ["blocks.3.ln"]
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    torch.save({**state, "k": torch.tensor(2.0)}, tmp_path / "ae.pt")
    refused(tmp_path, "'k' must hold integers", reads="blocks.0.ln")
    del state["k"]
    torch.save(state, tmp_path / "ae.pt")
    change_config(config, trainer__k=None)
    refused(tmp_path, "'k' is neither there nor in config.json", reads="blocks.0.ln")


def test_gemma_scope_files(tmp_path: Path):
    gemma_scope(tmp_path / "one")
    (file,) = tmp_path.rglob("params.npz")
    arrays = dict(np.load(file))
    np.savez(file, **arrays, W_ENC=arrays["w_enc"])
    refused(tmp_path, "the tensor 'w_enc' is there twice")
    np.savez(file, **{key: value for key, value in arrays.items() if key != "threshold"})
    refused(tmp_path, "the tensor 'threshold' is missing")
    np.savez(file, **{**arrays, "threshold": np.array([{}], dtype=object)})
    refused(tmp_path, "neither safetensors nor npz without pickles")
    gemma_scope_2(tmp_path / "two")
    change_config(tmp_path / "two" / "config.json", architecture="topk")
    refused(tmp_path / "two", "architecture 'topk' is not supported; supported are jump_relu")
    gemma_scope_2(tmp_path / "two")
    change_config(tmp_path / "two" / "config.json", hf_hook_point_in="model.layers.3")
    refused(tmp_path / "two", "must end in .output or .input")
    gemma_scope_2_layers(tmp_path / "three")
    (tmp_path / "three" / "params_layer_1.safetensors").unlink()
    refused(tmp_path / "three", r"files of layers \[0, 2\] are there")
    gemma_scope_2_layers(tmp_path / "three")
    (tmp_path / "three" / "config.json").unlink()
    refused(tmp_path / "three", "does not say at which site")
    names = list(
        load_dictionaries(tmp_path / "three", reads="h.{layer}:input", writes="h.{layer}.mlp")
    )
    assert names == [
        "h.0:input -> h.0.mlp .. h.2.mlp",
        "h.1:input -> h.1.mlp .. h.2.mlp",
        "h.2:input -> h.2.mlp",
    ]


def test_circuit_tracer_files(tmp_path: Path):
    config = tmp_path / "config.yaml"
    outside = tmp_path.parent / "outside.safetensors"
    for changes, match in (
        ({"feature_input_hook": None}, "the key 'feature_input_hook' is missing"),
        ({"model_kind": "lorsa"}, "model_kind 'lorsa' is not supported; supported are transcoder_"),
        ({"transcoders": ["../outside.safetensors"]}, "which lies outside its folder"),
        ({"transcoders": [str(outside)]}, "which lies outside its folder"),
        ({"transcoders": ["a/../../outside.safetensors"]}, "which lies outside its folder"),
        ({"transcoders": ["hf://me/mine/layer_0.safetensors"]}, "a file of the hub; download"),
        ({"transcoders": [3]}, "transcoders must list files, got 3"),
        ({"transcoders": "layer_0.safetensors"}, "transcoders must be list"),
        ({"transcoders": ["none.safetensors"]}, "no file '.*none.safetensors'"),
        ({"transcoders": [{"layer": 0}]}, "the key 'transcoders.filepath' is missing"),
        (
            {"transcoders": [{"layer": 0, "filepath": "layer_0.safetensors"}] * 2},
            "lists layer 0 twice",
        ),
        (
            {"transcoders": [{"layer": 1, "filepath": "layer_1.safetensors"}]},
            r"files of layers \[1\] are there",
        ),
    ):
        circuit_tracer(tmp_path)
        shutil.copy(tmp_path / "layer_0.safetensors", outside)
        change_config(config, **changes)
        refused(tmp_path, match)
    circuit_tracer(tmp_path)
    for text, match in (
        ("!!python/object/apply:os.system ['true']", "config.yaml is not YAML"),
        ("a: [", "config.yaml is not YAML"),
        ("- 1", "must be an object"),
        ("[" * 500, "config.yaml is not YAML"),
        ("a" * 1_000_001, "config.yaml is larger than any configuration"),
        (BOMB + "feature_input_hook: *b39", "feature_input_hook must be str, got a list"),
        (BOMB + "transcoders: [*b39]", "transcoders must list files, got a list"),
    ):
        config.write_text(text)
        refused(tmp_path, match)
    circuit_tracer(tmp_path)
    tensors = load_file(tmp_path / "layer_1.safetensors")
    tensors["activation_function.threshold"][0] = -1
    save_file(tensors, tmp_path / "layer_1.safetensors")
    refused(tmp_path, "is below 0, where circuit-tracer keeps negative features")
    clt = tmp_path / "clt"
    circuit_tracer_layers(clt)
    (clt / "W_dec_1.safetensors").unlink()
    refused(clt, "no file '.*W_dec_1.safetensors'")
    circuit_tracer_layers(clt)
    save_file({"W_dec_1": draw(M, 3, D)}, clt / "W_dec_1.safetensors")
    refused(clt, r"'W_dec_1' has shape \(9, 3, 5\), expected \(9, 2, 5\)")


def test_two_dictionaries_of_a_site_are_named(tmp_path: Path):
    saelens(tmp_path / "a", "standard")
    saelens(tmp_path / "b", "topk")
    refused(tmp_path, "/b and .*/a hold dictionaries of the same site, blocks.1.hook_resid_post")


def test_folders_without_dictionaries(tmp_path: Path):
    refused(tmp_path / "none", "no folder")
    refused(tmp_path, "holds no dictionaries of a format that is known: SAELens .cfg.json, sae_w")
    saelens(tmp_path, "standard")
    refused(tmp_path / "cfg.json", "is a file; give the folder that holds it")
    (tmp_path / WEIGHTS).unlink()
    refused(tmp_path, "holds no dictionaries")
    os.symlink(tmp_path / "nowhere", tmp_path / WEIGHTS)
    refused(tmp_path, "holds no dictionaries")
    (tmp_path / WEIGHTS).unlink()
    os.mkfifo(tmp_path / WEIGHTS)
    refused(tmp_path, "holds no dictionaries")


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_a_flipped_byte_is_named_or_harmless(tmp_path_factory, kind: str, data):
    folder = tmp_path_factory.mktemp("flip")
    expected = FILES[kind](folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        loaded = load_dictionaries(folder, **expected.given)
    except InputError:
        return
    for placed in loaded.values():
        assert all(tensor.isfinite().all() for tensor in placed.dictionary.state_dict().values())
