"""The max-of-K transformer in a file of weights, as exact rational numbers."""

import hashlib
from typing import Any

import numpy as np
from flint import fmpq, fmpq_mat

from assay_check.reading import InputError, need, tensors

HEAD = "blocks.0.attn."
NAMES = ["embed.W_E", "pos_embed.W_pos", *(HEAD + "W_" + n for n in "QKVO"), "unembed.W_U"]
NAMES += [*(HEAD + "b_" + n for n in "QKVO"), "unembed.b_U"]
UNUSED = {HEAD + "mask", HEAD + "IGNORE"}  # buffers: the last position attends to every position


class Model:
    """The weights in the order of NAMES, and with Eq = E + P[K-1] the tables `a = (Eq Q + b_Q) K^T
    E^T / sqrt h` and `b` with P for E (both without the division), `EV = E V O U`, `PV = P V O U`
    and `D = Eq U + (b_V O + b_O) U + b_U`."""

    def __init__(self, data: bytes):
        self.weights = _weights(tensors(data, "the weights file"))
        E, P, Q, K, V, O, U, b_Q, _, b_V, b_O, b_U = map(exact, self.weights)
        self.V, self.K, self.width, self.head = (
            len(self.weights[0]),
            len(self.weights[1]),
            *self.weights[2].shape,
        )
        rows, values = fmpq_mat(self.V, 1, [1] * self.V), V * O * U
        Eq = E + rows * exact(self.weights[1][-1])
        keys = (Eq * Q + rows * b_Q) * K.transpose()
        self.a, self.b, self.EV, self.PV = (
            keys * E.transpose(),
            keys * P.transpose(),
            E * values,
            P * values,
        )
        self.D = Eq * U + rows * ((b_V * O + b_O) * U + b_U)
        parts = [
            f"{name}\n{'x'.join(map(str, w.shape))}\n".encode() + w.tobytes()
            for name, w in zip(NAMES, self.weights, strict=True)
        ]
        self.entry: dict[str, Any] = {
            "vocabulary": self.V,
            "positions": self.K,
            "width": self.width,
            "head": self.head,
        }
        self.entry["sha256"] = hashlib.sha256(b"".join(parts)).hexdigest()


def exact(array: np.ndarray) -> fmpq_mat:
    """Return a float32 matrix exactly; a vector is one row."""
    return fmpq_mat(
        *np.atleast_2d(array).shape, [fmpq(*x.as_integer_ratio()) for x in array.ravel().tolist()]
    )


def floats(matrix: fmpq_mat) -> np.ndarray:
    """Return the nearest float64 of every entry (division of integers rounds correctly);
    InputError where that overflows.
    """
    try:
        return np.array([[int(x.p) / int(x.q) for x in row] for row in matrix.tolist()])
    except OverflowError as error:
        raise InputError("the products of the weights overflow float64") from error


def _weights(found: dict[str, np.ndarray]) -> list[np.ndarray]:
    unknown, missing = (
        sorted(found.keys() - {*NAMES, *UNUSED}),
        sorted(set(NAMES[:7]) - found.keys()),
    )
    need(
        not unknown and not missing,
        f"weights: unknown tensors {unknown} (a proof would not cover them), missing tensors"
        f" {missing}",
    )
    need(
        all(0 not in found[name].shape and found[name].ndim > 1 for name in NAMES[:7]),
        "weights: every W_ tensor must be a matrix",
    )
    (V, d), K, h, weights = (
        found[NAMES[0]].shape[-2:],
        len(found[NAMES[1]]),
        found[NAMES[2]].shape[-1],
        [],
    )
    need(
        V**3 * K <= 1 << 30, f"weights: {V} tokens and {K} positions are too many for this checker"
    )
    shapes = [(V, d), (K, d), (d, h), (d, h), (d, h), (h, d), (d, V), (h,), (h,), (h,), (d,), (V,)]
    for name, shape in zip(NAMES, shapes, strict=True):
        array = found.get(name, np.zeros(shape, np.float32))
        one_head = (1, *shape) if name.startswith(HEAD) and name != HEAD + "b_O" else shape
        need(
            array.shape in (shape, one_head),
            f"weights: {name} must have shape {shape}, got {array.shape}",
        )
        with np.errstate(over="ignore", under="ignore"):
            weights.append(array.reshape(shape).astype("<f4"))
        good = (
            array.dtype.kind == "f"
            and np.isfinite(array).all()
            and (weights[-1] == array.reshape(shape)).all()
        )
        need(good, f"weights: {name} must hold finite numbers that fit float32")
    return weights
