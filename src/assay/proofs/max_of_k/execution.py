"""How far the logits of the network, executed in float32 in any order of summation, can be from the
real ones.

A sum of n float32 products (with or without fused multiply-add) errs by at most gamma_n times the
sum of absolute products (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); each
quantity below carries a bound `size` of its magnitude and a bound `error` of its rounding error,
and the two are propagated through the network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from assay.bounds.rounding import Array
from assay.errors import InputError
from assay.targets.max_of_k import Weights

UNIT = 2.0**-24  # unit roundoff of float32
FLUSH = 2.0**-126  # a float32 result below this may be flushed to zero
LARGEST = 2.0**127
_SAFETY = 1 + 2.0**-20  # over the float64 roundings of the sums of non-negative numbers below


@dataclass(frozen=True)
class _Rounded:
    size: Array
    error: Array

    def times(self, matrix: Array, bias: Array) -> _Rounded:
        terms = len(matrix) + 1
        magnitude = np.abs(matrix.astype(np.float64))
        offset = np.abs(bias.astype(np.float64))
        computed = (self.size + self.error) @ magnitude + offset
        # Every product and every partial sum may be flushed.
        error = self.error @ magnitude + gamma(terms + 1) * computed + 2 * terms * FLUSH
        return _Rounded((self.size @ magnitude + offset) * _SAFETY, error * _SAFETY)

    def plus(self, other: _Rounded) -> _Rounded:
        size = self.size + other.size
        error = self.error + other.error
        return _Rounded(size * _SAFETY, (error + UNIT * (size + error) + FLUSH) * _SAFETY)

    @property
    def reach(self) -> Array:
        return self.size + self.error


def gamma(terms: float) -> float:
    """Return n u / (1 - n u) for float32."""
    return terms * UNIT / (1 - terms * UNIT)


@np.errstate(all="ignore")  # what overflows is refused at the end
def logit_error(w: Weights, *, exp_ulp: float = 2.0) -> Array:
    """Return bounds of |executed logit - real logit| for each query token and output, shape (V, V),
    over all sequences.

    The attention row is any float32 softmax that subtracts the row's maximum, with an exponential
    accurate to `exp_ulp` units in the last place; scaling by 1/sqrt(head) may cost three roundings.
    Raises InputError when float32 could overflow."""
    if not 0.5 <= exp_ulp <= 1024:
        raise InputError(f"exp_ulp must be between 0.5 and 1024, got {exp_ulp}")
    positions, vocabulary = w.positions, w.vocabulary
    tokens, places = np.abs(w.E.astype(np.float64)), np.abs(w.P.astype(np.float64))
    size = tokens[None] + places[:, None]
    x = _Rounded(size * _SAFETY, (UNIT * size + FLUSH) * _SAFETY)
    last = _Rounded(x.size[-1], x.error[-1])
    query, key, value = last.times(w.Q, w.q_bias), x.times(w.K, w.k_bias), x.times(w.V, w.v_bias)
    keys, key_errors = (
        part.reshape(positions * vocabulary, -1).T for part in (key.size, key.error)
    )
    exact = query.size @ keys
    spread = query.error @ keys + query.size @ key_errors + query.error @ key_errors
    spread = spread + gamma(w.head + 4) * (exact + spread) + 2 * (w.head + 4) * FLUSH
    root = np.sqrt(float(w.head)) / _SAFETY
    score, score_error = (
        (exact / root).max(1) * _SAFETY,
        (spread / root).max(1) * _SAFETY + 4 * FLUSH,
    )
    shift = score_error + 2 * UNIT * (score + score_error)
    relative, summed = 2 * UNIT * exp_ulp, (positions + 4) * UNIT
    change = (
        np.expm1((2 * shift + 2 * relative / (1 - relative) + summed / (1 - summed)) * _SAFETY)[
            :, None
        ]
        * _SAFETY
    )
    # Attention sums to one: a mean of vectors is at most the largest of them, and attention off by
    # a factor within 1 +- change moves the logits by at most `change` times the largest logit that
    # one position writes.
    reach, errors = value.reach.max((0, 1)), value.error.max((0, 1))
    head_error = (1 + change) * (errors + gamma(positions + 2) * reach) + 4 * positions * FLUSH * (
        1 + reach
    )
    # What is multiplied from here on is the drifted mean, so its rounding goes by the drifted size.
    mixed = _Rounded((1 + change) * value.size.max((0, 1)) * _SAFETY, head_error * _SAFETY)
    logits = last.plus(mixed.times(w.O, w.o_bias)).times(w.U, w.u_bias)
    moved = change * _largest_written(w)
    top = max(
        float(part.max())
        for part in (x.reach, query.reach, key.reach, exact + spread, value.reach, logits.reach)
    )
    if not top < LARGEST or not (np.isfinite(logits.error).all() and np.isfinite(moved).all()):
        raise InputError(
            "executed in float32 the network can overflow or lose every digit of its scores; use"
            " level real"
        )
    return (logits.error + moved) * _SAFETY


def _largest_written(w: Weights) -> Array:
    """Return bounds of what one position can write to each logit through the head, shape (V,)."""
    E, P, V, O, U = (array.astype(np.float64) for array in (w.E, w.P, w.V, w.O, w.U))
    tokens = (E[None] + P[:, None]).reshape(-1, w.width)
    written = np.abs((tokens @ V + w.v_bias) @ O @ U)
    sizes = (np.abs(tokens) @ np.abs(V) + np.abs(w.v_bias)) @ np.abs(O) @ np.abs(U)
    return (written + (2 * w.width + w.head + 8) * 2.0**-50 * sizes).max(
        0
    ) * _SAFETY  # gamma of the float64 products, generously
