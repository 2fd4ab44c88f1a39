"""Mutants of crosscoders: gate rules, bounds made of features, and their checker."""

from __future__ import annotations

from run_mutants import Mutant

INVARIANT = "tests/core/test_invariants.py::test_invariant"
KIND = "tests/mechanisms/crosscoder/test_crosscoder_kind.py"
BOUNDS = "tests/proofs/test_crosscoder_bounds.py"
CHECK = "tests/checker/test_check_crosscoder.py"
PROOFS = "assay/proofs/crosscoder"

MUTANTS = [
    Mutant(
        "assay/mechanisms/crosscoder/gates.py",
        "        return held | super().edits_of(names, clamped)",
        "        return super().edits_of(names, clamped)",
        (f"{INVARIANT}[exact_is_one_gate_at_zero-crosscoder, clamp]",),
    ),
    Mutant(
        "assay/mechanisms/crosscoder/gates.py",
        "        return decoder * here.unsqueeze(-1)",
        "        return decoder",
        (f"{KIND}::test_a_gate_acts_where_its_rule_says",),
    ),
    Mutant(
        "assay/mechanisms/crosscoder/training.py",
        "    found.W_dec.div_(scales[:, None])",
        "    found.W_dec.mul_(scales[:, None])",
        (f"{KIND}::test_folding_keeps_codes_and_what_they_rebuild",),
    ),
    Mutant(
        f"{PROOFS}/certificates.py",
        "    positive = ar.combine(codes, ar.relu(pre)) + ar.relu(bias)",
        "    positive = ar.combine(codes, ar.relu(pre))",
        (f"{BOUNDS}::test_no_bound_exceeds_the_true_margin",),
    ),
    Mutant(
        f"{PROOFS}/certificates.py",
        "        return -(size * ar.norm(away)[None]) - reach",
        "        return -reach",
        (f"{BOUNDS}::test_no_bound_exceeds_the_true_margin", f"{BOUNDS}::test_any_advice_is_sound"),
    ),
    Mutant(
        f"{PROOFS}/certificates.py",
        "    return ar.matmul(problem.error[rows], ar.transpose(away)) - reach",
        "    return ar.matmul(problem.error[rows], ar.transpose(away))",
        (f"{BOUNDS}::test_no_bound_exceeds_the_true_margin", f"{BOUNDS}::test_any_advice_is_sound"),
    ),
    Mutant(
        f"{PROOFS}/relaxation.py",
        "    offset = -ar.matmul(negative, lift[:, None])",
        "    offset = ar.matmul(negative, lift[:, None])",
        (f"{BOUNDS}::test_relaxations_lie_below_the_neurons",),
    ),
    Mutant(
        f"{PROOFS}/arithmetic.py",
        "rounding.sub_down(found.lo, spread), rounding.add_up(found.hi, spread)",
        "found.lo, found.hi",
        (f"{BOUNDS}::test_intervals_of_products_enclose_them",),
    ),
    Mutant(
        "assay_check/crosscoder/__init__.py",
        '    need((arrays["codes"] >= 0).all(), f"{name}: codes must not be negative")',
        "    pass",
        (f"{CHECK}::test_forged_advice_is_refused[codes below zero]",),
    ),
    Mutant(
        "assay_check/crosscoder/__init__.py",
        "    if envelope.model != model.entry:",
        "    if False:",
        (f"{CHECK}::test_other_weights_are_refused",),
    ),
    Mutant(
        "assay_check/crosscoder/margins.py",
        '        kept = rebuilt if rule == "compact" else state',
        "        kept = state",
        (f"{CHECK}::test_the_checker_finds_what_the_prover_found",),
    ),
    Mutant(
        "assay_check/crosscoder/margins.py",
        "            [arb.min(p, n) for p, n in zip(above, below, strict=True)]",
        "            [arb(0) for p, n in zip(above, below, strict=True)]",
        (f"{CHECK}::test_the_checker_finds_what_the_prover_found",),
    ),
]
