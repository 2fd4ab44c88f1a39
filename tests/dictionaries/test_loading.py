"""Files of each outside format compute what their formula says; sets, streams and older forms."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from format_files import FILES, D, M, dictionary_learning, draw, saelens, steps, write_saelens

from assay.dictionaries.load import load_dictionaries
from assay.dictionaries.save import save_dictionaries
from assay.errors import InputError


@pytest.mark.parametrize("kind", FILES)
def test_a_file_computes_what_its_formula_says(tmp_path: Path, kind: str):
    expected = FILES[kind](tmp_path)
    loaded = load_dictionaries(tmp_path, **expected.given)
    assert {name: (placed.reads, placed.writes) for name, placed in loaded.items()} == (
        expected.sites
    )
    x = draw(50, D, seed=40)
    for name, placed in loaded.items():
        dictionary = placed.dictionary.double()
        codes = expected.features(x, name)
        assert 0 < (codes > 0).sum() < codes.numel()
        torch.testing.assert_close(dictionary.encode(x), codes, check_dtype=False)
        rebuilt = expected.rebuilt(codes, x, name)
        torch.testing.assert_close(dictionary(x), rebuilt, check_dtype=False)


@pytest.mark.parametrize("kind", FILES)
def test_a_stream_reads_the_same_again(tmp_path: Path, kind: str):
    expected = FILES[kind](tmp_path)
    loaded = load_dictionaries(tmp_path, **expected.given)
    streamed = load_dictionaries(tmp_path, **expected.given, stream=True)
    assert list(streamed) == list(loaded)
    for name, placed in loaded.items():
        again = streamed[name]
        assert (again.reads, again.writes) == (placed.reads, placed.writes)
        assert again is not streamed[name]
        for key, tensor in placed.dictionary.state_dict().items():
            assert torch.equal(again.dictionary.state_dict()[key], tensor)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("name", ["standard", "topk", "gated"])
def test_values_are_normalised_and_restored(tmp_path: Path, name: str, norm: str):
    expected = saelens(tmp_path, name, normalize_activations=norm)
    (placed,) = load_dictionaries(tmp_path).values()
    x = 3 + 2 * draw(50, D, seed=40)
    rows = []
    for value in x:
        if norm == "layer_norm":
            mean, size = value.mean(), value.std(correction=1)
            inner = (value - mean) / (size + 1e-5)
        else:
            mean, size = 0.0, value.norm() / D**0.5
            inner = value / size
        codes = expected.features(inner[None], "")
        rows.append(expected.rebuilt(codes, inner[None], "")[0] * size + mean)
    dictionary = placed.dictionary
    torch.testing.assert_close(dictionary(x), torch.stack(rows))
    # The features rebuild by the same decoder at every position.
    rebuilt = dictionary.encode(x) @ dictionary.W_dec + dictionary.rest(x)
    torch.testing.assert_close(rebuilt, torch.stack(rows))
    (again,) = load_dictionaries(save_dictionaries(tmp_path / "again", {"a": placed})).values()
    torch.testing.assert_close(again.dictionary(x), torch.stack(rows))


def test_flat_configurations_of_earlier_versions(tmp_path: Path):
    tensors = {
        "W_enc": draw(D, M, seed=1),
        "W_dec": draw(M, D, seed=2),
        "b_enc": draw(M, seed=3),
        "b_dec": draw(D, seed=4),
        "scaling_factor": torch.ones(M),
    }
    config = {
        "d_in": D,
        "d_sae": M,
        "dtype": "torch.float64",
        "hook_point": "blocks.2.attn.hook_z",
        "hook_point_head_index": None,
        "activation_fn_str": "relu",
        "normalize_activations": False,
    }
    write_saelens(tmp_path, config, tensors)
    (placed,) = load_dictionaries(tmp_path).values()
    assert (placed.reads, placed.dictionary.architecture) == ("blocks.2.attn.hook_z", "relu")
    assert placed.dictionary.config()["subtract"] is True
    config |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    write_saelens(tmp_path, config, tensors)
    (placed,) = load_dictionaries(tmp_path).values()
    assert (placed.dictionary.architecture, placed.dictionary.k) == ("topk", 4)
    write_saelens(tmp_path, {**config, "activation_fn_kwargs": {}}, tensors)
    with pytest.raises(InputError, match="activation_fn 'topk' is not supported"):
        load_dictionaries(tmp_path)
    write_saelens(tmp_path, config, {**tensors, "scaling_factor": 2 * torch.ones(M)})
    with pytest.raises(InputError, match="'scaling_factor' is not supported unless 1"):
        load_dictionaries(tmp_path)


def test_a_scale_that_the_file_does_not_hold_has_to_be_given(tmp_path: Path):
    expected = saelens(tmp_path, "jumprelu", normalize_activations="expected_average_only_in")
    with pytest.raises(InputError, match="values were scaled in training, and not by how much"):
        load_dictionaries(tmp_path)
    x = draw(30, D, seed=40)
    codes = expected.features(x / 7.0, "")
    for scale in (7.0, {"blocks.1.hook_resid_post": 7.0}):
        (placed,) = load_dictionaries(tmp_path, scale=scale).values()
        torch.testing.assert_close(placed.dictionary.encode(x), codes)
        torch.testing.assert_close(placed.dictionary(x), 7.0 * expected.rebuilt(codes, x, ""))
    (placed,) = load_dictionaries(tmp_path, scale=1).values()
    torch.testing.assert_close(placed.dictionary.encode(x), expected.features(x, ""))
    with pytest.raises(InputError, match="not by how much"):
        load_dictionaries(tmp_path, scale={"blocks.2.hook_resid_post": 7.0})


def test_a_folder_of_folders_is_a_set(tmp_path: Path):
    for layer in range(3):
        metadata = {"hook_name": f"blocks.{layer}.hook_mlp_out"}
        saelens(tmp_path / "deep" / f"layer {layer}", "standard", metadata=metadata)
        dictionary_learning(tmp_path / "other", "AutoEncoder")
    (tmp_path / "notes.txt").write_text("not a dictionary")
    (tmp_path / "empty").mkdir()
    # What lies inside a dictionary's folder is not another one.
    saelens(tmp_path / "other" / "checkpoints", "standard")
    os.symlink(tmp_path / "deep", tmp_path / "zlink")
    names = list(load_dictionaries(tmp_path))
    assert names == ["blocks.3.hook_resid_post"] + [
        f"blocks.{layer}.hook_mlp_out" for layer in range(3)
    ]


def test_files_may_be_links(tmp_path: Path):
    expected = saelens(tmp_path / "blobs", "standard")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        os.symlink(file, folder / file.name)
    (placed,) = load_dictionaries(folder).values()
    x = draw(9, D)
    torch.testing.assert_close(placed.dictionary.encode(x), expected.features(x, ""))


def test_a_gemma_scope_file_without_the_names_of_its_folders_needs_a_site(tmp_path: Path):
    FILES["Gemma Scope residual"](tmp_path)
    (file,) = tmp_path.rglob("params.npz")
    plain = tmp_path / "plain"
    plain.mkdir()
    file.rename(plain / "params.npz")
    with pytest.raises(InputError, match="does not say at which site its dictionary reads"):
        load_dictionaries(plain)
    with pytest.raises(InputError, match=r"does not say its layer; give reads= without \{layer\}"):
        load_dictionaries(plain, reads="blocks.{layer}.hook_resid_post")
    assert list(load_dictionaries(plain, reads="blocks.4.hook_mlp_out")) == [
        "blocks.4.hook_mlp_out"
    ]


def test_a_threshold_that_was_never_set_lets_every_positive_feature_pass(tmp_path: Path):
    dictionary_learning(tmp_path, "BatchTopKSAE")
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    torch.save({**state, "threshold": torch.tensor(-1.0)}, tmp_path / "ae.pt")
    (placed,) = load_dictionaries(tmp_path).values()
    x = draw(9, D)
    dictionary = placed.dictionary
    assert torch.equal(dictionary.encode(x), torch.relu(dictionary.before(x)))


def test_low_precision_is_kept(tmp_path: Path):
    saelens(tmp_path, "jumprelu", dtype="bfloat16")
    (placed,) = load_dictionaries(tmp_path).values()
    assert {tensor.dtype for tensor in placed.dictionary.state_dict().values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "cfg.json").read_text())
    write_saelens(
        tmp_path,
        {**config, "dtype": "float8"},
        {
            "W_enc": draw(D, M),
            "W_dec": draw(M, D),
            "b_enc": draw(M),
            "b_dec": draw(D),
            "threshold": steps(M, seed=1),
        },
    )
    with pytest.raises(InputError, match="dtype 'float8' is not supported"):
        load_dictionaries(tmp_path)
