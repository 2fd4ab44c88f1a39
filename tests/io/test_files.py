"""Atomic writes and refusals of bad files."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from pathlib import Path

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


def test_byte_order_marks_are_accepted(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert files.read_json(tmp_path / "a.json") == {"a": "é"}
    assert files.read_text(tmp_path / "a.json").startswith("{")


@pytest.mark.parametrize(
    "text",
    ["{", "[" * 100_000, '{"a":' * 50_000, "9" * 5000, '{"a": 1} x', "", "\ud800"],
    ids=["cut", "deep list", "deep object", "digits", "more", "empty", "surrogate"],
)
def test_malformed_json_is_one_line(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match=r"a\.json is not (JSON|UTF-8)") as refused:
        files.read_json(tmp_path / "a.json")
    assert len(str(refused.value).splitlines()) == 1


def test_json_with_half_a_letter_is_refused_and_whole_ones_are_read(tmp_path):
    path = files.write_text(tmp_path / "text.json", r'{"a": ["\ud83d\ude00", "\\ud800"]}')
    assert files.read_json(path) == {"a": ["\U0001f600", "\\ud800"]}
    files.require_unicode(files.read_json(path), str(path))
    for text in (r'{"name": "half \ud800"}', r'{"\udfff": 1}', r'["\ude00\ud83d"]'):
        path.write_text(text)
        with pytest.raises(
            InputError, match=r"text\.json holds a lone surrogate: '.*ud"
        ) as refused:
            files.require_unicode(files.read_json(path), str(path))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "folder", "folder/none"])
def test_paths_that_are_no_files_are_refused(name, tmp_path):
    (tmp_path / "folder").mkdir()
    for read in (files.read_json, files.load_tensors, files.existing):
        with pytest.raises(InputError, match="no file"):
            read(tmp_path / name)


def test_text_that_is_no_unicode_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="lone surrogate"):
        files.write_text(tmp_path / "a.txt", "a\ud800")
    assert not os.listdir(tmp_path)


def npz(path, name="x.npy", header=None, body=bytes(16), compression=zipfile.ZIP_DEFLATED):
    """Write an npz file with any header."""
    text = repr({"descr": "<f4", "fortran_order": False, "shape": (4,)} | (header or {}))
    with zipfile.ZipFile(path, "w", compression) as archive:
        head = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
        archive.writestr(name, head + body)
    return path


HEADERS = {
    "an empty array of absurd shape": {"shape": (0, 2**70)},
    "more entries than bytes": {"shape": (2**40,)},
    "fewer entries than bytes": {"shape": (3,)},
    "a negative axis": {"shape": (-4,)},
    "too many axes": {"shape": (1,) * 70 + (4,)},
    "no shape": {"shape": "four"},
    "objects": {"descr": "|O"},
    "an unknown type": {"descr": "<q17"},
    "a size of thousands of digits": {"shape": (int("9" * 4000),)},
}


@pytest.mark.parametrize("case", HEADERS)
def test_npz_headers_are_held_against_the_bytes(case, tmp_path):
    assert files.load_tensors(npz(tmp_path / "whole.npz"))["x"].tolist() == [0, 0, 0, 0]
    path = npz(tmp_path / "x.npz", header=HEADERS[case])
    with pytest.raises(InputError, match=r"x\.npz is neither safetensors nor npz") as refused:
        files.load_tensors(path)
    assert len(str(refused.value)) < 500


def test_every_flipped_byte_of_an_npz_is_refused_or_changes_nothing(tmp_path):
    path = npz(tmp_path / "x.npz", body=np.arange(4, dtype="<f4").tobytes())
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = files.load_tensors(path)
        except InputError:
            continue
        assert [entry.tolist() for entry in found.values()] == [[0, 1, 2, 3]]


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    size = 1 << 26
    path = npz(tmp_path / "bomb.npz", header={"shape": (size // 4,)}, body=bytes(size))
    assert path.stat().st_size < size / 500
    monkeypatch.setattr("assay.memory.available", lambda device=None: size)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(InputError, match=r"unpacking .* takes at least 0.134 GB"):
        files.load_tensors(path)


def test_a_zip_that_lies_about_its_size_is_not_unpacked_further(tmp_path, monkeypatch):
    path = npz(tmp_path / "liar.npz", header={"shape": (1 << 24,)}, body=bytes(1 << 26))
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        place = data.index(signature) + offset
        data[place : place + 4] = (1000).to_bytes(4, "little")
    path.write_bytes(data)
    read, most = zipfile.ZipExtFile.read, []

    def watched(self, n=-1):
        found = read(self, n)
        most.append(len(found))
        return found

    monkeypatch.setattr(zipfile.ZipExtFile, "read", watched)
    with pytest.raises(InputError, match="neither safetensors nor npz"):
        files.load_tensors(path)
    assert max(most, default=0) <= 1001
    for compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with pytest.raises(InputError, match="compressed in another way"):
            files.load_tensors(npz(tmp_path / "other.npz", compression=compression))


def safetensors(path, shape, span, body=b""):
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": span}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    return path


@pytest.mark.parametrize(
    ("shape", "span"),
    [([0, 2**70], [0, 0]), ([0, 2**62], [0, 0]), ([2**40], [0, 4]), ([1], [0, 8]), ([-1], [0, 4])],
)
def test_safetensors_of_absurd_shapes_are_refused(shape, span, tmp_path):
    path = safetensors(tmp_path / "x.safetensors", shape, span, bytes(4))
    with pytest.raises(InputError, match="neither safetensors nor npz"):
        files.load_tensors(path)


def test_a_full_disk_is_one_line_in_every_format(tmp_path, monkeypatch):
    def full(*args, **settings):
        raise OSError(28, "No space left on device")

    def rust(*args, **settings):
        raise Exception("I/O error: No space left on device (os error 28)")

    writers = {
        "a.pt": lambda new: files.put_state(new, {"x": torch.ones(2)}),
        "a.safetensors": rust,
        "a.txt": full,
    }
    monkeypatch.setattr(files._Kept, "write", full)
    for name, write in writers.items():
        with pytest.raises(AssayError, match="No space left on device"):
            files.write_atomic(tmp_path / name, write)
    assert not os.listdir(tmp_path)


def test_a_mistake_in_a_writer_is_no_full_disk(tmp_path):
    def wrong(new):
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        files.write_atomic(tmp_path / "a.txt", wrong)
    assert not os.listdir(tmp_path)


def test_a_flipped_byte_of_saved_tensors_is_named(tmp_path: Path) -> None:
    """Every single flip in the file is named or leaves the tensors as they were."""
    whole = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor([1, 2])}
    data = files.save_tensors(tmp_path / "w.safetensors", whole).read_bytes()
    path, named, harmless = tmp_path / "flipped.safetensors", 0, 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        try:
            found = files.load_tensors(path)
        except InputError as error:
            named += str(path) in str(error)
            continue
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)
        harmless += 1
    assert named + harmless == len(data)
    assert named > harmless
