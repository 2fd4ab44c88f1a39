"""Windows of a text that is read in pieces are those of the whole text."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from assay.errors import AssayError, InputError
from assay.io import texts

WORDS = ["the", "lion", "sleeps", "été", "near", "zoo,", "日本", "🦁", "a", "running"]


def text_of(words: int, line: int, seed: int = 0) -> str:
    """Words with single and double spaces, in lines of about so many."""
    drawn = random.Random(seed)
    found = []
    for _ in range(words):
        found.append(drawn.choice(WORDS))
        found.append("\n" if drawn.random() < 1 / line else drawn.choice([" ", " ", "  "]))
    return "".join(found)


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    if kind == "words":
        vocabulary = {word: index for index, word in enumerate(["<unk>", *WORDS])}
        found = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>")
    found = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False)
    if kind == "bytes":
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.train_from_iterator([text_of(500, 9)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=found)


@pytest.mark.parametrize("kind", ["words", "bytes", "metaspace"])
@pytest.mark.parametrize("line", [5, 10**9])
def test_pieces_have_the_tokens_of_the_whole(kind, line, tmp_path, monkeypatch):
    tokenizer = tokenizer_of(kind)
    text = text_of(3000, line)
    path = tmp_path / "text.txt"
    path.write_text(text)
    whole = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    monkeypatch.setattr(texts, "PIECE", 700)
    monkeypatch.setattr(texts, "CONTEXT", 60)
    calls = []
    cut = texts._cut
    monkeypatch.setattr(texts, "_cut", lambda text: calls.append(text) or cut(text))
    found = texts.read_text(path, tokenizer, length=7)
    assert len(calls) > 20
    assert found.flatten().tolist() == whole[: len(whole) // 7 * 7].tolist()
    assert torch.equal(texts.read_text(path, tokenizer, length=7, limit=11), found[:11])


def test_a_text_without_spaces_is_one_piece(tmp_path, monkeypatch):
    tokenizer = tokenizer_of("bytes")
    (tmp_path / "text.txt").write_text("日本" * 900)
    monkeypatch.setattr(texts, "PIECE", 100)
    found = texts.read_text(tmp_path / "text.txt", tokenizer, length=5).flatten()
    whole = tokenizer("日本" * 900, add_special_tokens=False)["input_ids"]
    assert found.tolist() == whole[: len(whole) // 5 * 5]


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    tokenizer = tokenizer_of("words")
    monkeypatch.setattr(texts, "PIECE", 1 << 14)
    monkeypatch.setattr(texts, "WINDOWS", 64)
    peaks = []
    for words in (12_000, 96_000):
        path = tmp_path / f"{words}.txt"
        path.write_text(text_of(words, 12))
        tracemalloc.start()
        found = texts.read_text(path, tokenizer, length=16)
        again = texts.reorder(found, torch.arange(len(found)).flip(0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert torch.equal(again, found.flip(0))
        assert len(found) == words // 16
    assert peaks[1] < 2 * peaks[0]


def test_texts_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    tokenizer = tokenizer_of("words")
    (tmp_path / "latin.txt").write_bytes("the été".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8 text"):
        texts.read_text(tmp_path / "latin.txt", tokenizer, length=2)
    with pytest.raises(InputError, match="no file"):
        texts.read_text(tmp_path / "none.txt", tokenizer, length=2)
    (tmp_path / "short.txt").write_text("the lion")
    with pytest.raises(InputError, match="holds 2 tokens: too few for one window of 3"):
        texts.read_text(tmp_path / "short.txt", tokenizer, length=3)

    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(texts.mmap, "mmap", full)
    with pytest.raises(AssayError, match="No space left on device; set TMPDIR"):
        texts.read_text(tmp_path / "short.txt", tokenizer, length=2)
