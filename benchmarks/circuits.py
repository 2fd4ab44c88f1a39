"""What the circuits of a features run keep of the metric, on pairs that did not choose them.

Run: assay run agreement-features -o RUN, then python benchmarks/circuits.py RUN"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import polars as pl

from assay.io.runs import opened

WAYS = (
    "features only",
    "features only, refined",
    "features, errors kept",
    "features and errors",
    "features and errors, refined",
    "neurons",
    "features at random",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    run = opened(parser.parse_args().run)
    summary, curves = run.json("summary.json"), run.table("circuit-curves.parquet")
    print("| kind of prompt | parts | " + " | ".join(WAYS) + " | all features |")
    print("|---" * (len(WAYS) + 3) + "|")
    for one in summary["circuits"]:
        cells = [_cell(one["kept"][way]) for way in WAYS]
        whole = curves.filter(
            (pl.col("circuit") == one["circuit"])
            & (pl.col("kept") == WAYS[0])
            & (pl.col("share") == 1)
        ).row(0, named=True)
        cells.append(f"{whole['faithfulness']:.2f} ({whole['nodes']})")
        print(f"| {one['circuit']} | {one['nodes']} | " + " | ".join(cells) + " |")


def _cell(kept: Mapping[str, float | None]) -> str:
    value, low, high = (kept[key] for key in ("faithfulness", "low", "high"))
    if value is None:
        return "fewer parts"
    interval = "no interval" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"
    return f"{value:.2f} {interval}"


if __name__ == "__main__":
    main()
