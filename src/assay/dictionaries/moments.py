"""Sums over positions in float64: mean, variation and covariance of values, and squared errors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class Moments:
    """Mean and covariance of the values at one site, added up chunk by chunk, and the sum of
    squared errors of what was rebuilt of them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.error = 0.0
        self._shift: Tensor | None = None
        self._sum: Tensor | None = None
        self._products: Tensor | None = None

    def add(
        self, values: Float[Tensor, "positions width"], errors: Float[Tensor, "positions width"]
    ) -> None:
        """Add some positions."""
        if not len(values):
            return
        values = values.double()
        if self._shift is None:
            # Far from zero, squares of what varies little would cancel.
            self._shift = values.mean(0)
            self._sum = torch.zeros_like(self._shift)
            self._products = self._shift.new_zeros(values.shape[1], values.shape[1])
        assert self._sum is not None
        assert self._products is not None
        moved = values - self._shift
        self.count += len(values)
        self.error += float(errors.double().square().sum())
        self._sum += moved.sum(0)
        self._products += moved.T @ moved

    @property
    def mean(self) -> Float[Tensor, " width"]:
        assert self._shift is not None
        assert self._sum is not None
        return self._shift + self._sum / self.count

    @property
    def covariance(self) -> Float[Tensor, "width width"]:
        """The covariance times the number of positions."""
        assert self._sum is not None
        assert self._products is not None
        return self._products - torch.outer(self._sum, self._sum) / self.count

    @property
    def variation(self) -> float:
        """The sum of squared distances from the mean."""
        return float(self.covariance.trace())

    def spectrum(self) -> Float[Tensor, " width"]:
        """Return the variation along each principal component, largest first."""
        return torch.linalg.eigvalsh(self.covariance).flip(0).clamp(min=0)

    def principal(
        self, rank: int
    ) -> tuple[Float[Tensor, " width"], Float[Tensor, "width components"]]:
        """Return the mean and the first `rank` principal components, in float32."""
        vectors = torch.linalg.eigh(self.covariance).eigenvectors.flip(1)
        return self.mean.float(), vectors[:, :rank].float()
