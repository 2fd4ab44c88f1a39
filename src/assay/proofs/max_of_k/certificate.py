"""Claims about max-of-K transformers in the envelope of `assay.proofs.certificate`.

The task "max-of-k" has one field of its own, and two kinds of claims:

    model        {"sha256", "vocabulary": V, "positions": K, "width": d, "head": h}
    measure      {"name", "tokens": null or [[weight, ...V], ...K], "cells": null or a list of
                 [q, m, c]}
    claim        {"count": "n", "total": "N", "bound": "p/q"} under the rules "sequences", "cells",
                 "cubic" and "envelope"; {"cross_entropy": "p/q"} under the rule "cross-entropy"

`model.sha256` is the SHA-256 of, for each of the tensors embed.W_E, pos_embed.W_pos,
blocks.0.attn.W_Q, W_K, W_V, W_O, unembed.W_U, blocks.0.attn.b_Q, b_K, b_V, b_O, unembed.b_U in this
order (absent biases are zeros, a head axis of size one is dropped): the bytes `name + "\\n" + "AxB"
+ "\\n"` (the shape, a vector is "A") and then the float32 entries, little-endian, in row-major
order.

**Claims of right answers.** An answer is right when the logit of the largest token strictly exceeds
every other one. Every input counts with the weight `prod_p tokens[p][t_p]` (null: 1), and 0 outside
the cells listed (null: all cells). `total` is the weight of all V^K inputs, `count` a lower bound
of the weight of those answered right, `bound` = count / total. A checker accepts if and only if the
count that it recomputes is at least the claimed one, and the total and the bound are right. The
name "accuracy" is kept for the measure in which both are null.

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

    Eq = E + P[K-1];  a = (Eq Q + b_Q) K^T E^T / sqrt h;  b = (Eq Q + b_Q) K^T P^T / sqrt h;
    EV = E V O U;  PV = P V O U;
    D = Eq U + (b_V O + b_O) U + b_U   (b_K changes no attention weight).

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

**Rule "cross-entropy".** No advice. `cross_entropy` is an upper bound, in nats, of the mean over
all V^K inputs of log(1 + sum_x exp(logit_x - logit_m)), x over the other tokens; a reduced
fraction. All inputs count the same. The inequality is that of
`assay.proofs.max_of_k.cross_entropy`."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from assay.proofs.certificate import Certificate, weights_digest
from assay.proofs.max_of_k.cells import ACCURACY, Measure, Sets
from assay.proofs.max_of_k.strategies.base import Advice, Problem, Strategy
from assay.targets.max_of_k import NAMES, Weights

TASK = "max-of-k"
CROSS_ENTROPY = "cross-entropy"


def model_entry(weights: Weights) -> dict[str, Any]:
    """Return what a certificate says of its model: the digest of the weights, and the sizes."""
    sizes = {name: getattr(weights, name) for name in ("vocabulary", "positions", "width", "head")}
    return {"sha256": weights_digest(weights, NAMES), **sizes}


def pack(sets: Sets) -> np.ndarray:
    """Pack sets (F, V, V, K, V) into bits (F, V, V, K, ceil(V/8))."""
    return np.packbits(sets, axis=-1, bitorder="little")


def unpack(bits: np.ndarray, vocabulary: int) -> Sets:
    """Unpack what `pack` packed."""
    return np.unpackbits(bits, axis=-1, count=vocabulary, bitorder="little").astype(bool)


def certify_answers(
    problem: Problem, strategy: Strategy, advice: Advice, count: int, total: int, measure: Measure
) -> Certificate:
    """Return the certificate that inputs of the weight `count`, out of `total`, are answered
    right.
    """
    if strategy.rule in ("cells", "cubic"):
        stored = {"sets": pack(advice["sets"])}
    else:
        stored = {name: np.asarray(value) for name, value in advice.items()}
    claim = {"count": str(count), "total": str(total), "bound": str(Fraction(count, total))}
    return Certificate(
        task=TASK,
        model=model_entry(problem.weights),
        strategy=strategy.name,
        rule=strategy.rule,
        level=problem.level,
        claim=claim,
        advice=stored,
        options=strategy.options,
        assumptions=_assumptions(problem),
        own={"measure": _measure_entry(measure)},
    )


def certify_cross_entropy(problem: Problem, strategy: str, bound: Fraction) -> Certificate:
    """Return the certificate that the mean cross-entropy is at most `bound` nats."""
    return Certificate(
        task=TASK,
        model=model_entry(problem.weights),
        strategy=strategy,
        rule=CROSS_ENTROPY,
        level=problem.level,
        claim={"cross_entropy": str(bound)},
        assumptions=_assumptions(problem),
        own={"measure": {**_measure_entry(ACCURACY), "name": "all inputs alike"}},
    )


def _assumptions(problem: Problem) -> dict[str, Any]:
    return {"exp_ulp": problem.exp_ulp} if problem.level == "float32" else {}


def _measure_entry(measure: Measure) -> dict[str, Any]:
    chosen = None if measure.cells is None else np.argwhere(measure.cells)
    return {"name": measure.name, "tokens": measure.tokens, "cells": chosen}
