"""What is saved in the formats of SAELens and circuit-tracer is loaded again, and what they do not
have is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from format_files import D, M, circuit_tracer, circuit_tracer_layers, draw
from safetensors.torch import load_file
from torch import Tensor

from assay.dictionaries import Placed, make
from assay.dictionaries.load import load_dictionaries
from assay.dictionaries.save import save_circuit_tracer, save_dictionaries
from assay.errors import InputError

SITE, OUT = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"
MORE = {"topk": {"k": 3}, "batchtopk": {"k": 3}, "matryoshka": {"k": 3, "nested": [4, M]}}
WRITTEN_AS = {
    "relu": "standard",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
}


def placed(kind: str, writes: tuple[str, ...] = (SITE,), dtype=torch.float32, **shape) -> Placed:
    """Return a dictionary with every tensor drawn at random."""
    dictionary = make(kind, {"d_in": D, "size": M, **MORE.get(kind, {}), **shape}).to(dtype)
    for place, (key, tensor) in enumerate(sorted(dictionary.state_dict().items())):
        drawn = draw(*tensor.shape, seed=place)
        tensor.copy_(drawn.abs() if key == "threshold" else drawn)
    return Placed(dictionary, SITE, writes)


def assert_same(found: Placed, expected: Placed, factor: Tensor | float = 1.0) -> None:
    x = draw(40, D, seed=9).to(expected.dictionary.W_dec)
    assert (found.reads, found.writes) == (expected.reads, expected.writes)
    assert found.dictionary.W_dec.dtype == expected.dictionary.W_dec.dtype
    codes = expected.dictionary.encode(x)
    assert 0 < (codes > 0).sum() < codes.numel()
    torch.testing.assert_close(found.dictionary.encode(x), codes * factor)
    torch.testing.assert_close(found.dictionary(x), expected.dictionary(x))


@pytest.mark.parametrize("kind", WRITTEN_AS)
def test_autoencoders_come_back(tmp_path: Path, kind: str):
    mine = placed(kind)
    save_dictionaries(tmp_path / "set", {SITE: mine}, {"model_name": "gpt2", "context_size": 64})
    config = json.loads((tmp_path / "set" / SITE / "cfg.json").read_text())
    assert config["architecture"] == WRITTEN_AS[kind]
    assert config["metadata"]["model_name"] == "gpt2"
    assert config["metadata"]["hook_name"] == SITE
    loaded = load_dictionaries(tmp_path / "set")
    assert list(loaded) == [SITE]
    assert_same(loaded[SITE], mine)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_norms_are_folded_where_features_were_chosen_by_them(tmp_path: Path, kind: str):
    mine = placed(kind, by_norm=True)
    found = load_dictionaries(save_dictionaries(tmp_path / "set", {SITE: mine}))[SITE]
    torch.testing.assert_close(found.dictionary.W_dec.norm(dim=1), torch.ones(M))
    assert_same(found, mine, mine.dictionary.W_dec.norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("skip", [0, 2, 3])
def test_transcoders_come_back(tmp_path: Path, kind: str, skip: int, dtype: torch.dtype):
    mine = placed(kind, (OUT,), dtype, d_out=3, skip=skip)
    (found,) = load_dictionaries(save_dictionaries(tmp_path, {"mine": mine})).values()
    assert_same(found, mine)


def test_a_set_has_a_directory_for_each(tmp_path: Path):
    several = {
        "transformer.h.0.mlp:input": Placed(placed("relu").dictionary, "h.0:input", ("h.0:input",)),
        "../up": Placed(placed("topk").dictionary, "h.1", ("h.1",)),
        "h.2": Placed(placed("gated", (OUT,)).dictionary, "h.2", ("h.2",)),
    }
    save_dictionaries(tmp_path / "set", several)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    loaded = load_dictionaries(tmp_path / "set")
    assert set(loaded) == {"h.0:input", "h.1", "h.2"}
    for mine in several.values():
        assert_same(loaded[mine.reads], mine)


def test_what_was_not_written_is_not_overwritten(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("kept")
    for save in (save_dictionaries, save_circuit_tracer):
        with pytest.raises(InputError, match="is there already and is not empty"):
            save(tmp_path, {SITE: placed("relu")})
        with pytest.raises(InputError, match="is there already"):
            save(tmp_path / "mine.txt", {SITE: placed("relu")})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_changed_weights_are_found(tmp_path: Path):
    save_dictionaries(tmp_path / "set", {SITE: placed("relu")})
    path = tmp_path / "set" / SITE / "sae_weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged: its tensors are not those that Assay wrote"):
        load_dictionaries(tmp_path / "set")


REFUSED = {
    "several sites": (placed("relu", (OUT, "b"), d_out=4), "writes at several sites"),
    "identity": (Placed(make("identity", {"d_in": D}), SITE, (SITE,)), "no format outside Assay"),
    "skip": (placed("relu", skip=True), "no relu autoencoder with a skip connection"),
    "gated": (placed("gated", (OUT,), d_out=3), "SAELens has no gated transcoder"),
    "topk": (placed("topk", (OUT,), d_out=3), "SAELens has no topk transcoder"),
    "subtraction": (placed("relu", (OUT,)), "cannot subtract its bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_saelens_does_not_have_is_refused(tmp_path: Path, case: str):
    mine, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        save_dictionaries(tmp_path / "set", {"fine": placed("relu"), "mine": mine})
    assert not (tmp_path / "set").exists()


def test_two_names_that_become_one_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="have the same file name"):
        save_dictionaries(tmp_path / "set", {"a/b": placed("relu"), "a:b": placed("topk")})


def layers(kind: str = "relu", count: int = 2, **shape) -> dict[str, Placed]:
    shape = {"d_out": D, **shape}
    return {
        str(layer): Placed(
            placed(kind, **shape).dictionary,
            f"blocks.{layer}.hook_resid_mid",
            (f"blocks.{layer}.hook_mlp_out",),
        )
        for layer in range(count)
    }


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("skip", [0, 2, D])
def test_transcoders_of_circuit_tracer_come_back(tmp_path: Path, kind: str, skip: int):
    mine = layers(kind, skip=skip)
    save_circuit_tracer(tmp_path / "set", mine, model_name="gpt2", scan="me/mine")
    config = yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())
    assert config == {
        "model_name": "gpt2",
        "model_kind": "transcoder_set",
        "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
        "scan": "me/mine",
    }
    for found, expected in zip(
        load_dictionaries(tmp_path / "set").values(), mine.values(), strict=True
    ):
        assert_same(found, expected)


def test_what_circuit_tracer_wrote_is_written_as_it_was(tmp_path: Path):
    for write, count in ((circuit_tracer, 3), (circuit_tracer_layers, 7)):
        folder = tmp_path / write.__name__
        write(folder)
        if write is circuit_tracer_layers:
            write(folder, threshold=False)  # skip connections are lost by circuit-tracer
        again = save_circuit_tracer(
            tmp_path / f"{write.__name__} again", load_dictionaries(folder), model_name="gpt2"
        )
        names = sorted(path.name for path in folder.iterdir())
        assert names == sorted(path.name for path in again.iterdir())
        assert len(names) == count
        for name in (name for name in names if name != "config.yaml"):
            before, after = load_file(folder / name), load_file(again / name)
            assert before.keys() == after.keys()
            for key, tensor in before.items():
                assert torch.equal(after[key], tensor)


def crossing(**changes) -> dict[str, Placed]:
    """Return a cross-layer transcoder over two layers."""
    found = {}
    for layer in range(2):
        dictionary = placed("relu", d_out=(2 - layer) * D, subtract=False).dictionary
        dictionary.b_dec.data[D:] = 0
        written = tuple(f"blocks.{later}.hook_mlp_out" for later in range(layer, 2))
        found[str(layer)] = Placed(dictionary, f"blocks.{layer}.hook_resid_mid", written)
    return {**found, **changes}


def test_what_circuit_tracer_does_not_have_is_refused(tmp_path: Path):
    biased = crossing()
    biased["0"].dictionary.b_dec.data[-1] = 1
    skipping = placed("relu", d_out=2 * D, skip=D).dictionary
    read, outs = "blocks.0.hook_resid_mid", ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out")
    cases: list[tuple[dict[str, Placed], str]] = [
        (layers("topk"), "layer 0: circuit-tracer has no topk transcoder"),
        (layers("relu", subtract=True), "cannot subtract its bias"),
        ({"1": layers()["1"]}, r"needs every layer from 0 on, got \[1\]"),
        ({}, "needs every layer from 0 on"),
        ({"0": Placed(layers()["0"].dictionary, "h.0", ("h.0",))}, "sites named blocks"),
        ({**layers(), "2": layers()["1"]}, "two dictionaries read at layer 1"),
        (crossing(**{"1": layers(size=M + 1)["1"]}), "the same number of features"),
        (crossing(**{"1": Placed(layers()["1"].dictionary, "blocks.1.a", outs[1:])}), "same hooks"),
        (crossing(**{"0": Placed(skipping, read, outs)}), "leaves out"),
        (
            crossing(**{"0": Placed(skipping, read, outs[::-1])}),
            "from layer 0",
        ),
        (biased, "a bias at its own layer alone"),
    ]
    for mine, message in cases:
        with pytest.raises(InputError, match=message):
            save_circuit_tracer(tmp_path / "set", mine)
        assert not (tmp_path / "set").exists()
