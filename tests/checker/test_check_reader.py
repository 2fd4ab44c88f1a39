"""Reading safetensors and JSON from untrusted bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checker_cases import HEAD, draw, right, write_raw, write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from assay_check import InputError
from assay_check.max_of_k.model import Model
from assay_check.reading import parse, tensors

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def raw(header: Any, body: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int16,
        torch.uint8,
        torch.bool,
    ],
)
def test_reads_what_safetensors_writes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = {
        "a": (9 * torch.randn(3, 4, generator=generator)).abs().to(dtype),
        "b": torch.zeros(0, 5, dtype=dtype),
        "c": torch.ones((), dtype=dtype),
    }
    found = tensors(save(stored, metadata={"format": "pt"}), "test")
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        wide = tensor.float() if dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(found[name], wide.numpy())


BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "a short length": b"\x01\x00",
    "a length beyond the file": (10**15).to_bytes(8, "little") + b"{}",
    "no header": raw(b"xx"),
    "not text": raw(b"\xff\xfe{}"),
    "a list": raw([1, 2]),
    "a number": raw(b"7 ", b""),
    "deep": raw(b"[" * 100_000),
    "truncated": raw({"a": ENTRY}, bytes(15)),
    "trailing bytes": raw({"a": ENTRY}, bytes(17)),
    "bytes and no tensors": raw({}, bytes(1)),
    "a gap": raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [20, 36]}}, bytes(36)),
    "an overlap": raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 24]}}, bytes(24)),
    "shared bytes": raw({"a": ENTRY, "b": ENTRY}),
    "a repeated name": raw(
        b'{"a":'
        + json.dumps(ENTRY).encode()
        + b',"a":'
        + json.dumps({**ENTRY, "shape": [4, 1]}).encode()
        + b"}"
    ),
    "a span beyond its shape": raw({"a": {**ENTRY, "data_offsets": [0, 20]}}, bytes(20)),
    "a wrong shape": raw({"a": {**ENTRY, "shape": [2, 3]}}),
    "a negative shape": raw({"a": {**ENTRY, "shape": [-2, -2]}}),
    "a true shape": raw({"a": {**ENTRY, "shape": [True, 4]}}),
    "a float shape": raw({"a": {**ENTRY, "shape": [2.0, 2]}}),
    "a huge shape": raw({"a": {**ENTRY, "shape": [2**62, 2**62]}}),
    "a huge number": raw({"a": {**ENTRY, "shape": [10**4000, 1]}}),
    "too many digits": raw(b'{"a": ' + b"9" * 5000 + b"}"),
    "too many axes": raw({"a": {**ENTRY, "shape": [1] * 70 + [4]}}),
    "text for a shape": raw({"a": {**ENTRY, "shape": "22"}}),
    "offsets backwards": raw({"a": {**ENTRY, "data_offsets": [16, 0]}}),
    "negative offsets": raw({"a": {**ENTRY, "data_offsets": [-16, 0]}}),
    "three offsets": raw({"a": {**ENTRY, "data_offsets": [0, 8, 16]}}),
    "an unknown type": raw({"a": {**ENTRY, "dtype": "F8_E4M3"}}),
    "a type that is a list": raw({"a": {**ENTRY, "dtype": ["F32"]}}),
    "a missing field": raw({"a": {"dtype": "F32", "shape": [2, 2]}}),
    "a field too many": raw({"a": {**ENTRY, "more": 1}}),
    "an entry that is null": raw({"a": None}),
    "NaN": raw(b'{"a": NaN}'),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_refused(what: str) -> None:
    with pytest.raises(InputError):
        tensors(BROKEN[what], "test")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(
        raw(
            {"a": ENTRY, "b": {"dtype": "U8", "shape": [3], "data_offsets": [16, 19]}},
            bytes(range(19)),
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = tensors(bytes(whole[: data.draw(st.integers(0, len(whole)))]), "test")
    except InputError:
        return
    assert sum(array.nbytes for array in found.values()) <= 19 * 2


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a":1,"a":2}',
        b"[Infinity]",
        b"[-Infinity]",
        b"\xff",
        b"[" * 10**5,
        b"1" * 5000,
    ],
)
def test_broken_json_is_refused(text: bytes) -> None:
    with pytest.raises(InputError):
        parse(text, "test")


def test_model_tables_ignore_a_head_axis_and_storage_types(tmp_path: Path) -> None:
    w = draw(3, "random")
    w = {name: array.astype(np.float16).astype(np.float32) for name, array in w.items()}
    plain = Model(write_tensors(tmp_path / "a.safetensors", w).read_bytes())
    headed = {
        n: a[None] if n.startswith(HEAD) and not n.endswith("b_O") else a for n, a in w.items()
    }
    for other in (
        headed,
        {n: a.astype(np.float16) for n, a in w.items()},
        {n: a.astype(np.float64) for n, a in w.items()},
    ):
        model = Model(write_tensors(tmp_path / "b.safetensors", other).read_bytes())
        assert model.entry == plain.entry
        assert (model.a, model.b, model.EV, model.PV, model.D) == (
            plain.a,
            plain.b,
            plain.EV,
            plain.PV,
            plain.D,
        )
    extra = {**w, HEAD + "mask": np.ones((2, 2), bool), HEAD + "IGNORE": np.array(-1e5, np.float32)}
    assert Model(write_tensors(tmp_path / "c.safetensors", extra).read_bytes()).entry == plain.entry


def test_absent_biases_are_zeros(tmp_path: Path) -> None:
    w = draw(4, "random")
    zeros = {
        name: np.zeros_like(array) if name.split(".")[-1].startswith("b_") else array
        for name, array in w.items()
    }
    without = {name: array for name, array in w.items() if not name.split(".")[-1].startswith("b_")}
    models = [
        Model(write_tensors(tmp_path / "w.safetensors", tensors).read_bytes())
        for tensors in (zeros, without)
    ]
    assert models[0].entry == models[1].entry
    assert models[0].D == models[1].D


def broken_weights() -> dict[str, dict[str, np.ndarray]]:
    w = right(4, 3, np.random.default_rng(0), 0.1)
    nan = w["embed.W_E"].copy()
    nan[0, 0] = np.nan
    infinite = w["embed.W_E"].copy()
    infinite[0, 0] = np.inf
    return {
        "NaN": {**w, "embed.W_E": nan},
        "infinity": {**w, "embed.W_E": infinite},
        "missing": {name: array for name, array in w.items() if name != HEAD + "W_O"},
        "norm": {**w, "ln_final.w": np.ones(5, np.float32)},
        "integers": {**w, "unembed.W_U": np.ones((5, 4), np.int64)},
        "shape": {**w, "unembed.W_U": np.ones((4, 4), np.float32)},
        "vector": {**w, "embed.W_E": np.ones(4, np.float32)},
        "empty": {**w, "pos_embed.W_pos": np.ones((0, 5), np.float32)},
        "two heads": {**w, HEAD + "W_Q": np.ones((2, 5, 5), np.float32)},
        "float64": {**w, "embed.W_E": np.full((4, 5), 0.1)},
        "beyond float32": {**w, "embed.W_E": np.full((4, 5), 1e300)},
    }


@pytest.mark.parametrize("what", broken_weights())
def test_weights_that_no_proof_covers_are_refused(what: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weights"):
        Model(write_tensors(tmp_path / "w.safetensors", broken_weights()[what]).read_bytes())


def test_header_padding_is_allowed() -> None:
    assert tensors(raw(json.dumps({"a": ENTRY}).encode() + b"   "), "test")["a"].shape == (2, 2)


def test_write_raw_is_what_the_reader_reads(tmp_path: Path) -> None:
    assert (
        tensors(write_raw(tmp_path / "x", {"a": ENTRY}, bytes(16)).read_bytes(), "x")["a"].dtype
        == np.float32
    )
