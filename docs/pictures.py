"""Make the pictures of the README and of docs/crosscoder.md from finished runs: python
docs/pictures.py RUN_FOLDER, of `assay run digits-channels` or `assay run digits-crosscoder-proof`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

from assay import charts
from assay.io.runs import Run, opened

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    run = opened(sys.argv[1])
    make = draw_growth if run.has("growth.parquet") else draw_channels
    print(make(run))


def draw_growth(run: Run) -> Path:
    table = run.table("growth.parquet")
    picture = charts.line(
        table, "points", "operations", colour="what", log_x=True, log_y=True, points=True
    )
    return charts.png(picture, IMAGES / "crosscoder-growth.png", scale=1.0)


def draw_channels(run: Run) -> Path:
    points = run.table("channels.parquet").with_columns(
        (pl.col("attribution") - pl.col("exact")).abs().alias("error")
    )
    points = points.filter((pl.col("error") > 1e-12) & (pl.col("bound") > 1e-12)).with_columns(
        pl.col("error").log10(),
        pl.col("bound").log10(),
        pl.format("block {}", "block").alias("block"),
    )
    picture = charts.scatter_identity(
        points,
        "error",
        "bound",
        colour="block",
        title="Every attribution error lies below its certified bound",
        x_title="log10 of the true error (each channel switched off exactly)",
        y_title="log10 of the certified bound",
    )
    return charts.png(picture, IMAGES / "digits.png")


if __name__ == "__main__":
    main()
