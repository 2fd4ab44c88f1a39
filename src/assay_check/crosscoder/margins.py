"""Lower bounds of a network's margins from features that nobody has to trust, in balls.

With features z >= 0 that write d_f into r_0, `r_0 = sum_f z_f d_f + b + e`: the inputs of a neuron
are `x = P - N + W_in e`, where P and N are the sums of its positive and of its negative
contributions, so that `relu(P - N) = P - min(P, N)`, and min(P, N) is at most either. By the error
a relu moves by half of what its input does, and at most by as much again: `|relu(x + t) - relu(x) -
t / 2| <= |t| / 2`."""

from collections.abc import Sequence

import numpy as np
from flint import arb, arb_mat, ctx

from assay_check.crosscoder.model import Model, balls

BITS = 160
Rows = list[list[arb]]


class Advice:
    """decoder (size, width), bias (width,), codes (points, size); `group` (points,) and `negative`
    (groups, hidden) where the rule takes them, and what features write after the block.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.decoder, self.bias, self.codes = (
            balls(arrays[name]) for name in ("decoder", "bias", "codes")
        )
        self.plain_codes = arrays["codes"]
        self.group, self.negative = arrays.get("group"), arrays.get("negative")
        self.after = (
            (balls(arrays["decoder_after"]), balls(arrays["bias_after"]))
            if "decoder_after" in arrays
            else None
        )


def right_points(
    model: Model, rule: str, advice: Advice, inputs: np.ndarray, labels: Sequence[int]
) -> list[bool]:
    """Return which points provably have their right logit above every other one."""
    with ctx.workprec(BITS):
        P, N = _sides(model, advice)
        state = balls(inputs) * model.E.transpose() + spread(model.b_E, len(inputs))
        rebuilt = advice.codes * advice.decoder + spread(advice.bias, len(inputs))
        error = state - rebuilt
        sizes = [norm(row) for row in error.tolist()]
        written = rebuilt + spread(model.b_out, len(inputs))
        written = written + arb_mat(P) * model.W_out.transpose()
        half = model.W_out * model.W_in / 2
        if rule != "compact":
            written = written + error + error * half.transpose()
        logits = written * model.U.transpose() + spread(model.b_U, len(inputs))
        lost = _lost(rule, advice, P, N)
        inner, rows = (model.U * model.W_out).tolist(), (model.U + model.U * half).tolist()
        reaches = [norm(row) for row in model.W_in.tolist()]
        right = [False] * len(labels)
        for y in sorted(set(labels)):
            here = [i for i, label in enumerate(labels) if label == y]
            pulls = [less(inner[y], row) for row in inner]
            signed = pulls if rule == "exact" else [[positive(x) for x in row] for row in pulls]
            costs = arb_mat([lost[i] for i in here]) * arb_mat(signed).transpose()
            steps = [
                sum((abs(x) * r for x, r in zip(row, reaches, strict=True)), arb(0)) / 2
                for row in pulls
            ]
            if rule == "compact":
                ways = [less(rows[y], row) for row in rows]
                steps = [step + norm(way) for step, way in zip(steps, ways, strict=True)]
            for place, i in enumerate(here):
                right[i] = all(
                    logits[i, y] - logits[i, k] - costs[place, k] - steps[k] * sizes[i] > 0
                    for k in range(len(inner))
                    if k != y
                )
        return right


def _sides(model: Model, advice: Advice) -> tuple[Rows, Rows]:
    """Return P and N of every point and neuron."""
    single = (advice.decoder * model.W_in.transpose()).tolist()
    fixed = (advice.bias * model.W_in.transpose() + model.b_in).tolist()[0]
    found = []
    for sign in (1, -1):
        table = arb_mat([[positive(sign * x) for x in row] for row in single])
        base = [positive(sign * x) for x in fixed]
        sums = (advice.codes * table).tolist()
        found.append([[a + b for a, b in zip(row, base, strict=True)] for row in sums])
    return found[0], found[1]


def _lost(rule: str, advice: Advice, P: Rows, N: Rows) -> Rows:
    """Return what is taken off P for the interaction: min(P, N), or the side that was chosen."""
    if rule == "exact":
        return [
            [arb.min(p, n) for p, n in zip(above, below, strict=True)]
            for above, below in zip(P, N, strict=True)
        ]
    assert advice.group is not None
    assert advice.negative is not None
    chosen = advice.negative[advice.group].tolist()
    return [
        [n if side else p for p, n, side in zip(above, below, sides, strict=True)]
        for above, below, sides in zip(P, N, chosen, strict=True)
    ]


def positive(x: arb) -> arb:
    return arb.max(x, arb(0))


def norm(row: Sequence[arb]) -> arb:
    """Return the Euclidean norm: at least zero, whatever the rounding."""
    return arb.max(sum((x * x for x in row), arb(0)), arb(0)).sqrt()


def less(a: Sequence[arb], b: Sequence[arb]) -> list[arb]:
    return [x - y for x, y in zip(a, b, strict=True)]


def spread(row: arb_mat, count: int) -> arb_mat:
    return arb_mat(count, 1, [1] * count) * row
