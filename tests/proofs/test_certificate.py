"""Certificates overwrite certificates alone, and are about the weights that were proved."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import draw, planted

import assay_check
from assay.errors import InputError
from assay.proofs.certificate import ADVICE, advice_path, check_destination
from assay.proofs.max_of_k.certificate import model_entry
from assay.proofs.max_of_k.prove import prove, prove_cross_entropy
from assay.proofs.max_of_k.strategies.base import Problem
from assay.targets import max_of_k
from assay.targets.max_of_k import MaxOfK, Weights, weights_of

FOREIGN = {
    "text": b"my notes",
    "an object": b'{"format": "mine"}',
    "a list": b"[1, 2]",
    "nothing": b"",
    "not text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "another version": b'{"format": "assay-certificate/0"}',
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    net = planted(4, 2, np.random.default_rng(0), 0.05)
    return max_of_k.save(tmp_path / "net.safetensors", net)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("loss", [False, True])
def test_a_certificate_named_after_its_weights_leaves_them(loss: bool, weights: Path) -> None:
    before = weights.read_bytes()
    path = weights.with_suffix(".json")
    proof = prove_cross_entropy if loss else prove
    proof(weights, certificate_path=path)
    assert weights.read_bytes() == before
    stored = json.loads(path.read_text())["advice"]["file"]
    assert stored == (None if loss else "net.advice.safetensors")
    assert assay_check.check(path, weights).accepted
    proof(weights, certificate_path=path)  # a certificate of ours may be written again
    assert assay_check.check(path, weights).accepted


@pytest.mark.parametrize("loss", [False, True])
def test_no_output_is_an_input(loss: bool, weights: Path, tmp_path: Path) -> None:
    proof = prove_cross_entropy if loss else prove
    hidden = max_of_k.save(tmp_path / f"other{ADVICE}", max_of_k.load(weights))
    linked = tmp_path / f"linked{ADVICE}"
    os.link(weights, linked)
    pointed = tmp_path / f"pointed{ADVICE}"
    pointed.symlink_to(weights)
    before = everything(tmp_path)
    for given, name in ((hidden, "other"), (weights, "linked"), (weights, "pointed")):
        with pytest.raises(InputError, match="is an input"):
            proof(given, certificate_path=tmp_path / f"{name}.json")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("suffix", [".json", ADVICE])
def test_files_of_others_are_never_overwritten(what: str, suffix: str, weights: Path) -> None:
    path = weights.with_name("claim.json")
    path.with_suffix(suffix).write_bytes(FOREIGN[what])
    before = everything(weights.parent)
    for proof in (prove, prove_cross_entropy):
        with pytest.raises(InputError, match="choose another name"):
            proof(weights, certificate_path=path)
    assert everything(weights.parent) == before


def test_tensors_of_others_are_never_overwritten(weights: Path) -> None:
    path = weights.with_name("claim.json")
    for metadata in ({}, {"format": "pt"}, {"advice": "mine"}):
        save_file({"a": torch.ones(2)}, advice_path(path), metadata)
        with pytest.raises(InputError, match="choose another name"):
            prove(weights, certificate_path=path)


@pytest.mark.parametrize("suffix", [".json", ADVICE])
def test_links_of_others_are_never_replaced(suffix: str, weights: Path) -> None:
    """Wherever they lead: to nothing, to a file, or in a circle."""
    path = weights.with_name("claim.json")
    link = path.with_suffix(suffix)
    for aim in (weights.with_name("nothing"), weights.with_name("text"), link):
        weights.with_name("text").write_text("mine")
        link.symlink_to(aim)
        with pytest.raises(InputError, match="choose another name"):
            check_destination(path)
        with pytest.raises(InputError, match="choose another name"):
            prove(weights, certificate_path=path)
        assert link.is_symlink()
        assert os.readlink(link) == str(aim)
        link.unlink()


def test_a_folder_in_the_way_is_refused(weights: Path) -> None:
    weights.with_name("claim.json").mkdir()
    with pytest.raises(InputError, match="choose another name"):
        check_destination(weights.with_name("claim.json"))


def test_advice_left_by_an_interrupted_run_may_be_written_again(weights: Path) -> None:
    """The advice is written before the certificate that names it."""
    path = weights.with_name("claim.json")
    prove(weights, certificate_path=path)
    path.unlink()
    prove(weights, "cubic", certificate_path=path)
    assert assay_check.check(path, weights).accepted


def test_refusals_come_before_the_work(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from assay.proofs.max_of_k.strategies.exact import ExactSets

    monkeypatch.setattr(ExactSets, "search", lambda *_: pytest.fail("work was started"))
    for name in ("claim.txt", "claim", "claim.json"):
        weights.with_name("claim.json").write_text("mine")
        with pytest.raises(InputError):
            prove(weights, certificate_path=weights.with_name(name))


def test_weights_are_those_of_the_moment_they_were_taken() -> None:
    """Training the network further, in place, changes neither a proof nor its certificate."""
    model = MaxOfK(5, 2, 4, generator=torch.Generator().manual_seed(0))
    held = weights_of(model)
    problem, entry = Problem(held), model_entry(held)
    before = {field.name: getattr(held, field.name).copy() for field in fields(held)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(problem.weights, name), array)
    assert model_entry(held) == entry
    assert model_entry(weights_of(model)) != entry


@pytest.mark.parametrize(
    "bad", [np.float64, np.float16, np.int64, bool, complex, list, "nan", "inf"]
)
def test_weights_that_are_no_finite_float32_numbers_are_refused(bad: object) -> None:
    """A certificate speaks of float32 numbers: a proof about others would not be about them."""
    w = draw(0, "rough")
    for name in ("E", "U", "k_bias"):
        array = getattr(w, name)
        if isinstance(bad, str):
            changed = array.copy()
            changed.flat[0] = float(bad)
        else:
            changed = array.tolist() if bad is list else array.astype(bad)
        other: Weights = replace(w, **{name: changed})
        for proof in (prove, prove_cross_entropy):
            with pytest.raises(InputError, match=f"weights {name}: finite float32"):
                proof(other)


def test_negative_zeros_survive_a_file(tmp_path: Path) -> None:
    w = draw(1, "zero")
    w.q_bias[:] = -0.0
    again = max_of_k.load(max_of_k.save(tmp_path / "w.safetensors", w))
    assert model_entry(again) == model_entry(w)
