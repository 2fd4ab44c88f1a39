"""Verbs that ask a saved run for scores, exact effects and examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.options import By, Folder, Json, Top, any_seed, require_run, share, within
from assay.cli.printing import print_table, print_tables


def attribute(
    folder: Folder, method: By = "gradient", top: Top = 20, as_json: Json = False
) -> None:
    """Score every part of a saved run."""
    require_run(folder)
    from assay.studies.verbs import attribute_run

    print_table(*attribute_run(folder, by=method, top=top), as_json)


def ablate(
    folder: Folder,
    part: Annotated[
        list[str] | None,
        typer.Option("--part", help="group[index]; repeatable. Default: the top parts."),
    ] = None,
    method: By = "gradient",
    top: Top = 10,
    as_json: Json = False,
) -> None:
    """Ablate parts of a saved run exactly, beside their estimates."""
    require_run(folder)
    from assay.studies.verbs import ablate_run

    print_table(*ablate_run(folder, part or [], by=method, top=top), as_json)


def explain(
    folder: Folder,
    part: Annotated[str, typer.Argument(help="group[index], as `assay attribute` prints it.")],
    method: By = "gradient",
    top: Top = 10,
    as_json: Json = False,
) -> None:
    """Show the examples in which one part matters most."""
    require_run(folder)
    from assay.studies.verbs import explain_run

    print_table(*explain_run(folder, part, by=method, top=top), as_json)


def compare(
    first: Annotated[Path, typer.Argument(metavar="DIR")],
    second: Annotated[Path, typer.Argument(metavar="DIR")],
    method: By = "gradient",
    as_json: Json = False,
) -> None:
    """Match the parts of two saved runs and say how stable they are."""
    require_run(first)
    require_run(second)
    from assay.studies.verbs import compare_runs

    print_table(*compare_runs(first, second, by=method), as_json)


def steer(
    folder: Folder,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PART=GATE...",
            help="Parts as `assay attribute` prints them, * for all of an axis: 'group[*, 3]=-2'.",
        ),
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PART=VALUE",
            help="Set a feature to an activation, active or not; repeatable.",
        ),
    ] = None,
    count: Annotated[
        int,
        typer.Option(
            "--continue",
            help="Tokens to continue prompts by, with the gates and without.",
            callback=within("--continue", 0, 10_000),
        ),
    ] = 0,
    examples: Annotated[
        int,
        typer.Option(help="Prompts to continue.", callback=within("--examples", 1, 1_000_000)),
    ] = 4,
    temperature: Annotated[
        float, typer.Option(help="Draw tokens at this temperature; 0: take the likeliest.")
    ] = 0.0,
    alpha: Annotated[
        float, typer.Option(help="Share of predictions that a bar may miss.", callback=share)
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the draws.", callback=any_seed)] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new folder for the rows and a report.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Set gates of a saved run to any value, below 0 and above 1 too, or features to activations:
    the change of the metric measured and predicted, and what the model says.
    """
    require_run(folder)
    from assay.studies.steer_verbs import steer_run

    found = steer_run(
        folder,
        settings or [],
        values=values or [],
        out=out,
        count=count,
        examples=examples,
        temperature=temperature,
        alpha=alpha,
        seed=seed,
    )
    said = [] if as_json else found[0].pop("continuations", [])
    print_table(*found, as_json)
    if said:
        print_tables({"continuations": said}, False)
