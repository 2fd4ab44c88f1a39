"""The verb that says what changes at another size."""

from __future__ import annotations

from typing import Annotated

import typer

from assay.cli.options import Json
from assay.cli.printing import print_tables


def scaling(
    sites: Annotated[str, typer.Option(help="Number of weight sites, BEFORE:AFTER.")] = "1:1",
    batch: Annotated[str, typer.Option(help="Sequences in a batch, BEFORE:AFTER.")] = "1:1",
    seq: Annotated[str, typer.Option(help="Positions of a sequence, BEFORE:AFTER.")] = "1:1",
    beta: Annotated[float, typer.Option(help="Coefficient of the entropy part.")] = 0.2,
    p: Annotated[float, typer.Option(help="Exponent of the penalty.")] = 0.4,
    eps: Annotated[float, typer.Option(help="Added to importances inside the power.")] = 1e-12,
    components: Annotated[int, typer.Option(help="Components of one site.")] = 49_152,
    mean: Annotated[
        list[float] | None,
        typer.Option(help="A mean M of a^p to show; repeatable. Default: .1, .01, .001, 1e-4."),
    ] = None,
    world: Annotated[int, typer.Option(help="Processes that share a batch.")] = 1,
    positions_per_rank: Annotated[
        int | None, typer.Option(help="Positions of one process (default: an equal share).")
    ] = None,
    rate: Annotated[
        list[float] | None, typer.Option(help="A firing rate to show; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what to keep and what to change when components are learned at another size."""
    from assay.studies.scaling import scale

    found = scale(
        sites=sites,
        batch=batch,
        sequence=seq,
        beta=beta,
        p=p,
        eps=eps,
        components=components,
        means=mean or (0.1, 0.01, 0.001, 1e-4),
        world=world,
        positions=positions_per_rank,
        rates=rate or (1e-5, 1e-4),
    )
    print_tables(found, as_json)
