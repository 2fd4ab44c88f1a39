"""Features above a threshold of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from assay.dictionaries.linear import Linear
from assay.errors import InputError


class JumpReLU(Linear):
    """`f = relu(p) * (p > threshold)`, p before the activation function (Rajamanoharan et al. 2024,
    arXiv 2407.14435).

    Training takes the derivatives in the thresholds from a rectangle of width `bandwidth` around
    them; elsewhere the step has none."""

    architecture = "jumprelu"

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
        self.threshold = nn.Parameter(torch.zeros(size))

    def encode(self, x: Tensor) -> Tensor:
        return self._jump(self.before(x))

    def encode_training(self, x: Tensor, bandwidth: float = 1e-3) -> Tensor:
        """Return `encode(x)` with the derivative `-threshold / bandwidth` in a threshold that is
        within half a bandwidth of its feature.
        """
        before = self.before(x)
        slope = -self.threshold * self._near(before, bandwidth)
        return self._jump(before) + slope.detach() * self._moved()

    def count_active(self, x: Tensor, bandwidth: float = 1e-3) -> Tensor:
        """Return the number of active features per position, with the derivative `-1 / bandwidth`
        in a threshold that is within half a bandwidth of its feature: the penalty of training.
        """
        before = self.before(x)
        active = (before > self.threshold.clamp_min(0)).to(before.dtype)
        return (active - self._near(before, bandwidth).detach() * self._moved()).sum(-1)

    def _jump(self, before: Tensor) -> Tensor:
        return torch.relu(before) * (before > self.threshold)

    def _near(self, before: Tensor, bandwidth: float) -> Tensor:
        if bandwidth <= 0:
            raise InputError(f"bandwidth must be above 0, got {bandwidth}")
        near = ((before - self.threshold).abs() < bandwidth / 2).to(before.dtype)
        return near / bandwidth

    def _moved(self) -> Tensor:
        # Zero in value, one in derivative.
        return self.threshold - self.threshold.detach()
