"""Make the pictures of the README, docs/crosscoder.md and docs/certify.md: python docs/pictures.py
PATH, with the folder of `assay run digits-channels` or `assay run digits-crosscoder-proof`, or the
progress file of benchmarks/certify_map.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import polars as pl

from assay import charts
from assay.io.runs import Run, opened

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    if Path(sys.argv[1]).is_file():
        print(draw_map(pl.read_ndjson(sys.argv[1])))
        return
    run = opened(sys.argv[1])
    make = draw_growth if run.has("growth.parquet") else draw_channels
    print(make(run))


def draw_map(rows: pl.DataFrame) -> Path:
    """Draw the shares of certified, broken and open answers of the pairs that are done."""
    cells = ["free", "low"]
    rows = rows.filter(pl.col("part") == "agreement").unique(["pair", *cells])
    whole = rows.select(*cells).unique().height
    rows = rows.filter(pl.len().over("pair") == whole)
    pairs = rows["pair"].n_unique()
    verdicts = pl.DataFrame({"verdict": ["certified", "broken", "open"], "order": [0, 1, 2]})
    counts = rows.group_by(*cells, "verdict").len()
    table = rows.select(*cells).unique().join(verdicts, how="cross")
    table = table.join(counts, on=[*cells, "verdict"], how="left").with_columns(
        (pl.col("len").fill_null(0) / pairs).alias("share of the pairs"),
        pl.format("{} free, down to {}", "free", "low").alias("gates"),
    )
    picture = charts.heatmap(
        table.sort("free", pl.col("low").neg(), "order"),
        "verdict",
        "gates",
        "share of the pairs",
        text=True,
        title=f"Whether the answer stays, on {pairs} pairs",
        x_title="answer",
        y_title="the least important nodes",
    )
    return redraw(picture, "certify-map.png", 1.0)


def draw_growth(run: Run) -> Path:
    table = run.table("growth.parquet")
    picture = charts.line(
        table, "points", "operations", colour="what", log_x=True, log_y=True, points=True
    )
    return redraw(picture, "crosscoder-growth.png", 1.0)


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
    return redraw(picture, "digits.png", 2.0)


def redraw(picture: Any, name: str, scale: float) -> Path:
    (IMAGES / name).unlink(missing_ok=True)
    return charts.png(picture, IMAGES / name, scale=scale)


if __name__ == "__main__":
    main()
