"""Coefficients of a large dictionary as parts: the few that are not zero, found some examples at a
time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.core.parts import Parts
from assay.core.values import at

_ENTRIES = 1 << 19  # coefficients that are computed at once, and half the numbers gathered at once


@dataclass(frozen=True)
class SparseAtoms(Parts):
    """Coefficients times atoms, part_k = c_k a_k, with the entries of c that are not zero.

    `index` (axes + 1, entries) says which example, position and feature each of the `values` is of;
    `shape` is that of the gates, (examples, *positions, features). The same parts as
    `assay.core.parts.Atoms` for coefficients that are not zero almost everywhere."""

    index: Int[Tensor, "axes entries"]
    values: Float[Tensor, " entries"]
    atoms: Float[Tensor, "features width"]
    shape: tuple[int, ...]

    def add(self, weights: Tensor) -> Tensor:
        chosen = weights.expand(self.shape)[tuple(self.index)]
        scaled = chosen * self.values.to(chosen.dtype)
        table = torch.sparse_coo_tensor(
            torch.stack([self._rows, self.index[-1]]),
            scaled,
            (self._places, self.shape[-1]),
            check_invariants=False,
        )
        return (table @ self.atoms.to(scaled.dtype)).reshape(*self.shape[:-1], -1)

    def dot(self, cotangent: Tensor) -> Tensor:
        flat = cotangent.reshape(self._places, -1)
        found = torch.empty(len(self.values), dtype=torch.float64, device=flat.device)
        step = max(1, _ENTRIES // flat.shape[1])
        for begin in range(0, len(found), step):
            some = slice(begin, begin + step)
            atoms = self.atoms[self.index[-1, some]].to(flat.dtype)
            found[some] = (flat[self._rows[some]] * atoms).sum(-1).double()
        return self._table(found * self.values.double())

    def one(self, index: Tensor) -> Tensor:
        chosen = at(self._table(self.values), index[None])[0]
        vector = chosen[:, None] * self.atoms[index[:, -1]]
        here = torch.ones_like(chosen, dtype=torch.bool).reshape(-1, *[1] * (len(self.shape) - 2))
        for axis, size in enumerate(self.shape[1:-1]):
            places = torch.arange(size, device=index.device)
            lead = [size if other == axis else 1 for other in range(len(self.shape) - 2)]
            here = here & (places == index[:, axis : axis + 1]).reshape(-1, *lead)
        return here.unsqueeze(-1) * vector.reshape(len(index), *[1] * (here.ndim - 1), -1)

    def norm(self) -> Tensor:
        lengths = self.atoms.double().square().sum(1).sqrt()
        return self._table(self.values.double().abs() * lengths[self.index[-1]])

    def coefficients(self, index: Int[Tensor, "rows examples axes"]) -> Tensor:
        """Return the coefficients at rows of part indices, (rows, examples)."""
        return at(self._table(self.values), index)

    @cached_property
    def _rows(self) -> Tensor:
        rows = self.index[0]
        for axis, size in enumerate(self.shape[1:-1], start=1):
            rows = rows * size + self.index[axis]
        return rows

    @property
    def _places(self) -> int:
        return torch.Size(self.shape[:-1]).numel()

    def _table(self, values: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(
            self.index, values, self.shape, check_invariants=False, is_coalesced=True
        )


def sparse_codes(
    codes: Callable[[slice], Float[Tensor, "some *positions features"]],
    atoms: Float[Tensor, "features width"],
    shape: tuple[int, ...],
) -> SparseAtoms:
    """Return parts whose coefficients `codes` computes for some of the examples at a time."""
    step = max(1, _ENTRIES // torch.Size(shape[1:]).numel())
    places, values = [], []
    for begin in range(0, shape[0], step):
        found = codes(slice(begin, begin + step))
        index = found.nonzero().T
        values.append(found[tuple(index)])
        index[0] += begin
        places.append(index)
    return SparseAtoms(torch.cat(places, dim=1), torch.cat(values), atoms, shape)
