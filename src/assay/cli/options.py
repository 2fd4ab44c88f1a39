"""Options that several verbs share, and what their values must hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


def refusal(message: str) -> Exception:
    """Return the error of bad input, to be raised."""
    from assay.errors import InputError

    return InputError(message)


def within(flag: str, low: int, high: int) -> Callable[[int | None], int | None]:
    """Return a callback that refuses integers outside of a range."""

    def check(value: int | None) -> int | None:
        if value is not None and not low <= value <= high:
            raise refusal(f"{flag} must lie between {low} and {high}, got {value}")
        return value

    return check


any_seed = within("--seed", 0, 2**31 - 1)
"""A callback that refuses numbers that no generator takes."""


def share(value: float) -> float:
    """Return a share strictly between 0 and 1; raise InputError otherwise."""
    if not 0 < value < 1:
        raise refusal(f"--alpha must lie between 0 and 1, both excluded, got {value}")
    return value


def method_named(name: str) -> str:
    """Return the name of a method of attribution; raise InputError for another."""
    from assay.studies.methods import require_method

    return require_method(name)


def one_of(resume: bool, force: bool) -> None:
    """Refuse `--resume` together with `--force`."""
    if resume and force:
        raise refusal("--resume goes on with a run and --force replaces it; give one of them")


def require_run(folder: Path) -> None:
    """Refuse what is no run before anything large is loaded."""
    from assay.io.runs import opened

    opened(folder)


Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of the run (default: runs/RECIPE).")
]
CertificateFile = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="CERT.json", help="Write the certificate here."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace the run in the folder; only Assay's own files go."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a config key: --set training.steps=500. Repeatable."),
]
Dry = Annotated[
    bool, typer.Option("--dry-run", help="Say what the run would take, and load nothing.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished run.")]
By = Annotated[
    str,
    typer.Option(
        "--method", help="gradient, ig, second-order, exact or auto.", callback=method_named
    ),
]
Top = Annotated[int, typer.Option(help="Rows to show.", callback=within("--top", 1, 1_000_000))]
