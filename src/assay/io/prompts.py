"""Pairs of a clean and a patched prompt with one-token answers, and plain text, as token ids.

Prompts are left-aligned: padding stands on the right, where a causal model does not see it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.errors import InputError
from assay.io.pair_files import Format, TextPair, read_text_pairs


@dataclass(frozen=True)
class Pairs:
    """Encoded pairs: `clean` and `patch` ids (pairs, positions), `answers` (pairs, 2) as (clean,
    patch), `lengths` (pairs,).

    `years` (pairs,) and `digits` (pairs, 100), the tokens of 00 to 99, are there for the
    greater-than task only. `dropped` counts the pairs left out by reason, `texts` are those kept.
    """

    clean: Tensor
    patch: Tensor
    answers: Tensor
    lengths: Tensor
    cases: tuple[str, ...]
    texts: tuple[TextPair, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    years: Tensor | None = None
    digits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def last(self) -> Tensor:
        """The last position of every prompt, (pairs,)."""
        return self.lengths - 1

    @property
    def mask(self) -> Tensor:
        """The attention mask, (pairs, positions): 1 at prompt tokens, 0 at padding."""
        return (torch.arange(self.clean.shape[1]) < self.lengths[:, None]).long()

    def take(self, index: Sequence[int] | Tensor | slice) -> Pairs:
        """Return the pairs at `index`, without the positions that are padding in all of them."""
        if not isinstance(index, slice) and not len(index):
            raise InputError("no pairs chosen")
        chosen = torch.arange(len(self))[
            index if isinstance(index, slice) else torch.as_tensor(index)
        ]
        if not len(chosen):
            raise InputError("no pairs chosen")
        width = int(self.lengths[chosen].max())
        return Pairs(
            self.clean[chosen, :width],
            self.patch[chosen, :width],
            self.answers[chosen],
            self.lengths[chosen],
            tuple(self.cases[i] for i in chosen.tolist()),
            tuple(self.texts[i] for i in chosen.tolist()),
            self.dropped,
            None if self.years is None else self.years[chosen],
            None if self.digits is None else self.digits[chosen],
        )

    def report(self) -> str:
        """Say how many pairs were kept, and how many dropped for which reason."""
        return f"{len(self)} pairs kept, {_counted(self.dropped)}"


def read_pairs(
    path: Path | str,
    tokenizer: Any,
    *,
    format: Format | None = None,
    patch: str = "corrupted",
    limit: int | None = None,
    vocab_size: int | None = None,
) -> Pairs:
    """Read a file of pairs and encode it; `limit` keeps the first ones that pass, `patch` names the
    patched column of a CSV.

    The format follows from the suffix (.jsonl: pairs) and, for a CSV, from its columns
    (clean_prefix and the other fields: pairs, label: greater-than). The answers of an
    indirect-object CSV are found in its text: the name said once against the name said twice.
    Those of a greater-than CSV are the neighbouring years.

    Raises InputError with file and line for a malformed line, and when the file is empty or no pair
    passes."""
    found, dropped = read_text_pairs(path, format, patch)
    return encode_pairs(
        found, tokenizer, limit=limit, vocab_size=vocab_size, dropped=dropped, source=str(path)
    )


def encode_pairs(
    pairs: Iterable[TextPair],
    tokenizer: Any,
    *,
    limit: int | None = None,
    vocab_size: int | None = None,
    dropped: Mapping[str, int] | None = None,
    source: str = "the pairs",
) -> Pairs:
    """Encode pairs; those that a one-token answer at one last position cannot serve are dropped and
    counted by reason.

    A pair is kept when each prompt followed by each answer tokenises to the prompt's tokens and one
    more, which depends on the answer alone, and both prompts have equal length. Raises InputError
    when none is kept."""
    require_tokenizer(tokenizer)
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    pairs = list(pairs)
    texts = [
        (pair.clean_prefix, pair.patch_prefix)
        + tuple(
            prefix + answer
            for prefix in (pair.clean_prefix, pair.patch_prefix)
            for answer in (pair.clean_answer, pair.patch_answer)
        )
        for pair in pairs
    ]
    flat = encode_texts([text for row in texts for text in row], tokenizer)
    counts: Counter[str] = Counter(dropped or {})
    kept: list[tuple[TextPair, list[int], list[int], tuple[int, int]]] = []
    first = 1 if leading_token(tokenizer) is not None else 0
    for index, pair in enumerate(pairs):
        if limit is not None and len(kept) == limit:
            break
        clean, patch, *whole = flat[6 * index : 6 * index + 6]
        answers, reason = _check(clean, patch, whole, first, tokenizer.unk_token_id, vocab_size)
        if answers is None:
            counts[reason] += 1
        else:
            kept.append((pair, clean, patch, answers))
    if not kept:
        raise InputError(f"{source}: no pair is left with this tokenizer; {_counted(counts)}")
    padding = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    years = (
        torch.tensor([pair.year for pair, *_ in kept])
        if all(pair.year >= 0 for pair, *_ in kept)
        else None
    )
    digits = None if years is None else _digit_tokens(tokenizer).expand(len(kept), -1)
    return Pairs(
        pad([clean for _, clean, _, _ in kept], padding),
        pad([patch for _, _, patch, _ in kept], padding),
        torch.tensor([answers for *_, answers in kept]),
        torch.tensor([len(clean) for _, clean, _, _ in kept]),
        tuple(pair.case for pair, *_ in kept),
        tuple(pair for pair, *_ in kept),
        dict(counts),
        years,
        digits,
    )


def encode_texts(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of texts, each behind the tokenizer's leading token if it has one."""
    leading = leading_token(tokenizer)
    start = [] if leading is None else [leading]
    return (
        [start + ids for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        if texts
        else []
    )


def leading_token(tokenizer: Any) -> int | None:
    """Return the token that the tokenizer puts before every text, None when it puts none."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and ids[:1] == [bos] else None


def require_tokenizer(tokenizer: Any) -> None:
    """Raise InputError when there is no tokenizer to encode text with."""
    if tokenizer is None or not callable(tokenizer):
        raise InputError(
            "text needs a tokenizer, and there is none beside the model; name a tokenizer folder"
        )


def pad(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """Return rows of ids left-aligned in one tensor, (rows, longest)."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], dtype=torch.long)


def padded_inputs(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return rows of ids as the arguments of a language model, padded on the right."""
    ids = pad(rows, 0)
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }


def _check(
    clean: list[int],
    patch: list[int],
    whole: list[list[int]],
    first: int,
    unk: int | None,
    vocab_size: int | None,
) -> tuple[tuple[int, int] | None, str]:
    """Return the two answer tokens, or None and why the pair is dropped."""
    if len(clean) == first or len(patch) == first:
        return None, "empty prompt"
    if len(clean) != len(patch):
        return None, "prompts of unequal token length"
    if clean == patch:
        return None, "identical prompts"
    if any(
        ids[: len(clean)] != prefix
        for ids, prefix in zip(whole, (clean, clean, patch, patch), strict=True)
    ):
        return None, "tokenisation does not concatenate"
    tails = [ids[len(clean) :] for ids in whole]
    if any(len(tail) != 1 for tail in tails):
        return None, "answer is not one token"
    (a,), (b,), (c,), (d,) = tails
    if (a, b) != (c, d):
        return None, "tokenisation does not concatenate"
    if unk is not None and unk in (*clean, *patch, a, b):
        return None, "word unknown to the tokenizer"
    if a == b:
        return None, "identical answers"
    if vocab_size is not None and max(*clean, *patch, a, b) >= vocab_size:
        return None, "token outside the model's vocabulary"
    return (a, b), ""


def _digit_tokens(tokenizer: Any) -> Tensor:
    ids = tokenizer([f"{value:02d}" for value in range(100)], add_special_tokens=False)["input_ids"]
    if any(len(entry) != 1 for entry in ids):
        raise InputError(
            "the greater-than task needs a tokenizer in which 00 to 99 are single tokens"
        )
    return torch.tensor(ids).reshape(1, 100)


def _counted(dropped: Mapping[str, int]) -> str:
    total = sum(dropped.values())
    return f"{total} dropped" + (
        f" ({', '.join(f'{reason}: {count}' for reason, count in dropped.items())})"
        if total
        else ""
    )
