"""Verbs of a guard at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.options import Json, Top, any_seed, refusal, within
from assay.cli.printing import print_table

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of the model.")]
Lines = Annotated[Path, typer.Argument(metavar="DATA", help="Text file, one input per line.")]
GuardFolder = Annotated[Path, typer.Argument(metavar="GUARD", help="Folder of a saved guard.")]
Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", help="Inputs that only calibrate; default: a part of DATA."),
]
Limit = Annotated[
    int, typer.Option(help="Lines read at most.", callback=within("--limit", 1, 1_000_000))
]
GuardOut = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="New folder of the guard.")
]


def guard_fit(
    model: Model,
    data: Lines,
    out: GuardOut,
    sites: Annotated[
        list[str] | None,
        typer.Option("--sites", help="Names or patterns of sites; default: all MLP neurons."),
    ] = None,
    features: Annotated[
        int,
        typer.Option(help="Features that are guarded.", callback=within("--features", 1, 1024)),
    ] = 128,
    modes: Annotated[
        str, typer.Option(help="memorise, constant, marginal, add; with commas.")
    ] = "constant,marginal,add",
    theta: Annotated[float, typer.Option(help="Least probability of an accepted event.")] = 1e-5,
    delta: Annotated[float, typer.Option(help="One minus the confidence of all events.")] = 0.05,
    alpha: Annotated[float, typer.Option(help="Level of the tests.")] = 0.05,
    calibration: Calibration = None,
    limit: Limit = 4000,
    seed: Annotated[int, typer.Option(help="Seed of the splits.", callback=any_seed)] = 0,
    as_json: Json = False,
) -> None:
    """Fit a guard on inputs of your own and save it."""
    from assay.guard.settings import Settings
    from assay.io.files import existing

    chosen = tuple(mode.strip() for mode in modes.split(",") if mode.strip())
    settings = Settings(modes=chosen, theta=theta, delta=delta, alpha=alpha)
    if bounds := {"single-edit", "prune"} & set(chosen):
        raise refusal(
            f"the mode {min(bounds)} needs bounds of your network: use assay.guard in Python"
        )
    existing(data)
    from assay.studies.guard_verbs import fit_guard

    found = fit_guard(
        model,
        data,
        out,
        sites=sites or (),
        features=features,
        settings=settings,
        calibration=calibration,
        limit=limit,
        seed=seed,
    )
    print_table(*found, as_json)


def guard_propose(
    folder: GuardFolder,
    proposals: Annotated[
        Path, typer.Argument(metavar="FILE", help="Proposals, or a circuit, as JSON.")
    ],
    model: Model,
    data: Lines,
    out: GuardOut,
    calibration: Calibration = None,
    limit: Limit = 4000,
    as_json: Json = False,
) -> None:
    """Predict from gates what proposals say, and admit those that a fresh split agrees with."""
    _require_guard(folder, proposals, data)
    from assay.studies.guard_verbs import propose_to_guard

    found = propose_to_guard(
        folder, proposals, model, data, out, calibration=calibration, limit=limit
    )
    print_table(*found, as_json)


def guard_score(
    folder: GuardFolder, model: Model, data: Lines, limit: Limit = 4000, as_json: Json = False
) -> None:
    """Judge inputs: which are accepted, and which events of the others had no support."""
    _require_guard(folder, data)
    from assay.studies.guard_verbs import score_inputs

    print_table(*score_inputs(folder, model, data, limit=limit), as_json)


def guard_explain(folder: GuardFolder, top: Top = 20, as_json: Json = False) -> None:
    """Show what a guard knows: explanations that were admitted, and those that were refused."""
    _require_guard(folder)
    from assay.studies.guard_verbs import explain_guard

    print_table(*explain_guard(folder, top=top), as_json)


def _require_guard(folder: Path, *paths: Path) -> None:
    """Refuse what is no guard, or no file, before anything large is loaded."""
    from assay.io.files import existing

    for path in (folder / "guard.json", *paths):
        existing(path)
