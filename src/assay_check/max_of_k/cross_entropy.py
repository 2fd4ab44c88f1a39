"""Claims about the mean cross-entropy: at most so many nats over all inputs.

A sequence t of the cell (q, m, c) loses log(1 + sum_x exp(logit_x - logit_m)). Its attention
weights are positive and sum to one, and what position p adds is at most B_x(t_p), where

    B_x(t) = EV[t,x] - EV[t,m] + max_p (PV[p,x] - PV[p,m]) + D[q,x] - D[q,m] (+ both errors),

so the difference is at most the mean of B_x(m), B_x(q) and the B_x of the c smaller tokens, under
the positional weights s of the copies of m and T - s of the smaller tokens. Let F_x(k; s) be that
mean with all smaller tokens equal to k. Numerator and denominator of the mean are linear in how the
weight T - s is divided among the smaller tokens, and then in s: so what a sequence has is a convex
combination of the vectors F(k; s) over its tokens k and both ends of s, the same for all x. The
loss is convex in them and rises with each, hence at most the largest of these losses. With the
tokens below m in the order of their losses, r^c - (r - 1)^c choices of c of them have number r as
their worst. A mean never exceeds the largest of its values, whatever the weights are.

In float64, u = 2**-53, with weights within (K + 6) u of themselves, values within 8 u R and sizes
up to R, a mean errs by less than (2 K + 25) u R; `room` is more than that. Exponentials and
logarithms are looked up between numbers where balls enclose them."""

import re
from collections.abc import Callable
from fractions import Fraction
from math import ceil, comb, ldexp
from typing import Any

import numpy as np
from flint import arb, ctx

from assay_check.envelope import Envelope
from assay_check.max_of_k.accuracy import Found
from assay_check.max_of_k.margins import Margins
from assay_check.max_of_k.measure import Measure
from assay_check.reading import need

RULE = "cross-entropy"
ROUND = 1 + 2.0**-48  # over a few dozen roundings of positive numbers
SMALL = 2.0**-1000  # sums of weights below are lost to underflow, and the largest value stands
REACH = 700
UNITS = 60  # losses are summed as integers in units of 2^-60 nats
CHUNK = 1 << 22  # numbers in an array of (queries, tokens, competitors)


def read(envelope: Envelope, measure: Measure) -> None:
    """Raise InputError unless the claim is one of the mean cross-entropy over all inputs."""
    claim = envelope.claim
    text = claim.get("cross_entropy")
    good = claim.keys() == {"cross_entropy"} and isinstance(text, str)
    need(
        good and re.fullmatch("[0-9]{1,4000}(/[1-9][0-9]{0,3999})?", str(text)),
        'the claim must be {"cross_entropy": "p/q"}',
    )
    need(measure.uniform, "a claim of the mean cross-entropy is about all inputs alike")
    envelope.without_advice()


def describe(measure: Measure) -> str:
    """Return in words what the mean is taken over."""
    return f"the mean cross-entropy, all {measure.inputs()} alike"


def recompute(envelope: Envelope, measure: Measure, margins: Callable[[], Margins]) -> Found:
    """Return whether the recomputed bound supports the claim, why, and the recomputed bound."""
    text = envelope.claim["cross_entropy"]
    claimed = Fraction(text)
    if str(claimed) != text:
        return False, f"the claim must be a reduced fraction, got {text[:80]}", None, None
    found = mean_loss(margins())
    if found is None:
        return False, "the mean cross-entropy has no finite bound", None, None
    reason = (
        f"the mean cross-entropy is proved to be at most {_up(found)} nats, {_up(claimed)} are"
        " claimed"
    )
    return found <= claimed, reason, found, None


def _up(value: Fraction) -> str:
    """Return a few digits of a number, rounded up."""
    return f"{ceil(value * 10**9) / 10**9:.9f}"


@np.errstate(all="ignore")
def mean_loss(margins: Margins) -> Fraction | None:
    """Return an upper bound of the mean cross-entropy over all V^K inputs, or none."""
    V, K = margins.EV.shape[0], len(margins.PV)
    units = 0
    for m in range(V):
        for c in range(K if m else 1):
            queries = np.arange(m + 1) if c < K - 1 else np.array([m])
            ways = [1] if c == 0 else [r**c - (r - 1) ** c for r in range(1, m + 1)]
            for some in np.array_split(queries, -(-len(queries) * len(ways) * V // CHUNK)):
                losses = np.sort(np.maximum(*map(_loss, _means(margins, m, c, some))), axis=1)
                totals = (losses.sum(0) * (1 + 2.0**-52 * len(losses))).tolist()
                if not np.isfinite(totals).all():
                    return None
                units += comb(K - 1, c) * sum(
                    ceil(ldexp(total, UNITS)) * count
                    for total, count in zip(totals, ways, strict=True)
                )
    return Fraction(units, V**K << UNITS)


def _loss(means: np.ndarray) -> np.ndarray:
    """Return upper bounds of log(1 + sum_x exp(mean_x)), (queries, tokens)."""
    others = _exp_up(means).sum(-1) * (1 + 2.0**-52 * (means.shape[-1] + 1))
    return _log_up(np.nextafter(1 + others, np.inf))


def _means(margins: Margins, m: int, c: int, queries: np.ndarray) -> list[np.ndarray]:
    """Return upper bounds of F_x(k; s) at both ends of s, each (queries, k < m, x != m); with c = 0
    the one token k = m has no weight.
    """
    K, keys = len(margins.PV), np.arange(m) if c else np.array([m])
    size = float(np.abs(margins.EV).max() + np.abs(margins.PV).max() + np.abs(margins.D).max())
    room = (4 * K + 32) * 2.0**-53 * 2 * (size + float(margins.error.max()))
    token = margins.EV - margins.EV[:, m : m + 1] + (margins.PV - margins.PV[:, m : m + 1]).max(0)
    path = margins.D - margins.D[:, m : m + 1] + margins.error + margins.error[:, m : m + 1]
    token, path = np.delete(token, m, 1), np.delete(path, m, 1)[queries]
    at_max, at_own = (token[m] + path)[:, None], (token[queries] + path)[:, None]
    at_key = token[keys] + path[:, None]
    largest = np.maximum(np.maximum(at_max, at_own), at_key)
    places = np.sort(margins.eb[queries, :-1], axis=1)
    n, own = K - 1 - c, margins.ea[queries, queries] * margins.eb[queries, -1]
    ends = [
        (places[:, :n].sum(1), places[:, n:].sum(1)),
        (places[:, c:].sum(1), places[:, :c].sum(1)),
    ]
    means = []
    for copies, rest in ends:
        weights = [
            (copies * margins.ea[queries, m])[:, None, None],
            own[:, None, None],
            (rest[:, None] * margins.ea[queries][:, keys])[:, :, None],
        ]
        total = weights[0] + weights[1] + weights[2]
        mean = (weights[0] * at_max + weights[1] * at_own + weights[2] * at_key) / total
        means.append(np.where((total > SMALL) & (mean < largest), mean, largest) + room)
    return means


def _exp_up(x: np.ndarray) -> np.ndarray:
    """Return upper bounds of exp(x): balls at an integer and at a 256th below x, and for the rest r
    that e^r <= 1 + r + r^2 / 2 + r^3 / 4 up to r = 1 / 256.
    """
    near = np.clip(x, -float(REACH), float(REACH))
    steps = np.floor(near * 256)
    r = near - steps / 256
    whole, part = np.divmod(np.where(np.isfinite(steps), steps, 0).astype(int), 256)
    value = _table(REACH + 1, 1, arb.exp)[whole + REACH] * _table(256, 256, arb.exp)[part]
    return np.where(x <= REACH, value * (1 + r * (1 + r * (0.5 + r / 4))) * ROUND, np.inf)


def _log_up(z: np.ndarray) -> np.ndarray:
    """Return upper bounds of log(z) for z >= 1: with z = 2^e f, log f is below its tangent at a
    4096th below f.
    """
    f, e = np.frexp(np.where(np.isfinite(z), z, 1.0))
    f, e = 2 * f, e - 1
    index = np.floor((f - 1) * 4096).astype(int)
    point = 1 + index / 4096
    value = e * _two() + _table(4096, 4096, lambda x: (1 + x).log())[index] + (f - point) / point
    return np.where(np.isfinite(z), value * ROUND, np.inf)


_tables: dict[Any, np.ndarray] = {}


def _table(count: int, steps: int, function: Callable[[arb], arb]) -> np.ndarray:
    """Return float64 numbers just above function(i / steps), i from 0 (from -count + 1 for whole
    steps) to count - 1.
    """
    key = (count, steps)
    if key not in _tables:
        with ctx.workprec(128):
            places = range(0 if steps > 1 else 1 - count, count)
            values = [float(function(arb(i) / steps).upper()) for i in places]
        _tables[key] = np.nextafter(np.array(values), np.inf)
    return _tables[key]


def _two() -> float:
    with ctx.workprec(128):
        return float(np.nextafter(float(arb(2).log().upper()), np.inf))
