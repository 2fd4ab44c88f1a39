"""Where and at which position: the scores of a site as a table with bars, ready for a heat map."""

from __future__ import annotations

import polars as pl

from assay.audit.audit import Audit
from assay.errors import InputError


def heat(audit: Audit, *, units: bool = False, effect: bool = True) -> pl.DataFrame:
    """Return one row for every site and position: site, unit, position, mean score, bar, and the
    exact mean where it was sampled.

    The first axis of a group's gates is the position; heads or neurons behind it are added up, or
    keep a row each with `units`. `bar` is the half-width of the error bar, averaged over examples
    and added up like the scores: an upper bound of the mean error if every bar holds. `exact` is
    the mean over the `sampled` ablations of the cell's parts, unscaled. With `effect` the signs are
    those of the indirect effect m(clean, do(a := reference)) - m(clean), otherwise of a removal.

    Raises InputError for groups without a position axis.
    """
    sign = -1.0 if effect else 1.0
    halves = audit.half_widths()
    frames = []
    for name, values in audit.scores.values.items():
        if values.ndim < 2:
            raise InputError(f"group {name!r} has no position axis; a heat map needs one")
        mean, half = (
            (entry.mean(0)).reshape(entry.shape[1], -1).cpu()
            for entry in (sign * values, halves[name])
        )
        if not units:
            mean, half = mean.sum(1, keepdim=True), half.sum(1, keepdim=True)
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
                    "bar": half.flatten().tolist(),
                }
            )
        )
    sampled = _sampled(audit, sign, units)
    return pl.concat(frames).join(
        sampled, on=["site", "unit", "position"], how="left", maintain_order="left"
    )


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
    return rows.group_by("site", "unit", "position").agg(
        (sign * pl.col("exact")).mean().alias("exact"), pl.len().alias("sampled")
    )
