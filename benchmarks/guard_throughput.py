"""Inputs that a guard scores per second on one thread, beside one input at a time, and what it adds
to the network's own forward pass.

The features are those of a digits network: 192 hidden units with the predicted class as root.
CPU seconds, best of two."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from assay.guard import Guarded, Observed, Settings, fit
from assay.guard.reading import read, whole
from assay.guard.wrapper import hash_of, memory
from assay.learn.classifier import train_mlp
from assay.targets.data import load_digits

INPUTS = 20_000


def seconds(function: Callable[[], object], repeats: int = 2) -> float:
    """Return the least CPU seconds of a call."""
    function()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        found.append(time.process_time() - began)
    return min(found)


def main() -> None:
    torch.set_num_threads(1)
    x, y = load_digits().both_parts()
    model = train_mlp(x[:900], y[:900], (128, 64))
    reading = whole(model, x[:100], ["1", "3"])
    parts = [read(model, part, reading) for part in (x[:900], x[900:1150], x[1150:1450])]
    guard = fit(*parts, Settings(), model_hash=hash_of(model), reading=reading.to_json())
    held = x[1450:]
    many = held.repeat(INPUTS // len(held) + 1, 1)[:INPUTS]
    found = read(model, many, reading)
    guarded = Guarded(model, guard)
    batch = seconds(lambda: guard(found))
    one = [found.take(slice(row, row + 1)) for row in range(200)]
    single = seconds(lambda: [guard(row) for row in one]) / len(one)
    plain = seconds(lambda: model(many))
    served = seconds(lambda: guarded(many), 1)
    latency = seconds(lambda: [guarded(many[row : row + 1]) for row in range(100)]) / 100
    bare = seconds(lambda: [model(many[row : row + 1]) for row in range(100)]) / 100
    verdicts = guard(Observed(found.values, found.names, found.logits, found.keys))
    print(f"{len(guard.names)} features, {len(guard.explanations)} explanations, one thread")
    print(f"held-out digits accepted               {float(verdicts.accepted.double().mean()):.1%}")
    print(f"scored per second, {INPUTS:,} at once     {INPUTS / batch:,.0f}")
    print(f"scored per second, one at a time       {1 / single:,.0f}")
    print(f"ratio                                  {single * INPUTS / batch:.1f}")
    print(f"latency of one guarded input           {1e3 * latency:.2f} ms")
    print(f"latency of the network alone           {1e3 * bare:.2f} ms")
    print(f"guarded per second, digests included   {INPUTS / served:,.0f}")
    print(f"the network alone per second           {INPUTS / plain:,.0f}")
    print(f"memory of the guard                    {memory(guard) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
