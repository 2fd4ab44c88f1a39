"""Mutants of the independent checker: what it reads, counts, and allows for rounding."""

from __future__ import annotations

from run_mutants import Mutant

MUTANTS = [
    # reading
    Mutant(
        "assay_check/reading.py",
        '        need(len(dict(pairs)) == len(pairs), "a key appears twice")\n',
        '        need(len(dict(pairs)) <= len(pairs), "a key appears twice")\n',
        ("tests/checker/test_check_tampering.py",),
    ),
    Mutant(
        "assay_check/reading.py",
        "and span[1] - span[0] == math.prod(shape) * np.dtype(TYPES[kind]).itemsize",
        "and span[1] - span[0] >= math.prod(shape) * np.dtype(TYPES[kind]).itemsize",
        ("tests/checker/test_check_reader.py",),
    ),
    Mutant(
        "assay_check/reading.py",
        "        len(body),\n",
        "        spans[-1][1],\n",
        ("tests/checker/test_check_reader.py",),
    ),
    # envelope
    Mutant(
        "assay_check/envelope.py",
        'hashlib.sha256(data).hexdigest() == self.stored.get("sha256"),',
        'self.stored.get("sha256"),',
        ("tests/checker/test_check_tampering.py",),
    ),
    Mutant(
        "assay_check/envelope.py",
        "        need(self.stored == none, ",
        "        need(self.stored or none, ",
        ("tests/checker/test_check_cross_entropy.py",),
    ),
    Mutant(
        "assay_check/envelope.py",
        "            f\"assumptions: {'; '.join(self.assumptions) or 'none'}\",",
        '            "assumptions: none",',
        ("tests/checker/test_check_envelope.py",),
    ),
    # tasks
    Mutant(
        "assay_check/tasks.py",
        '"max-of-k": MAX_OF_K}',
        '"max_of_k": MAX_OF_K}',
        ("tests/checker/test_check_envelope.py",),
    ),
    # max_of_k
    Mutant(
        "assay_check/max_of_k/__init__.py",
        "    elif envelope.model != model.entry:",
        "    elif envelope.model.keys() != model.entry.keys():",
        ("tests/checker/test_check_tampering.py",),
    ),
    # measure
    Mutant(
        "assay_check/max_of_k/measure.py",
        "return self.plain and not self.listed",
        "return self.plain",
        ("tests/checker/test_check_envelope.py",),
    ),
    Mutant(
        "assay_check/max_of_k/measure.py",
        'label = "" if "accuracy" in letters else',
        'label = "" if "accuracy" in self.name else',
        ("tests/checker/test_check_envelope.py",),
    ),
    # accuracy
    Mutant(
        "assay_check/max_of_k/accuracy.py",
        "return found >= count, reason",
        "return found + 1 >= count, reason",
        ("tests/checker/test_check_tampering.py",),
    ),
    Mutant(
        "assay_check/max_of_k/accuracy.py",
        "(sets[..., V:].any(-1) | (sets[..., :V] & ~tokens).any(-1)).any(0)",
        "(sets[..., V:].any(-1) | (sets[..., :V] & ~tokens).all(-1)).any(0)",
        ("tests/checker/test_check_tampering.py",),
    ),
    # margins
    Mutant(
        "assay_check/max_of_k/margins.py",
        "2.0**-46 * model.K**2 * R",
        "0.0 * model.K**2 * R",
        ("tests/checker/test_check_rooms.py::test_ties_that_float64_gets_wrong_are_settled",),
    ),
    Mutant(
        "assay_check/max_of_k/margins.py",
        "self.error[q] + self.error[q, m] + self.extra",
        "self.error[q] + self.extra",
        ("tests/checker/test_check_rooms.py::test_the_errors_of_both_logits_count",),
    ),
    Mutant(
        "assay_check/max_of_k/margins.py",
        "                if best[c] < 0:",
        "                if best[c] <= 0:",
        ("tests/checker/test_check_rooms.py::test_ties_that_float64_gets_wrong_are_settled",),
    ),
    Mutant(
        "assay_check/max_of_k/margins.py",
        "sums[m, lane] - 2 * self.error[q, m] * sums[V],",
        "sums[m, lane],",
        ("tests/checker/test_check_rooms.py::test_the_errors_of_both_logits_count",),
    ),
    # execution
    Mutant(
        "assay_check/max_of_k/execution.py",
        "(K + 4) * MANY + floor",
        "4 * MANY + floor",
        (
            "tests/checker/test_check_rooms.py::test_a_softmax_and_a_mean_that_lose_all_their_small_terms",
        ),
    ),
    Mutant(
        "assay_check/max_of_k/execution.py",
        "query @ k_error.T + (h + 4) * MANY * s_top",
        "query @ k_error.T + 4 * MANY * s_top",
        ("tests/checker/test_check_rooms.py::test_a_large_score_that_loses_all_its_small_terms",),
    ),
    Mutant(
        "assay_check/max_of_k/execution.py",
        "return error @ W + (len(W) + 1) * MANY * sizes",
        "return error @ W + len(W) * MANY * sizes",
        ("tests/checker/test_check_rooms.py::test_every_rounding_of_the_direct_path",),
    ),
    Mutant(
        "assay_check/max_of_k/execution.py",
        "l_error, l_top = _sum(slip + o_error + UNIT * r_top + TINY,",
        "l_error, l_top = _sum(slip + o_error + TINY,",
        ("tests/checker/test_check_rooms.py::test_every_rounding_of_the_direct_path",),
    ),
    # cross_entropy
    Mutant(
        "assay_check/max_of_k/cross_entropy.py",
        "                    ceil(ldexp(total, UNITS)) * count",
        "                    int(ldexp(total, UNITS)) * count",
        ("tests/checker/test_check_rooms.py::test_summed_losses_are_rounded_up",),
    ),
    Mutant(
        "assay_check/max_of_k/cross_entropy.py",
        "room = (4 * K + 32) * 2.0**-53",
        "room = 0 * 2.0**-53",
        (
            "tests/checker/test_check_rooms.py::test_the_mean_loss_allows_for_large_numbers_that_cancel",
        ),
    ),
    Mutant(
        "assay_check/max_of_k/cross_entropy.py",
        "        (places[:, c:].sum(1), places[:, :c].sum(1)),",
        "        (places[:, :n].sum(1), places[:, n:].sum(1)),",
        (
            "tests/checker/test_check_rooms.py::test_both_ends_of_the_positional_weight_are_looked_at",
        ),
    ),
    Mutant(
        "assay_check/max_of_k/cross_entropy.py",
        'return f"{ceil(value * 10**9) / 10**9:.9f}"',
        'return f"{int(value * 10**9) / 10**9:.9f}"',
        ("tests/checker/test_check_rooms.py::test_a_bound_is_shown_rounded_up",),
    ),
    # pins of gates
    Mutant(
        "assay_check/gates/tree.py",
        "if side == 1 and slope.hi.reshape(-1)[place] <= 0:",
        "if side == 1:",
        ("tests/checker/test_check_gates.py::test_a_forgery_is_refused",),
    ),
    Mutant(
        "assay_check/gates/choices.py",
        "np.where(both, end, 0.0) for end in (x.lo, np.minimum(x.hi, t.hi))",
        "np.where(both, end, 0.0) for end in (x.lo, np.minimum(x.hi, t.lo))",
        ("tests/checker/test_check_choices.py::test_no_value_leaves_the_rules_of_a_choice",),
    ),
]
