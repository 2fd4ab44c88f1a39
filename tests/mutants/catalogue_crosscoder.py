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
ATTENTION = "tests/proofs/test_crosscoder_attention.py"
NETWORKS = "tests/checker/test_check_crosscoder_networks.py"
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
        f"{PROOFS}/certificates.py",
        "ar.exact(tables.reach[:, None]) * half(ar))",
        "ar.exact(tables.reach[:, None]) * half(ar) * half(ar))",
        (f"{BOUNDS}::test_no_bound_exceeds_the_true_margin", f"{BOUNDS}::test_any_advice_is_sound"),
    ),
    Mutant(
        f"{PROOFS}/problem.py",
        "ar.matmul(inner, ar.exact(n.W_in)) * half(ar)",
        "ar.matmul(inner, ar.exact(n.W_in))",
        (f"{BOUNDS}::test_an_error_passes_by_half_up_to_as_much_again",),
    ),
    Mutant(
        f"{PROOFS}/sides.py",
        "        better = score > most",
        "        better = score > -np.inf",
        (f"{BOUNDS}::test_searched_sides_certify_no_less_than_those_that_are_smaller_on_average",),
    ),
    Mutant(
        f"{PROOFS}/certificates.py",
        "ar.low(lead - lost)",
        "ar.high(lead - lost)",
        (f"{BOUNDS}::test_norms_and_linear_bounds_are_rounded_to_the_safe_side",),
    ),
    Mutant(
        f"{PROOFS}/problem.py",
        "self.ar.high(self.ar.norm(self.error))",
        "self.ar.low(self.ar.norm(self.error))",
        (f"{BOUNDS}::test_norms_and_linear_bounds_are_rounded_to_the_safe_side",),
    ),
    Mutant(
        f"{PROOFS}/problem.py",
        "ar.high(ar.norm(ar.exact(n.W_in)))",
        "ar.low(ar.norm(ar.exact(n.W_in)))",
        (f"{BOUNDS}::test_norms_and_linear_bounds_are_rounded_to_the_safe_side",),
    ),
    Mutant(
        "assay_check/crosscoder/propagation.py",
        "size = sizes[i] * (1 + steep) + norm(gap)",
        "size = sizes[i] * (1 + steep)",
        (f"{CHECK}::test_the_bounds_of_checker_and_prover_are_equal[balls]",),
    ),
    Mutant(
        "assay_check/crosscoder/propagation.py",
        "terms = (positive(c) * positive(a) - positive(-c) * positive(b) for c, (a, b) in kept)",
        "terms = (positive(c) * positive(a) - positive(-c) * positive(a) for c, (a, b) in kept)",
        (f"{CHECK}::test_the_bounds_of_checker_and_prover_are_equal[intervals]",),
    ),
    Mutant(
        "assay_check/crosscoder/propagation.py",
        "    return found, (arb_mat(steep) * model.W_in).tolist()",
        "    return found, (arb_mat(steep) * model.W_in * 0).tolist()",
        (f"{CHECK}::test_the_bounds_of_checker_and_prover_are_equal[linear_propagation]",),
    ),
    Mutant(
        "assay_check/crosscoder/groups.py",
        "    below = 1 if float(low) + float(high) > 0 else 0",
        "    below = 1",
        (f"{CHECK}::test_the_bounds_of_checker_and_prover_are_equal[linear_propagation]",),
    ),
    Mutant(
        "assay_check/crosscoder/margins.py",
        "zip(row, reaches, strict=True)), arb(0)) / 2",
        "zip(row, reaches, strict=True)), arb(0)) / 8",
        (f"{CHECK}::test_the_checker_finds_what_the_prover_found",),
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
        '        if rule != "compact":',
        "        if True:",
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
        f"{PROOFS}/attention.py",
        " + moved + sizes[K - 1] * apart * steep",
        " + moved",
        (f"{ATTENTION}::test_no_bound_exceeds_the_true_margin_whatever_the_advice",),
    ),
    Mutant(
        f"{PROOFS}/attention.py",
        "            for place, way in ((q, of_key), (p, -of_key)):",
        "            for place, way in ((q, of_key),):",
        (ATTENTION,),
    ),
    Mutant(
        f"{PROOFS}/attention.py",
        "        smallest = ar.exact(np.minimum.reduce(least_values))",
        "        smallest = ar.exact(np.maximum.reduce(least_values))",
        (ATTENTION,),
    ),
    Mutant(
        f"{PROOFS}/attention.py",
        "                return found - sizes[p][rows] * ar.norm(away)[None]",
        "                return found",
        (ATTENTION,),
    ),
    Mutant(
        "assay_check/crosscoder/attention.py",
        "                lead = lead + steep * sizes[-1][i] * distance",
        "                pass",
        (NETWORKS,),
    ),
    Mutant(
        "assay_check/crosscoder/attention.py",
        "                sums[i] = sums[i] + (lead / root).exp()",
        "                sums[i] = sums[i] + (lead / root / 2).exp()",
        (NETWORKS,),
    ),
    Mutant(
        "assay_check/crosscoder/bilinear.py",
        "                    lost = first * sizes[i] + bent * sizes[i] * sizes[i]",
        "                    lost = first * sizes[i]",
        (NETWORKS,),
    ),
    Mutant(
        "assay_check/crosscoder/bilinear.py",
        '        if rule == "quadratic":',
        "        if True:",
        (NETWORKS,),
    ),
    Mutant(
        "assay_check/crosscoder/__init__.py",
        '        (entry["kind"] == "sequences") == (rule in ATTENTION),',
        "        True,",
        (NETWORKS,),
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
