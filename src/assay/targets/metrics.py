"""Metrics of language models: one number per example, from the logits at the last position or over
the whole text.

Sign: every metric that compares answers grows from clean to patch, so that an indirect effect
`m(clean, do(a := a_patch)) - m(clean)` is positive where the patch pulls towards its own answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay.core.target import Batch, Metric
from assay.errors import InputError, unknown
from assay.io.prompts import Pairs

Labels = Mapping[str, Any]


@dataclass(frozen=True)
class AtLast:
    """A metric of the logits at the last position of every prompt: `function(logits (examples,
    vocabulary), labels)`.

    A run that computes the last position only calls `function` itself. `needs` names the labels it
    reads, `formula` says what the number is wherever it is printed."""

    name: str
    function: Callable[[Tensor, Labels], Tensor]
    needs: tuple[str, ...] = ()
    formula: str = ""
    higher_is_right: bool = True

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        labels = require_labels(batch, self.name, "last", *self.needs)
        return self.function(last_logits(output, labels["last"]), labels)


def pair_batch(
    pairs: Pairs, which: Literal["clean", "patch"] = "clean", device: torch.device | str = "cpu"
) -> Batch:
    """Return one side of the pairs as a batch: keyword inputs of a Hugging Face model, labels
    `answers`, `last` and the like.
    """
    if which not in ("clean", "patch"):
        raise unknown("side of the pairs", which, ("clean", "patch"))
    labels = {"answers": pairs.answers, "last": pairs.last}
    if pairs.years is not None and pairs.digits is not None:
        labels |= {"years": pairs.years, "digits": pairs.digits}
    inputs = {
        "input_ids": pairs.clean if which == "clean" else pairs.patch,
        "attention_mask": pairs.mask,
    }
    return Batch(
        {key: value.to(device) for key, value in inputs.items()},
        {key: value.to(device) for key, value in labels.items()},
    )


def text_batch(ids: Tensor, device: torch.device | str = "cpu") -> Batch:
    """Return windows of plain text (windows, length) as a batch; only `loss` and metrics without
    answers apply to it.
    """
    last = torch.full((len(ids),), ids.shape[1] - 1, device=device)
    return Batch(
        {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids, device=device)},
        {"last": last},
    )


def with_clean_run(model: nn.Module, batch: Batch, clean: Batch | None = None) -> Batch:
    """Return the batch with the clean run's log-probabilities at the last position as a label,
    which `kl` compares with.

    The clean run is that of `clean`, by default of the batch itself.
    """
    clean = batch if clean is None else clean
    labels = require_labels(clean, "kl", "last")
    with torch.no_grad():
        logits = last_logits(model(**clean.inputs), labels["last"])
    return Batch(batch.inputs, {**(batch.labels or {}), "clean_log_probs": logits.log_softmax(-1)})


def _logit_difference(logits: Tensor, labels: Labels) -> Tensor:
    chosen = logits.gather(-1, labels["answers"])
    return chosen[..., 1] - chosen[..., 0]


def _probability(logits: Tensor, labels: Labels) -> Tensor:
    return logits.softmax(-1).gather(-1, labels["answers"][..., 1:])[..., 0]


def _answer_loss(logits: Tensor, labels: Labels) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, labels["answers"][..., :1])[..., 0]


def _kl(logits: Tensor, labels: Labels) -> Tensor:
    clean = labels["clean_log_probs"]
    return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)


def _greater_than(logits: Tensor, labels: Labels) -> Tensor:
    probabilities = logits.softmax(-1).gather(-1, labels["digits"])
    years = torch.arange(probabilities.shape[-1], device=logits.device)
    wrong = years <= labels["years"][:, None]
    return (probabilities * (2.0 * wrong - 1.0)).sum(-1)


logit_difference = AtLast(
    "logit_difference",
    _logit_difference,
    ("answers",),
    "logit(patch answer) - logit(clean answer); the clean answer is right, so lower is better",
    higher_is_right=False,
)
probability = AtLast(
    "probability",
    _probability,
    ("answers",),
    "probability of the patch answer; the clean answer is right, so lower is better",
    higher_is_right=False,
)
answer_loss = AtLast(
    "answer_loss",
    _answer_loss,
    ("answers",),
    "-log p(clean answer), in nats; lower is better",
    higher_is_right=False,
)
kl = AtLast(
    "kl",
    _kl,
    ("clean_log_probs",),
    "KL(clean run || this run) of the next-token distribution, in nats; lower is better",
    higher_is_right=False,
)
"""Needs `with_clean_run`."""
greater_than = AtLast(
    "greater_than",
    _greater_than,
    ("years", "digits"),
    "p(end year <= start year) - p(end year > start year) over the digits 00 to 99; a later end"
    " year is right, so lower is better",
    higher_is_right=False,
)
"""The task of arXiv 2305.00586, with the opposite sign."""


@dataclass(frozen=True)
class TextLoss:
    """The mean next-token cross-entropy over the tokens of every example, in nats; padding is left
    out.
    """

    name: str = "loss"
    formula: str = "mean next-token cross-entropy, in nats; lower is better"
    higher_is_right: bool = False

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        ids, mask = batch.inputs["input_ids"], batch.inputs.get("attention_mask")
        log_probs = _logits(output)[..., :-1, :].log_softmax(-1)
        each = -log_probs.gather(-1, ids[:, 1:, None])[..., 0]
        if mask is None:
            return each.mean(-1)
        weights = mask[:, 1:].to(each.dtype)
        return (each * weights).sum(-1) / weights.sum(-1).clamp(min=1)


loss = TextLoss()

METRICS: dict[str, Metric] = {
    "logit_difference": logit_difference,
    "probability": probability,
    "answer_loss": answer_loss,
    "kl": kl,
    "greater_than": greater_than,
    "loss": loss,
}


def choose_metric(metric: str | Metric) -> Metric:
    """Return the metric of a name, or a user's function `(output, batch) -> (examples,)` as it
    is.
    """
    if callable(metric):
        return metric
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    return METRICS[metric]


def last_logits(output: Any, last: Tensor) -> Tensor:
    """Return the logits (examples, vocabulary) at the last position of every prompt, in float32
    or wider.
    """
    logits = _logits(output)
    return logits[torch.arange(len(last), device=last.device), last]


def require_labels(batch: Batch, metric: str, *needs: str) -> Labels:
    """Return the labels of a batch; InputError when one that the metric reads is missing."""
    labels = batch.labels if isinstance(batch.labels, Mapping) else {}
    lost = [name for name in needs if labels.get(name) is None]
    if lost:
        hint = "; add it with with_clean_run" if "clean_log_probs" in lost else ""
        raise InputError(
            f"metric {metric!r} needs the label {lost[0]!r}, and the batch has"
            f" {sorted(labels) or 'none'}{hint}"
        )
    return labels


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise InputError(
            f"a language model's output must be logits or have them, got {type(output).__name__}"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
