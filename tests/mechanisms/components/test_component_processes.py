"""One, two and four processes have one penalty and one gradient."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import sys, torch
from component_networks import mixed
from assay.learn.processes import join, sum_gradients, sum_over_processes
from assay.mechanisms.components import (
    Faithfulness, LpMinimality, Objective, Persistent, Problem, Recon, Rows, SmoothL0, Fresh)

rank, world = join()
tokens = torch.randint(7, (8, 3), generator=torch.Generator().manual_seed(0))
own = tokens.chunk(world)[rank]
out = {}
forms = {
    "lp": LpMinimality(0.3, beta=0.2, p=0.4),
    "smooth": SmoothL0(0.3, frequency=0.1, references=50.0, gamma=0.3, half_life=4.0),
}
for name, form in forms.items():
    model, found = mixed()
    problem = Problem(
        model, found, Objective((Recon(Persistent(warm=1)),), form, Faithfulness(0.2)),
        torch.Generator().manual_seed(1), reduce=sum_over_processes, world=world).double()
    for _ in range(2):
        found.zero_grad()
        loss, terms = problem(Rows(own), 0.5)
        loss.backward()
        sum_gradients(found)
        problem.finish()
    out[f"{name} penalty"] = terms["minimality"].detach()
    for key, parameter in found.named_parameters():
        out[f"{name} {key}"] = parameter.grad
    for key, entry in problem.adversaries.named_buffers():
        out[f"{name} {key}"] = entry
if rank == 0:
    torch.save(out, sys.argv[1])
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def results(world: int, folder: Path) -> dict[str, torch.Tensor]:
    port, file = str(free_port()), folder / f"{world}.pt"
    processes = []
    for rank in range(world):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
            "OMP_NUM_THREADS": "1",
        }
        if world > 1:
            environment |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        command = [sys.executable, "-W", "ignore", "-c", WORKER, str(file)]
        processes.append(subprocess.Popen(command, env=environment))
    assert [process.wait(timeout=120) for process in processes] == [0] * world
    return torch.load(file, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_agree_with_one(world, tmp_path):
    alone, shared = results(1, tmp_path), results(world, tmp_path)
    assert len(alone) > 20
    assert set(shared) == set(alone)
    for name, entry in alone.items():
        torch.testing.assert_close(shared[name], entry, rtol=1e-6, atol=1e-9, msg=name)
