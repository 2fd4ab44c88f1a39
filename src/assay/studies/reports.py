"""Reports of saved folders: runs of recipes, audits of graphs, and steering."""

from __future__ import annotations

from pathlib import Path

from assay.io.runs import opened, saved_config
from assay.studies import graph_verbs, runner, steer_verbs
from assay.studies.recipes import AUDIT, STEERING


def report(folder: Path | str) -> Path:
    """Build `report.html` of a saved folder again from what it holds; InputError for a folder that
    holds nothing of the kind, or only half of it.
    """
    run = opened(folder)
    saved = saved_config(run)
    if AUDIT in saved:
        return graph_verbs.report(run)
    if STEERING in saved:
        return steer_verbs.report(run)
    return runner.report(run)
