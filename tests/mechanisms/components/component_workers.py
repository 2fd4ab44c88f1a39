"""Groups of processes that compute the same thing: `python component_workers.py FOLDER` writes what
every number of them finds. They are forked, so that what they import is imported once."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from component_networks import mixed

from assay.io.runs import Run
from assay.learn.processes import join, sum_gradients, sum_over_processes
from assay.mechanisms.components import (
    Faithfulness,
    Fresh,
    LpMinimality,
    Merged,
    Objective,
    Persistent,
    Problem,
    Recon,
    Rows,
    SmoothL0,
    Training,
    train,
)

WORLDS = (1, 2, 4)
RESUMED = ((2, 1), (1, 4))
STEPS, LOST = 20, 12
FORMS = {
    "lp": LpMinimality(0.3, beta=0.2, p=0.4),
    "smooth": SmoothL0(0.3, frequency=0.1, references=50.0, gamma=0.3, half_life=4.0),
}


def compute_losses(file: Path) -> None:
    """Save loss, terms, gradients and sources of two steps; all processes start differently."""
    rank, world = join()
    tokens = torch.randint(7, (8, 3), generator=torch.Generator().manual_seed(0))
    out = {}
    for name, form in FORMS.items():
        model, found = mixed()
        problem = Problem(
            model,
            found,
            Objective((Recon(Persistent(warm=1)), Recon(Fresh(2, 0.3))), form, Faithfulness(0.2)),
            torch.Generator().manual_seed(1),
            reduce=sum_over_processes,
            world=world,
        ).double()
        for _ in range(2):
            found.zero_grad()
            loss, terms = problem(Rows(tokens).share(rank, world), 0.5)
            loss.backward()
            sum_gradients(found)
            problem.finish()
        out[f"{name} loss"] = loss.detach()
        out |= {f"{name} {key}": term.detach() for key, term in terms.items()}
        out |= {f"{name} {key}": own.grad for key, own in found.named_parameters()}
        out |= {f"{name} {key}": entry for key, entry in problem.adversaries.named_buffers()}
    if rank == 0:
        torch.save(out, file)


def train_steps(file: Path, folder: Path, last: int) -> None:
    """Train for `STEPS` steps, or stop before the one after `last`."""
    torch.set_default_dtype(torch.float64)
    rank, _ = join()
    drawn = 0

    def draw(generator: torch.Generator) -> Rows:
        nonlocal drawn
        drawn += 1
        if drawn > last:
            sys.exit(0)
        tokens = torch.randint(7, (6, 3), generator=generator)
        return Rows(tokens, (tokens != 0).double(), int((tokens != 0).sum()))

    model, found = mixed()
    train(
        model,
        found,
        Objective(
            (Recon(routing="subset"), Recon(Merged(Persistent(0.1), 0.5), coefficient=0.5)),
            LpMinimality(0.01, beta=0.2, p=0.4, p_start=2.0),
            Faithfulness(0.2),
        ),
        draw,
        Training(steps=STEPS, warmup_steps=5, log_every=1, save_every=8),
        generator=torch.Generator().manual_seed(3),
        run=None if rank else Run(folder),
    )
    if rank == 0:
        torch.save(found.state_dict(), file)


def start_group(world: int, work: Callable[..., None], *given: object) -> None:
    """Run the same work in `world` processes; AssertionError where one of them fails."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            os._exit(_run_as(rank, world, port, work, given))
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(own, 0)[1]) for own in children] == [0] * world


def _run_as(
    rank: int, world: int, port: str, work: Callable[..., None], given: tuple[object, ...]
) -> int:
    if world > 1:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = (str(rank), str(world), "127.0.0.1", port)
        os.environ.update(zip(names, values, strict=True))
    try:
        work(*given)
        return 0
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        atexit._run_exitfuncs()  # leaves the group
        sys.stderr.flush()


def main(folder: Path) -> None:
    for world in WORLDS:
        start_group(world, compute_losses, folder / f"losses-{world}.pt")
        start_group(world, train_steps, folder / f"{world}.pt", folder / f"run-{world}", STEPS)
    for before, after in RESUMED:
        own, run = folder / f"{before}-to-{after}.pt", folder / f"run-{before}-to-{after}"
        start_group(before, train_steps, own, run, LOST)
        assert not own.exists()
        start_group(after, train_steps, own, run, STEPS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
