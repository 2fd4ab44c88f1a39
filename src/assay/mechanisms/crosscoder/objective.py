"""What a crosscoder is trained for: reconstruction, sparsity, and features that do not interact."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from assay.errors import InputError


@dataclass(frozen=True)
class Folded:
    """One training step in the units of the network: decoders W_dec (size, layers, width), biases
    b_dec (layers, width), codes (rows, size), and the states that were encoded, (rows, layers,
    width); `rows` are the indices of their points.
    """

    W_dec: Tensor
    b_dec: Tensor
    codes: Tensor
    states: Tensor
    rows: Int[Tensor, " rows"] | None = None


class Term(Protocol):
    """A term beside reconstruction and sparsity: a weight, a name, and a scalar of one step."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    def __call__(self, step: Folded) -> Tensor: ...


@dataclass(frozen=True)
class Block:
    """The ReLU block `r + W_out relu(W_in r + b_in) + b_out` between two layers of a crosscoder."""

    W_in: Float[Tensor, "hidden width"]
    b_in: Float[Tensor, " hidden"]
    W_out: Float[Tensor, "width hidden"]
    b_out: Float[Tensor, " width"]
    layer: int

    @staticmethod
    def of(module: nn.Module, layer: int, *, live: bool = False) -> Block:
        """Return the tensors of a block with the linear layers `mlp_in` and `mlp_out`; `live` ones
        pass gradients on to the network.
        """
        try:
            inner, outer = module.get_submodule("mlp_in"), module.get_submodule("mlp_out")
        except AttributeError as error:
            raise InputError(
                "the interaction of features needs blocks with linear layers mlp_in and mlp_out"
            ) from error
        tensors = [
            (entry if live else entry.detach()) if isinstance(entry, Tensor) else None
            for entry in (inner.weight, inner.bias, outer.weight, outer.bias)
        ]
        W_in, b_in, W_out, b_out = tensors
        assert W_in is not None
        assert W_out is not None
        return Block(
            W_in,
            torch.zeros(len(W_in)) if b_in is None else b_in,
            W_out,
            torch.zeros(len(W_out)) if b_out is None else b_out,
            layer,
        )

    def sides(self, step: Folded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return `pre` (size, hidden) and `pre_bias` (hidden,), what a feature and the biases add
        to a neuron's input, and P and N (rows, hidden), the sums over features of what is positive
        and of what is negative there.
        """
        pre = step.W_dec[:, self.layer] @ self.W_in.T
        bias = self.W_in @ step.b_dec[self.layer] + self.b_in
        positive = step.codes @ pre.relu() + bias.relu()
        negative = step.codes @ (-pre).relu() + (-bias).relu()
        return pre, bias, positive, negative


@dataclass(frozen=True)
class Interaction:
    """`sum_n min(P_n, N_n) ||W_out[:, n]||`, mean over rows: what the block does with features
    together beyond what it does with each of them (compare arXiv 2606.09940).
    """

    block: Block
    weight: float = 1.0

    name = "interaction"

    def __call__(self, step: Folded) -> Tensor:
        _, _, positive, negative = self.block.sides(step)
        shared = torch.minimum(positive, negative)
        return (shared @ self.block.W_out.norm(dim=0)).mean()


@dataclass(frozen=True)
class Hinge:
    """The hinge of the certificates of the last block: how far the proved margins lie below
    `margin`, mean over rows.

    `compact` is the share of the certificate that knows the norm of the error eps_0 alone; the rest
    knows eps_0. Rows are grouped by the strongest feature, the largest `z_f ||W_in d_f||`; the side
    of a neuron is the one that is smaller on average in its group. Sheet: crosscoder_and_guard."""

    block: Block
    unembed: Float[Tensor, "outputs width"]
    unembed_bias: Float[Tensor, " outputs"]
    labels: Int[Tensor, " points"]
    margin: float = 0.5
    compact: float = 0.5
    weight: float = 1.0

    name = "certificate"

    def __call__(self, step: Folded) -> Tensor:
        block, layer = self.block, self.block.layer
        assert step.rows is not None
        labels = self.labels[step.rows]
        pre, bias, positive, negative = block.sides(step)
        strongest = (step.codes * pre.norm(dim=1)).argmax(1)
        with torch.no_grad():
            lead_of_side = torch.zeros_like(pre).index_add(0, strongest, positive - negative)
        at_most = torch.where(lead_of_side[strongest] > 0, negative, positive)
        error = step.states[:, layer] - step.codes @ step.W_dec[:, layer] - step.b_dec[layer]
        alone = step.codes @ (step.W_dec[:, layer] + pre.relu() @ block.W_out.T)
        alone = alone + step.b_dec[layer] + bias.relu() @ block.W_out.T + block.b_out
        logits = alone @ self.unembed.T + self.unembed_bias
        lead = logits.gather(1, labels[:, None]) - logits
        away, costs, reach = (table[labels] for table in self._tables)
        norm = (error.square().sum(1, keepdim=True) + 1e-12).sqrt()
        reach = reach * norm
        shared = (costs @ at_most.unsqueeze(2)).squeeze(2)
        known = (away @ error.unsqueeze(2)).squeeze(2)
        least = -away.norm(dim=2) * norm
        direct = self.compact * least + (1 - self.compact) * known
        bound = lead + direct - reach - shared
        own = torch.zeros_like(bound).scatter(1, labels[:, None], 1.0).bool()
        return torch.relu(self.margin - bound).masked_fill(own, 0).amax(1).mean()

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per pair (y, k) of outputs: `(U_y - U_k) (1 + W_out W_in / 2)`, the positive part of what
        neurons write along `U_y - U_k`, and `kappa`, how far a unit of error moves the margin
        beyond the first; see `assay.proofs.crosscoder.certificates`.
        """
        away = self.unembed[:, None] - self.unembed
        inner = away @ self.block.W_out
        through = away + inner @ self.block.W_in / 2
        return through, inner.relu(), inner.abs() @ self.block.W_in.norm(dim=1) / 2
