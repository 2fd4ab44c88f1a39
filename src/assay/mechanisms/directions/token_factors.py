"""Gradients of linear layers kept as sums over tokens of outer products, never formed whole."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.directions.space import Space


@dataclass(frozen=True)
class WeightGradients:
    """Gradients in one weight, `sum_t delta_t a_t^T` (its transpose where the weight is stored as
    (in, out)): inputs `a (samples, tokens, in)`, output gradients `delta (samples, draws, tokens,
    out)`.

    Where several layers, or several calls of one layer, use the weight, their tokens stand one
    after the other."""

    name: str
    inputs: Tensor
    deltas: Tensor
    transposed: bool

    def dot(self, directions: Tensor) -> Tensor:
        matrices = directions.mT if self.transposed else directions
        # One direction at a time: `U a` for all of them together would be k times the activations.
        rows = [torch.einsum("srto,sto->sr", self.deltas, self.inputs @ one.mT) for one in matrices]
        return torch.stack(rows, dim=2)

    def add(self, weights: Tensor) -> Tensor:
        tokens = self.inputs.flatten(0, 1)
        rows = []
        for one in weights.unbind(2):
            mixed = torch.einsum("srto,sr->sto", self.deltas, one).flatten(0, 1)
            gradient = mixed.mT @ tokens
            rows.append(gradient.mT if self.transposed else gradient)
        return torch.stack(rows)

    def traces(self) -> Tensor:
        inner = self.inputs @ self.inputs.mT
        return torch.einsum("srto,sruo,stu->s", self.deltas, self.deltas, inner)

    def dense(self) -> Tensor:
        gradient = torch.einsum("srto,sti->sroi", self.deltas, self.inputs)
        return gradient.mT if self.transposed else gradient


@dataclass(frozen=True)
class BiasGradients:
    """Gradients in one bias: output gradients summed over tokens, `sums (samples, draws, out)`."""

    name: str
    sums: Tensor

    def dot(self, directions: Tensor) -> Tensor:
        return self.sums @ directions.mT

    def add(self, weights: Tensor) -> Tensor:
        return torch.einsum("sro,srk->ko", self.sums, weights)

    def traces(self) -> Tensor:
        return self.sums.square().sum((1, 2))

    def dense(self) -> Tensor:
        return self.sums


@dataclass(frozen=True)
class TokenFactors:
    """Factors whose rows are sums over tokens of outer products `delta a^T`; see
    `token_gradients`.
    """

    space: Space
    weights: tuple[WeightGradients, ...]
    biases: tuple[BiasGradients, ...]

    @property
    def parts(self) -> tuple[WeightGradients | BiasGradients, ...]:
        return (*self.weights, *self.biases)

    @property
    def _first(self) -> Tensor:
        return self.weights[0].deltas if self.weights else self.biases[0].sums

    @property
    def samples(self) -> int:
        return self._first.shape[0]

    @property
    def draws(self) -> int:
        """The number of rows per sample."""
        return self._first.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def size(self) -> int:
        return self.space.size

    def dot(self, directions: Tensor) -> Tensor:
        split = self.space.split(directions)
        total = torch.zeros((), dtype=directions.dtype, device=directions.device)
        for part in self.parts:
            total = total + part.dot(split[part.name])
        return total

    def dot_low_rank(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Return `<delta a^T, sum_r left_r right_r^T>` for one weight, `(samples, draws, k)`, at
        O(rank (in + out)) a token.

        `left` is `(k, out, rank)`, `right` `(k, in, rank)`.
        """
        part = next(part for part in self.weights if part.name == name)
        read = torch.einsum("sti,kir->sktr", part.inputs, right)
        write = torch.einsum("sdto,kor->sdktr", part.deltas, left)
        return torch.einsum("sdktr,sktr->sdk", write, read)

    def add(self, weights: Tensor) -> Tensor:
        return self.space.join({part.name: part.add(weights) for part in self.parts})

    def traces(self) -> Tensor:
        return torch.stack([part.traces() for part in self.parts]).sum(0)

    def scaled(self, kept: Tensor, scales: Tensor) -> TokenFactors:
        weights = [
            replace(
                part,
                inputs=part.inputs[kept],
                deltas=part.deltas[kept] * scales[:, None, None, None],
            )
            for part in self.weights
        ]
        biases = [
            replace(part, sums=part.sums[kept] * scales[:, None, None]) for part in self.biases
        ]
        return replace(self, weights=tuple(weights), biases=tuple(biases))

    def joined(self, other: TokenFactors) -> TokenFactors:
        """Return the samples of both, these first. Raises InputError when parameters, tokens or
        rows per sample differ.
        """
        same = (
            self.space == other.space
            and self.draws == other.draws
            and all(
                one.inputs.shape[1:] == two.inputs.shape[1:]
                for one, two in zip(self.weights, other.weights, strict=True)
            )
        )
        if not same:
            raise InputError(
                "the two sets of factors must be over the same parameters, with as many tokens and"
                " rows per sample"
            )
        weights = [
            replace(
                one,
                inputs=torch.cat([one.inputs, two.inputs]),
                deltas=torch.cat([one.deltas, two.deltas]),
            )
            for one, two in zip(self.weights, other.weights, strict=True)
        ]
        biases = [
            replace(one, sums=torch.cat([one.sums, two.sums]))
            for one, two in zip(self.biases, other.biases, strict=True)
        ]
        return replace(self, weights=tuple(weights), biases=tuple(biases))

    def dense(self) -> Tensor:
        """Return the rows themselves, `(samples, draws, size)`: for small layers and for checks."""
        return self.space.join({part.name: part.dense() for part in self.parts})
