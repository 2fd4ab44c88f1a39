"""The list of an input's largest parts, with bars."""

from __future__ import annotations

import numpy as np
import polars as pl

from assay.audit.population import Population


def largest_table(
    parts: Population,
    rows: np.ndarray,
    half: np.ndarray,
    together: np.ndarray,
    exact: np.ndarray,
) -> pl.DataFrame:
    """Return rows of a population by input and rank: example, group, part, score, low, high,
    together_low, together_high, exact.

    [low, high] is a part's own bar; the bars [together_low, together_high] hold at once for all
    largest parts of an input. `exact` is null where the effect was not computed."""
    rows = rows[np.lexsort((parts.rank[rows], parts.example[rows]))]
    shown = parts.take(rows)
    groups, _, words = shown.described()
    return pl.DataFrame(
        {
            "example": shown.example,
            "group": groups,
            "part": words,
            "score": shown.score,
            "low": shown.score - half[rows],
            "high": shown.score + half[rows],
            "together_low": shown.score - together[rows],
            "together_high": shown.score + together[rows],
            "exact": exact[rows],
        },
        schema_overrides={"group": pl.String, "part": pl.String},
    ).with_columns(pl.col("exact").fill_nan(None))
