"""Atomic writes and refusals of bad files."""

from __future__ import annotations

import math
import os
import pickle

import numpy as np
import pytest
import torch

from assay.errors import AssayError, InputError
from assay.io import files


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def full(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        AssayError, match="No space left on device; what was there before is unchanged"
    ):
        files.write_atomic(path, full)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_tensors_round_trip_from_safetensors_and_npz(tmp_path):
    tensors = {"x": torch.arange(6.0).reshape(2, 3).T, "y": torch.tensor([1, 2])}
    files.save_tensors(tmp_path / "a.safetensors", tensors)
    np.savez(tmp_path / "a.npz", **{name: value.numpy() for name, value in tensors.items()})
    for name in ("a.safetensors", "a.npz"):
        found = files.load_tensors(tmp_path / name)
        assert all(torch.equal(found[key], value) for key, value in tensors.items())


def test_pickles_nan_missing_and_rubbish_are_refused(tmp_path):
    np.savez(tmp_path / "object.npz", x=np.array([{"a": 1}], dtype=object))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"x": 1}))
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00")
    for name in ("object.npz", "pickle.npz", "short.safetensors"):
        with pytest.raises(InputError, match="neither safetensors nor npz"):
            files.load_tensors(tmp_path / name)
    files.save_tensors(tmp_path / "nan.safetensors", {"w": torch.tensor([1.0, math.nan, math.inf])})
    with pytest.raises(InputError, match="'w' holds 2 NaN or infinite values of 3"):
        files.load_tensors(tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match="no file"):
        files.load_tensors(tmp_path / "none.npz")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        files.read_json(tmp_path / "bad.json")


def test_json_is_plain(tmp_path):
    files.write_json(
        tmp_path / "a.json",
        {"a": np.float32(1.5), "b": torch.tensor([1, 2]), "c": math.nan, "d": (tmp_path, None)},
    )
    assert files.read_json(tmp_path / "a.json") == {
        "a": 1.5,
        "b": [1, 2],
        "c": None,
        "d": [str(tmp_path), None],
    }
