"""A fixed mean number of active features over a batch; one threshold afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.dictionaries.linear import Linear
from assay.errors import InputError


class BatchTopK(Linear):
    """In training the `k` n largest features of n positions, afterwards those above `threshold`
    (Bussmann et al. 2024, arXiv 2412.06410).

    The threshold follows the smallest feature that training chose. With `by_norm` features are
    compared by `f * ||W_dec row||`. Raises InputError unless 0 < k <= size."""

    architecture = "batchtopk"
    threshold: Tensor

    def __init__(
        self,
        d_in: int,
        size: int,
        d_out: int | None = None,
        *,
        k: float,
        by_norm: bool = False,
        subtract: bool | None = None,
        skip: int | bool = False,
    ):
        super().__init__(d_in, size, d_out, subtract=subtract, skip=skip)
        if not 0 < k <= size:
            raise InputError(f"k must be above 0 and at most the {size} features, got {k}")
        self.k = k
        self.by_norm = by_norm
        self.register_buffer("threshold", torch.zeros(()))

    def config(self) -> dict[str, Any]:
        return {**super().config(), "k": self.k, "by_norm": self.by_norm}

    def sizes(self, codes: Tensor) -> Tensor:
        """Return what features are compared by."""
        return codes * self.W_dec.norm(dim=1) if self.by_norm else codes

    def encode(self, x: Tensor) -> Tensor:
        before = self.before(x)
        return torch.relu(before) * (self.sizes(before) > self.threshold)

    def choose(self, before: Tensor) -> Tensor:
        """Return the features that training keeps: the largest over all positions together."""
        positive = torch.relu(before)
        flat = positive.reshape(-1)
        kept = min(max(round(self.k * (flat.numel() // self.size)), 1), flat.numel())
        chosen = self.sizes(positive).reshape(-1).topk(kept, sorted=False).indices
        return torch.zeros_like(flat).scatter(0, chosen, flat[chosen]).reshape(before.shape)

    def encode_training(self, x: Tensor) -> Tensor:
        return self.choose(self.before(x))

    @torch.no_grad()
    def follow(self, codes: Tensor, rate: float = 0.01) -> None:
        """Move the threshold towards the smallest active feature of a training batch; the first
        batch sets it.
        """
        sizes = self.sizes(codes)
        smallest = torch.where(codes > 0, sizes, torch.inf).amin()
        moved = torch.where(
            self.threshold > 0, self.threshold + rate * (smallest - self.threshold), smallest
        )
        self.threshold.copy_(torch.where(torch.isfinite(smallest), moved, self.threshold))
