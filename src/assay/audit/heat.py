"""Where and at which position: the scores of a site as a table with bars, ready for a heat map."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
from torch import Tensor

from assay.attribution.scores import Scores
from assay.audit.audit import Audit
from assay.core.values import mean as average
from assay.errors import InputError


def heat(found: Audit | Scores, *, units: bool = False, effect: bool = True) -> pl.DataFrame:
    """Return one row for every site and position: site, unit, position, mean score, bar, and the
    exact mean where it was sampled.

    The first axis of a group's gates is the position; heads or neurons behind it are added up, or
    keep a row each with `units`. `bar` is the half-width of the error bar, averaged over examples
    and added up like the scores: an upper bound of the mean error if every bar holds. `exact` is
    the mean effect of a part of the cell, over the `sampled` ablations weighted by 1 / inclusion
    probability. Scores without an audit have neither. With `effect` the signs are those of the
    indirect effect m(clean, do(a := reference)) - m(clean), otherwise of a removal.

    Raises InputError for groups without a position axis.
    """
    sign = -1.0 if effect else 1.0
    audit = found if isinstance(found, Audit) else None
    scores = found.scores if isinstance(found, Audit) else found
    halves: Mapping[str, Tensor] = {} if audit is None else audit.half_widths()
    frames = []
    for name, values in scores.values.items():
        if values.ndim < 2:
            raise InputError(f"group {name!r} has no position axis; a heat map needs one")
        mean = sign * average(values).reshape(values.shape[1], -1).cpu()
        half = average(halves[name]).reshape(values.shape[1], -1).cpu() if halves else None
        if not units:
            mean = mean.sum(1, keepdim=True)
            half = None if half is None else half.sum(1, keepdim=True)
        positions, count = mean.shape
        frames.append(
            pl.DataFrame(
                {
                    "site": [name] * (positions * count),
                    "unit": [
                        unit if units and values.ndim > 2 else -1
                        for _ in range(positions)
                        for unit in range(count)
                    ],
                    "position": [position for position in range(positions) for _ in range(count)],
                    "score": mean.flatten().tolist(),
                    "bar": [None] * mean.numel() if half is None else half.flatten().tolist(),
                },
                schema_overrides={"bar": pl.Float64},
            )
        )
    table = pl.concat(frames)
    if audit is None:
        return table
    sampled = _sampled(audit, sign, units)
    return table.join(sampled, on=["site", "unit", "position"], how="left", maintain_order="left")


def _sampled(audit: Audit, sign: float, units: bool) -> pl.DataFrame:
    inner = {name: values.shape[2:] for name, values in audit.scores.values.items()}

    def unit(row: dict[str, object]) -> int:
        index, sizes = list(row["index"])[1:], inner[str(row["group"])]  # type: ignore[call-overload]
        if not units or not sizes:
            return -1
        flat = 0
        for place, size in zip(index, sizes, strict=True):
            flat = flat * size + place
        return flat

    rows = audit.table.with_columns(
        pl.struct("group", "index").map_elements(unit, return_dtype=pl.Int64).alias("unit"),
        pl.col("index").list.get(0).alias("position"),
        pl.col("group").alias("site"),
    )
    return rows.group_by("site", "unit", "position", maintain_order=True).agg(
        (
            sign * (pl.col("exact") / pl.col("inclusion")).sum() / (1 / pl.col("inclusion")).sum()
        ).alias("exact"),
        pl.len().alias("sampled"),
    )
