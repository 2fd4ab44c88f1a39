"""The circuits of a max-of-K network as tables to look at, and what each path adds to the
margin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from assay.bounds.rounding import Array
from assay.errors import InputError
from assay.proofs.max_of_k.tables import factor
from assay.targets.max_of_k import Weights

PATHS = (
    "direct path, token",
    "direct path, position",
    "head, copies of the largest",
    "head, other tokens",
    "head, positions",
)


@dataclass(frozen=True)
class Circuits:
    """The three circuits, each split into what depends on the token alone and what depends on the
    position.

    With V tokens and K positions: `qk` (V, V) query by key and `qk_position` (V, K), the mean over
    positions moved into `qk` and each row centred (attention does not see a row's mean); `ov` (V,
    V) and `ov_position` (K, V) to logits, the mean over positions moved into `ov`; `direct` (V, V)
    and `direct_position` (V,) to logits, biases in the latter. Float64, not bounds."""

    qk: Array
    qk_position: Array
    ov: Array
    ov_position: Array
    direct: Array
    direct_position: Array


def circuits(weights: Weights) -> Circuits:
    """Return the circuits of a network (compare the figures of arXiv 2406.11779)."""
    f = factor(weights, "float64")
    mean, root = f.P.mean(0), np.sqrt(float(f.head))
    qk = f.query @ f.keys @ (f.E + mean).T / root
    return Circuits(
        qk - qk.mean(1, keepdims=True),
        f.query @ f.keys @ (f.P - mean).T / root,
        (f.E + mean) @ f.values,
        (f.P - mean) @ f.values,
        f.E @ f.U,
        (f.P[-1:] @ f.U + f.bias)[0],
    )


def margin_shares(weights: Weights, *, sequences: int = 4096, seed: int = 0) -> dict[str, float]:
    """Return the mean part of each path in the margin over the strongest competitor, on random
    sequences.

    The margin is logit_m - max_{x != m} logit_x; the parts add up to it. An estimate from a sample,
    in logits."""
    if weights.vocabulary < 2:
        raise InputError("a margin needs at least two tokens")
    tokens = _draw(weights, sequences, seed)
    parts, m, rows = _parts(circuits(weights), tokens), tokens.max(1), np.arange(sequences)
    rival = _rival(parts, m)
    return {
        name: float((part[rows, m] - part[rows, rival]).mean())
        for name, part in zip(PATHS, parts, strict=True)
    }


def sampled_accuracy(weights: Weights, *, sequences: int = 1 << 15, seed: int = 0) -> float:
    """Return the share of random sequences answered right: an estimate, where brute force is out
    of reach.
    """
    tokens, table = _draw(weights, sequences, seed), circuits(weights)
    right = 0
    for chunk in np.array_split(tokens, max(1, sequences // 1024)):
        parts, m, rows = _parts(table, chunk), chunk.max(1), np.arange(len(chunk))
        rival = _rival(parts, m)
        right += int((sum(part[rows, m] - part[rows, rival] for part in parts) > 0).sum())
    return right / sequences


def _draw(weights: Weights, sequences: int, seed: int) -> np.ndarray:
    if sequences < 1:
        raise InputError(f"sequences must be at least 1, got {sequences}")
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        weights.vocabulary, (sequences, weights.positions), generator=generator
    ).numpy()


def _parts(c: Circuits, tokens: np.ndarray) -> list[Array]:
    """Return what each path writes to the logits, (sequences, V) in the order of `PATHS`."""
    q = tokens[:, -1]
    scores = np.take_along_axis(c.qk[q], tokens, 1) + c.qk_position[q]
    attention = np.exp(scores - scores.max(1, keepdims=True))
    attention /= attention.sum(1, keepdims=True)
    largest = tokens == tokens.max(1, keepdims=True)
    return [
        c.direct[q],
        np.broadcast_to(c.direct_position, c.direct[q].shape),
        np.einsum("sp,spx->sx", attention * largest, c.ov[tokens]),
        np.einsum("sp,spx->sx", attention * ~largest, c.ov[tokens]),
        attention @ c.ov_position,
    ]


def _rival(parts: list[Array], m: np.ndarray) -> np.ndarray:
    logits = np.sum(parts, axis=0)
    logits[np.arange(len(m)), m] = -np.inf
    return np.asarray(logits.argmax(1))
