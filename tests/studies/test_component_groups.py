"""Components by several processes: `torchrun` gives the numbers of one process, a group that loses
one stops with one line, and another number of processes goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from assay.io.runs import Run
from assay.studies import runner
from assay.targets.agreement import agreement_text, build_model, build_tokenizer
from assay.targets.language import save_language_model


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home = tmp_path_factory.mktemp("own")
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), layers=2, width=16, heads=2, context=16, seed=0)
    (home / "text.txt").write_text("\n".join(agreement_text(200)))
    return [
        f"target.path={save_language_model(home / 'model', model, tokenizer)}",
        f"data.path={home / 'text.txt'}",
        "data.length=12",
        "data.held_out=6",
        "sites=[transformer.h.*.mlp.c_*, transformer.wte, lm_head]",
        "components.per_site=10",
        "components.width=16",
        "components.hidden=16",
        "training.steps=20",
        "training.warmup_steps=10",
        "training.batch=4",
        "pgd=[3, 6]",
    ]


def command(world: int, sets: list[str], folder: Path) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    words = [word for entry in sets for word in ("--set", entry)]
    start = [sys.executable, *torchrun, "-m", "assay"]
    return [*start, "run", "components", "--json", *words, "-o", str(folder)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def run_here(sets: list[str], folder: Path, *, resume: bool = False) -> dict:
    summary = runner.execute(runner.load("components", sets), folder, resume=resume)
    summary.pop("seconds")
    return summary


def finish(world: int, sets: list[str], folder: Path) -> dict:
    done = subprocess.run(
        command(world, sets, folder),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    summary.pop("seconds")
    return summary


def assert_same(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        numbers = value.values() if isinstance(value, dict) else [value]
        if all(isinstance(number, float) for number in numbers):
            assert found[key] == pytest.approx(value, rel=tolerance, abs=1e-6), key
        else:
            assert found[key] == value, key


@pytest.mark.slow
def test_a_group_prints_what_one_process_prints(sets: list[str], tmp_path: Path) -> None:
    alone = run_here(sets, tmp_path / "alone")
    assert_same(finish(2, sets, tmp_path / "two"), alone, 1e-4)
    losses = [Run(tmp_path / name).metrics() for name in ("alone", "two")]
    assert losses[0].height > 2
    for row, other in zip(losses[0].to_dicts(), losses[1].to_dicts(), strict=True):
        assert other.keys() == row.keys()
        for key, value in row.items():
            numeric = isinstance(value, float)
            assert other[key] == (pytest.approx(value, rel=1e-4) if numeric else value), key


@pytest.mark.slow
def test_a_group_that_loses_a_process_stops_with_one_line(sets: list[str], tmp_path: Path) -> None:
    longer = [*sets, "training.steps=250"]
    folder = tmp_path / "run"
    group = subprocess.Popen(
        command(2, longer, folder), env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (folder / "components.pt").exists() and time.monotonic() < deadline:
        assert group.poll() is None
        time.sleep(0.02)
    workers = Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    errors = group.communicate(timeout=120)[1]
    assert group.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("assay:")]
    assert len(said) == 1
    assert "another process of the group has stopped" in said[0]
    assert not (folder / "summary.json").exists()
    assert Run(folder).state("components.pt")["optimizer"]["state"]
    resumed = run_here(longer, folder, resume=True)
    assert_same(resumed, run_here(longer, tmp_path / "whole"), 1e-2)


@pytest.mark.slow
def test_a_study_of_one_process_refuses_a_group(tmp_path: Path) -> None:
    words = command(2, [], tmp_path / "run")
    words[words.index("components")] = "tms-components"
    done = subprocess.run(
        words, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("assay:")]
    assert said == [
        "assay: the study 'toy-components' runs in one process; start it without torchrun"
    ]
    assert not (tmp_path / "run").exists()
