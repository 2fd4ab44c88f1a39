"""Mutants of crosscoders: gate rules, bounds made of features, and their checker."""

from __future__ import annotations

from run_mutants import Mutant

INVARIANT = "tests/core/test_invariants.py::test_invariant"
KIND = "tests/mechanisms/crosscoder/test_crosscoder_kind.py"
BOUNDS = "tests/proofs/test_crosscoder_bounds.py"
CHECK = "tests/checker/test_check_crosscoder.py"
TRAINING = "tests/mechanisms/crosscoder/test_crosscoder_training.py"
BILINEAR = "tests/proofs/test_crosscoder_bilinear.py"
BILINEAR_BOUND = f"{BILINEAR}::test_no_bound_exceeds_the_true_margin_whatever_the_advice"
MAX_OF_K = "tests/proofs/test_max_of_k_heuristic.py"
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
        (f"{BOUNDS}::test_an_error_that_no_neuron_reads_counts_by_its_norm",),
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
    Mutant(
        "assay/mechanisms/crosscoder/coder.py",
        "            above = above + (near - near.detach())",
        "            above = above + (near - near)",
        (f"{TRAINING}::test_thresholds_are_learned_by_their_pseudo_derivative",),
    ),
    Mutant(
        "assay/mechanisms/crosscoder/cotraining.py",
        "    found.model_hash = hash_of(model)",
        "    hash_of(model)",
        (f"{TRAINING}::test_a_killed_co_training_goes_on_to_the_same_bits",),
    ),
    Mutant(
        "assay/mechanisms/crosscoder/evaluation.py",
        "        value[rows.kept.to(value.device)] = new.to(value)",
        "        new.to(value)",
        (f"{TRAINING}::test_what_is_measured_on_a_language_model",),
    ),
    Mutant(
        f"{PROOFS}/bilinear.py",
        "ar.low(lead + first - second)",
        "ar.low(lead + first)",
        (BILINEAR_BOUND,),
    ),
    Mutant(
        f"{PROOFS}/bilinear.py",
        "first = -(ar.norm(steep)[:, None] * size[rows])",
        "first = ar.norm(steep)[:, None] * size[rows]",
        (
            BILINEAR_BOUND,
            f"{BILINEAR}::test_without_error_the_bound_is_the_margin_and_levels_agree",
        ),
    ),
    Mutant(
        "assay/proofs/max_of_k/heuristic.py",
        "        mean = mean + share * terms[:m].mean(0).sum(0)",
        "        mean = mean + terms[:m].mean(0).sum(0)",
        (MAX_OF_K,),
    ),
    Mutant(
        "assay/proofs/max_of_k/heuristic.py",
        "    lead[m] = np.inf",
        "    pass",
        (MAX_OF_K,),
    ),
]
