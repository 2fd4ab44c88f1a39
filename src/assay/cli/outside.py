"""Verbs over networks and claims of other tools' formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.options import CertificateFile, Json
from assay.cli.printing import print_lines, print_summary


def verify(
    network: Annotated[Path, typer.Argument(metavar="NET.onnx", help="The network.")],
    claim: Annotated[
        Path,
        typer.Argument(metavar="PROPERTY.vnnlib", help="Boxes of inputs, and unsafe outputs."),
    ],
    seconds: Annotated[float, typer.Option(help="CPU seconds.")] = 60.0,
    out: CertificateFile = None,
    as_json: Json = False,
) -> None:
    """Prove that no input of a VNN-LIB property gives an unsafe output, or find one that does; exit
    0 if it holds, 1 if it is violated or open.
    """
    from assay.io.files import existing

    for path in (network, claim):
        existing(path)
    from assay.studies.outside import verify_files

    found, lines = verify_files(network, claim, seconds=seconds, certificate=out)
    if as_json:
        print_summary(found, True)
    else:
        print_lines(lines)
    raise typer.Exit(0 if found["verdict"] == "holds" else 1)
