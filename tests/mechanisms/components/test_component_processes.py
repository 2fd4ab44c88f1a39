"""One, two and four processes have one penalty, one gradient and one training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

from assay.io.runs import Run

RESUMED = ("2-to-1", "1-to-4")


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every group of `component_workers` finds."""
    folder = tmp_path_factory.mktemp("groups")
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(here / "component_workers.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def assert_equal_tensors(first: Path, second: Path) -> None:
    one, two = (torch.load(file, weights_only=True) for file in (first, second))
    assert len(one) > 10
    assert set(two) == set(one)
    for name, entry in one.items():
        torch.testing.assert_close(two[name], entry, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_agree_with_one(world, groups):
    assert_equal_tensors(groups / "losses-1.pt", groups / f"losses-{world}.pt")


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", ["2", "4", *RESUMED])
def test_twenty_steps_and_a_resume_are_the_same_for_every_number_of_processes(name, groups):
    """The logged terms of every step too are those of the whole batch."""
    assert_equal_tensors(groups / "1.pt", groups / f"{name}.pt")
    rows, others = (Run(groups / f"run-{own}").metrics().drop("phase") for own in ("1", name))
    assert len(rows) == 25
    torch.testing.assert_close(
        others.cast(pl.Float64).fill_null(0).to_torch(),
        rows.cast(pl.Float64).fill_null(0).to_torch(),
        rtol=1e-6,
        atol=1e-9,
    )
