"""Linear bounds of what ReLU neurons write along a direction."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from assay.proofs.crosscoder.arithmetic import Arithmetic, Array, Number


def relax(
    ar: Arithmetic,
    inner: Number,
    low: Float[Array, " hidden"],
    high: Float[Array, " hidden"],
) -> tuple[Number, Number]:
    """Return slopes (outputs, hidden) and offsets (outputs,) with `sum_n inner_n relu(x_n) >= sum_n
    slope_n x_n + offset` for all x in [low, high].

    Where inner_n is positive relu(x) >= s x holds for any s in [0, 1]; where it is negative relu(x)
    <= s x + t with `t = max(relu(low) - s low, relu(high) - s high)`, since relu is convex."""
    with np.errstate(divide="ignore", invalid="ignore"):
        chord = np.where(high > low, (np.maximum(high, 0) - np.maximum(low, 0)) / (high - low), 1.0)
    chord = np.clip(np.where(np.isfinite(chord), chord, 1.0), 0.0, 1.0)
    chord = np.where(low >= 0, 1.0, np.where(high <= 0, 0.0, chord))
    below = np.where(high + low > 0, 1.0, 0.0)
    over, under = ar.exact(chord), ar.exact(below)
    ends = [ar.high(ar.relu(ar.exact(x)) - over * ar.exact(x)) for x in (low, high)]
    lift = ar.exact(np.maximum(np.maximum(*ends), 0.0))
    positive, negative = ar.relu(inner), ar.relu(-inner)
    slope = positive * under[None] - negative * over[None]
    offset = -ar.matmul(negative, lift[:, None])
    return slope, ar.transpose(offset)[0]
