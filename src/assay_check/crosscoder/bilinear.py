"""Lower bounds of the margins of a bilinear network of one block, in balls.

With rhat what the features write, `r_0 = rhat + e`, and logits `U (r_0 + D (L r_0 * R r_0))`, a
margin differs from that at rhat by `g . e + e^T M e`, `g = (U_y - U_k) + 2 M rhat`, where M is the
symmetric part of `L^T diag((U_y - U_k) D) R`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flint import arb, arb_mat, ctx

from assay_check.crosscoder.margins import BITS, Advice, norm, spread
from assay_check.crosscoder.model import balls, matrices, need_shapes

NAMES = ["embed", "blocks.0.left", "blocks.0.right", "blocks.0.down", "head"]


class Bilinear:
    """The weights as matrices of balls without radius: E, L, R, D, U."""

    def __init__(self, data: bytes):
        found, digest = matrices(data, [f"{name}.weight" for name in NAMES])
        (width, inputs), (hidden, _), _, _, (outputs, _) = (array.shape for array in found)
        across = (hidden, width)
        need_shapes(found, [(width, inputs), across, across, across[::-1], (outputs, width)])
        self.E, self.L, self.R, self.D, self.U = map(balls, found)
        self.entry: dict[str, Any] = {
            "sha256": digest,
            "inputs": inputs,
            "width": width,
            "hidden": hidden,
            "outputs": outputs,
        }


def right_points_of_bilinear(
    model: Bilinear, rule: str, advice: Advice, inputs: np.ndarray, labels: Sequence[int]
) -> list[bool]:
    """Return which points provably have their right logit above every other one."""
    with ctx.workprec(BITS):
        rebuilt = advice.codes * advice.decoder + spread(advice.bias, len(inputs))
        error = balls(inputs) * model.E.transpose() - rebuilt
        sizes = [norm(row) for row in error.tolist()]
        left, right = rebuilt * model.L.transpose(), rebuilt * model.R.transpose()
        inner = (model.U * model.D).tolist()
        logits = (rebuilt + _product(left, right) * model.D.transpose()) * model.U.transpose()
        if rule == "quadratic":
            moved = _product(error * model.L.transpose(), right)
            moved = moved + _product(left, error * model.R.transpose())
            logits = logits + (error + moved * model.D.transpose()) * model.U.transpose()
        found, ways = [True] * len(labels), model.U.tolist()
        for y in sorted(set(labels)):
            here = [i for i, label in enumerate(labels) if label == y]
            for k in range(len(inner)):
                if k == y:
                    continue
                weights = [a - b for a, b in zip(inner[y], inner[k], strict=True)]
                form = model.L.transpose() * _scaled(weights, model.R)
                bent = norm([x for row in (form + form.transpose()).tolist() for x in row]) / 2
                steep = [arb(0)] * len(here)
                if rule != "quadratic":
                    way = [a - b for a, b in zip(ways[y], ways[k], strict=True)]
                    slopes = _rows(left, here) * _scaled(weights, model.R)
                    slopes = slopes + _rows(right, here) * _scaled(weights, model.L)
                    slopes = slopes + spread(arb_mat([way]), len(here))
                    steep = [norm(row) for row in slopes.tolist()]
                for i, first in zip(here, steep, strict=True):
                    lost = first * sizes[i] + bent * sizes[i] * sizes[i]
                    found[i] = found[i] and bool(logits[i, y] - logits[i, k] - lost > 0)
        return found


def _product(a: arb_mat, b: arb_mat) -> arb_mat:
    """Return the product entry by entry."""
    both = zip(a.tolist(), b.tolist(), strict=True)
    return arb_mat([[x * y for x, y in zip(row, other, strict=True)] for row, other in both])


def _scaled(weights: Sequence[arb], matrix: arb_mat) -> arb_mat:
    """Return the matrix with its rows weighed."""
    kept = zip(weights, matrix.tolist(), strict=True)
    return arb_mat([[weight * x for x in row] for weight, row in kept])


def _rows(matrix: arb_mat, index: Sequence[int]) -> arb_mat:
    rows = matrix.tolist()
    return arb_mat([rows[i] for i in index])
