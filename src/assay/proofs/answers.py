"""Margins of a network's answer over its rivals, as functions of gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from assay.core.mechanisms import Mechanisms
from assay.core.sites import run_edited
from assay.core.target import Batch
from assay.errors import InputError
from assay.proofs.boxed import Boxed
from assay.targets.metrics import last_logits


def run_margins(
    part: Boxed, gates: Mapping[str, Tensor], margins: Callable[[Any, Batch], Tensor]
) -> Tensor:
    """Return the margins of one example under gates."""
    edits = part.inner.edits(gates)
    return margins(run_edited(part.target.model, part.batch.inputs, edits), part.batch)


@torch.no_grad()
def margins_of(part: Mechanisms) -> Callable[[Any, Batch], Tensor]:
    """Return the function that gives, from a model's output, the margins of the untouched network's
    answer over its rivals, (examples, rivals).

    The answer is the largest logit of a classifier, and of a language model the larger of the
    labelled answers at the last position, or without labels the likeliest token there."""
    logits = _logits(run_edited(part.target.model, part.batch.inputs), part.batch)
    labels = part.batch.labels if isinstance(part.batch.labels, Mapping) else {}
    answers = labels.get("answers")
    chosen = torch.arange(logits.shape[1]) if answers is None else answers[0]
    seen = logits[0, chosen]
    best = int(seen.argmax())
    answer, rivals = int(chosen[best]), torch.cat([chosen[:best], chosen[best + 1 :]])
    if not len(rivals):
        raise InputError("same-answer: the model has one output, and its answer has no rival")

    def margins(output: Any, batch: Batch) -> Tensor:
        found = _logits(output, batch)
        return found[:, answer : answer + 1] - found.index_select(1, rivals)

    return margins


def _logits(output: Any, batch: Batch) -> Tensor:
    """Return the logits (examples, answers) that a model's output stands for."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    labels = batch.labels if isinstance(batch.labels, Mapping) else {}
    if labels.get("last") is None:
        raise InputError(
            "same-answer: the model's output must be logits (examples, classes), or the batch have"
            " the label 'last', the position of the answer"
        )
    return last_logits(output, labels["last"])
