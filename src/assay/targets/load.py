"""Load a language model as a target, and pairs of prompts as its batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from assay.core.target import Batch, Metric, Target
from assay.errors import InputError
from assay.io.pair_files import TextPair
from assay.io.prompts import encode_pairs, read_pairs
from assay.targets.language import load_language_model, require_context
from assay.targets.lens import Lensed, is_lens
from assay.targets.metrics import choose_metric, pair_batch, with_clean_run


@dataclass(frozen=True)
class LanguageTarget(Target):
    """A target that carries its tokenizer, so that prompts can be given as text."""

    tokenizer: Any = field(default=None, repr=False)


def load(
    path: Path | str | nn.Module,
    metric: str | Metric = "logit_difference",
    *,
    dtype: torch.dtype | None = torch.float32,
) -> LanguageTarget:
    """Load a Hugging Face causal language model, from a folder or by its hub name, as a target; a
    `HookedTransformer` or bridge of TransformerLens is taken as it is.

    `metric` is a name (logit_difference, probability, answer_loss, kl, greater_than, loss) or a
    function `(output, batch) -> (examples,)`. Attention runs unfused, so that every method applies.
    Raises InputError as `load_language_model`."""
    if isinstance(path, nn.Module):
        if not is_lens(path):
            raise InputError(
                f"a {type(path).__name__} is no network of TransformerLens; give the folder or hub"
                " name of a model, or use assay.target(model, metric)"
            )
        name, tokenizer = type(path).__name__, getattr(path, "tokenizer", None)
        return LanguageTarget(Lensed(path), choose_metric(metric), name, tokenizer=tokenizer)
    model = load_language_model(path, dtype=dtype)
    return LanguageTarget(model.model, choose_metric(metric), model.path, tokenizer=model.tokenizer)


def pairs(
    target: Target,
    source: Path | str | list[tuple[str, str, str, str]],
    *,
    limit: int | None = None,
) -> tuple[Batch, Batch]:
    """Return the clean and the patch batch of pairs of prompts.

    `source` is a JSONL or CSV file, or a list of (clean prompt, patch prompt, clean answer, patch
    answer). Pairs whose prompts differ in length in tokens, or whose answers are not one token, are
    dropped. Raises InputError when the target has no tokenizer or no pair is left."""
    tokenizer = getattr(target, "tokenizer", None)
    if tokenizer is None:
        raise InputError(
            "the target has no tokenizer: load it with assay.load, or make the batches yourself"
            " with assay.Batch"
        )
    if isinstance(source, list):
        found = encode_pairs([TextPair(*entry) for entry in source], tokenizer, limit=limit)
    else:
        found = read_pairs(source, tokenizer, limit=limit)
    require_context(target.model, found.clean.shape[1])
    clean, patch = (pair_batch(found, side, target.device) for side in ("clean", "patch"))
    if "clean_log_probs" in getattr(target.metric, "needs", ()):
        return with_clean_run(target.model, clean), with_clean_run(target.model, patch, clean)
    return clean, patch
