"""The tour: the short recipe of every kind that exists, one report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from assay.io import runs
from assay.recipes import base
from assay.report import page
from assay.report.page import Fact, Section

STOPS = ("digits-channels", "agreement-attribution", "max-of-k", "tms-directions")


def tour(folder: Path | str) -> dict[str, Any]:
    """Run the short form of every stop into `folder`, replacing an earlier tour, and write one report; returns the summaries."""
    recipes = [base.load(name, short=True) for name in STOPS]
    run = runs.start(folder, {"recipe": "tour", "stops": list(STOPS)}, force=True)
    facts: list[Fact] = []
    sections: list[Section] = []
    summary: dict[str, Any] = {}
    for recipe in recipes:
        summary[recipe.name] = base.execute(recipe, run.path(recipe.name))
        part = runs.opened(run.path(recipe.name))
        kind = base.study_of(part)
        title, lead = kind.headline(part)
        own_facts, own_sections = kind.sections(part)
        facts += own_facts[:3]
        sections += [Section(title, lead), *own_sections]
    run.save_json("summary.json", summary)
    lead = (
        "Assay takes a network apart into mechanisms and measures how far to trust the result. This page was computed on your machine "
        "just now; every estimate below stands beside the exact value, a bound or a proof."
    )
    page.write(run.folder, page.render("Assay: the tour", lead, facts, sections))
    return summary
