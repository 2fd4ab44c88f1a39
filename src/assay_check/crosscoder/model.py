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
        found, digest = matrices(
            data, [f"{n}.{part}" for n in NAMES for part in ("weight", "bias")]
        )
        (width, inputs), (hidden, _), _, (outputs, _) = (array.shape for array in found[::2])
        across = [(width, inputs), (hidden, width), (width, hidden), (outputs, width)]
        need_shapes(found, [shape for full in across for shape in (full, full[:1])])
        self.E, self.b_E, self.W_in, self.b_in, self.W_out, self.b_out, self.U, self.b_U = (
            balls(array) for array in found
        )
        self.entry: dict[str, Any] = {
            "sha256": digest,
            "inputs": inputs,
            "width": width,
            "hidden": hidden,
            "outputs": outputs,
        }


def matrices(data: bytes, names: list[str]) -> tuple[list[np.ndarray], str]:
    """Return the float32 tensors of a file, which must hold exactly these, weights as matrices, and
    the digest of them all.
    """
    found = tensors(data, "the weights file")
    need(
        found.keys() == set(names),
        f"weights: the tensors must be {sorted(names)}, got {sorted(found)}",
    )
    digest, arrays = hashlib.sha256(), []
    for name in names:
        array = float32(found[name], f"weights: {name}")
        need(
            array.ndim == (2 if name.endswith("weight") else 1) and 0 < array.size <= MOST,
            f"weights: {name} has shape {array.shape}",
        )
        digest.update(f"{name}\n{'x'.join(map(str, array.shape))}\n".encode())
        digest.update(array.tobytes())
        arrays.append(array)
    return arrays, digest.hexdigest()


def need_shapes(arrays: list[np.ndarray], wanted: list[tuple[int, ...]]) -> None:
    """Raise InputError unless arrays have these shapes."""
    shapes = [array.shape for array in arrays]
    need(shapes == wanted, f"weights: the shapes {shapes} do not fit one another")


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
