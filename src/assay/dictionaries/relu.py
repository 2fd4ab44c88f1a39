"""The standard sparse autoencoder: a linear map, a bias and a ReLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from assay.dictionaries.base import Dictionary


class ReLU(Dictionary):
    """`f = relu((x - subtract * b_dec) W_enc + b_enc)` (Bricken et al. 2023, Towards
    Monosemanticity).
    """

    architecture = "relu"

    def __init__(self, d_in: int, size: int, d_out: int | None = None, *, subtract: bool = True):
        super().__init__()
        self.subtract = subtract
        self.W_enc = nn.Parameter(torch.zeros(d_in, size))
        self.b_enc = nn.Parameter(torch.zeros(size))
        self.W_dec = nn.Parameter(torch.zeros(size, d_in if d_out is None else d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.W_dec.shape[1]))

    @property
    def d_in(self) -> int:
        return int(self.W_enc.shape[0])

    def config(self) -> dict[str, Any]:
        return {
            "d_in": self.d_in,
            "size": self.size,
            "d_out": self.d_out,
            "subtract": self.subtract,
        }

    def before(self, x: Tensor) -> Tensor:
        """Return the features before their activation function."""
        centred = x - self.b_dec if self.subtract else x
        return centred @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.before(x))
