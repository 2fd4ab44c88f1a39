"""Progress bars: on a terminal every long loop shows one, anywhere else stderr stays empty."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from assay.progress import counted, progress

pty = pytest.importorskip("pty", reason="pseudo-terminals of POSIX systems")
termios = pytest.importorskip("termios", reason="pseudo-terminals of POSIX systems")

LOOPS = """
import sys
sys.path.insert(0, sys.argv[1])
from assay import progress
progress.DELAY = 0.0
import cases, plain_gpt2, torch
from torch import nn
from transformers.utils import logging
logging.disable_progress_bar()  # that of the tests' own models
from assay.attribution import Exact, IntegratedGradients, SecondOrder, attribute
from assay.audit.adversary import worst_case
from assay.audit.faithfulness import curve
from assay.bounds import ball, bound
from assay.bounds.convert import graph_of
from assay.edges.patching import exact_edges
from assay.learn.max_of_k import train_max_of_k
from assay.mechanisms.directions import PowerIteration, around, fisher_factors
from assay.mechanisms.directions.forms import quadratic_forms
from assay.proofs.max_of_k.prove import prove
from assay.targets.max_of_k import save

scores = attribute(cases.dictionary(), IntegratedGradients())
attribute(cases.dictionary(), Exact())
attribute(cases.bound_directions(), SecondOrder())
attribute(cases.bound_nodes(), Exact())
curve(scores, [0.5, 1.0])
worst_case(cases.dictionary(), restarts=2, steps=2)
exact_edges(plain_gpt2.target_of(plain_gpt2.tiny_gpt2()), *plain_gpt2.pair())
generator = torch.Generator().manual_seed(0)
local = around(nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64))
quadratic_forms(local, torch.eye(local.space.size, dtype=torch.float64)[:2])
PowerIteration(2, steps=3)(fisher_factors(local, "kl"), generator=generator)
bound(graph_of(nn.Linear(3, 2), (3,)), ball(torch.zeros(2, 3), 0.1))
weights = save(sys.argv[2], train_max_of_k(4, 2, 4, steps=3))
prove(weights, "best")
"""
LABELS = (
    "ablating features",
    "integrated gradients",
    "path of features",
    "second order",
    "patching ",
    "faithfulness",
    "worst case",
    "patching edges",
    "quadratic forms",
    "power iteration",
    "bounds",
    "max-of-k",
    "largest tokens",
)


def on_a_terminal(words: list[str]) -> str:
    """Return what a command writes to a terminal that is its stderr."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    said = b""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end was closed
                part = b""
            if not part:
                break
            said += part
    os.close(ours)
    assert process.returncode == 0, said.decode()
    return said.decode()


@pytest.mark.slow
def test_every_long_loop_shows_a_bar_on_a_terminal_and_nothing_elsewhere(tmp_path: Path) -> None:
    words = [sys.executable, "-c", LOOPS, str(Path(__file__).parent), str(tmp_path / "w")]
    said = on_a_terminal([*words[:-1], f"{words[-1]}1.safetensors"])
    assert [label for label in LABELS if label not in said] == []
    piped = subprocess.run(
        [*words[:-1], f"{words[-1]}2.safetensors"], capture_output=True, text=True, check=True
    )
    assert (piped.stdout, piped.stderr) == ("", "")


@pytest.mark.parametrize("stream", [None, io.StringIO(), object()])
def test_bars_are_silent_without_a_terminal(
    stream: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("assay.progress.DELAY", 0.0)
    assert list(progress(range(3), "loop")) == [0, 1, 2]
    assert list(progress(iter("ab"), "loop", total=2, initial=1)) == ["a", "b"]
    with counted(3, "loop") as bar:
        bar.update(2)
    if isinstance(stream, io.StringIO):
        assert stream.getvalue() == ""
