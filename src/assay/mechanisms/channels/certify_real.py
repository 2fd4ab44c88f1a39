"""Certificates of channels at level real: ball arithmetic for every number, Frobenius norms for
every matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from flint import arb, arb_mat, ctx
from torch import Tensor

from assay.bounds.exact import ball_interval
from assay.errors import InputError
from assay.mechanisms.channels.certify import Certificates
from assay.mechanisms.channels.weights import ChannelWeights


def certify_channels_real(
    weights: ChannelWeights, inputs: Tensor, labels: Tensor, *, bits: int = 128
) -> Certificates:
    """Return certificates that hold for the network over the real numbers, with the given float
    weights and inputs.

    The recursions are those of `certify_channels`; every quantity is a ball that contains its real
    value (python-flint), matrix norms are Frobenius norms, of a Jacobian `1 + ||J - I||_F`, and
    ends are rounded outward. The bounds refer to the rounded `attribution` and `curvature` in the
    result, whose own rounding they include: no channel's bound is zero. About 0.3 CPU seconds an
    example for four blocks of 64 channels.

    Raises InputError for what has no proof at this level: norms, patches and gate nonlinearities;
    the functional is the logit."""
    weights.require_polynomial("a certificate")
    if weights.normed or weights.positions > 1:
        raise InputError(
            "level real covers dense networks without norms and the logit; use level float64"
            " (certify_channels) for this network"
        )
    if bits < 64:
        raise InputError(f"bits must be at least 64, got {bits}")
    if labels.shape != (len(inputs),) or not len(inputs):
        raise InputError(
            f"labels must be one class per example, got {tuple(labels.shape)} for {len(inputs)}"
            " examples"
        )
    with ctx.workprec(bits):
        layers = [_Layer.read(layer.left, layer.right, layer.down) for layer in weights.layers]
        states = inputs.reshape(len(inputs), -1)
        embed, head = _matrix(weights.embed), _matrix(weights.head)
        rows = [
            _certify(layers, embed * _matrix(x[:, None]), head, int(y))
            for x, y in zip(states, labels, strict=True)
        ]
    attribution, first, curvature, second = (
        torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in range(4)
    )
    none = torch.zeros_like(first)
    return Certificates(attribution, first, curvature, second, none, "real", "plain")


@dataclass(frozen=True)
class _Layer:
    left: arb_mat
    right: arb_mat
    down: arb_mat
    product: arb

    @staticmethod
    def read(left: Tensor, right: Tensor, down: Tensor) -> _Layer:
        read = _Layer(_matrix(left), _matrix(right), _matrix(down), arb(0))
        left_row, right_row = (
            max((_length(row) for row in side.tolist()), key=_upper)
            for side in (read.left, read.right)
        )
        bound = min(
            left_row * _frobenius(read.right), right_row * _frobenius(read.left), key=_upper
        )
        return replace(read, product=_frobenius(read.down) * bound)


def _certify(
    layers: list[_Layer], state: arb_mat, head: arb_mat, label: int
) -> tuple[list[list[float]], ...]:
    """Return attribution, first, curvature and second, each (blocks, hidden), of one example."""
    lefts, rights = [], []
    for layer in layers:
        lefts.append(layer.left * state)
        rights.append(layer.right * state)
        state = state + layer.down * _times(lefts[-1], rights[-1])
    width, count = state.nrows(), len(layers)
    one = _identity(width)
    gradient = arb_mat(1, width, [head[label, j] for j in range(width)])
    jacobians, forms, gradients = {}, {}, {}
    for m in reversed(range(count)):
        layer, gradients[m] = layers[m], gradient
        back = (gradient * layer.down).transpose()
        change = layer.down * (_scale(lefts[m], layer.right) + _scale(rights[m], layer.left))
        half = layer.left.transpose() * _scale(back, layer.right)
        jacobians[m] = (one + change, 1 + _frobenius(change))
        form = (half + half.transpose()) * arb(0.5)
        forms[m] = (form, _frobenius(form))
        gradient = gradient + gradient * change
    found: tuple[list[list[float]], ...] = ([], [], [], [])
    for block, layer in enumerate(layers):
        hidden = _times(lefts[block], rights[block]).entries()
        attribution = [
            g * h for g, h in zip((gradients[block] * layer.down).entries(), hidden, strict=True)
        ]
        linear = -(layer.down * _diagonal(hidden))
        step = _column_lengths(linear)
        rest, scalar, tight, curvature = ([arb(0)] * len(hidden) for _ in range(4))
        for m in range(block + 1, count):
            (jacobian, alpha), (form, bend), beta = jacobians[m], forms[m], layers[m].product
            size, slopes = _column_lengths(linear), form * linear
            slope = _column_lengths(slopes)
            curvature = [q + _dot(linear, slopes, k) for k, q in enumerate(curvature)]
            scalar = [s + bend * e * e for s, e in zip(scalar, step, strict=True)]
            tight = [
                t + 2 * c * r + bend * r * r for t, c, r in zip(tight, slope, rest, strict=True)
            ]
            if m == count - 1:
                break
            bent = _column_lengths(
                layers[m].down * _times(layers[m].left * linear, layers[m].right * linear)
            )
            step = [alpha * e + beta * e * e for e in step]
            rest = [
                alpha * r + b + beta * (2 * s * r + r * r)
                for r, b, s in zip(rest, bent, size, strict=True)
            ]
            linear = jacobian * linear
        middle, middle_q = (
            [float(a.mid()) for a in attribution],
            [float(q.mid()) for q in curvature],
        )
        off = [abs(a - arb(m)) for a, m in zip(attribution, middle, strict=True)]
        off_q = [abs(q - arb(m)) for q, m in zip(curvature, middle_q, strict=True)]
        found[0].append(middle)
        found[1].append([_upper(s + o) for s, o in zip(scalar, off, strict=True)])
        found[2].append(middle_q)
        found[3].append([_upper(t + o + p) for t, o, p in zip(tight, off, off_q, strict=True)])
    return found


def _matrix(weight: Tensor) -> arb_mat:
    # Every float is an exact ball.
    return arb_mat(*weight.shape, weight.detach().double().flatten().tolist())


def _identity(size: int) -> arb_mat:
    return arb_mat(size, size, [int(i == j) for i in range(size) for j in range(size)])


def _diagonal(entries: list[arb]) -> arb_mat:
    size = len(entries)
    return arb_mat(
        size, size, [entries[i] if i == j else 0 for i in range(size) for j in range(size)]
    )


def _times(a: arb_mat, b: arb_mat) -> arb_mat:
    return arb_mat(
        a.nrows(), a.ncols(), [p * q for p, q in zip(a.entries(), b.entries(), strict=True)]
    )


def _scale(column: arb_mat, matrix: arb_mat) -> arb_mat:
    """Return `diag(column) matrix`."""
    rows = zip(column.entries(), matrix.tolist(), strict=True)
    return arb_mat(
        matrix.nrows(), matrix.ncols(), [factor * entry for factor, row in rows for entry in row]
    )


def _length(entries: list[arb]) -> arb:
    return sum((entry * entry for entry in entries), arb(0)).sqrt()


def _frobenius(matrix: arb_mat) -> arb:
    return _length(matrix.entries())


def _column_lengths(matrix: arb_mat) -> list[arb]:
    return [_length(column) for column in matrix.transpose().tolist()]


def _dot(a: arb_mat, b: arb_mat, column: int) -> arb:
    return sum((a[i, column] * b[i, column] for i in range(a.nrows())), arb(0))


def _upper(ball: arb) -> float:
    return ball_interval(ball)[1]
