"""Small max-of-K networks, right and wrong ones, and oracles that judge single sequences without
any of the proofs' tables.
"""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product

import numpy as np
from flint import arb, arb_mat, ctx

from assay.targets.max_of_k import Weights

KINDS = ("planted", "rough", "random", "ties", "twins", "huge", "tiny", "denormal", "mixed", "zero")


def empty(V: int, K: int, d: int, h: int) -> Weights:
    """Return a network of zeros."""
    shapes = {
        "E": (V, d),
        "P": (K, d),
        "Q": (d, h),
        "K": (d, h),
        "V": (d, h),
        "O": (h, d),
        "U": (d, V),
    }
    biases = {"q_bias": (h,), "k_bias": (h,), "v_bias": (h,), "o_bias": (d,), "u_bias": (V,)}
    return Weights(
        **{name: np.zeros(shape, np.float32) for name, shape in {**shapes, **biases}.items()}
    )


def planted(V: int, K: int, rng: np.random.Generator, noise: float) -> Weights:
    """Return a network that attends to larger tokens and copies them, with noise on every
    tensor.
    """
    w = empty(V, K, V + 1, V + 1)
    eye = np.eye(V, V + 1)
    E = eye.copy()
    E[:, V] = 1.0
    query, key = np.zeros((V + 1, V + 1)), np.zeros((V + 1, V + 1))
    query[V, 0] = np.sqrt(V + 1)
    key[:V, 0] = 4.0 * np.arange(V)
    copy = np.eye(V + 1)
    copy[V, V] = 0.0
    exact = {"E": E, "Q": query, "K": key, "V": copy, "O": 8.0 * copy, "U": eye.T}
    names = ("E", "P", "Q", "K", "V", "O", "U", "q_bias", "k_bias", "v_bias", "o_bias", "u_bias")
    return replace(
        w,
        **{
            n: (exact.get(n, 0.0) + noise * rng.normal(size=getattr(w, n).shape)).astype(np.float32)
            for n in names
        },
    )


def draw(seed: int, kind: str, *, most_sequences: int = 400) -> Weights:
    """Return a small network of a kind: V from 3 to 12, K from 2 to 5, at most `most_sequences`
    inputs.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    while True:
        V, K = int(rng.integers(3, 13)), int(rng.integers(2, 6))
        if most_sequences >= V**K:
            break
    if kind == "planted":
        return planted(V, K, rng, 0.02)
    if kind == "rough":
        return planted(V, K, rng, float(rng.uniform(0.1, 0.5)))
    d, h = int(rng.integers(1, 7)), int(rng.integers(1, 7))
    w = empty(V, K, d, h)
    scale = {
        "random": float(rng.choice([0.3, 1.0, 3.0])),
        "huge": 1e4,
        "tiny": 1e-12,
        "denormal": 2e-41,
    }.get(kind, 1.0)

    def entries(shape: tuple[int, ...]) -> np.ndarray:
        values = rng.normal(size=shape) * scale
        if kind == "ties":
            values = rng.integers(-1, 2, size=shape).astype(float)
        if kind == "mixed":
            values = rng.normal(size=shape) * 10.0 ** rng.uniform(-20, 3, size=shape)
        return values.astype(np.float32) if kind != "zero" else np.zeros(shape, np.float32)

    w = replace(w, **{field.name: entries(getattr(w, field.name).shape) for field in fields(w)})
    if kind == "twins":
        first, second = rng.choice(V, 2, replace=False)
        w.E[first], w.U[:, first], w.u_bias[first] = w.E[second], w.U[:, second], w.u_bias[second]
    return w


def sequences(w: Weights) -> np.ndarray:
    """Return all inputs, (V^K, K)."""
    return np.array(list(product(range(w.vocabulary), repeat=w.positions)))


def logits(
    w: Weights, tokens: np.ndarray, dtype: type = np.float64, order: np.ndarray | None = None
) -> np.ndarray:
    """Run the network forward in a dtype; `order` permutes positions in the head's sums."""
    a = {field.name: getattr(w, field.name).astype(dtype) for field in fields(w)}
    order = np.arange(w.positions) if order is None else order
    with np.errstate(all="ignore"):
        x = a["E"][tokens] + a["P"]
        query = x[:, -1] @ a["Q"] + a["q_bias"]
        keys, values = x @ a["K"] + a["k_bias"], x @ a["V"] + a["v_bias"]
        scores = (keys @ query[:, :, None])[..., 0] / dtype(np.sqrt(w.head))
        weights = np.exp(scores - scores.max(1, keepdims=True))[:, order]
        weights = weights / weights.sum(1, keepdims=True, dtype=dtype)
        mixed = (weights[:, None] @ values[:, order])[:, 0]
        return (x[:, -1] + mixed @ a["O"] + a["o_bias"]) @ a["U"] + a["u_bias"]


def margins(w: Weights, tokens: np.ndarray, **how: object) -> np.ndarray:
    """Return max over x != m of logit_x - logit_m."""
    values = logits(w, tokens, **how)  # type: ignore[arg-type]
    m = tokens.max(1)
    own = np.take_along_axis(values, m[:, None], 1)
    np.put_along_axis(values, m[:, None], -np.inf, 1)
    return values.max(1) - own[:, 0]


def surely_right(w: Weights, tokens: np.ndarray) -> bool:
    """Decide one sequence in ball arithmetic at 2000 bits: True only if every margin is
    certainly negative.
    """
    with ctx.workprec(2000):
        a = {
            f.name: arb_mat(np.atleast_2d(getattr(w, f.name)).astype(float).tolist())
            for f in fields(w)
        }
        x = arb_mat(
            [
                [a["E"][int(t), i] + a["P"][p, i] for i in range(w.width)]
                for p, t in enumerate(tokens)
            ]
        )
        last = arb_mat([[x[w.positions - 1, i] for i in range(w.width)]])
        query = last * a["Q"] + a["q_bias"]
        ones = arb_mat([[1]] * w.positions)
        keys, values = x * a["K"] + ones * a["k_bias"], x * a["V"] + ones * a["v_bias"]
        scores = (query * keys.transpose()) * (1 / arb(w.head).sqrt())
        weights = [scores[0, p].exp() for p in range(w.positions)]
        mixed = arb_mat([weights]) * values * (1 / sum(weights, arb(0)))
        out = (last + mixed * a["O"] + a["o_bias"]) * a["U"] + a["u_bias"]
        m = int(tokens.max())
        return all((out[0, x] - out[0, m]) < 0 for x in range(w.vocabulary) if x != m)


def members(sets: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return which sequences lie in sets (families, q, m, c, k), one by one from the definition
    of a cell.
    """
    inside = np.zeros(len(tokens), bool)
    for row, sequence in enumerate(tokens):
        q, m, others = sequence[-1], sequence.max(), sequence[:-1]
        smaller = others[others < m]
        for family in sets[:, q, m, len(smaller)]:
            inside[row] |= bool(family[smaller].all()) if len(smaller) else bool(family[0])
    return inside
