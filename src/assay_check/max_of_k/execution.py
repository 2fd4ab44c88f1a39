"""How far logits executed in float32 can be from the real ones, in any order of summation.

Every operation returns its result times (1 + d), |d| <= 2**-24, or errs by at most 2**-126 where
that is larger (gradual underflow, or results flushed to zero); sums are taken in any order, fused
or not; the softmax subtracts the row's maximum, and its exponential is accurate to `ulps` units in
the last place. Compare Higham, Accuracy and Stability of Numerical Algorithms, 3.1."""

from typing import Any

import numpy as np
from flint import fmpq_mat

from assay_check.max_of_k.model import Model, exact, floats
from assay_check.reading import need

UNIT, TINY, LARGEST, SAFETY = 2.0**-24, 2.0**-126, 2.0**127, 1 + 2.0**-20
MANY = UNIT * (1 + 2.0**-9)  # n of it bound the compound error of n <= 2**14 + 8 roundings


def logit_error(model: Model, ulps: Any) -> np.ndarray:
    """Return bounds of |executed - real logit| for every query and output token over all sequences;
    InputError for possible overflow.

    Plain names are magnitudes of exact values, `_error` how far executed ones are, `_top` the sum
    of magnitudes of what is summed. All are sums and products of non-negative numbers, so that
    float64's own rounding is far below `SAFETY`."""
    E, P, W_Q, W_K, W_V, W_O, W_U, b_Q, b_K, b_V, b_O, b_U = map(exact, model.weights)
    V, K, h, root = model.V, model.K, model.head, np.sqrt(float(model.head))
    good = type(ulps) in (int, float) and 0.5 <= ulps <= 1024 and max(h, K, model.width) <= 2**14
    need(
        good,
        f"level float32: exp_ulp must be between 0.5 and 1024, got {ulps!r}, and sizes at most"
        " 2**14",
    )
    x = fmpq_mat(
        [
            [e + p for e, p in zip(token, place, strict=True)]
            for place in P.tolist()
            for token in E.tolist()
        ]
    )
    residual, rows, inputs = (
        np.abs(floats(x)),
        fmpq_mat(K * V, 1, [1] * (K * V)),
        ((W_Q, b_Q), (W_K, b_K), (W_V, b_V)),
    )
    slip = UNIT * residual + TINY
    query, key, value = (np.abs(floats(x * W + rows * b)) for W, b in inputs)
    written = np.abs(floats((x * W_V + rows * b_V) * W_O * W_U)).max(0)
    (q_error, q_top), (k_error, k_top), (v_error, v_top) = (
        _sum(slip, residual + slip, W, b) for W, b in inputs
    )
    query, q_error, residual, slip = (
        query[-V:],
        q_error[-V:],
        residual[-V:],
        slip[-V:],
    )  # the query is in the last position
    s_top = (query + q_error) @ (key + k_error).T
    s_error = (
        (q_error @ (key + k_error).T + query @ k_error.T + (h + 4) * MANY * s_top) / root
    ).max(1) + 3 * (h + 4) * TINY
    width = (
        sum(
            np.ptp(s, axis=1) + 2.0**-50 * np.abs(s).max(1) for s in map(floats, (model.a, model.b))
        )
        / root
    )
    # Executed attention is off by a factor within exp(+-log) and by `floor`: scores, their maximum,
    # exponentials, sum, quotient.
    shift, relative, floor = (
        s_error + UNIT * (width + 2 * s_error) + TINY,
        2 * UNIT * ulps,
        4 * K * (ulps + 2) * TINY,
    )
    log = 2 * shift + 2 * relative / (1 - relative) + (K + 4) * MANY + floor
    need(
        (log < 600).all(),
        "level float32: the executed network could lose every digit of its scores",
    )
    moved = np.expm1(log * SAFETY)[:, None] * SAFETY + floor
    most = (value + v_error).max(0)
    z_error = (1 + moved) * (v_error.max(0) + K * MANY * most) + 3 * K * TINY
    o_error, o_top = _sum(z_error, (1 + moved) * (1 + K * MANY) * most + 3 * K * TINY, W_O, b_O)
    r_top = residual + slip + (1 + (h + 1) * MANY) * o_top + 3 * (h + 1) * TINY
    l_error, l_top = _sum(slip + o_error + UNIT * r_top + TINY, (1 + UNIT) * r_top, W_U, b_U)
    need(
        all((top < LARGEST).all() for top in (q_top, k_top, v_top, s_top, o_top, l_top)),
        "level float32: the network could overflow",
    )
    return (l_error + moved * written) * SAFETY


def _sum(
    error: np.ndarray, top: np.ndarray, matrix: fmpq_mat, bias: fmpq_mat
) -> tuple[np.ndarray, np.ndarray]:
    """Return the error of `x W + bias` as executed, and the sum of magnitudes in it."""
    W, b = np.abs(floats(matrix)), np.abs(floats(bias))
    sizes = top @ W + b
    return error @ W + (len(W) + 1) * MANY * sizes + 3 * (len(W) + 1) * TINY, sizes
