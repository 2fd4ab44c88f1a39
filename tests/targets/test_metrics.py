"""Metrics against their formulas written out in float64, example by example."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.core.target import Batch, target
from assay.errors import InputError
from assay.io.pair_files import TextPair
from assay.io.prompts import Pairs
from assay.targets import metrics


def some_pairs(*, years: bool = False) -> Pairs:
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    text = TextPair("", "", "", "")
    digits = torch.arange(100).flip(0).expand(2, -1) if years else None
    return Pairs(
        ids,
        ids + 1,
        torch.tensor([[7, 8], [9, 6]]),
        torch.tensor([3, 2]),
        ("", ""),
        (text, text),
        years=torch.tensor([30, 98]) if years else None,
        digits=digits,
    )


def random_logits(width: int = 12) -> Tensor:
    return torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Fixed(nn.Module):
    """Gives fixed logits, whatever it is asked."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.values = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.values[: len(input_ids)])


def test_last_position_metrics_are_their_formulas() -> None:
    logits = random_logits()
    batch = metrics.pair_batch(some_pairs())
    model = Fixed(logits)
    rows = [logits[0, 2].tolist(), logits[1, 1].tolist()]
    answers = [(7, 8), (9, 6)]
    sums = [sum(math.exp(value) for value in row) for row in rows]
    expected = {
        "logit_difference": [row[b] - row[a] for row, (a, b) in zip(rows, answers, strict=True)],
        "probability": [
            math.exp(row[b]) / total for row, total, (_, b) in zip(rows, sums, answers, strict=True)
        ],
        "answer_loss": [
            math.log(total) - row[a] for row, total, (a, _) in zip(rows, sums, answers, strict=True)
        ],
    }
    for name, values in expected.items():
        found = target(model, metrics.choose_metric(name)).values(batch)
        torch.testing.assert_close(
            found, torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


def test_loss_leaves_padding_out() -> None:
    logits = random_logits()
    batch = metrics.pair_batch(some_pairs())
    first = [
        torch.logsumexp(logits[0, i], 0) - logits[0, i, token] for i, token in enumerate((2, 3))
    ]
    second = torch.logsumexp(logits[1, 0], 0) - logits[1, 0, 5]
    expected = torch.stack([sum(first, torch.tensor(0.0)) / 2, second])
    torch.testing.assert_close(target(Fixed(logits), metrics.loss).values(batch), expected)
    whole = metrics.text_batch(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert metrics.loss(logits, whole).shape == (2,)
    torch.testing.assert_close(metrics.loss(logits, whole)[0], expected[0])


def test_kl_to_the_clean_run_is_zero_there_and_positive_elsewhere() -> None:
    logits = random_logits()
    batch = metrics.with_clean_run(Fixed(logits), metrics.pair_batch(some_pairs()))
    assert metrics.kl(logits, batch).abs().max() < 1e-12
    other = logits.flip(-1)
    p, q = logits[0, 2].softmax(0), other[0, 2].softmax(0)
    found = metrics.kl(other, batch)
    torch.testing.assert_close(
        found[0], sum((p[i] * torch.log(p[i] / q[i]) for i in range(12)), torch.tensor(0.0))
    )
    assert (found > 0).all()
    taken = batch.take(torch.tensor([1]))
    torch.testing.assert_close(metrics.kl(other[1:], taken)[0], found[1])
    with pytest.raises(InputError, match="with_clean_run"):
        metrics.kl(logits, metrics.pair_batch(some_pairs()))


def test_greater_than_counts_wrong_minus_right_years() -> None:
    logits = random_logits(100)
    batch = metrics.pair_batch(some_pairs(years=True))
    found = metrics.greater_than(logits, batch)
    for row, (probabilities, year) in enumerate(
        [(logits[0, 2].softmax(0).flip(0), 30), (logits[1, 1].softmax(0).flip(0), 98)]
    ):
        torch.testing.assert_close(
            found[row], probabilities[: year + 1].sum() - probabilities[year + 1 :].sum()
        )
    with pytest.raises(InputError, match="needs the label 'years'"):
        metrics.greater_than(logits, metrics.pair_batch(some_pairs()))


def test_sides_of_the_pairs() -> None:
    pairs = some_pairs()
    assert metrics.pair_batch(pairs, "patch").inputs["input_ids"].equal(pairs.patch)
    assert metrics.pair_batch(pairs).inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    with pytest.raises(InputError, match="side of the pairs"):
        metrics.pair_batch(pairs, "cleen")  # type: ignore[arg-type]


def test_user_functions_are_metrics_and_their_shape_is_checked() -> None:
    batch = metrics.pair_batch(some_pairs())
    logits = random_logits()

    def entropy(output: Any, batch: Batch) -> Tensor:
        return -(output.logits[:, -1].softmax(-1) * output.logits[:, -1].log_softmax(-1)).sum(-1)

    assert target(Fixed(logits), metrics.choose_metric(entropy)).values(batch).shape == (2,)
    with pytest.raises(InputError, match="one number per example"):
        target(Fixed(logits), lambda output, batch: output.logits.mean()).values(batch)
    with pytest.raises(InputError, match="logit_difference"):
        metrics.choose_metric("logit_diff")
    with pytest.raises(InputError, match="logits"):
        metrics.logit_difference({"wrong": logits}, batch)


def test_half_precision_logits_are_widened() -> None:
    batch = metrics.pair_batch(some_pairs())
    assert metrics.logit_difference(random_logits().bfloat16(), batch).dtype == torch.float32


def test_the_divergence_is_that_of_the_clean_run_from_this_one() -> None:
    """KL((1/2, 1/2) || (9/10, 1/10)) is log(5/3), and the other way round it is another number."""
    clean = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    labels = {"last": torch.tensor([0]), "clean_log_probs": clean}
    batch = Batch({"input_ids": torch.tensor([[1]])}, labels)
    other = torch.tensor([[[0.9, 0.1]]], dtype=torch.float64).log() + 3
    found = float(metrics.kl(SimpleNamespace(logits=other), batch))
    assert found == pytest.approx(math.log(5 / 3), abs=1e-12)
