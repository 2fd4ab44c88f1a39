"""Parts that are some of a site's columns: one head of a fused projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.core.parts import Parts, Whole


@dataclass(frozen=True)
class Columns(Parts):
    """Parts that live in some columns of the site's value: `vectors` is (*gate axes, columns a
    part).

    `columns` (*last gate axis, columns a part) says which columns they are, of `width` in all; the
    others are untouched."""

    vectors: Tensor
    shape: tuple[int, ...]
    columns: Tensor
    width: int

    @property
    def _inner(self) -> Whole:
        return Whole(self.vectors, self.shape, (*self.shape[:-1], self.columns.numel()))

    def add(self, weights: Tensor) -> Tensor:
        return self._place(self._inner.add(weights))

    def dot(self, cotangent: Tensor) -> Tensor:
        return self._inner.dot(cotangent[..., self.columns.flatten()])

    def one(self, index: Tensor) -> Tensor:
        return self._place(self._inner.one(index))

    def norm(self) -> Tensor:
        return self._inner.norm()

    def _place(self, chosen: Tensor) -> Tensor:
        # A gather with one column of zeros for the rest: it batches under vmap, a scatter into
        # zeros does not.
        source = torch.full((self.width,), self.columns.numel(), device=chosen.device)
        source[self.columns.flatten()] = torch.arange(self.columns.numel(), device=chosen.device)
        return torch.cat([chosen, torch.zeros_like(chosen[..., :1])], dim=-1)[..., source]
