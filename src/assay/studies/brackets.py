"""Brackets [found, proved] of what the least important parts can do, for the studies' reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import polars as pl
import torch
from torch import Tensor

from assay import charts
from assay.bounds.search.leaves import Budget
from assay.core.mechanisms import Mechanisms
from assay.errors import AssayError
from assay.io.runs import Run
from assay.proofs.gates import certify
from assay.report.page import Section

FILE = "brackets.parquet"
BRACKETED = 512
"""Parts of an example up to which a report brackets them: seconds of work, not minutes."""
# Counted in steps and not in seconds, so that a resumed run has the same numbers.
BUDGET = Budget(seconds=1e9, boxes=1, steps=(20, 0), whole=0, memory=1 << 28)


def save_brackets(
    run: Run,
    mechanisms: Mechanisms,
    sizes: Mapping[str, Tensor],
    counts: Sequence[int],
    *,
    examples: int,
    low: float | None = None,
    pins: int = BUDGET.pins,
) -> None:
    """Bound the damage of the parts with the smallest `sizes` that have an effect, for several
    numbers of them, on the first examples, and save the means.

    sizes: (examples, *axes) by group. pins: how often derivatives are bounded, which costs most of
    the time in a transformer. A network with an operation that has no rule gets no table."""
    budget = replace(BUDGET, pins=pins)
    some = mechanisms.take(slice(0, examples))
    flat = torch.cat([size[:examples].flatten(1).abs() for size in sizes.values()], 1)
    order = torch.where(flat > 0, flat, torch.inf).argsort(1)
    rows = []
    for count in sorted({min(count, flat.shape[1]) for count in counts}):
        keep = torch.ones_like(flat, dtype=torch.bool).scatter(1, order[:, :count], False)
        parts = (keep | (flat == 0)).split([size[0].numel() for size in sizes.values()], 1)
        masks = {
            name: part.reshape(len(part), *size.shape[1:])
            for (name, size), part in zip(sizes.items(), parts, strict=True)
        }
        try:
            found = certify(some, masks, low=low, budget=budget)
        except AssayError:
            return
        proved = found.proved.values
        rows.append(
            {
                "free": found.free,
                "found": float(found.found.values.mean()),
                "proved": float(proved.mean()) if bool(proved.isfinite().all()) else None,
                "vacuous": int(found.vacuous.sum()),
                "examples": len(proved),
                "low": low,
            }
        )
    types = {"proved": pl.Float64, "low": pl.Float64}
    run.save_table(FILE, pl.DataFrame(rows, schema_overrides=types))


def bracket_sections(run: Run, unit: str) -> list[Section]:
    """Return the section with the picture of a run's brackets; none where there is no table."""
    if not run.has(FILE):
        return []
    table = run.table(FILE)
    last, low = table.row(-1, named=True), table["low"][0]
    long = table.unpivot(
        index="free", on=["found", "proved"], variable_name="damage", value_name="value"
    )
    picture = charts.line(
        long,
        "free",
        "value",
        colour="damage",
        title="Damage that was found, and damage that was proved impossible to exceed",
        x_title=f"free {unit} of an example, the least important first",
        y_title="damage of the metric",
        points=True,
    )
    proved = (
        "no bound was reached"
        if last["proved"] is None
        else f"no combination costs more than {last['proved']:.3g} (proved in real arithmetic)"
    )
    reach = "down to the lowest value that the kind allows" if low is None else f"down to {low:g}"
    text = (
        f"The free {unit} are switched off in any combination and at any strength, with gates"
        f" {reach}, on {last['examples']} examples. With {last['free']:.0f} of them free, a search"
        f" found a damage of {last['found']:.3g} on average, and {proved}. What lies between the"
        " two is not known; assay certify narrows it by splits."
    )
    if last["vacuous"]:
        text += f" The bound says nothing in {last['vacuous']} of the examples."
    return [Section("What the others can do at most", text, charts=[picture])]
