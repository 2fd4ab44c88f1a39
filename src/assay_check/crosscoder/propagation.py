"""Lower bounds of a network's margins over a ball around rhat_0, point by point, in balls.

rhat_0 is what features write into r_0, and the ball has the norm of `e = r_0 - rhat_0`. The input
of neuron n moves by at most `||e|| ||W_in[n]||`, whatever the direction: so far go the ends of
`intervals`, and of the lines of `slopes`. The rule `balls` knows of the block its Lipschitz
constant alone, `1 + ||W_out|| ||W_in||` in Frobenius norms, and takes the margins at rhat_1, which
lies off the block's output at rhat_0 by a distance that is computed."""

from collections.abc import Sequence

import numpy as np
from flint import arb, arb_mat, ctx

from assay_check.crosscoder.groups import Row, line, slopes
from assay_check.crosscoder.margins import BITS, Advice, Rows, less, norm, positive, spread
from assay_check.crosscoder.model import Model, balls


def right_points_of_propagation(
    model: Model, rule: str, advice: Advice, inputs: np.ndarray, labels: Sequence[int]
) -> list[bool]:
    """Return which points provably have their right logit above every other one."""
    with ctx.workprec(BITS):
        count = len(inputs)
        state = balls(inputs) * model.E.transpose() + spread(model.b_E, count)
        rebuilt = advice.codes * advice.decoder + spread(advice.bias, count)
        sizes = [norm(row) for row in (state - rebuilt).tolist()]
        beside = rebuilt + spread(model.b_out, count)
        pre = rebuilt * model.W_in.transpose() + spread(model.b_in, count)
        if rule == "balls":
            active = arb_mat([[positive(x) for x in row] for row in pre.tolist()])
            return _balls(model, advice, beside + active * model.W_out.transpose(), sizes, labels)
        straight = (beside * model.U.transpose() + spread(model.b_U, count)).tolist()
        written = _written_by_intervals if rule == "intervals" else _written_by_slopes
        U, reaches = model.U.tolist(), [norm(row) for row in model.W_in.tolist()]
        inner = (model.U * model.W_out).tolist()
        right = []
        for y, direct, into, size in zip(labels, straight, pre.tolist(), sizes, strict=True):
            ends = [(x - size * r, x + size * r) for x, r in zip(into, reaches, strict=True)]
            aways = [less(U[y], row) for row in U]
            block = written(model, [less(inner[y], row) for row in inner], into, ends)
            right.append(
                all(
                    direct[y] - direct[k] + block[0][k] - size * norm(_plus(aways[k], block[1][k]))
                    > 0
                    for k in range(len(U))
                    if k != y
                )
            )
        return right


def _written_by_intervals(
    model: Model, pulls: Rows, into: Row, ends: list[tuple[arb, arb]]
) -> tuple[Row, Rows]:
    """Return the least that the neurons write along every direction."""
    least = []
    for row in pulls:
        kept = zip(row, ends, strict=True)
        terms = (positive(c) * positive(a) - positive(-c) * positive(b) for c, (a, b) in kept)
        least.append(sum(terms, arb(0)))
    return least, [[arb(0)] * model.W_in.ncols()] * len(pulls)


def _written_by_slopes(
    model: Model, pulls: Rows, into: Row, ends: list[tuple[arb, arb]]
) -> tuple[Row, Rows]:
    """Return what bounds by lines give at rhat_0, and how it moves with the error."""
    lines = [line(low.lower(), high.upper()) for low, high in ends]
    steep, offsets = slopes(pulls, lines)
    center = (arb_mat(steep) * arb_mat([into]).transpose()).tolist()
    found = [row[0] + offset for row, offset in zip(center, offsets, strict=True)]
    return found, (arb_mat(steep) * model.W_in).tolist()


def _balls(
    model: Model, advice: Advice, output: arb_mat, sizes: Row, labels: Sequence[int]
) -> list[bool]:
    assert advice.after is not None
    decoder, bias = advice.after
    claimed = advice.codes * decoder + spread(bias, len(sizes))
    logits = claimed * model.U.transpose() + spread(model.b_U, len(sizes))
    steep = norm(model.W_in.entries()) * norm(model.W_out.entries())
    rows, right = model.U.tolist(), []
    for i, (y, gap) in enumerate(zip(labels, (output - claimed).tolist(), strict=True)):
        size = sizes[i] * (1 + steep) + norm(gap)
        right.append(
            all(
                logits[i, y] - logits[i, k] - size * norm(less(rows[y], rows[k])) > 0
                for k in range(len(rows))
                if k != y
            )
        )
    return right


def _plus(a: Row, b: Row) -> Row:
    return [x + y for x, y in zip(a, b, strict=True)]
