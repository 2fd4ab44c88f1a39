"""Whether a feature is active and how strongly it is, decided apart from one another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from assay.dictionaries.linear import Linear


class Gated(Linear):
    """`f = relu(p exp(r_mag) + b_mag) * (p + b_enc > 0)`, `p = (x - subtract * b_dec) W_enc`
    (Rajamanoharan et al. 2024, arXiv 2404.16014).
    """

    architecture = "gated"

    def __init__(
        self,
        d_in: int,
        size: int,
        d_out: int | None = None,
        *,
        subtract: bool | None = None,
        skip: int | bool = False,
    ):
        super().__init__(d_in, size, d_out, subtract=subtract, skip=skip)
        self.r_mag = nn.Parameter(torch.zeros(size))
        self.b_mag = nn.Parameter(torch.zeros(size))

    def encode(self, x: Tensor) -> Tensor:
        projected = self.centred(x) @ self.W_enc
        strength = torch.relu(projected * self.r_mag.exp() + self.b_mag)
        return strength * (projected + self.b_enc > 0)

    def open_gates(self, x: Tensor) -> Tensor:
        """Return `relu(p + b_enc)`: what the penalty and the auxiliary loss of training are about,
        as the step has no derivative.
        """
        return torch.relu(self.before(x))
