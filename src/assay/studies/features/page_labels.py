"""The section of a features report that labels the features of the circuits."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.charts import show
from assay.io.runs import Run
from assay.report.page import Section, Table
from assay.studies.features.labelled import FILE


def label_sections(run: Run) -> list[Section]:
    """Return the section, none for a run without labels."""
    if not run.has(FILE):
        return []
    labels = run.table(FILE)
    rows, bins = [], []
    for one in labels.iter_rows(named=True):
        name = f"{one['dictionary']} {one['feature']}"
        rows.append(
            {
                "feature": name,
                "active": one["active"] / one["positions"],
                "strongest contexts": _contexts(one["contexts"]),
                "promoted": _tokens(one["promoted"]),
                "lowered": _tokens(one["lowered"]),
                "note": one["reason"],
            }
        )
        most = max(one["counts"], default=0)
        bins += [
            {
                "feature": name,
                "bin": place,
                "share": count / most,
                "from": one["top"] * place / len(one["counts"]),
                "count": count,
            }
            for place, count in enumerate(one["counts"])
            if most
        ]
    text = (
        "Contexts are the windows in which a feature is most active, the strongest first, one a "
        "window; the token is in brackets, the activation behind it. Promoted and lowered are the "
        "tokens whose logits W_U norm(v) - W_U norm(0) are largest and smallest for the decoder "
        "row v, with the model's own final norm: an order, and no effect. Histograms count |f| in "
        "equal bins from zero to a power of two, each row shaded by its own largest count."
    )
    pictures = []
    if bins:
        pictures.append(
            charts.heatmap(
                pl.DataFrame(bins),
                "bin",
                "feature",
                "share",
                tooltip=("from", "count"),
                title="Histograms of activations, where features are active",
                x_title="bin of |f|",
                value_title="share of the most",
            )
        )
    return [
        Section(
            "What the circuits' features are",
            text,
            charts=pictures,
            tables=[Table(pl.DataFrame(rows), "Labels")],
        )
    ]


def _contexts(found: list[dict[str, Any]]) -> str:
    return " / ".join(f"{one['text']} {show(one['activation'])}" for one in found[:3])


def _tokens(found: list[dict[str, Any]]) -> str:
    return ", ".join(one["token"].strip() or repr(one["token"]) for one in found)
