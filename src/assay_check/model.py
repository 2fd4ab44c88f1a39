"""The max-of-K transformer that a certificate is about, as exact rational numbers.

With `Eq = E + P[K-1]`: scores `a = (Eq Q + b_Q) K^T E^T / sqrt h` and `b` with P for E, outputs `EV = E V O U`, `PV = P V O U`, and
`D = Eq U + (b_V O + b_O) U + b_U`. Every float32 is rational, so all of them are, up to the root of h.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from flint import fmpq, fmpq_mat

from assay_check.reader import InputError, need, tensors

HEAD = "blocks.0.attn."
NAMES = ["embed.W_E", "pos_embed.W_pos", *(HEAD + "W_" + n for n in "QKVO"), "unembed.W_U"]
BIASES = [*(HEAD + "b_" + n for n in "QKVO"), "unembed.b_U"]
UNUSED = {HEAD + "mask", HEAD + "IGNORE"}  # buffers: the last position attends to every position


@dataclass(frozen=True)
class Model:
    """The weights E, P, Q, K, V, O, U, b_Q, b_K, b_V, b_O, b_U and the tables; a and b lack the division by the root of h."""

    weights: list[np.ndarray]
    a: fmpq_mat
    b: fmpq_mat
    EV: fmpq_mat
    PV: fmpq_mat
    D: fmpq_mat

    @property
    def sizes(self) -> dict[str, int]:
        E, P, Q = self.weights[:3]
        return {"vocabulary": len(E), "positions": len(P), "width": Q.shape[0], "head": Q.shape[1]}

    @property
    def digest(self) -> str:
        entries = zip(NAMES + BIASES, self.weights, strict=True)
        parts = [f"{name}\n{'x'.join(map(str, w.shape))}\n".encode() + w.astype("<f4").tobytes() for name, w in entries]
        return hashlib.sha256(b"".join(parts)).hexdigest()


def exact(array: np.ndarray) -> fmpq_mat:
    """Return a float32 matrix exactly; a vector is one row."""
    rows = np.atleast_2d(array)
    return fmpq_mat(*rows.shape, [fmpq(*x.as_integer_ratio()) for x in rows.ravel().tolist()])


def floats(matrix: fmpq_mat) -> np.ndarray:
    """Return the nearest float64 of every entry (division of integers rounds correctly); InputError where that overflows."""
    try:
        return np.array([[int(x.p) / int(x.q) for x in row] for row in matrix.tolist()])
    except OverflowError as error:
        raise InputError("the products of the weights overflow float64") from error


def repeat(row: fmpq_mat, count: int) -> fmpq_mat:
    """Return a matrix of equal rows."""
    return fmpq_mat(count, 1, [1] * count) * row


def load(data: bytes) -> Model:
    """Read weights from the bytes of a safetensors file and form the tables; InputError for anything that a proof would not cover."""
    weights = _weights(tensors(data, "the weights file"))
    E, P, Q, K, V, O, U, b_Q, _, b_V, b_O, b_U = map(exact, weights)
    tokens, keys, values = len(weights[0]), K.transpose(), V * O * U
    Eq = E + repeat(exact(weights[1][-1]), tokens)
    query, bias = Eq * Q + repeat(b_Q, tokens), (b_V * O + b_O) * U + b_U
    return Model(weights, query * keys * E.transpose(), query * keys * P.transpose(), E * values, P * values, Eq * U + repeat(bias, tokens))


def _weights(found: dict[str, np.ndarray]) -> list[np.ndarray]:
    unknown, missing = sorted(found.keys() - {*NAMES, *BIASES, *UNUSED}), sorted(set(NAMES) - found.keys())
    need(not unknown and not missing, f"weights: unknown tensors {unknown} (a proof would not cover them), missing tensors {missing}")
    need(all(0 not in found[name].shape and found[name].ndim > 1 for name in NAMES), "weights: every W_ tensor must be a matrix")
    (V, d), K, h = found[NAMES[0]].shape[-2:], len(found[NAMES[1]]), found[NAMES[2]].shape[-1]
    shapes = [(V, d), (K, d), (d, h), (d, h), (d, h), (h, d), (d, V), (h,), (h,), (h,), (d,), (V,)]
    weights = []
    for name, shape in zip(NAMES + BIASES, shapes, strict=True):
        array = found.get(name, np.zeros(shape, np.float32))
        one_head = (1, *shape) if name.startswith(HEAD) and name != HEAD + "b_O" else shape
        need(array.shape in (shape, one_head), f"weights: {name} must have shape {shape}, got {array.shape}")
        need(array.dtype.kind == "f" and bool(np.isfinite(array).all()), f"weights: {name} must hold finite floating-point numbers")
        with np.errstate(over="ignore", under="ignore"):
            weights.append(array.astype(np.float32).reshape(shape))
        need(np.array_equal(weights[-1], array.reshape(shape)), f"weights: {name} does not fit float32")
    return weights
