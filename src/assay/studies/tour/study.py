"""The tour: the short recipe of every kind that exists, one report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from assay.io import runs
from assay.io.runs import Run
from assay.report.page import Fact, Section
from assay.studies import runner

STOPS = ("digits-channels", "agreement-attribution", "max-of-k", "tms-directions")


class Config(runner.StudyConfig):
    stops: tuple[str, ...] = STOPS


def tour(folder: Path | str) -> dict[str, Any]:
    """Run the short form of every stop into `folder`, replacing an earlier tour, and write one
    report; returns the summaries.
    """
    recipes = [runner.load(name, short=True) for name in STOPS]
    run = runs.start(
        folder, {"recipe": "tour", "study": "tour", "config": {"stops": list(STOPS)}}, force=True
    )
    summary = {recipe.name: runner.execute(recipe, run.path(recipe.name)) for recipe in recipes}
    run.save_json("summary.json", summary)
    runner.report(run)
    return summary


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    return (
        "Assay: the tour",
        (
            "Assay takes a network apart into mechanisms and measures how far to trust the result."
            " This page was computed on your machine just now; every estimate below stands beside"
            " the exact value, a bound or a proof."
        ),
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the first headline numbers of every stop, and a chapter for each."""
    facts: list[Fact] = []
    found: list[Section] = []
    for name in run.json("config.json")["config"]["stops"]:
        part = runs.opened(run.path(name))
        study = runner.study_of(part)
        own_facts, own_sections = study.sections(part)
        facts += own_facts[:3]
        found += [Section(*study.headline(part)), *own_sections]
    return facts, found
