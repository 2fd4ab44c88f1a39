"""Softmax, losses and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from assay.bounds import nonlinear
from assay.bounds import operations as ops
from assay.bounds.rounding import Interval, sqrt_up
from assay.bounds.rules import Divide, Product, Shift, Smooth, Total
from assay.bounds.trace.arithmetic import add_values, multiply, scaled, subtract, total_of
from assay.bounds.trace.lower import Constant, Lowering, Node, UnsupportedError, Value, real
from assay.bounds.trace.registry import plain, rule

PAIRS = 32
"""Entries up to which log softmax is bounded by differences of all pairs."""


def _last(low: Lowering, x: Node, dim: int) -> tuple[Node, Callable[[Node], Node]]:
    """Return x with an axis moved to the end, and how to move it back."""
    axis, axes = dim % len(low.shape(x)), len(low.shape(x))
    if axis == axes - 1:
        return x, lambda y: y
    moved = low.move(lambda y: y.movedim(axis, -1), x)
    return moved, lambda y: low.move(lambda z: z.movedim(-1, axis), y)


@rule("_softmax", "softmax", "_safe_softmax")
def _softmax(low: Lowering, op: Any, x: Value, dim: int, *args: Any) -> Node:
    scores, back = _last(low, low.node(x), dim)
    never = low.never.pop(scores.ref, None)
    mask = np.ones(low.shape(scores)) if never is None else 1.0 - never
    if not np.all(mask.max(-1) > 0):
        # A row without any allowed entry is that of padding; the executed row is uniform, and no
        # later value may depend on it. It is bounded as if it saw everything.
        mask = np.where(mask.max(-1, keepdims=True) > 0, mask, 1.0)
    found = low.add(nonlinear.Softmax(mask), scores)
    if never is not None:
        low.never[scores.ref] = never
    return back(found)


@rule("_log_softmax", "log_softmax")
def _log_softmax(low: Lowering, op: Any, x: Value, dim: int, *args: Any) -> Node:
    scores, back = _last(low, low.node(x), dim)
    shape = low.shape(scores)
    size = shape[-1]
    if size > PAIRS:
        wide = low.expand(_log_sum(low, scores), shape)
        return back(low.add(ops.Add(-1.0), scores, wide, virtual=True))
    # log p_i = -log sum_j exp(x_j - x_i), j = i included.
    eye = np.eye(size)
    differences = (eye[None, :, :] - eye[:, None, :]).reshape(size * size, size)
    gaps = low.add(ops.Affine(differences, np.zeros(size * size)), scores, virtual=True)
    gaps = low.move(lambda y: y.reshape(*shape[:-1], size, size), gaps)
    total = low.add(
        Total(size),
        low.add(Smooth("exp"), gaps, virtual=True),
        virtual=True,
    )
    logs = low.add(Smooth("log"), low.move(lambda y: y.squeeze(-1), total), virtual=True)
    found = low.add(ops.Scale(np.asarray(-1.0), np.zeros(())), logs, virtual=True)
    low.dtypes |= {torch.float64}  # float32 executes another formula
    return back(found)


def _log_sum(low: Lowering, x: Node) -> Node:
    """Add the logarithm of the sum of the exponentials along the last axis, which stays."""
    size = low.shape(x)[-1]
    exponentials = low.add(Smooth("exp"), x, virtual=True)
    total = low.add(Total(size), exponentials, virtual=True)
    low.dtypes |= {torch.float64}
    return low.add(Smooth("log"), total, virtual=True)


@rule("logsumexp")
def _logsumexp(low: Lowering, op: Any, x: Node, dim: list[int], keepdim: bool = False) -> Node:
    if len(dim) != 1:
        raise UnsupportedError("sums over several axes")
    scores, back = _last(low, x, dim[0])
    found = back(_log_sum(low, scores))
    return found if keepdim else low.move(lambda y: y.squeeze(dim[0]), found)


@rule("nll_loss_forward")
def _nll(
    low: Lowering, op: Any, x: Node, labels: Value, weight: Any, reduction: int, ignore: int
) -> Any:
    if weight is not None or reduction != 0:
        raise UnsupportedError("weighs or averages its losses; only reduction='none' has a rule")
    chosen = plain(labels)
    if bool((chosen == ignore).any()):
        raise UnsupportedError("ignores a label")
    found = low.move(lambda y: y.gather(1, chosen[:, None])[:, 0], x)
    return scaled(low, found, -1.0), None


@rule("native_layer_norm")
def _layer_norm(
    low: Lowering, op: Any, x: Value, shape: list[int], weight: Any, bias: Any, eps: float
) -> Any:
    node = low.node(x)
    size = low.shape(node)
    if tuple(shape) != size[-1:]:
        raise UnsupportedError(f"normalises over {tuple(shape)}; only the last axis has a rule")
    width = size[-1]
    centred = low.add(ops.Affine(width * np.eye(width) - 1.0, np.zeros(width)), node, virtual=True)
    # c = width (x - mean) has integer weights; norm = c / sqrt(sum c^2 / width + width^2 eps).
    scaled = _normed(low, centred, width, float(width), float(width**2) * eps, width - 1)
    gain = np.ones(width) if weight is None else real(weight)
    offset = np.zeros(width) if bias is None else real(bias)
    reason = (
        "level float32: LayerNorm is not covered, because how its variance is summed is not"
        " fixed; use level real"
    )
    return low.add(ops.Scale(gain, offset, unbounded=reason), scaled), None, None


@rule("_fused_rms_norm", "rms_norm")
def _rms_norm(
    low: Lowering, op: Any, x: Value, shape: list[int], weight: Any = None, eps: Any = None
) -> Any:
    node = low.node(x)
    size = low.shape(node)
    if tuple(shape) != size[-1:] or eps is None:
        raise UnsupportedError("normalises over other axes than the last, or without an eps")
    scaled = _normed(low, node, size[-1], float(size[-1]), eps, size[-1])
    gain = np.ones(size[-1]) if weight is None else real(weight)
    reason = "level float32: a fused RMSNorm is not covered; use level real"
    found = low.add(ops.Scale(gain, np.zeros(()), unbounded=reason), scaled)
    return (found, None) if op._schema.name.endswith("_fused_rms_norm") else found


def _normed(low: Lowering, x: Node, width: int, divisor: float, eps: float, radius: int) -> Node:
    """Add `x / sqrt(sum x^2 / divisor + eps)`, of which each entry is at most sqrt(radius)."""
    squares = low.add(nonlinear.Square(), x, virtual=True)
    total = low.add(Total(width), squares, virtual=True)
    root = low.add(
        nonlinear.InverseRoot(Interval.exactly(1.0) / divisor, Interval.exactly(eps)),
        total,
        virtual=True,
    )
    found = low.add(Product(), x, root, virtual=True)
    end = np.broadcast_to(sqrt_up(float(radius)), low.shape(found))
    low.limits[found.ref] = Interval(-end, end)
    return found


@rule("linalg_vector_norm")
def _length(
    low: Lowering, op: Any, x: Node, order: Any = 2, dim: Any = None, keep: bool = False, **_: Any
) -> Node:
    if order != 2:
        raise UnsupportedError(f"is the norm of order {order}; only 2 has a rule")
    low.dtypes |= {torch.float64}  # how float32 sums the squares is not fixed
    squares = low.add(nonlinear.Square(), x)
    return low.add(Smooth("sqrt"), total_of(low, op, squares, dim, keep))


@rule("std", "var")
def _spread(
    low: Lowering,
    op: Any,
    x: Node,
    dim: Any = None,
    correction: Any = None,
    keepdim: bool = False,
) -> Node:
    width = low.shape(x)[-1]
    if dim is None or [axis % len(low.shape(x)) for axis in dim] != [len(low.shape(x)) - 1]:
        raise UnsupportedError("spreads over other axes than the last")
    low.dtypes |= {torch.float64}
    # c = width (x - mean) has integer weights.
    centred = low.add(ops.Affine(width * np.eye(width) - 1.0, np.zeros(width)), x)
    squares = low.add(nonlinear.Square(), centred)
    count = width - (1 if correction is None else correction)
    found = low.add(
        Divide(np.asarray(float(width**2) * count)), total_of(low, op, squares, [-1], keepdim)
    )
    return low.add(Smooth("sqrt"), found) if op._schema.name == "aten::std" else found


@rule("native_batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(low: Lowering, op: Any, x: Node, weight: Any, bias: Any, *args: Any) -> Any:
    mean, variance, *rest = args
    legit = op._schema.name.endswith("no_training")
    if not legit and rest[0]:
        raise UnsupportedError("normalises by the batch; call eval() on the model")
    eps = rest[1] if legit else rest[2]
    shape = (-1, *[1] * (len(low.shape(x)) - 2))
    wide = {
        name: None if t is None else Constant(plain(t).double().reshape(shape))
        for name, t in (("w", weight), ("b", bias), ("m", mean), ("v", variance))
    }
    assert wide["m"] is not None
    assert wide["v"] is not None
    root = low.add(Smooth("rsqrt"), low.add(Shift(np.asarray(eps)), low.node(wide["v"])))
    found = multiply(low, subtract(low, op, x, wide["m"]), root)
    found = found if wide["w"] is None else multiply(low, found, wide["w"])
    found = found if wide["b"] is None else add_values(low, found, wide["b"])
    return found, None, None
