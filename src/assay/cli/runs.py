"""Verbs that make a run and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.options import Dry, Folder, Force, Json, Out, Resume, Set, one_of, require_run
from assay.cli.printing import print_facts, print_summary, print_tables
from assay.cli.process import going_on, is_in_a_group


def run(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (see `assay recipes`) or a YAML file.")
    ],
    out: Out = None,
    overrides: Set = None,
    resume: Resume = False,
    force: Force = False,
    dry: Dry = False,
    as_json: Json = False,
) -> None:
    """Run a recipe from nothing to a report."""
    from assay.io.runs import require_startable
    from assay.studies import recipes

    if dry:
        from assay.studies import runner

        print_tables(runner.plan(recipes.load(recipe, overrides or ())), as_json)
        return
    one_of(resume, force)
    folder = out or Path("runs") / Path(recipe).stem
    loaded = recipes.load(recipe, overrides or (), resumes=folder if resume else None)
    if not is_in_a_group():
        require_startable(folder, resume=resume, force=force)
    loaded.config.require()
    sets = [word for override in overrides or () for word in ("--set", override)]
    # With its settings, since it may be stopped before it keeps them.
    with going_on("run", recipe, *sets, "-o", str(folder), "--resume"):
        from assay.studies import runner

        summary = runner.execute(loaded, folder, resume=resume, force=force)
        if not summary:  # the first process of the group says what came out
            return
        if as_json:
            print_summary(summary, True)
        else:
            print_facts(runner.facts(folder), folder)


def train(
    what: Annotated[str, typer.Argument(help="What is trained: crosscoder or dictionaries.")],
    out: Out = None,
    overrides: Set = None,
    resume: Resume = False,
    force: Force = False,
    dry: Dry = False,
    as_json: Json = False,
) -> None:
    """Train dictionaries or a crosscoder on your own model and text: --set
    target.path=MODEL_DIR --set data.path=TEXT --set sites=PATTERN.
    """
    from assay.studies.names import require_training

    require_training(what)
    run(what, out, overrides, resume, force, dry, as_json)


def recipes(as_json: Json = False) -> None:
    """List the recipes."""
    from assay.studies import recipes

    loaded = [recipes.load(name) for name in recipes.shipped()]
    print_summary({recipe.name: recipe.about for recipe in loaded}, as_json)


def tour(
    out: Out = None, resume: Resume = False, force: Force = False, as_json: Json = False
) -> None:
    """Run the short recipe of every kind that exists and write one report."""
    from assay.io.runs import require_startable

    one_of(resume, force)
    folder = out or Path("runs") / "tour"
    require_startable(folder, resume=resume, force=force)
    with going_on("tour", "-o", str(folder), "--resume"):
        from assay.studies import runner
        from assay.studies.tour.study import tour as take

        summary = take(folder, resume=resume, force=force)
        if as_json:
            print_summary(summary, True)
        else:
            print_facts([fact for name in summary for fact in runner.facts(folder / name)], folder)


def report(folder: Folder, as_json: Json = False) -> None:
    """Build the report of a saved run, audit or steering again."""
    require_run(folder)
    from assay.studies.reports import report as rebuild

    print_summary({"report": str(rebuild(folder))}, as_json)
