"""Two processes give the scores of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import node_models
import pytest
import torch
from cases import rank_one

from assay.attribution import Exact, Gradient
from assay.attribution.distributed import attribute_distributed, start
from assay.core.target import target
from assay.mechanisms.nodes import Nodes, nodes
from assay.targets.metrics import logit_difference

SITES = ["blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"]

WORKER = """
import sys, torch
from test_distributed_attribution import bound
from assay.attribution import Exact, Gradient, IntegratedGradients
from assay.attribution.distributed import attribute_distributed, start
from assay.errors import AssayError, InputError
import cases

bound()  # saves its model: of several processes, transformers lets only the first one write
rank, world = start()
assert world == 2
found = {}
for name, method in (("gradient", Gradient()), ("exact", Exact()), ("path", IntegratedGradients())):
    scores = attribute_distributed(bound(), method)
    found[name] = {**scores.values, "baseline": scores.baseline}
    assert (name == "path") == bool(scores.gaps), scores.gaps

class Failing:
    name = "failing"
    def scores(self, mechanisms):
        if rank == 1:
            raise InputError("no good here")
        return Gradient().scores(mechanisms)

for bad, message in ((lambda: attribute_distributed(bound(), Failing()),
                      "process 1: InputError: no good here"),
                     (lambda: attribute_distributed(bound().take(slice(0, 1))), "fewer")):
    try:
        bad()
    except AssayError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
for name, kind in cases.KINDS.items():
    scores, alone = attribute_distributed(kind()), Gradient().scores(kind())
    for group, values in alone.values.items():
        torch.testing.assert_close(scores.values[group], values, rtol=1e-12, atol=1e-12)
torch.save(found, f"{sys.argv[1]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def bound() -> Nodes:
    clean, patch = node_models.batches()
    model = target(node_models.build("gpt2"), logit_difference)
    return nodes(
        model, clean.take(slice(0, 3)), patch.take(slice(0, 3)), SITES
    )  # three examples: shares of two and one


def test_one_process_needs_no_others() -> None:
    assert start() == (0, 1)
    alone, plain = attribute_distributed(bound()), Gradient().scores(bound())
    assert all(torch.equal(alone.values[name], plain.values[name]) for name in SITES)
    assert attribute_distributed(rank_one()).values["components"].shape == (5, 1, 3)


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=paths(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = {"gradient": Gradient().scores(bound()), "exact": Exact().scores(bound())}
    for name in ("gradient", "exact", "path"):
        for key, values in first[name].items():
            assert torch.equal(values, second[name][key])
            assert len(values) == 3
            if name in alone:
                expected = alone[name].baseline if key == "baseline" else alone[name].values[key]
                torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)


def paths() -> dict[str, str]:
    here = Path(__file__).parent
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
    }
