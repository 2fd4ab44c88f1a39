"""The tour: the short recipe of every kind that exists, one report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from assay.io import runs
from assay.io.runs import Run
from assay.progress import progress
from assay.report.page import Fact, Section
from assay.studies import recipes, runner
from assay.studies.tour.config import STOPS, Config

__all__ = ["Config", "headline", "sections", "tour"]


def tour(folder: Path | str, *, resume: bool = False, force: bool = False) -> dict[str, Any]:
    """Run the short form of every stop into `folder` and write one report; returns the summaries.

    `resume` goes on with an earlier tour and `force` replaces one; InputError when the folder holds
    anything and neither was asked for."""
    stops = [recipes.load(name, short=True) for name in STOPS]
    whole = recipes.Recipe("tour", "tour", "", Config(), {}, {})
    with runs.start(folder, whole.saved(), resume=resume, force=force) as run:
        summary = {
            stop.name: runner.execute(stop, run.path(stop.name), resume=resume, force=force)
            for stop in progress(stops, "tour")
        }
        if not run.has("summary.json"):
            run.save_json("summary.json", summary)
        runner.report(run)
        return runner.finished_summary(run)


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
