"""Plain text as windows of tokens. It is read a piece at a time and its tokens lie in a temporary
file that is mapped, so that a large text takes no memory in proportion."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from assay.errors import AssayError, InputError
from assay.io.files import existing
from assay.io.prompts import leading_token, require_tokenizer

PIECE = 1 << 18
"""Characters that are tokenised at once."""

CONTEXT = 1 << 10
"""Characters on either side of a piece that its tokens may depend on."""

WINDOWS = 1 << 12
"""Windows that are copied at once."""


def read_text(path: Path | str, tokenizer: Any, *, length: int, limit: int | None = None) -> Tensor:
    """Read plain text as windows of `length` tokens, (windows, length), the first `limit` of them;
    the rest that fills none is left out.

    Every window begins with the tokenizer's leading token if it has one. The text is cut at the
    ends of lines, or of words where lines are long, and every piece is tokenised with its
    surroundings; a tokenizer without offsets (`is_fast` false) gets the whole text. Raises
    InputError when the text fills no window, AssayError when there is no room for the tokens."""
    require_tokenizer(tokenizer)
    if length < 2:
        raise InputError(f"length must be at least 2 tokens, got {length}")
    path = existing(path)
    leading = leading_token(tokenizer)
    own = length - (leading is not None)
    left: list[int] = []

    def windows() -> Iterator[Tensor]:
        made = 0
        for ids in _tokens(path, tokenizer):
            left.extend(ids)
            count = len(left) // own
            count = count if limit is None else min(count, limit - made)
            taken = torch.tensor(left[: count * own], dtype=torch.long).reshape(count, own)
            if leading is not None:
                taken = torch.cat([torch.full((count, 1), leading), taken], dim=1)
            yield taken
            del left[: count * own]
            made += count
            if made == limit:
                return

    try:
        found = _mapped(windows(), length)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    if not len(found):
        raise InputError(f"{path} holds {len(left)} tokens: too few for one window of {length}")
    return found


def reorder(
    ids: Int[Tensor, "windows length"], order: Int[Tensor, " chosen"]
) -> Int[Tensor, "chosen length"]:
    """Return windows in another order, in a temporary file of their own."""
    return _mapped((ids[some] for some in order.split(WINDOWS)), ids.shape[1])


def _mapped(parts: Iterable[Tensor], length: int) -> Int[Tensor, "windows length"]:
    """Return windows as one mapped tensor, of a file without a name that ends with it."""
    with tempfile.TemporaryFile() as file:
        try:
            for part in parts:
                file.write(part.contiguous().numpy().tobytes())
            file.flush()
            held = mmap.mmap(file.fileno(), 0) if file.tell() else None
        except OSError as error:
            raise AssayError(
                f"the tokens cannot be kept in {tempfile.gettempdir()}: {error.strerror}; set"
                " TMPDIR to a folder with room for eight bytes a token"
            ) from error
    if held is None:
        return torch.zeros(0, length, dtype=torch.long)
    return torch.frombuffer(held, dtype=torch.long).reshape(-1, length)


def _tokens(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    """Return the tokens of a text, a piece at a time."""
    options = {"add_special_tokens": False, "verbose": False}
    with path.open(encoding="utf-8-sig") as file:
        if not getattr(tokenizer, "is_fast", False):
            yield tokenizer(file.read(), **options)["input_ids"]
            return
        before, text = "", ""
        while True:
            more = file.read(PIECE)
            text += more
            cut = _cut(text) if more else len(text)
            if not cut and more:
                continue
            found = tokenizer(before + text, return_offsets_mapping=True, **options)
            start, stop = len(before), len(before) + cut
            yield [
                token
                for token, (place, _) in zip(
                    found["input_ids"], found["offset_mapping"], strict=True
                )
                if place >= start and (place < stop or not more)
            ]
            if not more:
                return
            whole = before + text[:cut]
            before = whole[_cut(whole) :]
            text = text[cut:]


def _cut(text: str) -> int:
    """Return where the last line begins that has `CONTEXT` characters behind its beginning, or the
    last space there; 0 for none.
    """
    most = max(len(text) - CONTEXT, 0)
    return text.rfind("\n", 0, most) + 1 or max(text.rfind(" ", 0, most), 0)
