"""Steps per CPU-second and peak memory of learning components, beside a plain loop of the same
objective; with `--train`, what both find on the same network in equally many steps.

The plain loop is the usual way to write it: every row of the batch, the nets of all components as
one einsum over a hidden layer that is kept, delta matrices that are formed, and the losses read
back at every step. Its objective is that of ours: stochastic reconstruction over all sites and
layer by layer, with masks at either end and the same penalty. It starts at random, as usual, and
ours at the data."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as f

from assay.learn import toys
from assay.mechanisms.components import (
    Decomposition,
    Objective,
    Problem,
    Recon,
    Rows,
    SmoothL0,
    Stochastic,
    Training,
    decomposition,
    lower,
    skip_zeros,
    start_at_data,
    train,
    upper,
)
from assay.mechanisms.components.reconstruction import climb_ladder, open_scene
from assay.mechanisms.components.recovery import identity_error, probes, recover
from assay.mechanisms.components.training import make_optimizer
from assay.targets.tms import TMS, pentagon, untie
from assay.targets.toys import Autoencoder

PENALTY = SmoothL0(3.4e-3, gamma=0.03, end=0.8)
SOURCE = Stochastic("binary")
RECON = (Recon(SOURCE), Recon(SOURCE, "layerwise"))
ROWS = 2048
RATES = {"rate": 1e-3, "importance_rate": 6e-3}


def draw(features: int, rows: int, generator: torch.Generator) -> Tensor:
    """Draw inputs, each feature active with probability 0.05."""
    x = torch.rand(rows, features, generator=generator)
    return x * (torch.rand(x.shape, generator=generator) < 0.05)


def plain_loss(
    model: TMS, found: Decomposition, x: Tensor, done: float, generator: torch.Generator
) -> Tensor:
    """Return the objective of one batch, written the plain way."""
    weights = [model.linear1.weight.detach().T, model.linear2.weight.detach().T]
    bias, nets = model.linear2.bias.detach(), found.importance
    hidden = x @ weights[0]
    clean = torch.relu(hidden @ weights[1] + bias)
    lows, penalty = [], torch.zeros(())
    width = PENALTY.width(done)
    for index, read in enumerate((x, hidden)):
        h = read @ found.V[index]
        layer = f.gelu(torch.einsum("bc,ch->bch", h, nets.w1[index]) + nets.b1[index])
        z = torch.einsum("bch,ch->bc", layer, nets.w2[index]) + nets.b2[index]
        lows.append(lower(z))
        a = upper(z)
        penalty = penalty + PENALTY.coefficient * (a**2 / (a**2 + width**2)).mean(0).sum()

    def masked(chosen: tuple[int, ...]) -> Tensor:
        value = x
        for index in range(2):
            whole = value @ weights[index]
            if index in chosen:
                v, u, g = found.V[index], found.U[index], lows[index]
                m = g + (1 - g) * torch.rand(g.shape, generator=generator).round()
                r = torch.rand(len(x), 1, generator=generator).round()
                whole = ((value @ v) * m) @ u + r * (value @ (weights[index] - v @ u))
            value = torch.relu(whole + bias) if index == 1 else whole
        return (value - clean).square().mean()

    return masked((0, 1)) + (masked((0,)) + masked((1,))) / 2 + penalty


def ready(features: int, hidden: int, components: int) -> tuple[TMS, Decomposition]:
    """Return a network and an untrained decomposition of it."""
    generator = torch.Generator().manual_seed(0)
    tied = pentagon() if features == 5 else Autoencoder(features, hidden, generator)
    model = untie(tied)
    return model, decomposition(model, "*", components, generator=generator)


def stepper(
    name: str, model: TMS, found: Decomposition, batch: int, steps: int, seed: int = 0
) -> Callable[[int], None]:
    """Return one training step of ours or of the plain loop."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(found, Training(**RATES))
    features = model.encoder.shape[1]
    problem = Problem(model, found, Objective(RECON, PENALTY), generator)

    def ours(step: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss, _ = problem(skip_zeros(draw(features, batch, generator)), step / steps)
        loss.backward()
        optimizer.step()

    def plain(step: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        x = draw(features, batch, generator)
        loss = plain_loss(model, found, x, step / steps, generator)
        loss.backward()
        optimizer.step()
        float(loss.detach())  # as loops do that log every step

    return ours if name == "ours" else plain


def time_steps(name: str, count: int) -> float:
    """Return steps per CPU-second on TMS 5-2 with 20 components and 4096 rows."""
    model, found = ready(5, 2, 20)
    step = stepper(name, model, found, 4096, 10_000)
    for index in range(5):
        step(index)
    began = time.process_time()
    for index in range(count):
        step(index)
    return count / (time.process_time() - began)


def peak_memory(name: str) -> float:
    """Return the peak resident memory in MB of a process that takes three steps on TMS 40-10 with
    200 components and 4096 rows."""
    command = [sys.executable, __file__, "--memory", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report_memory(name: str) -> None:
    """Take three steps and print this process's peak in MB."""
    model, found = ready(40, 10, 200)
    step = stepper(name, model, found, 4096, 100)
    for index in range(3):
        step(index)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def print_found(seeds: int, steps: int) -> None:
    """Train both on the same trained networks and print what they find."""
    print(f"TMS 5-2 after {steps} steps of {ROWS} rows, encoder + decoder")
    print("wrong importances, MMCS, ML2R; then the error under PGD-20")
    for seed in range(seeds):
        tied = toys.tms(5, 2, seed=seed).model
        assert isinstance(tied, Autoencoder)
        worst = {}
        for name in ("ours", "plain"):
            began = time.process_time()
            model = untie(tied)
            generator = torch.Generator().manual_seed(seed)
            found = decomposition(model, "*", 20, generator=generator)
            if name == "ours":
                start_at_data(model, found, draw(5, 4096, generator), generator)
                train(
                    model,
                    found,
                    Objective(RECON, PENALTY),
                    lambda generator: skip_zeros(draw(5, ROWS, generator)),
                    Training(steps, **RATES),
                    generator=generator,
                )
            else:
                step = stepper("plain", model, found, ROWS, steps, seed)
                for index in range(steps):
                    step(index)
            seconds = time.process_time() - began
            scene = open_scene(
                model,
                found,
                Rows(draw(5, ROWS, torch.Generator().manual_seed(99))),
                "mse",
                torch.Generator().manual_seed(98),
            )
            worst[name] = climb_ladder(scene, (20,))["divergence"].item()
            at_probes = found.importances(model, probes(5))
            wrong = [identity_error(at_probes[site]) for site in ("linear1", "linear2")]
            ends = [
                recover(model, found, site, at_probes[site], features=side)
                for site, side in (("linear1", "inputs"), ("linear2", "outputs"))
            ]
            print(
                f"seed {seed} {name:<6} {wrong[0]} + {wrong[1]:<3}"
                f" {ends[0].mmcs:.4f} + {ends[1].mmcs:.4f}  {ends[0].ml2r:.4f} + {ends[1].ml2r:.4f}"
                f"  {worst[name]:.3g}  {seconds:6.1f} CPU s",
                flush=True,
            )
        print(f"seed {seed} PGD-20, ours over plain: {worst['ours'] / worst['plain']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--train", type=int, default=0, metavar="STEPS")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--memory", choices=("ours", "plain"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory:
        report_memory(given.memory)
    elif given.train:
        print_found(given.seeds, given.train)
    else:
        speeds = {name: time_steps(name, given.steps) for name in ("ours", "plain")}
        print("TMS 5-2, 20 components, 4096 rows: steps per CPU-second")
        print(f"ours {speeds['ours']:.1f}, plain loop {speeds['plain']:.1f}")
        print(f"ratio {speeds['ours'] / speeds['plain']:.1f}")
        memory = {name: peak_memory(name) for name in ("ours", "plain")}
        print("TMS 40-10, 200 components, 4096 rows: peak memory of the process, MB")
        print(f"ours {memory['ours']:.0f}, plain loop {memory['plain']:.0f}")
