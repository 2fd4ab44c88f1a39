"""Lower bounds of a network's margins that hold for groups of points, in balls.

The inputs of the neurons over a group lie between ends that come from the box of the group's codes
z and errors e, `x = P - N + W_in e + b`. A neuron that helps, with c >= 0 along a direction, has `c
relu(x) >= c s x` for s in [0, 1]; one that harms has `relu(x) <= s x + t`, where t is the larger
value of the convex `relu(x) - s x` at the ends. All slopes are free choices."""

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
from flint import arb, arb_mat, ctx

from assay_check.crosscoder.margins import BITS, Advice, less, positive, spread
from assay_check.crosscoder.model import Model, balls

Row = list[arb]


def right_points_of_groups(
    model: Model, advice: Advice, inputs: np.ndarray, labels: Sequence[int]
) -> list[bool]:
    """Return which points provably have their right logit above every other one."""
    assert advice.group is not None
    with ctx.workprec(BITS):
        count = len(inputs)
        state = balls(inputs) * model.E.transpose() + spread(model.b_E, count)
        errors = (state - advice.codes * advice.decoder - spread(advice.bias, count)).tolist()
        read = (state * model.W_in.transpose() + spread(model.b_in, count)).tolist()
        beside = ((state + spread(model.b_out, count)) * model.U.transpose()).tolist()
        inner, bias = (model.U * model.W_out).tolist(), model.b_U.tolist()[0]
        box = _Box(model, advice)
        right = [False] * count
        for one in np.unique(advice.group).tolist():
            rows = np.flatnonzero(advice.group == one).tolist()
            y = labels[rows[0]]
            ends = box.ends(advice.plain_codes[rows], [errors[row] for row in rows])
            lines = [line(low, high) for low, high in ends]
            pulls = [less(inner[y], row) for row in inner]
            steep, offsets = slopes(pulls, lines)
            written = (arb_mat([read[row] for row in rows]) * arb_mat(steep).transpose()).tolist()
            for row, through in zip(rows, written, strict=True):
                right[row] = all(
                    beside[row][y] - beside[row][k] + bias[y] - bias[k] + through[k] + offsets[k]
                    > 0
                    for k in range(len(inner))
                    if k != y
                )
        return right


class _Box:
    """The ends of the neurons' inputs over boxes of codes and errors."""

    def __init__(self, model: Model, advice: Advice):
        single = (advice.decoder * model.W_in.transpose()).tolist()
        across = model.W_in.transpose().tolist()
        self.rising, self.falling = (_signed(single, sign) for sign in (1, -1))
        self.up, self.down = (_signed(across, sign) for sign in (1, -1))
        self.fixed = advice.bias * model.W_in.transpose() + model.b_in

    def ends(self, codes: np.ndarray, errors: list[Row]) -> list[tuple[arb, arb]]:
        """Return the lower and the upper end of every neuron's input."""
        least, most = balls(codes.min(0)), balls(codes.max(0))
        columns = list(zip(*errors, strict=True))
        low = arb_mat([[_extreme(column, arb.min, arb.lower) for column in columns]])
        high = arb_mat([[_extreme(column, arb.max, arb.upper) for column in columns]])
        below = least * self.rising - most * self.falling + low * self.up - high * self.down
        above = most * self.rising - least * self.falling + high * self.up - low * self.down
        lower, upper = ((side + self.fixed).tolist()[0] for side in (below, above))
        return [(a.lower(), b.upper()) for a, b in zip(lower, upper, strict=True)]


def line(low: arb, high: arb) -> tuple[int, arb, arb]:
    """Return a slope below relu on [low, high], and the slope and offset of a line above it."""
    below = 1 if float(low) + float(high) > 0 else 0
    if float(low) >= 0 or float(high) <= 0:
        slope = arb(1 if float(low) >= 0 else 0)
    else:
        slope = arb(float(high) / (float(high) - float(low)))
    lift = arb.max(positive(low) - slope * low, positive(high) - slope * high)
    return below, slope, positive(lift)


def slopes(pulls: list[Row], lines: list[tuple[int, arb, arb]]) -> tuple[list[Row], list[arb]]:
    """Return slopes and an offset for every direction: below what the neurons write along it."""
    found, offsets = [], []
    for row in pulls:
        kept = zip(row, lines, strict=True)
        found.append([positive(c) * below - positive(-c) * s for c, (below, s, _) in kept])
        lifts = (positive(-c) * lift for c, (_, _, lift) in zip(row, lines, strict=True))
        offsets.append(-sum(lifts, arb(0)))
    return found, offsets


def _signed(table: list[Row], sign: int) -> arb_mat:
    return arb_mat([[positive(sign * x) for x in row] for row in table])


def _extreme(
    column: Sequence[arb], pick: Callable[[arb, arb], arb], end: Callable[[arb], arb]
) -> arb:
    return reduce(pick, map(end, column))
