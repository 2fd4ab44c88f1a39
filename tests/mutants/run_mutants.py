"""Change one line at a time and see that a named test fails: `make mutants`.

Every mutant is a change of meaning in one line of the product, with the tests that must notice it.
A mutant that survives is a hole in the tests, and so is a test that fails without one: this script
names both and exits 1. It also exits 1 where the catalogue holds fewer than `LEAST` mutants.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEAST = 60


@dataclass(frozen=True)
class Mutant:
    """A line `old` of `src/file` that becomes `new`, and the tests that must fail then.

    `slow` says that those are of the slow tier."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    slow: bool = False

    @property
    def name(self) -> str:
        return f"{self.file}: {self.old.strip()} -> {self.new.strip()}"

    def applied(self) -> str:
        """Return the file's changed text; ValueError unless the line stands there exactly once."""
        text = (ROOT / "src" / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} holds {text.count(self.old)} times: {self.old!r}")
        if self.old == self.new:
            raise ValueError(f"{self.file}: the mutant of {self.old!r} changes nothing")
        return text.replace(self.old, self.new)


@contextmanager
def mutated(mutant: Mutant) -> Iterator[Path]:
    """Make a copy of the sources with the mutant applied."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        (source / mutant.file).write_text(mutant.applied())
        yield source


def outcome(mutant: Mutant, timeout: float = 600) -> str:
    """Run the mutant's tests: "killed", "survived", or what went wrong."""
    with mutated(mutant) as source:
        try:
            done = run_tests(mutant.tests, source, timeout, slow=mutant.slow)
        except subprocess.TimeoutExpired:
            return "killed"  # a mutant may loop for ever
    if done.returncode == 1:
        return "killed"
    if done.returncode == 0:
        return "survived"
    return f"broken: {done.stdout[-400:]}{done.stderr[-400:]}"


def failing(mutants: Iterable[Mutant]) -> dict[str, str]:
    """Return the files of which a named test fails without any mutant, with what pytest says; each
    file runs in a process of its own, as a mutant's does.
    """
    named: dict[tuple[str, bool], dict[str, None]] = {}
    for mutant in mutants:
        for test in mutant.tests:
            named.setdefault((test.partition("::")[0], mutant.slow), {})[test] = None
    found = {}
    for (file, slow), tests in named.items():
        done = run_tests(tuple(tests), ROOT / "src", 600, slow=slow)
        if done.returncode:
            found[file] = f"{done.stdout[-400:]}{done.stderr[-400:]}"
    return found


def run_tests(
    tests: tuple[str, ...], source: Path, timeout: float, *, slow: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run some tests, the fast ones of them unless `slow`, on the sources in a folder, up to the
    first failure.
    """
    with tempfile.TemporaryDirectory() as memory:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(source), str(ROOT / "tests")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            # What earlier failures taught hypothesis would kill a mutant on this machine alone.
            "HYPOTHESIS_STORAGE_DIRECTORY": memory,
        }
        options = ["-q", "-x", "-p", "no:cacheprovider", *([] if slow else ["-m", "not slow"])]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def timed(mutant: Mutant) -> tuple[str, float]:
    """Return the outcome and the seconds that it took."""
    began = time.monotonic()
    return outcome(mutant), time.monotonic() - began


def main() -> None:
    from catalogue import CATALOGUE

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=0, help="so many at random instead of all")
    parser.add_argument("--seed", type=int, default=None, help="of the sample; printed")
    parser.add_argument("--only", default="", help="those whose file holds this text")
    parser.add_argument("--slow", action="store_true", help="those of slow tests too")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    mutants = [
        mutant
        for mutant in CATALOGUE
        if chosen.only in mutant.file and (chosen.slow or not mutant.slow)
    ]
    if chosen.sample:
        seed = int(time.time()) if chosen.seed is None else chosen.seed
        print(f"seed {seed}")
        mutants = random.Random(seed).sample(mutants, min(chosen.sample, len(mutants)))
    with ThreadPoolExecutor(chosen.jobs) as pool:
        results = []
        for mutant, (result, seconds) in zip(mutants, pool.map(timed, mutants), strict=True):
            results.append(result)
            print(f"{result:<9} {seconds:5.1f} s  {mutant.name}", flush=True)
    wrong = failing(mutants)
    for file, said in wrong.items():
        print(f"{file} fails without any mutant: {said}")
    alive = len(results) - results.count("killed")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{len(results) - alive} of {len(results)} mutants killed, of a catalogue of"
        f" {len(CATALOGUE)}, in {spent.ru_utime + spent.ru_stime:.0f} CPU seconds"
    )
    if len(CATALOGUE) < LEAST:
        print(f"the catalogue must hold at least {LEAST} mutants")
    sys.exit(1 if alive or wrong or len(CATALOGUE) < LEAST else 0)


if __name__ == "__main__":
    main()
