"""Mutants of proofs: ties, ends of enclosures, roundings of the executed network, files."""

from __future__ import annotations

from run_mutants import Mutant

MUTANTS = [
    # subcubic
    Mutant(
        "assay/proofs/max_of_k/strategies/subcubic.py",
        "good = (margins(p, limits) < 0) & (limits >= 0)",
        "good = (margins(p, limits) <= 0) & (limits >= 0)",
        (
            "tests/proofs/test_soundness.py::test_ties_are_wrong_whatever_the_advice_claims[subcubic_anchored-float64]",
        ),
    ),
    # exact
    Mutant(
        "assay/proofs/max_of_k/strategies/exact.py",
        "            no_others = part.over_competitors(part.all_max.copy()) < 0",
        "            no_others = part.over_competitors(part.all_max.copy()) <= 0",
        (
            "tests/proofs/test_soundness.py::test_ties_are_wrong_whatever_the_advice_claims[box_exact-float64]",
        ),
    ),
    Mutant(
        "assay/proofs/max_of_k/strategies/exact.py",
        "claimed & (part.worst(largest, c) < 0)[:, None]",
        "claimed & (part.worst(largest, c) <= 0)[:, None]",
        (
            "tests/proofs/test_soundness.py::test_ties_are_wrong_whatever_the_advice_claims[box_exact-float64]",
        ),
    ),
    # cubic
    Mutant(
        "assay/proofs/max_of_k/strategies/cubic.py",
        "sets[0, queries, m, c, :m] &= margin < 0",
        "sets[0, queries, m, c, :m] &= margin <= 0",
        ("tests/proofs/test_soundness.py::test_ties_are_wrong[cubic-float64]",),
    ),
    # rivals
    Mutant(
        "assay/proofs/max_of_k/strategies/rivals.py",
        "(tables.up(tables.times(few, of_key) + fixed) < 0) | absent",
        "(tables.up(tables.times(few, of_key) + fixed) <= 0) | absent",
        ("tests/proofs/test_soundness.py::test_ties_are_wrong[named_rivals-float64]",),
    ),
    # brute
    Mutant(
        "assay/proofs/max_of_k/strategies/brute.py",
        "return np.asarray((margin < 0).all(-1))",
        "return np.asarray((margin <= 0).all(-1))",
        ("tests/proofs/test_soundness.py::test_ties_are_wrong[brute_force-float64]",),
    ),
    Mutant(
        "assay/proofs/max_of_k/strategies/brute.py",
        "found = largest < -doubt",
        "found = largest < 0",
        (
            "tests/checker/test_check_rooms.py::test_screening_in_float32_leaves_doubtful_sequences_to_float64",
        ),
    ),
    # tables
    Mutant(
        "assay/proofs/max_of_k/tables.py",
        "return self.up(self.EV.hi[tokens] - self.EV.lo[tokens, m : m + 1])",
        "return self.up(self.EV.hi[tokens] - self.EV.hi[tokens, m : m + 1])",
        ("tests/proofs/test_tables.py::test_differences_of_written_logits_are_bounded_exactly",),
    ),
    Mutant(
        "assay/proofs/max_of_k/tables.py",
        "        2.0 * logit_error(weights, exp_ulp=exp_ulp).max(1)",
        "        1.0 * logit_error(weights, exp_ulp=exp_ulp).max(1)",
        ("tests/proofs/test_tables.py::test_the_slack_covers_both_logits_of_a_difference",),
    ),
    # execution
    Mutant(
        "assay/proofs/max_of_k/execution.py",
        "relative, summed = 2 * UNIT * exp_ulp, (positions + 4) * UNIT",
        "relative, summed = 2 * UNIT * exp_ulp, 4 * UNIT",
        (
            "tests/checker/test_check_rooms.py::test_a_softmax_and_a_mean_that_lose_all_their_small_terms",
        ),
    ),
    Mutant(
        "assay/proofs/max_of_k/execution.py",
        "spread = spread + gamma(w.head + 4) * (exact + spread)",
        "spread = spread + gamma(4) * (exact + spread)",
        ("tests/checker/test_check_rooms.py::test_a_large_score_that_loses_all_its_small_terms",),
    ),
    # cross_entropy
    Mutant(
        "assay/proofs/max_of_k/cross_entropy.py",
        "        np.ceil(loss * 2.0**_SCALE)",
        "        np.floor(loss * 2.0**_SCALE)",
        ("tests/proofs/test_cross_entropy.py::test_a_loss_known_in_closed_form_is_met_from_above",),
    ),
    Mutant(
        "assay/proofs/max_of_k/cross_entropy.py",
        "return Fraction(ceil(self.bound * (1 + Fraction(1, 1 << 20)) * unit), unit)",
        "return Fraction(int(self.bound * (1 + Fraction(1, 1 << 20)) * unit), unit)",
        (
            "tests/proofs/test_cross_entropy.py::test_what_is_claimed_is_no_less_than_what_is_proved",
        ),
    ),
    Mutant(
        "assay/proofs/max_of_k/cross_entropy.py",
        "mean = tables.up(np.maximum(top / low, top / high))",
        "mean = tables.up(top / high)",
        (
            "tests/proofs/test_cross_entropy.py::test_a_mean_is_bounded_whatever_weights_are_in_their_intervals",
        ),
    ),
    # cells
    Mutant(
        "assay/proofs/max_of_k/cells.py",
        "(c <= np.where(q == m, positions - 1, positions - 2)) & ((c == 0) | (m > 0))",
        "(c <= positions - 1) & ((c == 0) | (m > 0))",
        ("tests/proofs/test_cells.py::test_cells_partition_the_inputs",),
    ),
    # certificate
    Mutant(
        "assay/proofs/certificate.py",
        "        if any(_same(target, Path(given)) for given in inputs):",
        "        if any(target == Path(given) for given in inputs):",
        ("tests/proofs/test_certificate.py::test_no_output_is_an_input",),
    ),
    Mutant(
        "assay/proofs/certificate.py",
        "    require_ours(advice_path(path), MARK)\n",
        "",
        ("tests/proofs/test_certificate.py::test_links_of_others_are_never_replaced",),
    ),
]
