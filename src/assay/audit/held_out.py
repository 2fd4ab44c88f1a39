"""What the bars do on the inputs that are held out, for every selection that a promise names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from assay.audit.bars import LISTS, Bars
from assay.audit.calibration import Ablated, largest_residuals, reaches, residuals
from assay.audit.coverage import Coverage, measure
from assay.audit.selections import TOP

BY_EXACT = "top 5 % by exact effect"
"""A selection that no bar can promise anything for: measured and shown all the same."""


def held_out(
    ablated: Ablated, bars: Bars, chosen: np.ndarray, *, only_all: bool = False
) -> tuple[np.ndarray, dict[str, Coverage]]:
    """Return the half-width of every row's bar, and the coverage by selection on the `chosen`
    examples: all, and without `only_all` every selection, the largest exact effects, and both lists
    as wholes ("largest, together" and "listed, together"). A promised selection is measured on the
    rows that the promise is made for.

    Groups in which every score is exact up to rounding are left out: covering proves nothing there.
    """
    parts, rows = ablated.parts, ablated.rows
    promised = bars.masks(parts)
    masks = {} if only_all else bars.selections.masks(parts) | promised
    half = bars.half_widths(parts, reaches(parts, ablated.design, promised))
    error, drawn = ablated.error, half[rows]
    wrong = np.unique(parts.group[rows][error > 1e-12 * np.abs(ablated.exact).max(initial=0.0)])
    held = chosen[parts.example[rows]] & np.isin(parts.group[rows], wrong)
    inside = {"all": np.ones(len(rows), dtype=bool)}
    inside |= {name: mask[rows] for name, mask in masks.items()}
    if not only_all:
        inside[BY_EXACT] = _largest(np.abs(ablated.exact), ablated.weight, held)
    found = {
        name: measure(
            name,
            (error <= drawn)[held & mask],
            ablated.weight[held & mask],
            ablated.unit[held & mask],
            1 - bars.alpha,
            drawn[held & mask],
        )
        for name, mask in inside.items()
        if name not in LISTS or bars.selections.count
    }
    return half, found if only_all else found | _together(ablated, bars, chosen, masks)


def _together(
    ablated: Ablated, bars: Bars, chosen: np.ndarray, masks: Mapping[str, np.ndarray]
) -> dict[str, Coverage]:
    parts = ablated.parts
    residual = residuals(ablated, bars.scale)
    held = chosen[parts.example[ablated.rows]]
    found = {}
    for name, tail in bars.together.items():
        examples, largest = largest_residuals(ablated, masks[name], held, residual)
        quantile = float(tail.quantile(bars.alpha, np.ones(1), np.ones(1))[0])
        half = bars.together_half_widths(parts, name)[ablated.rows]
        inside = held & masks[name][ablated.rows]
        widths = np.bincount(parts.example[ablated.rows[inside]], half[inside], parts.examples)
        counts = np.bincount(parts.example[ablated.rows[inside]], minlength=parts.examples)
        weight = 1 / np.bincount(parts.unit)[parts.unit[examples]]
        found[f"{name}, together"] = measure(
            f"{name}, together",
            largest <= quantile,
            weight,
            parts.unit[examples],
            1 - bars.alpha,
            (widths / np.maximum(counts, 1))[examples],
            f"inputs have all bars of {bars.selections.count} parts hold at once",
        )
    return found


def _largest(size: np.ndarray, weight: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Return which rows are among the largest 5 % of the held-out weight."""
    if not held.any():
        return held
    order = np.argsort(-size[held], kind="stable")
    before = np.cumsum(weight[held][order]) - weight[held][order]
    level = size[held][order][before <= TOP * weight[held].sum()].min()
    return size >= level
