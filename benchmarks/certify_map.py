"""Which answers hold, over how many parts are free and how far: a map of certified, broken and open
shares for the agreement model, and the same answer on held-out digits with all channels free.

    assay run digits-channels -o runs/digits
    assay run agreement-attribution -o runs/agreement
    OMP_NUM_THREADS=1 python benchmarks/certify_map.py runs/digits runs/agreement --out map.html

Every cell takes the least important nodes with an effect, by exact ablation, on the first --pairs
pairs. The picture shows the shares; the lines are printed as they come. The digits part prints how
many of the inputs where the search finds no break are certified, and the bracket of each other."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import polars as pl
import torch
from certify import effect_sizes, least_important

from assay import certify, charts
from assay.core.mechanisms import Mechanisms
from assay.io.runs import opened
from assay.studies.runner import mechanisms_of

FREE = (3, 5, 10, 20)
LOWS = (0.9, 0.5, 0.0)


def agreement(folder: Path, pairs: int, seconds: float, out: Path | None) -> None:
    """Print and draw the shares of every cell."""
    mechanisms = mechanisms_of(opened(folder)).take(slice(0, pairs))
    sizes = effect_sizes(mechanisms, exact=True)
    rows = []
    for free in FREE:
        keep = least_important(mechanisms, sizes, free)
        for low in LOWS:
            found = certify(mechanisms, keep, low=low, claim="same-answer", budget=seconds)
            shares = {
                "certified": float(found.certified.double().mean()),
                "broken": float(found.broken.double().mean()),
                "open": float(found.open.double().mean()),
            }
            unbroken = 1 - shares["broken"]
            print(
                f"{free:>3} free, low {low}: "
                + ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
                + f"; {shares['certified'] / unbroken:.2f} of the unbroken certified"
                if unbroken
                else f"{free:>3} free, low {low}: all broken",
                f"({int(found.vacuous.sum())} vacuous, {sum(found.seconds) / len(found.full):.1f}"
                " CPU s an example)",
                flush=True,
            )
            rows += [
                {"cell": f"{free} free, down to {low}", "answers": name, "share": share}
                for name, share in shares.items()
            ]
    if out is not None:
        picture = charts.bars(
            pl.DataFrame(rows),
            "cell",
            "share",
            colour="answers",
            title=f"Answers of {pairs} pairs with the least important nodes free",
        )
        picture.save(out)


def digits(folder: Path, inputs: int, seconds: float) -> None:
    """Print how many answers are certified with all channels free, on the first inputs."""
    mechanisms: Mechanisms = mechanisms_of(opened(folder)).take(slice(0, inputs))
    certified = broken = 0
    for index in range(len(mechanisms.batch)):
        one = mechanisms.take(slice(index, index + 1))
        found = certify(one, {}, claim="same-answer", budget=seconds)
        certified += int(found.certified.sum())
        broken += int(found.broken.sum())
        if bool(found.open.any()):
            ends = float(found.proved.values[0]), float(found.found.values[0])
            print(f"    open: input {index}, margin in [{ends[0]:.3g}, {ends[1]:.3g}]", flush=True)
    count = len(mechanisms.batch)
    unbroken = max(count - broken, 1)
    print(
        f"digits, all channels free: {certified} of {count - broken} unbroken certified"
        f" ({certified / unbroken:.2f}), {broken} of {count} broken"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("digits", type=Path)
    parser.add_argument("agreement", type=Path)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--inputs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", choices=("digits", "agreement"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    began = time.process_time()
    if given.only != "agreement":
        digits(given.digits, given.inputs, given.seconds)
    if given.only != "digits":
        agreement(given.agreement, given.pairs, given.seconds, given.out)
    print(f"CPU seconds in all: {time.process_time() - began:.0f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
