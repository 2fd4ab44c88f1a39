"""Windows of a plain text for a language model of the user's: those to train on, and those held
out."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.errors import InputError
from assay.io.texts import WINDOWS, read_text, reorder
from assay.learn.reading import Rows, rows_of
from assay.targets.language import LanguageModel, require_context

_MOST_UNKNOWN = 0.5


def split_windows(
    model: LanguageModel,
    path: str,
    length: int,
    held_out: int,
    *,
    constant: int,
    seed: int,
    from_end: bool = False,
) -> tuple[Rows, Rows]:
    """Return the windows of a text to train on, and `held_out` others, drawn with `seed` from all
    or, with `from_end`, from the last tenth of the text (all of it where it has fewer), of which
    none is then trained on; the first `constant` positions of each are not read.

    Raises InputError for windows longer than the model's context, a text that fills too few of
    them, and one of another vocabulary."""
    require_context(model.model, length, "set data.length lower")
    ids = read_text(path, model.tokenizer, length=length)
    require_vocabulary(ids, model, path)
    generator = torch.Generator().manual_seed(seed)
    if from_end:
        require_tenth(ids, path)
        kept = len(ids) - len(ids) // 10
        test = ids[kept:][torch.randperm(len(ids) - kept, generator=generator)[:held_out]]
        return rows_of(ids[:kept], constant=constant), rows_of(test, constant=constant)
    if len(ids) < 2 * held_out:
        raise InputError(
            f"{path} fills {len(ids)} windows of {length} tokens; data.held_out = {held_out} needs"
            " twice as many"
        )
    ids = reorder(ids, torch.randperm(len(ids), generator=generator))
    return (
        rows_of(ids[held_out:], constant=constant),
        rows_of(ids[:held_out], constant=constant),
    )


def require_tenth(ids: Tensor, path: str) -> None:
    """Raise InputError for windows of a text whose last tenth does not hold two of them."""
    if len(ids) < 20:
        raise InputError(
            f"{path} fills {len(ids)} windows of {ids.shape[1]} tokens; at least 20 are needed, as"
            " the last tenth is held out: give more text, or set data.length lower"
        )


def require_vocabulary(ids: Tensor, model: LanguageModel, path: str) -> None:
    """Raise InputError for tokens that the model has no embedding for, and for a text most of whose
    words its tokenizer does not know.
    """
    parts = ids.split(WINDOWS)
    largest = max(int(part.max()) for part in parts)
    if largest >= model.vocab_size:
        raise InputError(
            f"{path} holds token {largest}, and the model has {model.vocab_size} tokens: its"
            " tokenizer is that of another vocabulary"
        )
    unknown = model.tokenizer.unk_token_id
    if unknown is None:
        return
    share = sum(int((part == unknown).sum()) for part in parts) / ids.numel()
    if share > _MOST_UNKNOWN:
        raise InputError(
            f"{share:.0%} of the tokens of {path} are unknown to the model's tokenizer; give a text"
            " in its vocabulary"
        )
