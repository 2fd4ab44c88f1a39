"""Which answers hold, over how many parts are free and how far: a map of certified, broken and open
shares for the agreement model, and the same answer on held-out digits with all channels free.

    assay run digits-channels -o runs/digits
    assay run agreement-attribution -o runs/agreement
    OMP_NUM_THREADS=1 python benchmarks/certify_map.py runs/digits runs/agreement \
        --progress map.jsonl
    python docs/pictures.py map.jsonl

Every cell takes the least important nodes with an effect, by exact ablation, on the first --pairs
pairs. The picture shows the shares of the pairs that are done. The digits part prints how many of
the inputs where the search finds no break are certified, and the bracket of each other. With
--progress a run that was stopped goes on."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from certify import effect_sizes, least_important

from assay import certify
from assay.io.runs import opened
from assay.proofs.bracket import Certified
from assay.studies.runner import mechanisms_of

FREE = (3, 5, 10, 20)
LOWS = (0.9, 0.5, 0.0)


class Progress:
    """What is known so far, one line of JSON for each input or cell, so that a run that was killed
    goes on where it stopped. A file is that of one sort of budget.
    """

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path, self.seconds, self.rows = path, seconds, list[dict[str, Any]]()
        if path is not None and path.exists():
            lines = path.read_text().splitlines()
            self.rows = [row for row in map(_line, lines) if row and row["budget"] == seconds]

    def of(self, part: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["part"] == part]

    def has(self, part: str, pair: int, free: int | None = None, low: float | None = None) -> bool:
        return any(
            (row["pair"], row.get("free"), row.get("low")) == (pair, free, low)
            for row in self.of(part)
        )

    def add(self, part: str, entry: dict[str, Any]) -> None:
        row = {"part": part, "budget": self.seconds} | entry
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _line(text: str) -> dict[str, Any] | None:
    """Return one entry; None for a line that was cut off when the run was killed."""
    try:
        found: dict[str, Any] = json.loads(text)
        return found
    except json.JSONDecodeError:
        return None


def verdict(found: Certified) -> str:
    """Return what is known of the answer of one example."""
    words = {"certified": found.certified, "broken": found.broken, "open": found.open}
    return next(word for word, holds in words.items() if bool(holds[0]))


def known(rows: list[dict[str, Any]], pair: int, free: int, low: float) -> str | None:
    """Return what other cells of a pair say of a cell: what is certified over a box is certified
    over the boxes inside it, and what breaks in a box breaks in those around it.
    """
    for row in rows:
        if row["pair"] != pair or "free" not in row:
            continue
        if row["verdict"] == "certified" and row["free"] >= free and row["low"] <= low:
            return "certified"
        if row["verdict"] == "broken" and row["free"] <= free and row["low"] >= low:
            return "broken"
    return None


def agreement(folder: Path, pairs: int, seconds: float, done: Progress) -> None:
    """Print the shares of every cell."""
    whole = mechanisms_of(opened(folder))
    count = min(pairs, len(whole.batch))
    for pair in range(count):
        if all(done.has("agreement", pair, free, low) for free in FREE for low in LOWS):
            continue
        one = whole.take(slice(pair, pair + 1))
        sizes = effect_sizes(one, exact=True)
        # The largest boxes first: what is certified there is certified inside them.
        for low in sorted(LOWS):
            for free in sorted(FREE, reverse=True):
                if done.has("agreement", pair, free, low):
                    continue
                keep = least_important(one, sizes, free)
                said = known(done.of("agreement"), pair, free, low)
                entry = {"pair": pair, "free": free, "low": low, "deduced": said is not None}
                if said is None:
                    found = certify(one, keep, low=low, claim="same-answer", budget=seconds)
                    said = verdict(found)
                    entry |= {"seconds": found.seconds[0], "vacuous": bool(found.vacuous[0])}
                done.add("agreement", entry | {"verdict": said})
    for free in FREE:
        for low in LOWS:
            cell = [r for r in done.of("agreement") if (r["free"], r["low"]) == (free, low)]
            cell = [row for row in cell if row["pair"] < count]
            counts = {
                word: sum(row["verdict"] == word for row in cell)
                for word in ("certified", "broken", "open")
            }
            unbroken = len(cell) - counts["broken"]
            print(
                f"{free:>3} free, low {low}: "
                + ", ".join(f"{number} {word}" for word, number in counts.items())
                + f" of {len(cell)}; {counts['certified']} of {unbroken} unbroken certified"
                f" ({sum(row.get('vacuous', False) for row in cell)} vacuous,"
                f" {sum(row.get('seconds', 0.0) for row in cell) / len(cell):.1f} CPU s a pair)"
            )


def digits(folder: Path, inputs: int, seconds: float, done: Progress) -> None:
    """Print how many answers are certified with all channels free, on the first inputs."""
    whole = mechanisms_of(opened(folder))
    count = min(inputs, len(whole.batch))
    for index in range(count):
        if done.has("digits", index):
            continue
        one = whole.take(slice(index, index + 1))
        found = certify(one, {}, claim="same-answer", budget=seconds)
        entry = {
            "pair": index,
            "verdict": verdict(found),
            "proved": float(found.proved.values[0]),
            "found": float(found.found.values[0]),
            "seconds": found.seconds[0],
        }
        done.add("digits", entry)
    rows = [row for row in done.of("digits") if row["pair"] < count]
    for row in rows:
        if row["verdict"] == "open":
            print(
                f"    open: input {row['pair']}, margin in"
                f" [{row['proved']:.3g}, {row['found']:.3g}]"
            )
    certified, broken = (
        sum(row["verdict"] == word for row in rows) for word in ("certified", "broken")
    )
    print(
        f"digits, all channels free: {certified} of {count - broken} unbroken certified,"
        f" {broken} of {count} broken, at most {max(row['seconds'] for row in rows):.0f} CPU s an"
        " input"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("digits", type=Path)
    parser.add_argument("agreement", type=Path)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--inputs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", choices=("digits", "agreement"))
    parser.add_argument("--progress", type=Path)
    given = parser.parse_args()
    began = time.process_time()
    done = Progress(given.progress, given.seconds)
    if given.only != "agreement":
        digits(given.digits, given.inputs, given.seconds, done)
    if given.only != "digits":
        agreement(given.agreement, given.pairs, given.seconds, done)
    print(f"CPU seconds in all: {time.process_time() - began:.0f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
