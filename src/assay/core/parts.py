"""The gated sum: the value at a site is `now + sum_k (gate_k - 1) part_k`, the network itself when
every gate is one.

Written as a correction of the current value, and not as base plus parts, the sum is equal to the
original bit for bit at all ones. Gates are kept, and `gate - 1` formed, in float32 or wider; the
result is cast back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.core.sites import Seen

Gates = Mapping[str, Tensor]


@dataclass(frozen=True)
class Group:
    """A family of gates that acts at one or more sites.

    `shape` is the shape of the gates: (examples, *axes) when `per_example`, else (*axes), shared
    over the batch. An axis of length one broadcasts. The parts are computed from the current value
    at the sites where they act, unless the group `reads` earlier sites of the same forward pass
    (their values are in `Seen.earlier`), or its parts were `fixed` when the kind was bound."""

    name: str
    sites: tuple[str, ...]
    shape: tuple[int, ...]
    per_example: bool = True
    reads: tuple[str, ...] = ()
    fixed: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        return self.shape[1:] if self.per_example else self.shape

    @property
    def source(self) -> str:
        """Where the parts come from, in words: results say it of every group."""
        if self.fixed:
            return "fixed when bound"
        return f"read at {', '.join(self.reads)}" if self.reads else "read where they act"


class Parts(ABC):
    """The parts of one gate group at one site: linear in the gates and never materialised
    together.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def add(self, weights: Float[Tensor, "*gates"]) -> Float[Tensor, "*value"]:
        """Return `sum_k weights_k part_k`."""

    @abstractmethod
    def dot(self, cotangent: Float[Tensor, "*value"]) -> Float[Tensor, "*gates"]:
        """Return `<cotangent, part_k>` for every part, the adjoint of `add`, in float64."""

    @abstractmethod
    def one(self, index: Int[Tensor, "..."]) -> Float[Tensor, "*value"]:
        """Return single parts: `index` is (examples, axes), or (axes,) for gates shared over the
        batch.
        """

    @abstractmethod
    def norm(self) -> Float[Tensor, "*gates"]:
        """Return the Euclidean norm of every part, the step that ablating it takes."""


@dataclass(frozen=True)
class Atoms(Parts):
    """Coefficients times atoms: part_k = c_k a_k, with c (examples, *positions, k) and a (k, d).

    `shape` is the gates' shape (examples, *positions, k); a position axis of one gates all
    positions together."""

    coefficients: Tensor
    atoms: Tensor
    shape: tuple[int, ...]

    def add(self, weights: Tensor) -> Tensor:
        scaled = weights * self.coefficients
        return scaled @ self.atoms.to(scaled.dtype)

    def dot(self, cotangent: Tensor) -> Tensor:
        products = self.coefficients * (cotangent @ self.atoms.to(cotangent.dtype).T)
        return _sum_to(products.double(), self.shape)

    def one(self, index: Tensor) -> Tensor:
        last = index[:, -1]
        lead = [1] * (self.coefficients.ndim - 2)
        chosen = torch.take_along_dim(self.coefficients, last.reshape(-1, *lead, 1), dim=-1)
        atom = self.atoms[last].reshape(-1, *lead, self.atoms.shape[1])
        return chosen * _mask(index[:, :-1], self.shape[1:-1]).unsqueeze(-1) * atom

    def norm(self) -> Tensor:
        squares = self.coefficients.double().square() * self.atoms.double().square().sum(1)
        return _sum_to(squares, self.shape).sqrt()


@dataclass(frozen=True)
class Whole(Parts):
    """One vector a gate: an error, a delta or a head's output; `vectors` is (*gate axes, ...)
    and reshapes to the value's shape.
    """

    vectors: Tensor
    shape: tuple[int, ...]
    value_shape: tuple[int, ...]

    def add(self, weights: Tensor) -> Tensor:
        return (self._spread(weights) * self.vectors).reshape(self.value_shape)

    def dot(self, cotangent: Tensor) -> Tensor:
        products = cotangent.reshape(self.vectors.shape).double() * self.vectors.double()
        return _sum_to(
            products.flatten(len(self.shape)).sum(-1)
            if products.ndim > len(self.shape)
            else products,
            self.shape,
        )

    def one(self, index: Tensor) -> Tensor:
        return self.add(_mask(index, self.shape[1:]).to(self.vectors.dtype))

    def norm(self) -> Tensor:
        squares = self.vectors.double().square()
        return _sum_to(
            squares.flatten(len(self.shape)).sum(-1) if squares.ndim > len(self.shape) else squares,
            self.shape,
        ).sqrt()

    def _spread(self, weights: Tensor) -> Tensor:
        return weights.reshape(*weights.shape, *[1] * (self.vectors.ndim - weights.ndim))


@dataclass(frozen=True)
class Shifts(Parts):
    """Displacements of a parameter, shared over the batch: `vectors` is (k, *parameter)."""

    vectors: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.vectors.shape[0],)

    def add(self, weights: Tensor) -> Tensor:
        return torch.tensordot(weights, self.vectors.to(weights.dtype), dims=1)

    def dot(self, cotangent: Tensor) -> Tensor:
        return self.vectors.double().flatten(1) @ cotangent.double().flatten()

    def one(self, index: Tensor) -> Tensor:
        return self.vectors[index[..., 0]]

    def norm(self) -> Tensor:
        return self.vectors.double().flatten(1).norm(dim=1)


def mix(seen: Seen, parts: Mapping[str, Parts], gates: Gates) -> Tensor:
    """Return `now + sum_k (gate_k - 1) part_k` in the dtype of the value that is written."""
    wide = torch.promote_types(seen.written.dtype, torch.float32)
    total = seen.written.to(wide)
    for name, group in parts.items():
        if name in gates:
            total = total + group.add(
                gates[name].to(torch.promote_types(gates[name].dtype, wide)) - 1
            ).to(wide)
    return total.to(seen.written.dtype)


def _sum_to(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    axes = [
        axis
        for axis, (have, want) in enumerate(zip(values.shape, shape, strict=True))
        if want == 1 and have != 1
    ]
    return values.sum(axes, keepdim=True) if axes else values


def _mask(index: Tensor, sizes: tuple[int, ...]) -> Tensor:
    # A comparison per axis instead of a scatter: it batches under vmap, and an axis of length one
    # selects every position.
    mask = torch.ones((index.shape[0], *[1] * len(sizes)), dtype=torch.bool, device=index.device)
    for axis, size in enumerate(sizes):
        here = torch.arange(size, device=index.device) == index[:, axis : axis + 1]
        mask = mask & here.reshape(
            -1, *[size if other == axis else 1 for other in range(len(sizes))]
        )
    return mask
