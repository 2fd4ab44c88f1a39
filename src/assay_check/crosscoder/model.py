"""A residual ReLU network of one block in a file of weights, as exact numbers."""

import hashlib
from typing import Any

import numpy as np
from flint import arb, arb_mat

from assay_check.reading import need, tensors

NAMES = ["embed", "blocks.0.mlp_in", "blocks.0.mlp_out", "unembed"]
MOST = 1 << 22  # entries of one matrix: beyond, a check would take hours


class Model:
    """The weights as matrices of balls without radius: E and b_E, W_in and b_in, W_out and b_out, U
    and b_U; a bias is one row.
    """

    def __init__(self, data: bytes):
        found = tensors(data, "the weights file")
        expected = {f"{name}.{part}" for name in NAMES for part in ("weight", "bias")}
        need(
            found.keys() == expected,
            f"weights: the tensors must be {sorted(expected)}, got {sorted(found)}",
        )
        for name in NAMES:
            weight, bias = found[f"{name}.weight"], found[f"{name}.bias"]
            need(
                weight.ndim == 2 and 0 < weight.size <= MOST and bias.shape == weight.shape[:1],
                f"weights: {name} must be a matrix with a bias, got {weight.shape}, {bias.shape}",
            )
        shapes = [found[f"{name}.weight"].shape for name in NAMES]
        (width, inputs), (hidden, _), _, (outputs, _) = shapes
        wanted = [(width, inputs), (hidden, width), (width, hidden), (outputs, width)]
        need(shapes == wanted, f"weights: the shapes {shapes} do not fit one another")
        digest = hashlib.sha256()
        matrices = []
        for name in [f"{name}.{part}" for name in NAMES for part in ("weight", "bias")]:
            array = float32(found[name], f"weights: {name}")
            digest.update(f"{name}\n{'x'.join(map(str, array.shape))}\n".encode())
            digest.update(array.tobytes())
            matrices.append(balls(array))
        self.E, self.b_E, self.W_in, self.b_in, self.W_out, self.b_out, self.U, self.b_U = matrices
        self.entry: dict[str, Any] = {
            "sha256": digest.hexdigest(),
            "inputs": inputs,
            "width": width,
            "hidden": hidden,
            "outputs": outputs,
        }


def float32(array: np.ndarray, what: str) -> np.ndarray:
    """Return an array as little-endian float32; InputError unless its entries are such numbers."""
    need(array.dtype.kind == "f", f"{what} must hold floating-point numbers")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        narrow = array.astype("<f4")
    need(np.isfinite(array).all() and (narrow == array).all(), f"{what} must hold finite float32")
    return np.ascontiguousarray(narrow)


def balls(array: np.ndarray) -> arb_mat:
    """Return a matrix exactly; a vector is one row."""
    rows = np.atleast_2d(array)
    return arb_mat(*rows.shape, [arb(x) for x in rows.ravel().tolist()])
