"""Mutants of the guard: its files, what it serves, and the level of its tests."""

from __future__ import annotations

from run_mutants import Mutant

FILES = "tests/guard/test_guard_files.py"
WRAPPER = "tests/guard/test_guard_wrapper.py"
SERVING = "tests/guard/test_serving.py"
GUARD = "tests/guard/test_guard.py"

MUTANTS = [
    Mutant(
        "assay/guard/files.py",
        '    if _checksum(entry) != entry["checksum"]:',
        '    if not entry["checksum"]:',
        (f"{FILES}::test_an_edited_json_is_refused",),
    ),
    Mutant(
        "assay/guard/files.py",
        "    if guard.ranks is not None and not (statistic.ndim == 1 and len(statistic)):",
        "    if guard.ranks is not None and not statistic.ndim == 1:",
        (f"{FILES}::test_forged_tensors_are_refused",),
    ),
    Mutant(
        "assay/guard/files.py",
        'require_ours(folder / CONFIG, {"format": FORMAT})',
        "folder / CONFIG",
        ("tests/guard/test_guard_files.py::test_what_is_not_a_guard_is_left_alone",),
    ),
    Mutant(
        "assay/guard/wrapper.py",
        "        self._require_same()\n",
        "",
        (f"{WRAPPER}::test_a_network_that_is_changed_or_replaced_is_noticed",),
    ),
    Mutant(
        "assay/guard/wrapper.py",
        "            if args and kwargs:",
        "            if args and not kwargs and not args:",
        (f"{WRAPPER}::test_inputs_by_position_and_by_keyword_are_not_mixed",),
    ),
    Mutant(
        "assay/core/target.py",
        "            module.training = True",
        "            model.train()",
        ("tests/guard/test_guard_wrapper.py::test_every_module_keeps_its_mode",),
    ),
    Mutant(
        "assay/guard/conformal.py",
        "    return found.float().double()",
        "    return found",
        (f"{WRAPPER}::test_ties_are_ties_however_many_inputs_are_scored_at_once",),
    ),
    Mutant(
        "assay/guard/conformal.py",
        "    return (size - below + 1).double() / (size + 1)",
        "    return (size - below).double() / size",
        (f"{GUARD}::test_the_tests_keep_their_level_over_resplits",),
    ),
    Mutant(
        "assay/guard/fitting.py",
        "    if 1 / (len(calibration) + 1) > guard.settings.alpha:",
        "    if 1 / (len(calibration) + 1) > 2 * guard.settings.alpha:",
        (f"{WRAPPER}::test_tests_that_could_reject_nothing_are_refused",),
    ),
    Mutant(
        "assay/guard/guard.py",
        "        usable = finite & torch.isfinite(scores).all(0)",
        "        usable = torch.isfinite(scores).all(0)",
        (f"{GUARD}::test_what_is_not_finite_is_rejected",),
    ),
    Mutant(
        "assay/guard/compiled.py",
        "        return found & self.root[roots][:, None]",
        "        return found",
        (f"{GUARD}::test_a_root_value_without_evidence_is_rejected",),
    ),
    Mutant(
        "assay/guard/fitting.py",
        "settings.delta / found.candidates",
        "settings.delta",
        (f"{GUARD}::test_every_accepted_event_has_its_evidence",),
    ),
]
