"""A circuit whose parts are exchanged for others as long as it comes nearer to the network."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from assay.attribution.gradient import gate_gradient
from assay.audit.circuits import node_masks
from assay.audit.faithfulness import kept_gates
from assay.core.mechanisms import Mechanisms
from assay.core.values import dense
from assay.edges.cut import Node
from assay.errors import InputError
from assay.progress import progress


@dataclass(frozen=True)
class Refined:
    """The nodes of a refined circuit; `before` and `after` are the mean squared differences between
    its metric and the network's, `bias_before` and `bias_after` the sizes of the mean difference,
    `exchanged` counts the exchanges that were made, and `evaluations` the forward passes that they
    took.
    """

    nodes: tuple[Node, ...]
    before: float
    after: float
    bias_before: float
    bias_after: float
    exchanged: int
    evaluations: int


@torch.no_grad()
def refine_circuit(
    mechanisms: Mechanisms,
    nodes: Sequence[Node],
    candidates: Sequence[Node],
    *,
    always: Collection[str] = (),
    rounds: int = 50,
    tried: int = 12,
) -> Refined:
    """Exchange nodes of a circuit for candidates while that lowers the mean over examples of
    d^2, d = m(circuit) - m(network), and does not raise |mean d|, on which faithfulness depends: a
    smaller spread could outweigh a larger bias.

    In every round derivatives in the gates predict what each exchange changes, to first order in
    every example; the `tried` best predictions are measured, and the best of them is made if it
    helps. Effects of single parts in the whole network choose too many parts that do the same and
    too few that only matter where others are gone; this sees the circuit as it is.

    Raises InputError for nodes whose gates are shared over the batch."""
    for name, _ in (*nodes, *candidates):
        if not mechanisms.group(name).per_example:
            raise InputError(f"the gates of {name!r} are shared over the batch: they are no nodes")
    inside = list(nodes)
    outside = [node for node in dict.fromkeys(candidates) if node not in set(inside)]
    full = mechanisms.values().double()
    search = _Search(mechanisms, always, full)
    before = now = search.misses(inside)
    exchanged = 0
    for _ in progress(range(rounds), "refining the circuit"):
        if not inside or not outside:
            break
        predicted = search.predict(inside, outside, now)
        best = predicted.flatten().topk(min(tried, predicted.numel()), largest=False).indices
        made = None
        for place in best.tolist():
            one, other = divmod(place, len(outside))
            trial = [*inside[:one], outside[other], *inside[one + 1 :]]
            found = search.misses(trial)
            if found.square < now.square and found.bias <= now.bias:
                now, made = found, (one, other)
        if made is None:
            break
        one, other = made
        inside[one], outside[other] = outside[other], inside[one]
        exchanged += 1
    return Refined(
        tuple(inside),
        before.square,
        now.square,
        before.bias,
        now.bias,
        exchanged,
        search.evaluations,
    )


class _Misses(NamedTuple):
    """How far a circuit is from the network: the mean of d^2 over examples, and |mean d|."""

    square: float
    bias: float


class _Search:
    def __init__(self, mechanisms: Mechanisms, always: Collection[str], full: Tensor):
        self.mechanisms, self.always, self.full = mechanisms, always, full
        self.evaluations = 0

    def gates(self, nodes: Sequence[Node]) -> dict[str, Tensor]:
        return kept_gates(self.mechanisms, node_masks(self.mechanisms, nodes, self.always))

    def misses(self, nodes: Sequence[Node]) -> _Misses:
        self.evaluations += 1
        rest = self.mechanisms.values(self.gates(nodes)).double() - self.full
        return _Misses(float(rest.square().mean()), abs(float(rest.mean())))

    def predict(
        self, inside: Sequence[Node], outside: Sequence[Node], now: _Misses
    ) -> Float[Tensor, "inside outside"]:
        """Return the predicted mean of d^2 after every exchange; those for which a larger |mean d|
        is predicted come last.
        """
        self.evaluations += 2
        values, slopes = gate_gradient(self.mechanisms, self.gates(inside))
        rest = values.double() - self.full
        loses, gains = (_columns(slopes, nodes) for nodes in (inside, outside))
        squares, worse = [], []
        for lost in loses.T:
            left = (rest - lost)[:, None] + gains
            squares.append(left.square().mean(0))
            worse.append(left.mean(0).abs() > now.bias)
        square = torch.stack(squares)
        return square + torch.stack(worse) * square.max()


def _columns(
    slopes: Mapping[str, Tensor], nodes: Sequence[Node]
) -> Float[Tensor, "examples nodes"]:
    """Return the derivatives in the gates of nodes."""
    known = {name: dense(slopes[name]) for name in {name for name, _ in nodes}}
    return torch.stack(
        [
            known[name].permute(*range(1, known[name].ndim), 0)[index].double()
            for name, index in nodes
        ],
        1,
    )
