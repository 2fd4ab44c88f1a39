"""Small max-of-K networks, files about them written byte by byte, and the exact truth about
every sequence.
"""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from flint import arb, ctx, fmpq, fmpq_mat

HEAD = "blocks.0.attn."
NAMES = [
    "embed.W_E",
    "pos_embed.W_pos",
    *(HEAD + "W_" + n for n in "QKVO"),
    "unembed.W_U",
    *(HEAD + "b_" + n for n in "QKVO"),
    "unembed.b_U",
]
KINDS = ("right", "rough", "random", "twins", "huge", "tiny", "denormal", "mixed", "zero", "steep")
CODES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "uint8": "U8",
    "int16": "I16",
    "bool": "BOOL",
    "int64": "I64",
}

Tensors = dict[str, np.ndarray]


def draw(seed: int, kind: str, *, most: int = 130) -> Tensors:
    """Return a network with V from 3 to 12 tokens, K from 2 to 5 positions and at most `most`
    inputs, all biases present.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    sizes = [(V, K) for V in range(3, 13) for K in range(2, 6) if most >= V**K]
    V, K = sizes[rng.integers(len(sizes))]
    if kind in ("right", "rough"):
        return right(V, K, rng, 0.02 if kind == "right" else float(rng.uniform(0.1, 0.6)))
    d, h = (int(n) for n in rng.integers(1, 5, 2))
    w = {name: rng.normal(size=shape) for name, shape in shapes(V, K, d, h).items()}
    if kind == "twins":
        i, j = rng.choice(V, 2, replace=False)
        w["embed.W_E"][i], w["unembed.W_U"][:, i], w["unembed.b_U"][i] = (
            w[n].T[j] if "U" in n else w[n][j] for n in ("embed.W_E", "unembed.W_U", "unembed.b_U")
        )
    if kind == "steep":  # attention falls by hundreds of nats between tokens and between positions
        w[HEAD + "W_K"] *= 100.0
    scale = {"huge": 1e4, "tiny": 1e-12, "denormal": 1e-41, "zero": 0.0}.get(kind, 1.0)
    scales = 10.0 ** rng.integers(-42, 12, len(w)) if kind == "mixed" else [scale] * len(w)
    return {
        name: (array * s).astype(np.float32)
        for (name, array), s in zip(w.items(), scales, strict=True)
    }


def right(V: int, K: int, rng: np.random.Generator, noise: float) -> Tensors:
    """Return a network that attends to large tokens and copies what it sees, with noise on every
    tensor.
    """
    w = {name: noise * rng.normal(size=shape) for name, shape in shapes(V, K, V + 1, V + 1).items()}
    w["embed.W_E"] += np.eye(V, V + 1)
    w["embed.W_E"][:, V] += 1
    w[HEAD + "W_Q"][V, 0] += np.sqrt(V + 1)
    w[HEAD + "W_K"][:V, 0] += 4 * np.arange(V)
    for name in ("W_V", "W_O"):
        w[HEAD + name] += 3 * np.diag([1.0] * V + [0.0])
    w["unembed.W_U"] += np.eye(V + 1, V)
    return {name: array.astype(np.float32) for name, array in w.items()}


def shapes(V: int, K: int, d: int, h: int) -> dict[str, tuple[int, ...]]:
    sizes = [(V, d), (K, d), (d, h), (d, h), (d, h), (h, d), (d, V), (h,), (h,), (h,), (d,), (V,)]
    return dict(zip(NAMES, sizes, strict=True))


def sizes_of(w: Tensors) -> tuple[int, int]:
    return len(w["embed.W_E"]), len(w["pos_embed.W_pos"])


class Truth:
    """Which sequences a network answers right in real arithmetic: from its layers, one by one, in
    balls of 400 bits.

    A float32 margin is off by at most `error` (query, token) for either logit; a sequence counts as
    right if it is for any error."""

    def __init__(self, w: Tensors, error: np.ndarray | None = None):
        self.V, self.K = sizes_of(w)
        self.error = np.zeros((self.V, self.V)) if error is None else error
        E, P, Q, K, V, O, U, bq, bk, bv, bo, bu = (_exact(w[name]) for name in NAMES)
        x = fmpq_mat([_row(E, t, P, p) for p in range(self.K) for t in range(self.V)])
        last = fmpq_mat([_row(E, t, P, self.K - 1) for t in range(self.V)])
        query, key, value = (
            rows * matrix + _rows(bias, rows.nrows())
            for rows, matrix, bias in ((last, Q, bq), (x, K, bk), (x, V, bv))
        )
        self.scores, self.head = (query * key.transpose()).tolist(), Q.ncols()
        self.written = (value * O * U).tolist()
        self.kept = (last * U + _rows(bo * U + bu, self.V)).tolist()

    @cache  # noqa: B019
    def right(self, tokens: tuple[int, ...]) -> bool:
        """Return whether the largest token's logit surely exceeds every other one (tokens in
        order, the query last).
        """
        q, m = tokens[-1], max(tokens)
        places = [p * self.V + t for p, t in enumerate(tokens)]
        with ctx.workprec(400):
            best = max(self.scores[q][i] for i in places)
            attention = [
                (arb(self.scores[q][i] - best) / arb(self.head).sqrt()).exp() for i in places
            ]
            for x in set(range(self.V)) - {m}:
                gap = sum(
                    a * arb(self.written[i][x] - self.written[i][m])
                    for a, i in zip(attention, places, strict=True)
                ) / sum(attention)
                if (
                    not gap
                    + arb(self.kept[q][x] - self.kept[q][m])
                    + arb(float(self.error[q, x]))
                    + arb(float(self.error[q, m]))
                    < 0
                ):
                    return False
        return True

    def mean_loss(self) -> arb:
        """Return the mean cross-entropy over all sequences, every logit off by its error."""
        with ctx.workprec(400):
            total = arb(0)
            for tokens in product(range(self.V), repeat=self.K):
                q, m = tokens[-1], max(tokens)
                places = [p * self.V + t for p, t in enumerate(tokens)]
                best = max(self.scores[q][i] for i in places)
                attention = [
                    (arb(self.scores[q][i] - best) / arb(self.head).sqrt()).exp() for i in places
                ]
                others = arb(0)
                for x in set(range(self.V)) - {m}:
                    gap = sum(
                        a * arb(self.written[i][x] - self.written[i][m])
                        for a, i in zip(attention, places, strict=True)
                    ) / sum(attention)
                    gap = gap + arb(self.kept[q][x] - self.kept[q][m])
                    others += (gap + float(self.error[q, x]) + float(self.error[q, m])).exp()
                total += (1 + others).log()
            return total / self.V**self.K

    def count(
        self,
        sets: np.ndarray,
        weights: list[list[int]] | None = None,
        counted: list[list[int]] | None = None,
    ) -> int:
        """Return the weight of the sequences in cells (family, q, m, c, k) that hold right
        answers only, each sequence once.
        """
        wrong = set()
        claimed: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for tokens in product(range(self.V), repeat=self.K):
            q, m = tokens[-1], max(tokens)
            others = [t for t in tokens[:-1] if t < m]
            for family in range(len(sets)):
                cell = (family, q, m, len(others))
                if all(sets[cell][t] for t in others) if others else sets[cell][0]:
                    claimed.setdefault(tokens, []).append(cell)
                    if not self.right(tokens):
                        wrong.add(cell)
        kept = [tokens for tokens, cells in claimed.items() if set(cells) - wrong]
        if counted is not None:
            kept = [t for t in kept if [t[-1], max(t), sum(o < max(t) for o in t[:-1])] in counted]
        return sum(
            prod(weights[p][t] for p, t in enumerate(tokens)) if weights else 1 for tokens in kept
        )

    def everything(self, weights: list[list[int]] | None = None) -> int:
        """Return the weight of all right answers."""
        found = [tokens for tokens in product(range(self.V), repeat=self.K) if self.right(tokens)]
        return sum(
            prod(weights[p][t] for p, t in enumerate(tokens)) if weights else 1 for tokens in found
        )


def possible(V: int, K: int) -> np.ndarray:
    """Return the tokens that may stand below m in every cell, (q, m, c, k), found by listing all
    inputs; {0} for c = 0.
    """
    tokens = np.zeros((V, V, K, V), bool)
    for sequence in product(range(V), repeat=K):
        others = [t for t in sequence[:-1] if t < max(sequence)]
        tokens[sequence[-1], max(sequence), len(others), others or [0]] = True
    return tokens


def write_tensors(path: Path, tensors: Tensors, *, metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": CODES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    return write_raw(path, header, body)


def write_raw(path: Path, header: Any, body: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def model_entry(w: Tensors) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in NAMES:
        digest.update(
            f"{name}\n{'x'.join(map(str, w[name].shape))}\n".encode()
            + w[name].astype("<f4").tobytes()
        )
    V, K = sizes_of(w)
    width, head = w[HEAD + "W_Q"].shape
    return {
        "sha256": digest.hexdigest(),
        "vocabulary": V,
        "positions": K,
        "width": width,
        "head": head,
    }


def certify(
    folder: Path,
    w: Tensors,
    count: int,
    advice: np.ndarray | None,
    /,
    *,
    rule: str = "cells",
    level: str = "real",
    tokens: list[list[int]] | None = None,
    cells: list[list[int]] | None = None,
    total: int | None = None,
    **changes: Any,
) -> tuple[Path, Path]:
    """Write weights and a certificate with true digests about them; return the paths of the
    certificate and the weights.
    """
    V, K = sizes_of(w)
    total = V**K if total is None else total
    stored: dict[str, Any] = {"file": None, "sha256": None}
    if advice is not None:
        name = "limits" if rule == "envelope" else "sets"
        array = (
            advice.astype(np.int16)
            if rule == "envelope"
            else np.packbits(advice, axis=-1, bitorder="little")
        )
        data = write_tensors(folder / "advice.safetensors", {name: array}).read_bytes()
        stored = {"file": "advice.safetensors", "sha256": hashlib.sha256(data).hexdigest()}
    entry = {
        "format": "assay-certificate/1",
        "task": "max-of-k",
        "model": model_entry(w),
        "strategy": "by hand",
        "rule": rule,
        "level": level,
        "options": {},
        "assumptions": {"exp_ulp": 2.0} if level == "float32" else {},
        "measure": {"name": "accuracy", "tokens": tokens, "cells": cells},
        "claim": {"count": str(count), "total": str(total), "bound": str(Fraction(count, total))},
        "advice": stored,
    }
    (folder / "proof.json").write_text(json.dumps(entry | changes))
    return folder / "proof.json", write_tensors(folder / "weights.safetensors", w)


def _exact(array: np.ndarray) -> fmpq_mat:
    rows = np.atleast_2d(array).astype(np.float64)
    return fmpq_mat(*rows.shape, [fmpq(*float(x).as_integer_ratio()) for x in rows.ravel()])


def _row(E: fmpq_mat, t: int, P: fmpq_mat, p: int) -> list[fmpq]:
    return [E[t, i] + P[p, i] for i in range(E.ncols())]


def _rows(bias: fmpq_mat, count: int) -> fmpq_mat:
    return fmpq_mat(count, 1, [1] * count) * bias
