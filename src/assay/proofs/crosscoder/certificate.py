"""Claims that features prove, in the envelope of `assay.proofs.certificate`: about residual ReLU
networks, bilinear networks, and one-layer attention models.

The task "crosscoder" has one field of its own:

    model    {"sha256", "inputs", "width", "hidden", "outputs"}; of an attention model that of
             `assay.proofs.max_of_k.certificate`
    points   {"kind": "pairs"}, all ordered pairs (a, b) of `outputs` tokens as two one-hot vectors
             side by side, the pair in row `a * outputs + b`, the right output max(a, b); or
             {"kind": "listed"}, those in the advice: `inputs` (points, inputs) float32 and `labels`
             (points,) int32; or {"kind": "sequences"}, all sequences of tokens of an attention
             model, the first token changing slowest, the right output the largest token
    claim    {"count": "n", "total": "N", "bound": "p/q"}: at least n of the N points are answered
             right, their right logit strictly above every other one

`model.sha256` is the SHA-256 of, for each of embed.weight, embed.bias, blocks.0.mlp_in.weight,
blocks.0.mlp_in.bias, blocks.0.mlp_out.weight, blocks.0.mlp_out.bias, unembed.weight, unembed.bias
in this order, the bytes `name + "\\n" + "AxB" + "\\n"` and the float32 entries, little-endian, row
by row; of a bilinear network embed.weight, blocks.0.left.weight, blocks.0.right.weight,
blocks.0.down.weight, head.weight.

Advice, all of it free choices (any finite numbers are sound, codes at least zero): `decoder`
(size, width) and `bias` (width,), what features write at "embed"; `codes` (points, size), float32.
Rules, with the inequality of `assay.proofs.crosscoder.certificates`:

    linear   S_n is N_n where `negative` (groups, hidden; uint8) is 1 in the point's group, else
             P_n; `group` (points,) int32
    compact  the same, and eps_0 enters by its norm alone
    exact    the interaction itself, min(P_n, N_n); no `group`, no `negative`
    groups   `group` alone, points of one label each: over the box of a group's codes and eps_0
             every neuron has a linear bound, and each margin one in (z, eps_0)
    balls, intervals, slopes
             the baselines of `assay.proofs.crosscoder.baselines`, over the ball of eps_0 around
             rhat_0; balls also takes `decoder_after` (size, width) and `bias_after` (width,), what
             features write at "blocks.0"

about a bilinear network, with the inequality of `assay.proofs.crosscoder.bilinear`,

    quadratic, quadratic-compact    the error to first order as it is, or by its norm

and about an attention model, with that of `assay.proofs.crosscoder.attention`,

    attention, attention-compact    the same; `decoder` (size, positions, width) and `bias`
                                    (positions, width) are those of the positions

The level is "real"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from assay.errors import InputError
from assay.proofs.certificate import Certificate, check_destination, weights_digest, write
from assay.proofs.crosscoder.arithmetic import Array
from assay.proofs.crosscoder.attention import AttentionProblem, attention_margins
from assay.proofs.crosscoder.bilinear import BilinearProblem, bilinear_margins
from assay.proofs.crosscoder.problem import Network, Points, Problem
from assay.proofs.crosscoder.prove import STRATEGIES, ProofResult, prove
from assay.proofs.max_of_k.certificate import model_entry as attention_entry
from assay.targets.residual_relu import pairs_of_tokens

TASK = "crosscoder"
RULES = {
    "one_side": "linear",
    "one_side_compact": "compact",
    "strongest": "linear",
    "compact": "compact",
    "exact": "exact",
    "groups": "groups",
    "balls": "balls",
    "intervals": "intervals",
    "linear_propagation": "slopes",
}
"""Every strategy, with the rule that its certificate names."""
BILINEAR_RULES = {"exact": "quadratic", "compact": "quadratic-compact"}
ATTENTION_RULES = {"exact": "attention", "compact": "attention-compact"}

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
BILINEAR_NAMES = {
    "E": "embed.weight",
    "L": "blocks.0.left.weight",
    "R": "blocks.0.right.weight",
    "D": "blocks.0.down.weight",
    "U": "head.weight",
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

    Raises InputError for an unknown strategy, a problem at another level, weights or advice
    that are not float32, points that are called pairs and are others, and a path as
    `assay.proofs.certificate.write` does."""
    _require(problem.level, strategy, RULES)
    check_destination(path, inputs)
    _require_narrow(problem.network)
    f = problem.features
    advice: dict[str, Array] = {
        "decoder": _narrow("decoder", f.decoder[:, 0]),
        "bias": _narrow("bias", f.bias[0]),
        "codes": _narrow("codes", f.codes),
    }
    if strategy == "balls":
        advice["decoder_after"] = _narrow("decoder", f.decoder[:, 1])
        advice["bias_after"] = _narrow("bias", f.bias[1])
    sides = STRATEGIES[strategy].advice(problem)
    if sides is not None:
        groups, group = np.unique(sides.group, return_inverse=True)
        advice["group"] = group.astype(np.int32)
        if RULES[strategy] != "groups":
            advice["negative"] = sides.negative[groups].astype(np.uint8)
    kind, points = _points_entry(problem.points, problem.network.U.shape[0])
    advice |= points
    result = prove(problem, strategy)
    model, rule = model_entry(problem.network), RULES[strategy]
    _write(path, inputs, model, strategy, rule, result.right, advice, kind)
    return result


def certify_bilinear(
    problem: BilinearProblem,
    strategy: str,
    path: Path | str,
    inputs: Iterable[Path | str] = (),
) -> Array:
    """Prove points of a bilinear network at level real and write the certificate; return the lower
    bounds of the margins. Raises InputError as `certify_points` does.
    """
    _require(problem.level, strategy, BILINEAR_RULES)
    check_destination(path, inputs)
    _require_narrow(problem.weights)
    f, w = problem.features, problem.weights
    advice = {
        "decoder": _narrow("decoder", f.decoder[:, 0]),
        "bias": _narrow("bias", f.bias[0]),
        "codes": _narrow("codes", f.codes),
    }
    kind, points = _points_entry(problem.points, w.U.shape[0])
    advice |= points
    model = {
        "sha256": weights_digest(w, BILINEAR_NAMES),
        "inputs": w.E.shape[1],
        "width": w.E.shape[0],
        "hidden": w.L.shape[0],
        "outputs": w.U.shape[0],
    }
    margins = bilinear_margins(problem, strategy)
    _write(path, inputs, model, strategy, BILINEAR_RULES[strategy], margins > 0, advice, kind)
    return margins


def certify_attention(
    problem: AttentionProblem,
    strategy: str,
    path: Path | str,
    inputs: Iterable[Path | str] = (),
) -> Array:
    """Prove all sequences of tokens of an attention model at level real and write the certificate;
    return the lower bounds of the margins.

    Raises InputError as `certify_points` does, and for tokens other than all sequences in order."""
    _require(problem.level, strategy, ATTENTION_RULES)
    check_destination(path, inputs)
    _require_narrow(problem.weights)
    w, f = problem.weights, problem.features
    every = np.indices((w.vocabulary,) * w.positions).reshape(w.positions, -1).T
    if not np.array_equal(problem.tokens, every):
        raise InputError(
            f"a certificate is about all {len(every)} sequences in order, the first token changing"
            f" slowest; got {len(problem.tokens)}"
        )
    advice = {
        "decoder": _narrow("decoder", f.decoder[:, : w.positions]),
        "bias": _narrow("bias", f.bias[: w.positions]),
        "codes": _narrow("codes", f.codes),
    }
    margins = attention_margins(problem, strategy)
    rule, model = ATTENTION_RULES[strategy], attention_entry(w)
    _write(path, inputs, model, strategy, rule, margins > 0, advice, "sequences")
    return margins


def _require(level: str, strategy: str, rules: Mapping[str, str]) -> None:
    if strategy not in rules:
        raise InputError(
            f"strategy {strategy!r} writes no certificate; those that do are {', '.join(rules)}"
        )
    if level != "real":
        raise InputError(f"a certificate holds at level real, the problem is at {level!r}")


def _write(
    path: Path | str,
    inputs: Iterable[Path | str],
    model: dict[str, Any],
    strategy: str,
    rule: str,
    right: Array,
    advice: dict[str, Array],
    kind: str,
) -> None:
    count, total = int(right.sum()), len(right)
    claim = {"count": str(count), "total": str(total), "bound": str(Fraction(count, total))}
    certificate = Certificate(
        task=TASK,
        model=model,
        strategy=strategy,
        rule=rule,
        level="real",
        claim=claim,
        advice=advice,
        own={"points": {"kind": kind}},
    )
    write(path, certificate, inputs)


def _points_entry(points: Points, outputs: int) -> tuple[str, dict[str, Array]]:
    """Return the kind of points that a certificate names, and what of them stands in the advice;
    InputError for pairs that are not all pairs in order.
    """
    if points.pairs:
        every, largest = (part.numpy() for part in pairs_of_tokens(outputs))
        same = np.array_equal(points.inputs, every) and np.array_equal(points.labels, largest)
        if not same:
            raise InputError(
                f"points that are called pairs must be all {outputs**2} pairs of tokens, in order"
            )
        return "pairs", {}
    inputs = _narrow("inputs", points.inputs)
    return "listed", {"inputs": inputs, "labels": points.labels.astype(np.int32)}


def _require_narrow(weights: Any) -> None:
    """Raise InputError for weights that are not float32, which the file of weights holds."""
    for entry in fields(weights):
        _narrow(entry.name, getattr(weights, entry.name))


def _narrow(name: str, array: Array) -> Array:
    narrow = array.astype(np.float32)
    if (narrow != array).any():
        raise InputError(f"{name} must hold float32 numbers to be written into a certificate")
    return narrow
