"""The catalogue fits the sources, and a sample of its mutants is killed."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest
from catalogue import CATALOGUE
from run_mutants import LEAST, ROOT, Mutant, failing, outcome


def test_every_mutant_changes_a_line_that_stands_once_and_names_tests_that_exist():
    for mutant in CATALOGUE:
        mutant.applied()
        for test in mutant.tests:
            assert (ROOT / test.partition("::")[0]).exists(), test
    assert len({mutant.name for mutant in CATALOGUE}) == len(CATALOGUE) >= LEAST


@pytest.mark.slow
def test_a_mutant_whose_tests_do_not_look_survives():
    first = CATALOGUE[0]
    missing = Mutant(first.file, first.old, first.new, ("tests/core/no_such_test.py",))
    assert outcome(missing).startswith("broken")
    unseen = Mutant(
        "assay/errors.py", "    exit_code = 2", "    exit_code = 3", ("tests/core/test_sites.py",)
    )
    assert outcome(unseen) == "survived"


def test_a_test_that_fails_without_a_mutant_is_named(tmp_path: Path):
    test = tmp_path / "test_wrong.py"
    test.write_text("def test_right(): pass\ndef test_wrong(): assert False\n")
    names = [(f"{test}::{name}",) for name in ("test_right", "test_wrong")]
    mutants = [Mutant("assay/errors.py", "x", "y", tests) for tests in names]
    assert failing(mutants[:1]) == {}
    assert "test_wrong" in failing(mutants)[str(test)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sample_is_killed():
    """The catalogue draws the sample, so that one tree always gives one answer; `make mutants`
    tries them all.
    """
    seed = zlib.crc32("".join(sorted(mutant.name for mutant in CATALOGUE)).encode())
    fast = [mutant for mutant in CATALOGUE if not mutant.slow]
    chosen = random.Random(seed).sample(fast, 4)
    found = {mutant.name: outcome(mutant) for mutant in chosen}
    alive = {name: result for name, result in found.items() if result != "killed"}
    assert not alive, f"seed {seed}: {alive}"
    assert not failing(chosen), f"seed {seed}"
    assert Path(ROOT / "Makefile").read_text().count("run_mutants.py")
