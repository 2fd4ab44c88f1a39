"""A dictionary of values that are normalised one by one, and restored afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from assay.dictionaries.base import Dictionary
from assay.errors import InputError, unknown

_LAYER_NORM_EPSILON = 1e-5


class Normalised(Dictionary):
    """`out = D((x - m) / s) * r + m`, with m, s and r of each value x, D an autoencoder.

    `layer_norm`: m the mean, r the standard deviation (n - 1 in its denominator), s = r + 1e-5;
    `constant_norm_rescale`: m = 0, s = r = ||x|| / sqrt(d). The features are those of D times r,
    so that they rebuild x by the same decoder: `f W_dec + b_dec r + m`. Raises InputError for
    another normalisation, and where D is no autoencoder."""

    architecture = "normalised"

    def __init__(self, norm: str, inner: str, config: Mapping[str, Any]):
        from assay.dictionaries import make

        super().__init__()
        if norm not in ("layer_norm", "constant_norm_rescale"):
            raise unknown("normalisation", norm, ("layer_norm", "constant_norm_rescale"))
        self.norm = norm
        self.inner = make(inner, config)
        if self.inner.d_in != self.inner.d_out:
            raise InputError("only an autoencoder can be normalised, as it writes where it reads")

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        return self.inner.W_dec

    @property
    def b_dec(self) -> Tensor:  # type: ignore[override]
        return self.inner.b_dec

    @property
    def d_in(self) -> int:
        return self.inner.d_in

    def config(self) -> dict[str, Any]:
        return {
            "norm": self.norm,
            "inner": self.inner.architecture,
            "config": self.inner.config(),
        }

    def encode(self, x: Tensor) -> Tensor:
        mean, divisor, size = self._moments(x)
        return self.inner.encode((x - mean) / divisor) * size

    def rest(self, x: Tensor) -> Tensor:
        mean, divisor, size = self._moments(x)
        return self.inner.rest((x - mean) / divisor) * size + mean

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return m, s and r of each value, (*positions, 1)."""
        if self.norm == "layer_norm":
            mean, size = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            return mean, size + _LAYER_NORM_EPSILON, size
        size = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
        return torch.zeros_like(size), size, size
