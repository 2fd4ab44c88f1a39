"""Guard files by other hands: damaged, edited, or in the way of something that is not a guard."""

from __future__ import annotations

import pytest
import torch
from laboratories import three
from safetensors.torch import save_file

from assay.errors import InputError
from assay.guard import Settings, fit
from assay.guard.files import CONFIG, TENSORS, _checksum, load, save
from assay.io import files


@pytest.fixture
def guard():
    return fit(*three(), Settings(bins=4, least=10, modes=("constant", "marginal", "add",
                                                          "single-edit")))  # fmt: skip


def rewrite(folder, entry, tensors) -> None:
    """Write the files as a forger would: every digest is right."""
    files.save_tensors(folder / TENSORS, tensors)
    entry = {**entry, "sha256": files.sha256(folder / TENSORS)}
    files.write_json(folder / CONFIG, {**entry, "checksum": _checksum(entry)})


def test_an_edited_json_is_refused(guard, tmp_path):
    folder = save(tmp_path / "guard", guard)
    entry = files.read_json(folder / CONFIG)
    settings = entry["settings"]
    for change in (
        {"settings": {**settings, "alpha": 0.001}},
        {"settings": {**settings, "modes": [*settings["modes"], "memorise"]}},
        {"training": [*entry["training"], "ab" * 32]},
        {"model_hash": "x"},
        {"explanations": []},
        {"checksum": None},
    ):
        files.write_json(folder / CONFIG, {**entry, **change})
        with pytest.raises(InputError, match="is damaged, or was edited"):
            load(folder)
    files.write_json(folder / CONFIG, entry)
    assert load(folder).names == guard.names


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_every_flipped_bit_and_every_cut_is_refused(guard, tmp_path, name):
    folder = save(tmp_path / "guard", guard)
    good = (folder / name).read_bytes()
    for place in range(7, len(good), len(good) // 25):
        for bad in (good[:place], good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :]):
            (folder / name).write_bytes(bad)
            with pytest.raises(InputError):
                load(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("statistic", lambda t: t[:0], "must be a vector that is not empty"),
        ("statistic", lambda t: t[:1] * torch.nan, "NaN"),
        ("ranks", lambda t: t[:, :0], "no scores to rank against"),
        ("ranks", lambda t: t.flip(1), "must rise"),
        ("classes", lambda t: t.flip(0), "must rise"),
        ("cuts", lambda t: t * torch.nan, "holds NaN"),
        ("cuts", lambda t: t.to(torch.complex64), "must hold real numbers"),
        ("compiled.edges", lambda t: t.float(), "must hold whole numbers"),
        ("memory", lambda t: t[:, :1], "memory has shape"),
        ("decisions", lambda t: t[:3], "decisions has shape"),
        ("statistic", lambda t: t[None].expand(2, -1), "must be a vector"),
    ],
)
def test_forged_tensors_are_refused(guard, tmp_path, name, change, message):
    folder = save(tmp_path / "guard", guard)
    tensors = files.load_tensors(folder / TENSORS, finite=False)
    forged = {**tensors, name: change(tensors[name])}
    rewrite(folder, files.read_json(folder / CONFIG), forged)
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"features": [99]},
        {"features": [-1]},
        {"features": [float("inf")]},
        {"features": []},
        {"form": "nothing"},
        {"sort": "magic"},
        {"bits": "many"},
    ],
)
def test_explanations_of_nothing_are_refused(guard, tmp_path, change):
    folder = save(tmp_path / "guard", guard)
    entry = files.read_json(folder / CONFIG)
    one = {**entry["explanations"][0], **change}
    entry["explanations"] = [one, *entry["explanations"][1:]]
    rewrite(folder, entry, files.load_tensors(folder / TENSORS, finite=False))
    with pytest.raises(InputError, match=r"guard\.json"):
        load(folder)


def test_what_is_not_a_guard_is_left_alone(guard, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for place in (CONFIG, TENSORS):  # links, to nothing and to something
        target = tmp_path / f"target-{place}"
        for there in (False, True):
            if there:
                target.write_text("mine")
            (other / place).symlink_to(target)
            with pytest.raises(InputError, match="choose another name"):
                save(other, guard)
            assert (other / place).is_symlink()
            (other / place).unlink()
    folder = save(tmp_path / "guard", guard)
    save_file({"mine": torch.zeros(3)}, folder / TENSORS)
    kept = (folder / TENSORS).read_bytes()
    with pytest.raises(
        InputError, match=r"guard\.safetensors exists and is not a file that Assay would"
    ):
        save(folder, guard)
    assert (folder / TENSORS).read_bytes() == kept
