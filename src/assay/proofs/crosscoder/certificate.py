"""Claims about residual ReLU networks in the envelope of `assay.proofs.certificate`.

The task "crosscoder" has one field of its own:

    model    {"sha256", "inputs", "width", "hidden", "outputs"}
    points   {"kind": "pairs"}, all ordered pairs (a, b) of `outputs` tokens as two one-hot vectors
             side by side, the pair in row `a * outputs + b`, the right output max(a, b); or
             {"kind": "listed"}, those in the advice: `inputs` (points, inputs) float32 and `labels`
             (points,) int32
    claim    {"count": "n", "total": "N", "bound": "p/q"}: at least n of the N points are answered
             right, their right logit strictly above every other one

`model.sha256` is the SHA-256 of, for each of embed.weight, embed.bias, blocks.0.mlp_in.weight,
blocks.0.mlp_in.bias, blocks.0.mlp_out.weight, blocks.0.mlp_out.bias, unembed.weight, unembed.bias
in this order, the bytes `name + "\\n" + "AxB" + "\\n"` and the float32 entries, little-endian, row
by row.

Advice, all of it free choices (any finite numbers are sound, codes at least zero): `decoder`
(size, width) and `bias` (width,), what features write at "embed"; `codes` (points, size), float32.
Rules, with the inequality of `assay.proofs.crosscoder.certificates`:

    linear   S_n is N_n where `negative` (groups, hidden; uint8) is 1 in the point's group, else
             P_n; `group` (points,) int32
    compact  the same, and eps_0 enters by its norm alone
    exact    the interaction itself, min(P_n, N_n); no `group`, no `negative`
    groups   `group` alone, points of one label each: over the box of a group's codes and eps_0
             every neuron has a linear bound, and each margin one in (z, eps_0)

The level is "real"."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from assay.errors import InputError
from assay.proofs.certificate import Certificate, check_destination, weights_digest, write
from assay.proofs.crosscoder.arithmetic import Array
from assay.proofs.crosscoder.problem import Network, Problem
from assay.proofs.crosscoder.prove import STRATEGIES, ProofResult, prove

TASK = "crosscoder"
RULES = {
    "one_side": "linear",
    "one_side_compact": "compact",
    "strongest": "linear",
    "compact": "compact",
    "exact": "exact",
    "groups": "groups",
}
"""The strategies whose claims can be certified, each with its rule."""

NAMES = {
    "E": "embed.weight",
    "b_e": "embed.bias",
    "W_in": "blocks.0.mlp_in.weight",
    "b_in": "blocks.0.mlp_in.bias",
    "W_out": "blocks.0.mlp_out.weight",
    "b_out": "blocks.0.mlp_out.bias",
    "U": "unembed.weight",
    "b_u": "unembed.bias",
}


def model_entry(network: Network) -> dict[str, Any]:
    """Return what a certificate says of its model: the digest of the weights, and the sizes."""
    return {
        "sha256": weights_digest(network, NAMES),
        "inputs": network.E.shape[1],
        "width": network.E.shape[0],
        "hidden": network.W_in.shape[0],
        "outputs": network.U.shape[0],
    }


def certify_points(
    problem: Problem,
    strategy: str,
    path: Path | str,
    inputs: Iterable[Path | str] = (),
) -> ProofResult:
    """Prove by a strategy at level real and write the certificate; return the proof.

    Raises InputError for a strategy without a rule, a problem at another level, advice that is not
    float32, and a path as `assay.proofs.certificate.write` does."""
    if strategy not in RULES:
        raise InputError(
            f"strategy {strategy!r} writes no certificate; those that do are {', '.join(RULES)}"
        )
    if problem.level != "real":
        raise InputError(f"a certificate holds at level real, the problem is at {problem.level!r}")
    check_destination(path, inputs)
    f = problem.features
    advice: dict[str, Array] = {
        "decoder": _narrow("decoder", f.decoder[:, 0]),
        "bias": _narrow("bias", f.bias[0]),
        "codes": _narrow("codes", f.codes),
    }
    sides = STRATEGIES[strategy].advice(problem)
    if sides is not None:
        groups, group = np.unique(sides.group, return_inverse=True)
        advice["group"] = group.astype(np.int32)
        if RULES[strategy] != "groups":
            advice["negative"] = sides.negative[groups].astype(np.uint8)
    if not problem.points.pairs:
        advice["inputs"] = _narrow("inputs", problem.points.inputs)
        advice["labels"] = problem.points.labels.astype(np.int32)
    result = prove(problem, strategy)
    total = len(problem.points)
    claim = {
        "count": str(result.count),
        "total": str(total),
        "bound": str(Fraction(result.count, total)),
    }
    certificate = Certificate(
        task=TASK,
        model=model_entry(problem.network),
        strategy=strategy,
        rule=RULES[strategy],
        level=problem.level,
        claim=claim,
        advice=advice,
        own={"points": {"kind": "pairs" if problem.points.pairs else "listed"}},
    )
    write(path, certificate, inputs)
    return result


def _narrow(name: str, array: Array) -> Array:
    narrow = array.astype(np.float32)
    if (narrow != array).any():
        raise InputError(f"{name} must hold float32 numbers to be written into a certificate")
    return narrow
