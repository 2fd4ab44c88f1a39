"""A fixed number of active features at each position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.dictionaries.linear import Linear
from assay.errors import InputError


class TopK(Linear):
    """The `k` largest features of a position, those above zero (Gao et al. 2024, arXiv 2406.04093).

    With `by_norm` the features are chosen by `f * ||W_dec row||`, the size of what they add.
    Raises InputError unless 1 <= k <= size."""

    architecture = "topk"

    def __init__(
        self,
        d_in: int,
        size: int,
        d_out: int | None = None,
        *,
        k: int,
        by_norm: bool = False,
        subtract: bool | None = None,
        skip: int | bool = False,
    ):
        super().__init__(d_in, size, d_out, subtract=subtract, skip=skip)
        if not 1 <= k <= size:
            raise InputError(f"k must be between 1 and the {size} features, got {k}")
        self.k = int(k)
        self.by_norm = by_norm

    def config(self) -> dict[str, Any]:
        return {**super().config(), "k": self.k, "by_norm": self.by_norm}

    def encode(self, x: Tensor) -> Tensor:
        positive = torch.relu(self.before(x))
        sizes = positive * self.W_dec.norm(dim=1) if self.by_norm else positive
        chosen = sizes.topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(positive).scatter(-1, chosen, positive.gather(-1, chosen))
