"""Mutants of what may be overwritten, and of what is bound to weights of the time."""

from __future__ import annotations

from catalogue_components import COMPONENTS
from run_mutants import Mutant

MUTANTS = [
    Mutant(
        "assay/io/texts.py",
        "if place >= start and",
        "if place > start and",
        ("tests/io/test_texts.py::test_pieces_have_the_tokens_of_the_whole",),
    ),
    Mutant(
        "assay/io/texts.py",
        "before = whole[_cut(whole) :]",
        "before = whole[:0]",
        ("tests/io/test_texts.py::test_pieces_have_the_tokens_of_the_whole",),
    ),
    Mutant(
        "assay/learn/processes.py",
        "                dist.all_reduce(parameter.grad)",
        "                dist.all_reduce(parameter.grad.clone())",
        (f"{COMPONENTS}/test_component_processes.py::test_several_processes_agree_with_one",),
        slow=True,
    ),
    Mutant(
        "assay/learn/processes.py",
        "            dist.all_reduce(total)",
        "            dist.broadcast(total, 0)",
        (f"{COMPONENTS}/test_component_processes.py::test_several_processes_agree_with_one",),
        slow=True,
    ),
    Mutant(
        "assay/io/ours.py",
        "    plain = path.is_file() and not path.is_symlink()",
        "    plain = path.is_file()",
        ("tests/io/test_ours.py::test_a_link_to_a_file_of_our_own_stays",),
    ),
    Mutant(
        "assay/io/ours.py",
        "name not in found or value not in (None, found[name]) for",
        "name not in found for",
        ("tests/io/test_ours.py::test_files_of_others_stay",),
    ),
    Mutant(
        "assay/io/files.py",
        "    require_ours(path, metadata or {DIGEST: None})\n",
        "",
        ("tests/io/test_ours.py::test_files_of_others_stay",),
    ),
    Mutant(
        "assay/core/versions.py",
        "None if tensor.is_inference() else tensor._version,",
        "None,",
        ("tests/core/test_versions.py::test_training_after_binding_is_refused",),
    ),
    Mutant(
        "assay/core/versions.py",
        "            if buffer is not None and name not in module._non_persistent_buffers_set:",
        "            if buffer is not None:",
        (
            "tests/core/test_versions.py::test_every_way_to_change_weights_is_seen_and_reading_is_not",
        ),
    ),
    Mutant(
        "assay/core/mechanisms.py",
        "        if self.bound is None:  # else",
        "        if True:  # else",
        ("tests/core/test_versions.py::test_training_after_binding_is_refused",),
    ),
    Mutant(
        "assay/learn/loop.py",
        "            if isinstance(entry, Tensor) and not bool(entry.isfinite().all()):",
        "            if isinstance(entry, Tensor) and bool(entry.isnan().any()):",
        ("tests/learn/test_loop.py::test_a_moment_that_overflows_stops_the_training",),
    ),
]
