"""Certificates: what a proof claims, and the untrusted advice with which anyone can check it.

A certificate is a JSON file `NAME.json` and, where the rule takes advice, a safetensors file beside
it, `NAME.advice.safetensors`:

    format       "assay-certificate/1"
    task         "max-of-k": the answer is right when the logit of the largest token strictly
    exceeds every other one model        {"sha256", "vocabulary": V, "positions": K, "width": d,
    "head": h} strategy     name of the search that found the advice (a label; the rule decides how
    the claim is checked) rule         "sequences" | "cells" | "cubic" | "envelope": see below level
    "real" (the network in real arithmetic) | "float32" (as executed in float32, any summation
    order) |
                 "float64" (search without proof: a checker refuses it)
    options      the rule's options (only "envelope" has any)
    assumptions  {"exp_ulp": u} at level float32: the exponential errs by at most u units in the
    last place measure      {"name", "tokens": null or [[weight, ...V], ...K], "cells": null or a
    list of [q, m, c]} claim        {"count": "n", "total": "N", "bound": "p/q"}: integers and a
    reduced fraction as decimal strings advice       {"file": name or null, "sha256": digest of that
    file or null}

`model.sha256` is the SHA-256 of, for each of the tensors embed.W_E, pos_embed.W_pos,
blocks.0.attn.W_Q, W_K, W_V, W_O, unembed.W_U, blocks.0.attn.b_Q, b_K, b_V, b_O, unembed.b_U in this
order (absent biases are zeros, a head axis of size one is dropped): the bytes `name + "\\n" + "AxB"
+ "\\n"` (the shape, a vector is "A") and then the float32 entries, little-endian, in row-major
order. Digests only tell files apart; nothing is concluded from them.

**Claim.** Every input counts with the weight `prod_p tokens[p][t_p]` (null: 1), and 0 outside the
cells listed (null: all cells). `total` is the weight of all V^K inputs, `count` a lower bound of
the weight of those answered right, `bound` = count / total. A checker accepts if and only if the
count that it recomputes is at least the claimed one, and the total and the bound are right.

**Cells.** The cell (q, m, c) holds the sequences with query token q = t_{K-1}, largest token m >=
q, and exactly c non-query positions below m (c <= K-2 if q < m, c <= K-1 if q = m; c = 0 if m = 0).
A set S of tokens below m selects C(K-1, c) |S|^c of them. For c = 0 there is one sequence; S = {0}
claims it and the empty set does not. With token weights w_p the weight of S is `w_{K-1}(q) * sum
over position subsets I of size c of prod_{i in I} w_i(S) prod_{i not in I} w_i(m)`, i over 0..K-2.

**Rule "sequences".** No advice. The count is recomputed over all V^K sequences.

**Rule "cells".** Advice `sets`, uint8, shape (F, V, V, K, ceil(V/8)) over (family, q, m, c, byte):
bit k % 8 (little-endian) of byte k // 8 says that token k is in S. F is 1 or 2; with two families,
all sequences that are in either are claimed, so a cell weighs |A| + |B| - |A and B|. A cell with
tokens S is true if for all x != m (g as below, c largest over positions i = 0..K-2)

    sum_i g_i(m) + g_{K-1}(q) + (the c largest of max_{k in S} g_i(k) - g_i(m)) < 0,
    g_p(k) = exp(a[q,k] + b[q,p]) (EV[k,x] - EV[k,m] + PV[p,x] - PV[p,m] + D[q,x] - D[q,m] +
    slack[q]),

    Eq = E + P[K-1];  a = (Eq Q + b_Q) K^T E^T / sqrt h;  b = (Eq Q + b_Q) K^T P^T / sqrt h;  EV = E
    V O U;  PV = P V O U; D = Eq U + (b_V O + b_O) U + b_U   (b_K changes no attention weight).

A positive factor per q, such as exp(-max a - max b), changes nothing. slack is 0 at level "real"
and, at level "float32", 2 max_x of a valid bound of |executed - real logit|: the prover searches
with `assay.proofs.max_of_k.execution.logit_error`, a checker uses its own.

**Rule "cubic".** Advice `sets` with F = 1. A cell with c > 0 is true if every k in S passes the
inequality of `assay.proofs.max_of_k.strategies.cubic` for both s; one with c = 0 as under "cells".
(Both also pass "cells", which is exact.)

**Rule "envelope".** Advice `limits`, int16, shape (V, V, K) over (q, m, c): j >= 0 for S = {0..j},
-1 for nothing (with c = 0, 0 claims the sequence); and float32 vectors, all of them free choices
(any value is sound): `key_center` (d), `query_center` (d); with `options.qk` other than "exact"
`query_directions` and `key_directions` (h, r); with `options.direct` "direction" `direct_direction`
(d). `options` are those of `assay.proofs.max_of_k.strategies.subcubic.Options`; its docstring and
that of `assay.proofs.max_of_k.strategies.low_rank` give the inequality. With N = Eq Q + b_Q and
tokens = (E - key_center)^T, "exact" scores are N K^T tokens / sqrt h; otherwise they are (N W)(Z^T
K^T tokens) / sqrt h with W, Z the two directions, and two entries of a row of the residual N (I - W
Z^T) K^T tokens / sqrt h differ by at most the error of `options.qk`.

Any true cell passes the exact test of rule "cells", whichever rule found it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from assay.errors import InputError
from assay.io import files
from assay.proofs.max_of_k.cells import ACCURACY, Measure, Sets
from assay.targets.max_of_k import NAMES, Weights

FORMAT = "assay-certificate/1"
ADVICE = ".advice.safetensors"


@dataclass(frozen=True)
class Certificate:
    """A claim about a model and the advice to check it with; `advice` holds arrays by name."""

    model: Mapping[str, Any]
    strategy: str
    rule: str
    level: str
    count: int
    total: int
    advice: Mapping[str, np.ndarray]
    options: Mapping[str, Any] = field(default_factory=dict)
    assumptions: Mapping[str, Any] = field(default_factory=dict)
    measure: Measure = ACCURACY

    @property
    def bound(self) -> Fraction:
        return Fraction(self.count, self.total)


def model_entry(weights: Weights) -> dict[str, Any]:
    """Return what a certificate says of its model: the digest of the weights, and the sizes."""
    digest = hashlib.sha256()
    for entry in fields(weights):
        array = np.ascontiguousarray(getattr(weights, entry.name), dtype="<f4")
        digest.update(f"{NAMES[entry.name]}\n{'x'.join(map(str, array.shape))}\n".encode())
        digest.update(array.tobytes())
    sizes = {name: getattr(weights, name) for name in ("vocabulary", "positions", "width", "head")}
    return {"sha256": digest.hexdigest(), **sizes}


def pack(sets: Sets) -> np.ndarray:
    """Pack sets (F, V, V, K, V) into bits (F, V, V, K, ceil(V/8))."""
    return np.packbits(sets, axis=-1, bitorder="little")


def unpack(bits: np.ndarray, vocabulary: int) -> Sets:
    """Unpack what `pack` packed."""
    return np.unpackbits(bits, axis=-1, count=vocabulary, bitorder="little").astype(bool)


def advice_path(path: Path) -> Path:
    """Return where the advice of a certificate goes."""
    return path.with_suffix(ADVICE)


def check_destination(path: Path | str, inputs: Iterable[Path | str] = ()) -> Path:
    """Return the path of a certificate to be; raises InputError, before any work, for another
    suffix than `.json`, and where a file would be overwritten that is an input or no certificate of
    ours.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise InputError(f"a certificate is a .json file, got {path.name!r}")
    for target in (path, advice_path(path)):
        if any(_same(target, Path(given)) for given in inputs):
            raise InputError(f"{target} is an input and would be overwritten; choose another name")
    written = _written(path)
    if os.path.lexists(path) and written is None:
        raise InputError(f"{path} exists and is no certificate; choose another name")
    advice = advice_path(path)
    if os.path.lexists(advice) and (written or {}).get("advice") != _stored(advice):
        raise InputError(f"{advice} exists and is not the advice of {path}; choose another name")
    return path


def write(path: Path | str, certificate: Certificate, inputs: Iterable[Path | str] = ()) -> Path:
    """Write a certificate to `path` (JSON) and its advice beside it (safetensors); return the path.

    Raises InputError as `check_destination` does.
    """
    path = check_destination(path, inputs)
    stored: dict[str, Any] = {"file": None, "sha256": None}
    if certificate.advice:
        advice = advice_path(path)
        files.save_tensors(
            advice,
            {
                name: torch.from_numpy(np.ascontiguousarray(a))
                for name, a in certificate.advice.items()
            },
        )
        stored = _stored(advice)
    measure = certificate.measure
    chosen = None if measure.cells is None else np.argwhere(measure.cells)
    entry = {
        "format": FORMAT,
        "task": "max-of-k",
        "model": certificate.model,
        "strategy": certificate.strategy,
        "rule": certificate.rule,
        "level": certificate.level,
        "options": certificate.options,
        "assumptions": certificate.assumptions,
        "measure": {"name": measure.name, "tokens": measure.tokens, "cells": chosen},
        "claim": {
            "count": str(certificate.count),
            "total": str(certificate.total),
            "bound": str(certificate.bound),
        },
        "advice": stored,
    }
    return files.write_json(path, entry)


def _stored(advice: Path) -> dict[str, Any]:
    return {"file": advice.name, "sha256": hashlib.sha256(advice.read_bytes()).hexdigest()}


def _written(path: Path) -> Mapping[str, Any] | None:
    """Return the certificate that is at a path, or none."""
    try:
        entry = files.read_json(path)
    except InputError:
        return None
    known = isinstance(entry, dict) and entry.get("format") == FORMAT
    return entry if known else None


def _same(target: Path, given: Path) -> bool:
    if target.exists() and given.exists():
        return target.samefile(given)
    return target.resolve() == given.resolve()
