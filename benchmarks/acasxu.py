"""Properties of the ACAS-Xu networks (arXiv 1702.01135), as `assay verify` decides them.

    OMP_NUM_THREADS=1 python benchmarks/acasxu.py FOLDER [--instances N] [--seconds S]
        [--only PROPERTIES] [--progress FILE]

FOLDER holds the networks, the properties and instances.csv (network, property and time limit per
line; --seconds replaces the limits). Instances come in a fixed random order, so that the share of
those that were run says something of all; --only 3,4 with --networks 1_1,1_2 chooses some. A row is
printed for each: the verdict, boxes, CPU seconds (the network and its trace included), the proved
bound and the open share of the volume. With --progress the same command goes on where it stopped.

Verdicts are compared with what exhaustive tools found (the table of arXiv 1702.01135, VNN-COMP
2021): property 1 holds on all, 3 and 4 hold but for networks 1_7 to 1_9, 5, 6, 9 and 10 hold, 7 is
violated on 1_9 and 8 on 2_9. A contradiction ends the benchmark with exit code 1; property 2
differs from network to network and is not compared."""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from assay.io.vnnlib import read_vnnlib
from assay.proofs.unsafe import verify
from assay.targets.onnx_network import load_onnx


def expected(network: str, number: int) -> str | None:
    """Return the verdict that is known, if it is."""
    if number == 2:
        return None
    unsafe = (number in (3, 4) and network in ("1_7", "1_8", "1_9")) or number in (7, 8)
    return "violated" if unsafe else "holds"


def instances(folder: Path) -> list[tuple[str, int, Path, Path, float]]:
    """Return (network, property, their files, CPU seconds) in a fixed random order."""
    found = []
    for network, claim, limit in csv.reader((folder / "instances.csv").open()):
        name = "_".join(Path(network).stem.split("_")[2:4])
        number = int(Path(claim).stem.split("_")[1])
        found.append((name, number, folder / network, folder / claim, float(limit)))
    random.Random(0).shuffle(found)
    return found


def known(path: Path | None, seconds: float | None) -> list[dict[str, Any]]:
    """Return the rows that an earlier run with the same limit left."""
    if path is None or not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [row for row in rows if row["limit"] == seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--instances", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--only")
    parser.add_argument("--networks")
    parser.add_argument("--progress", type=Path)
    given = parser.parse_args()
    chosen = [
        entry
        for entry in instances(given.folder)
        if (given.only is None or str(entry[1]) in given.only.split(","))
        and (given.networks is None or entry[0] in given.networks.split(","))
    ]
    some = chosen[: given.instances]
    rows = known(given.progress, given.seconds)
    done = {(row["network"], row["property"]) for row in rows}
    for name, number, network, claim, limit in some:
        if (name, number) in done:
            continue
        began = time.process_time()
        found = verify(load_onnx(network), read_vnnlib(claim), seconds=given.seconds or limit)
        row = {"network": name, "property": number, "limit": given.seconds} | found.plain()
        row["cpu_seconds"] = time.process_time() - began
        rows.append(row)
        if given.progress is not None:
            with given.progress.open("a") as file:
                file.write(json.dumps(row) + "\n")
        bound = "none" if row["bound"] is None else f"{row['bound']:.3g}"
        print(
            f"network {name}, property {number:>2}: {row['verdict']:<9}{row['boxes']:>8} boxes"
            f"{row['cpu_seconds']:>8.1f} s  bound {bound}, least found {row['least_found']:.3g},"
            f" open {row['open_share']:.2%}",
            flush=True,
        )
    names = {(name, number) for name, number, *_ in some}
    mine = [row for row in rows if (row["network"], row["property"]) in names]
    wrong = []
    for number in sorted({row["property"] for row in mine}):
        part = [row for row in mine if row["property"] == number]
        said = {word: sum(row["verdict"] == word for row in part) for word in WORDS}
        print(
            f"property {number:>2}: {len(part):>3} run, "
            + ", ".join(f"{count} {word}" for word, count in said.items())
            + f", {sum(row['cpu_seconds'] for row in part):.0f} CPU s"
        )
        for row in part:
            right = expected(row["network"], number)
            if right is not None and row["verdict"] not in (right, "open"):
                wrong.append(f"network {row['network']}, property {number}: {row['verdict']}")
    said = {word: sum(row["verdict"] == word for row in mine) for word in WORDS}
    print(
        f"{len(mine)} of {len(chosen)} instances run: "
        + ", ".join(f"{count} {word}" for word, count in said.items())
        + f"; {sum(row['cpu_seconds'] for row in mine):.0f} CPU s in all"
    )
    if wrong:
        sys.exit("known otherwise: " + "; ".join(wrong))


WORDS = ("holds", "violated", "open")

if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
