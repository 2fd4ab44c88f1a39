"""Change one line at a time and see that a named test fails: `make mutants`.

Every mutant is a change of meaning in one line of the product, with the tests that must notice it.
A mutant that survives is a hole in the tests: this script names it and exits 1.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """A line `old` of `src/file` that becomes `new`, and the tests that must fail then."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

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
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(source), str(ROOT / "tests")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                [*command, *mutant.tests],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "killed"  # a mutant may loop for ever
    if done.returncode == 1:
        return "killed"
    return (
        "survived" if done.returncode == 0 else f"broken: {done.stdout[-400:]}{done.stderr[-400:]}"
    )


def main() -> None:
    from catalogue import CATALOGUE

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=0, help="so many at random instead of all")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", default="", help="those whose file holds this text")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    mutants = [mutant for mutant in CATALOGUE if chosen.only in mutant.file]
    if chosen.sample:
        mutants = random.Random(chosen.seed).sample(mutants, min(chosen.sample, len(mutants)))
    with ThreadPoolExecutor(chosen.jobs) as pool:
        results = list(zip(mutants, pool.map(outcome, mutants), strict=True))
    for mutant, result in results:
        print(f"{result:<9} {mutant.name}")
    alive = [mutant for mutant, result in results if result != "killed"]
    print(f"{len(results) - len(alive)} of {len(results)} mutants killed")
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main()
