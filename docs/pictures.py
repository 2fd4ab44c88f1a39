"""Make the README's picture from a finished run of `assay run digits-channels`: python
docs/pictures.py RUN_FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

from assay import charts
from assay.io.runs import opened


def main() -> None:
    run = opened(sys.argv[1])
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
    print(charts.png(picture, Path(__file__).parent / "images" / "digits.png"))


if __name__ == "__main__":
    main()
