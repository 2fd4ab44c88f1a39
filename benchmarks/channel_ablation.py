"""Exact ablation of every channel: the error scan against zeroing one channel at a time, in CPU
seconds and peak memory.

Run with `python benchmarks/channel_ablation.py [--blocks 4 --hidden 256 --width 64 --batch 256
--float64]`."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor

from assay.mechanisms.channels.ablation import ablate_channels
from assay.mechanisms.channels.clean import run_clean
from assay.mechanisms.channels.weights import read_weights
from assay.targets.bilinear import BilinearNetwork


@torch.no_grad()
def zero_one_by_one(model: BilinearNetwork, x: Tensor, y: Tensor, *, reuse: bool = False) -> Tensor:
    """Return the effects by setting one channel to zero and running again; with `reuse`, from
    that block on.
    """
    states = [model.embed(x)]
    for block in model.blocks:
        states.append(block(states[-1]))
    clean = model.head(states[-1]).gather(1, y[:, None])[:, 0]
    effects = clean.new_empty(len(x), len(model.blocks), model.hidden)
    for index, block in enumerate(model.blocks):
        for channel in range(model.hidden):
            state = states[index] if reuse else model.embed(x)
            for later, other in enumerate(model.blocks):
                if later == index:
                    h = block.left(state) * block.right(state)
                    h[:, channel] = 0
                    state = state + block.down(h)
                elif later > index or not reuse:
                    state = other(state)
            effects[:, index, channel] = clean - model.head(state).gather(1, y[:, None])[:, 0]
    return effects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {
        "blocks": 4,
        "hidden": 256,
        "width": 64,
        "batch": 256,
        "threads": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--float64", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(0)
    model = BilinearNetwork(
        64, 10, width=given.width, hidden=given.hidden, blocks=given.blocks, generator=generator
    )
    model = model.to(torch.float64 if given.float64 else torch.float32)
    x = torch.randn(given.batch, 64, generator=generator).to(model.head.weight.dtype) * 0.3
    y = torch.randint(0, 10, (given.batch,), generator=generator)

    def scan() -> Tensor:
        return ablate_channels(run_clean(read_weights(model), x, y)).effects

    scan()
    fast, effects = _timed(scan)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    prefix, _ = _timed(lambda: zero_one_by_one(model, x, y, reuse=True))
    slow, expected = _timed(lambda: zero_one_by_one(model, x, y))
    gap = float((effects - expected).abs().max() / expected.abs().max())
    print(
        f"{given.blocks} x {given.hidden} channels, width {given.width}, batch {given.batch},"
        f" {model.head.weight.dtype}"
    )
    print(f"zeroing one channel at a time   {slow:8.2f} CPU s")
    print(f"  from the ablated block on     {prefix:8.2f} CPU s   {slow / prefix:5.1f} x")
    print(
        f"error scan                      {fast:8.2f} CPU s   {slow / fast:5.1f} x   peak memory"
        f" {memory:.0f} MiB"
    )
    print(f"largest difference, relative to the largest effect: {gap:.1e}")


def _timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    begin = time.process_time()
    result = function()
    return time.process_time() - begin, result


if __name__ == "__main__":
    main()
