"""Continuations of a prompt, token by token, with edits at sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from assay.core.sites import Edit, run_edited
from assay.core.target import Batch
from assay.errors import InputError
from assay.targets.language import require_context
from assay.targets.metrics import last_logits


@torch.no_grad()
def continue_tokens(
    model: nn.Module,
    prompt: list[int],
    count: int,
    *,
    edits: Callable[[Batch], Mapping[str, Edit]] | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> list[int]:
    """Return `count` tokens behind a prompt: the likeliest one each time, or with a `temperature`
    one that is drawn from softmax(logits / temperature).

    `edits` returns the edits for the text as it is so far. Every token runs the whole text again: a
    cache of keys and values would hold what edits change. Raises InputError where prompt and
    continuation do not fit the model's context."""
    if count < 1 or not temperature >= 0 or temperature == float("inf"):
        raise InputError(
            f"count must be at least 1 and temperature a number from 0 on, got {count} and"
            f" {temperature}"
        )
    require_context(model, len(prompt) + count)
    tokens = list(prompt)
    for _ in range(count):
        ids = torch.tensor([tokens], device=device)
        last = torch.tensor([len(tokens) - 1], device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch = Batch(inputs, {"last": last}, checked=True)
        output = run_edited(model, inputs, None if edits is None else edits(batch))
        tokens.append(_next(last_logits(output, last)[0], temperature, generator))
    return tokens[len(prompt) :]


def _next(logits: Tensor, temperature: float, generator: Any) -> int:
    if temperature == 0:
        return int(logits.argmax())
    # Less the largest one first: a tiny temperature would make it infinite.
    odds = ((logits.double() - logits.max()).cpu() / temperature).softmax(-1)
    return int(torch.multinomial(odds, 1, generator=generator))
