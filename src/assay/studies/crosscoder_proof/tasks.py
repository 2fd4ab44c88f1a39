"""What a network of this study is asked: all pairs of tokens, or digits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.targets.data import load_digits
from assay.targets.residual_relu import pairs_of_tokens


@dataclass(frozen=True)
class Task:
    """Inputs (points, inputs), right outputs (points,), and what describes each point; `proposed`
    are codes (points, some) at which a crosscoder may start.
    """

    inputs: Float[Tensor, "points inputs"]
    labels: Int[Tensor, " points"]
    contexts: pl.DataFrame
    pairs: bool = False
    proposed: Float[Tensor, "points some"] | None = None

    def split(self, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
        """Return the indices of the points to fit and of those held out."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.labels), generator=generator)
        held = max(1, round(held_out * len(order)))
        return order[held:], order[:held]


def pairs_task(vocabulary: int) -> Task:
    """All ordered pairs of tokens; the larger token is right. The proposed codes are the tokens at
    their positions, and the answers.
    """
    inputs, labels = pairs_of_tokens(vocabulary)
    first, second = np.indices((vocabulary, vocabulary)).reshape(2, -1)
    table = pl.DataFrame({"first": first, "second": second, "larger": np.maximum(first, second)})
    answers = torch.nn.functional.one_hot(labels, vocabulary).to(inputs)
    return Task(inputs, labels, table, True, torch.cat([inputs, answers], 1))


def digits_task() -> Task:
    """The 1797 digits of scikit-learn, 8 x 8 pixels in [0, 1]."""
    inputs, labels = load_digits().both_parts()
    table = pl.DataFrame({"digit": labels.numpy(), "mean pixel": inputs.double().mean(1).numpy()})
    return Task(inputs, labels, table)
