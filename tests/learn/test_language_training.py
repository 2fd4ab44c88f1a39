"""Training of language models: resumed to the bit, better than word frequencies, and right on
held-out agreement pairs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.errors import AssayError, InputError
from assay.io.prompts import read_pairs
from assay.io.runs import Run
from assay.learn import language
from assay.learn.language import AgreementTraining, LanguageTraining
from assay.targets.agreement import agreement_text, build_tokenizer
from assay.targets.language import load_language_model

TINY = AgreementTraining(
    layers=1,
    width=16,
    heads=2,
    steps=12,
    batch=8,
    sentences=60,
    pairs=20,
    required=0.0,
    save_every=4,
)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_training_stopped_anywhere_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(language.train_agreement_model(Run(tmp_path / "whole"), TINY))
    calls = 0
    real = language.cross_entropy

    def stop(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    run = Run(tmp_path / "stopped")
    monkeypatch.setattr(language, "cross_entropy", stop)
    with pytest.raises(KeyboardInterrupt):
        language.train_agreement_model(run, TINY)
    assert not run.has("model")
    calls = 100
    folder = language.train_agreement_model(run, TINY)
    assert calls == 108  # steps 4 to 11, those after the checkpoint
    assert weights(folder) == whole
    language.train_agreement_model(run, TINY)
    assert calls == 108


def test_run_holds_pairs_and_their_shares(tmp_path: Path) -> None:
    run = Run(tmp_path)
    folder = language.train_agreement_model(run, TINY)
    shares = run.json("agreement.json")
    assert set(shares) == {"simple", "nounpp", "within_rc", "rc"}
    assert all(0 <= share <= 1 for share in shares.values())
    loaded = load_language_model(folder)
    assert (
        len(read_pairs(run.path("pairs.jsonl"), loaded.tokenizer, vocab_size=loaded.vocab_size))
        == 80
    )
    assert len(read_pairs(run.path("pairs/rc.jsonl"), loaded.tokenizer)) == 20
    with pytest.raises(AssayError, match=r"below the required 100\.0%"):
        language.train_agreement_model(run, dataclasses.replace(TINY, required=1.0))


def test_any_text_with_any_tokenizer(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(agreement_text(600)))
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    run = Run(tmp_path / "run")
    config = LanguageTraining(
        layers=1, width=32, heads=2, context=16, steps=80, batch=16, rate=1e-2
    )
    folder = language.train_language_model(text, tmp_path / "tokenizer", run, config)
    losses = run.json("language.json")
    assert losses["held_out_loss"] < losses["frequency_loss"] - 0.2
    loaded = load_language_model(folder)
    assert loaded.logits(torch.tensor([[3, 4, 5]])).shape == (1, 3, len(loaded.tokenizer))


def test_bad_input_is_refused_before_training(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    text = tmp_path / "text.txt"
    text.write_text(" ".join(agreement_text(3)))
    run = Run(tmp_path / "run")
    with pytest.raises(InputError, match="too few"):
        language.train_language_model(text, tokenizer, run)
    with pytest.raises(InputError, match="at least 2"):
        language.train_language_model(text, tokenizer, run, LanguageTraining(context=16))
    with pytest.raises(InputError, match="no file"):
        language.train_language_model(tmp_path / "none.txt", tokenizer, run)
    with pytest.raises(InputError, match="tokenizer"):
        language.train_language_model(text, None, run)
    with pytest.raises(InputError, match="context"):
        language.train_agreement_model(run, dataclasses.replace(TINY, context=4))
    assert not run.has("model")


@pytest.mark.slow
@pytest.mark.parametrize("config", language.AGREEMENT.values(), ids=language.AGREEMENT)
def test_agreement_is_learned_on_held_out_pairs(config: AgreementTraining, tmp_path: Path) -> None:
    run = Run(tmp_path)
    language.train_agreement_model(run, config)
    assert min(run.json("agreement.json").values()) >= config.required
