"""SAELens's trainer in a process of its own, for `dictionary_training.py`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def peer_command(python: Path) -> list[str]:
    return [str(python), str(Path(__file__).resolve().parent / "sae_lens_training.py")]


def peer_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": ""}


class Peer:
    """SAELens's trainer in a process of its own, which takes a step for every line."""

    def __init__(self, python: Path, folder: Path, given: Mapping[str, Any], sparse: bool) -> None:
        sizes = folder / f"sizes-{sparse}.json"
        sizes.write_text(json.dumps({**given, "sparse": sparse}))
        self.said = folder / f"said-{sparse}.txt"
        said = self.said.open("w")
        self.process = subprocess.Popen(
            [*peer_command(python), "step", str(folder), str(sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            cwd=folder,
            env=peer_environment(),
        )
        said.close()
        self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            lines = self.said.read_text().strip().splitlines() or ["it ended early"]
            raise RuntimeError(([one for one in lines if "Error" in one] or lines)[-1][:120])
        return line

    def ask(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.read()

    def result(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.close()
        found: dict[str, float] = json.loads(self.read())
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def stepping(
    python: Path | None, folder: Path, given: Mapping[str, Any]
) -> Iterator[dict[str, Peer]]:
    """Start a trainer with dense and one with sparse activations, and end both."""
    peers: dict[str, Peer] = {}
    try:
        if python is not None:
            for kind, sparse in (("dense", False), ("sparse", True)):
                peers[kind] = Peer(python, folder, given, sparse)
        yield peers
    finally:
        for peer in peers.values():
            peer.end()
