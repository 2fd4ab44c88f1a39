"""A random one-layer attention model with biases, and features of all its sequences of tokens."""

from __future__ import annotations

import numpy as np

from assay.proofs.crosscoder.attention import AttentionProblem
from assay.proofs.crosscoder.problem import Features
from assay.targets.max_of_k import Weights

V, K, WIDTH, HEAD = 4, 3, 5, 4


def problem(seed: int, error: float = 0.1, level: str = "real") -> AttentionProblem:
    """At error 0 the features are the tokens at their positions."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    narrow = np.float32
    weights = Weights(
        draw(V, WIDTH), draw(K, WIDTH), draw(WIDTH, HEAD), draw(WIDTH, HEAD), draw(WIDTH, HEAD),
        draw(HEAD, WIDTH), draw(WIDTH, V), draw(HEAD), draw(HEAD), draw(HEAD), draw(WIDTH), draw(V),
    )  # fmt: skip
    tokens = np.indices((V,) * K).reshape(K, -1).T
    decoder = np.zeros((K * V, K + 1, WIDTH), narrow)
    codes = np.zeros((len(tokens), K * V))
    for p in range(K):
        decoder[p * V : (p + 1) * V, p] = weights.E
        codes[np.arange(len(tokens)), p * V + tokens[:, p]] = 1
    decoder[:, K] = draw(K * V, WIDTH)
    bias = np.concatenate([weights.P, draw(1, WIDTH)])
    if error:
        decoder[:, :K] += narrow(error) * draw(K * V, K, WIDTH)
    features = Features(decoder.astype(np.float64), bias.astype(np.float64), codes)
    return AttentionProblem(weights, tokens, features, level)
