"""A network as a small explicit graph: each node is an operation on earlier nodes, batch axis
apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np

from assay.bounds import nonlinear
from assay.bounds import operations as ops
from assay.bounds.levels import ULPS
from assay.bounds.numbers import as_array
from assay.bounds.operations import Operation, Shape
from assay.bounds.rounding import Interval
from assay.errors import InputError

Ref = int


@dataclass(frozen=True)
class Node:
    """An operation (none for an input), the nodes it reads, and the shape of one sample.

    virtual: it exists for the bound alone (a part of a norm, a sum that tightens a product), so
    that float32 never executes it. limited: a virtual node that float32 does form inside a later
    operation, such as the sum of squares of a norm, so that it must not overflow."""

    operation: Operation | None
    parents: tuple[Ref, ...]
    shape: Shape
    virtual: bool = False
    limited: bool = False


class Graph:
    """A network under construction: every method adds a node and returns its number; the last node
    is the output.

    Shapes are those of one sample. Constants may be arrays or tensors of any precision; they are
    taken exactly, and copied, so that training the network later changes no bound."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    @property
    def inputs(self) -> list[Ref]:
        """The input nodes, in order."""
        return [i for i, node in enumerate(self.nodes) if node.operation is None]

    def input(self, *shape: int) -> Ref:
        """Add an input of the given shape; raises `InputError` for sizes that are not positive."""
        if not all(hasattr(size, "__index__") and size > 0 for size in shape):
            raise InputError(f"input: positive sizes are needed, got shape {shape}")
        self.nodes.append(Node(None, (), tuple(map(index, shape))))
        return len(self.nodes) - 1

    def add_node(
        self, operation: Operation, *parents: Ref, virtual: bool = False, limited: bool = False
    ) -> Ref:
        """Add any operation; raises `InputError` when shapes do not fit."""
        shape = operation.shape(*(self.nodes[p].shape for p in parents))
        self.nodes.append(Node(operation, parents, shape, virtual, limited))
        return len(self.nodes) - 1

    def linear(self, x: Ref, weight: Any, bias: Any = None, *, virtual: bool = False) -> Ref:
        """Add `x W^T + b` along the last axis; weight (out, in), bias (out,)."""
        W = as_array("linear weight", weight)
        if W.ndim != 2:
            raise InputError(f"linear: a weight of two axes is needed, got shape {W.shape}")
        b = np.zeros(len(W)) if bias is None else as_array("linear bias", bias)
        if b.shape != (len(W),):
            raise InputError(f"linear: bias {b.shape} does not fit weight {W.shape}")
        return self.add_node(ops.Affine(W, b), x, virtual=virtual)

    def scale(self, x: Ref, weight: Any = 1.0, bias: Any = 0.0) -> Ref:
        """Add `w x + b`, elementwise, w and b broadcast to the shape of x."""
        return self.add_node(ops.Scale(weight, bias), x)

    def add(self, x: Ref, y: Ref) -> Ref:
        """Add `x + y`."""
        return self.add_node(ops.Add(), x, y)

    def subtract(self, x: Ref, y: Ref) -> Ref:
        """Add `x - y`."""
        return self.add_node(ops.Add(-1.0), x, y)

    def multiply(self, x: Ref, y: Ref) -> Ref:
        """Add `x y`, elementwise, with the virtual sum and difference that halve its relaxation."""
        plus = self.add_node(ops.Add(), x, y, virtual=True)
        minus = self.add_node(ops.Add(-1.0), x, y, virtual=True)
        return self.add_node(nonlinear.Multiply(), x, y, plus, minus)

    def matmul(self, x: Ref, y: Ref) -> Ref:
        """Add `X Y` over the last two axes."""
        return self.add_node(nonlinear.MatMul(), x, y)

    def relu(self, x: Ref) -> Ref:
        """Add ReLU."""
        return self.add_node(nonlinear.Relu(), x)

    def gelu(self, x: Ref) -> Ref:
        """Add GELU, `x Phi(x)`."""
        return self.add_node(nonlinear.Gelu(), x)

    def softmax(self, x: Ref, mask: Any = None) -> Ref:
        """Add softmax along the last axis; mask (broadcast to the shape of x) is 1 where weight
        may fall, such as a causal mask.
        """
        allowed = (
            np.ones(self.nodes[x].shape[-1])
            if mask is None
            else (as_array("softmax mask", mask) != 0).astype(np.float64)
        )
        if not np.all(allowed.max(-1) > 0):
            raise InputError("softmax: a row of the mask allows no entry")
        return self.add_node(nonlinear.Softmax(allowed), x)

    def rms_norm(self, x: Ref, gain: Any = None, eps: float = 0.0, *, unexecuted: str = "") -> Ref:
        """Add `gain x / sqrt(mean x^2 + eps)` along the last axis; `unexecuted`: why level float32
        does not cover it, if it does not.
        """
        width, shift = self.nodes[x].shape[-1], _checked_eps(eps)
        root = self._root(x, Interval.exactly(1.0) / float(width), Interval.exactly(shift))
        weight = np.ones(width) if gain is None else gain
        scaled = self.add_node(nonlinear.Multiply(), x, root, virtual=True)
        reason = unexecuted or (
            ""
            if shift >= 2.0**-60
            else f"level float32: rms_norm needs eps >= 2^-60 against underflow, got {eps}"
        )
        # width + 4 roundings for the mean and eps, 4 for the root and the two products, and the
        # accuracy of the root.
        last = ops.Scale(weight, np.zeros(()), width + 8 + 2 * ULPS, reason)
        return self.add_node(last, scaled)

    def layer_norm(self, x: Ref, gain: Any = None, bias: Any = None, eps: float = 1e-5) -> Ref:
        """Add `gain (x - mean) / sqrt(var + eps) + bias` along the last axis."""
        width = self.nodes[x].shape[-1]
        # c = width (x - mean) has integer weights; norm = c / sqrt(sum c^2 / width + width^2 eps).
        centred = self.linear(x, width * np.eye(width) - 1.0, virtual=True)
        shift = Interval.exactly(float(width**2)) * _checked_eps(eps)
        root = self._root(
            centred,
            Interval.exactly(1.0) / float(width),
            Interval(np.maximum(shift.lo, 0.0), shift.hi),
        )
        scaled = self.add_node(nonlinear.Multiply(), centred, root, virtual=True)
        weight = np.ones(width) if gain is None else gain
        offset = np.zeros(width) if bias is None else bias
        reason = (
            "level float32: LayerNorm is not covered, because how its variance is summed is not"
            " fixed; use level real"
        )
        return self.add_node(ops.Scale(weight, offset, unbounded=reason), scaled)

    def _root(self, x: Ref, scale: Interval, shift: Interval) -> Ref:
        width = self.nodes[x].shape[-1]
        squares = self.add_node(nonlinear.Square(), x, virtual=True)
        ones = ops.Affine(np.ones((1, width)), np.zeros(1))
        total = self.add_node(ones, squares, virtual=True, limited=True)
        return self.add_node(nonlinear.InverseRoot(scale, shift), total, virtual=True)

    def rearrange(self, x: Ref, shape: Shape, axes: tuple[int, ...] | None = None) -> Ref:
        """Add a permutation of the axes of one sample, then a reshape."""
        kept = tuple(range(len(self.nodes[x].shape))) if axes is None else axes
        return self.add_node(ops.Rearrange(kept, shape), x)


def _checked_eps(eps: Any) -> float:
    value = as_array("norm eps", eps)
    if value.shape or value < 0:
        raise InputError(f"norm eps: one number >= 0 is needed, got {eps}")
    return float(value)
