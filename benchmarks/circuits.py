"""What the circuits of a features run keep of the metric, on pairs that did not choose them.

Run: assay run agreement-features -o RUN, then python benchmarks/circuits.py RUN"""

from __future__ import annotations

import argparse

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
        cells = [
            f"{kept['faithfulness']:.2f} [{kept['low']:.2f}, {kept['high']:.2f}]"
            if (kept := one["kept"][way])["faithfulness"] is not None
            else "fewer parts"
            for way in WAYS
        ]
        whole = curves.filter(
            (pl.col("circuit") == one["circuit"])
            & (pl.col("kept") == WAYS[0])
            & (pl.col("share") == 1)
        ).row(0, named=True)
        cells.append(f"{whole['faithfulness']:.2f} ({whole['nodes']})")
        print(f"| {one['circuit']} | {one['nodes']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
