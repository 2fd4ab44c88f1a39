"""`assay prove` and `assay check`: both claims, what they are about, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from assay.errors import InputError
from assay.learn.max_of_k import train_max_of_k
from assay.studies.proofs import check_certificate, prove_task
from assay.targets import max_of_k


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    return max_of_k.save(folder / "net.safetensors", train_max_of_k(6, 3, 12, steps=200, rate=0.01))


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "assay.cli", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("level", ["real", "float32"])
def test_a_loss_is_proved_and_checked(level: str, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "loss.json"
    found = prove_task("max-of-k", weights, level=level, loss=True, certificate=path)
    assert found["proved"]
    assert found["quantity"].startswith("mean cross-entropy")
    verdict, _ = check_certificate(path, weights)
    assert verdict["accepted"]
    assert verdict["measure"] == "the mean cross-entropy, all 6^3 = 216 inputs alike"
    assert verdict["level"] == level
    assert (verdict["assumptions"] == "none") == (level == "real")
    assert json.loads(path.read_text())["claim"] == {"cross_entropy": found["fraction"]}
    searched = prove_task("max-of-k", weights, level="float64", loss=True)
    assert not searched["proved"]
    assert searched["bound"] <= found["bound"] * 1.001


def test_the_loss_has_one_strategy(weights: Path) -> None:
    same = [prove_task("max-of-k", weights, strategy=s, loss=True) for s in ("best", "cubic")]
    assert same[0]["fraction"] == same[1]["fraction"]
    for strategy in ("box_exact", "all", "brute_force"):
        with pytest.raises(InputError, match="one strategy, 'cubic'"):
            prove_task("max-of-k", weights, strategy=strategy, loss=True)


@pytest.mark.slow
def test_commands_print_what_a_verdict_is_about(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "loss.json"
    done = command("prove", "max-of-k", weights, "--loss", "-o", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "in nats, at most" in done.stdout
    done = command("check", path, "--weights", weights)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("accepted", "measure", "level", "assumptions", "216 inputs alike", "none"):
        assert word in done.stdout
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        *("accepted", "measure", "level", "assumptions")
    ]
    done = command("check", path, "--weights", weights, "--json")
    verdict: dict[str, Any] = json.loads(done.stdout)
    assert verdict["accepted"] is True
    assert verdict["level"] == "real"
    entry = json.loads(path.read_text())
    entry["claim"] = {"cross_entropy": "1/1000000"}
    path.write_text(json.dumps(entry))
    done = command("check", path, "--weights", weights)
    assert done.returncode == 1
    assert done.stdout.startswith("rejected: ")
    assert "measure" in done.stdout
    done = command("prove", "max-of-k", weights, "--loss", "-o", weights)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
