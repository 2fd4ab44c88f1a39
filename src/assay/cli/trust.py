"""Verbs that measure or prove how far a result holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.options import (
    By,
    CertificateFile,
    Folder,
    Json,
    any_seed,
    refusal,
    require_run,
    share,
    within,
)
from assay.cli.printing import print_lines, print_summary, print_table, print_tables


def audit(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|GRAPH.json",
            help="Folder of a finished run, or a graph of circuit-tracer, Neuronpedia or EAP-IG.",
        ),
    ],
    method: By = "gradient",
    exact: Annotated[
        int | None,
        typer.Option(
            help="Parts ablated exactly in every input [64], or nodes of a graph [2000].",
            callback=within("--exact", 1, 1_000_000_000),
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Share of parts that a bar may miss.", callback=share)
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the sample.", callback=any_seed)] = 0,
    on: Annotated[
        Path | None,
        typer.Option(
            "--on", metavar="NEW", help="New inputs: apply the run's own bars and thresholds there."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--target", metavar="MODEL", help="Of a graph: its model.")
    ] = None,
    dictionaries: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of a graph over features: its transcoders.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--pairs", metavar="FILE", help="Of a graph over heads: pairs of prompts."),
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            help="Of a graph: nodes and edges that are listed.",
            callback=within("--top", 1, 1_000_000),
        ),
    ] = 50,
    within: Annotated[
        float, typer.Option(help="Of a graph: how far a claim that holds may be off.")
    ] = 0.25,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Of a graph: a folder for tables and report.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how far to trust a method on a saved run, or a graph that another tool made: exact
    effects beside what is estimated or claimed, and error bars.
    """
    given = (model, dictionaries, prompts, out)
    if model is not None or folder.is_file():
        from assay.studies.names import require_graph_options

        require_graph_options(folder, model, method, on, within)
        from assay.studies.graph_verbs import SHOWN, audit_file

        shown = audit_file(
            folder,
            str(model),
            dictionaries=dictionaries,
            prompts=prompts,
            out=out,
            rows=None if as_json else SHOWN,
            top=top,
            exact=2000 if exact is None else exact,
            within=within,
            alpha=alpha,
            seed=seed,
        )
        print_tables(shown, as_json)
        return
    require_run(folder)
    if any(value is not None for value in given):
        raise refusal(
            "--target, --dictionaries, --pairs and -o belong to the file of a graph, and this is"
            " the folder of a run"
        )
    if on is not None and (method, exact, alpha, seed) != ("gradient", None, 0.1, 0):
        raise refusal(
            "--on applies what the run calibrated, by its own method and level; leave out --method,"
            " --exact, --alpha and --seed"
        )
    from assay.studies.verbs import audit_run

    count = 64 if exact is None else exact
    print_table(*audit_run(folder, by=method, exact=count, alpha=alpha, seed=seed, on=on), as_json)


def certify(
    folder: Folder,
    keep: Annotated[
        str, typer.Option("--keep", help="The parts that stay on: top:N, by the method's scores.")
    ],
    low: Annotated[
        float | None,
        typer.Option("--low", help="Lowest gate of the others. Default: what the kind allows."),
    ] = None,
    claim: Annotated[str, typer.Option(help="damage or same-answer.")] = "damage",
    method: By = "gradient",
    budget: Annotated[float, typer.Option(help="CPU seconds an example.")] = 10.0,
    level: Annotated[
        str, typer.Option(help="real, float32, or float64 (a search: proves nothing).")
    ] = "real",
    examples: Annotated[
        int,
        typer.Option(help="Examples, from the first.", callback=within("--examples", 1, 1_000_000)),
    ] = 10,
    radius: Annotated[
        float | None,
        typer.Option("--radius", help="Let every input entry move by up to this beside the gates."),
    ] = None,
    references: Annotated[
        bool,
        typer.Option(
            "--references",
            help="Let a gate of zero bring in any value between those of the run's examples.",
        ),
    ] = False,
    out: CertificateFile = None,
    as_json: Json = False,
) -> None:
    """Bound what all other parts of a saved run can do, in any combination and at any strength:
    the bracket of the damage that a search found and a proof allows.
    """
    require_run(folder)
    from assay.studies.verbs import certify_run

    found = certify_run(
        folder,
        keep,
        low=low,
        claim=claim,
        by=method,
        budget=budget,
        level=level,
        examples=examples,
        radius=radius,
        references=references,
        certificate=out,
    )
    print_table(*found, as_json)


def prove(
    task: Annotated[str, typer.Argument(help="What the network does: max-of-k.")],
    weights: Annotated[
        Path, typer.Argument(metavar="WEIGHTS", help="Safetensors file with the network's weights.")
    ],
    strategy: Annotated[str, typer.Option(help="A strategy's name, best, or all.")] = "best",
    level: Annotated[
        str, typer.Option(help="real, float32, or float64 (a search: proves nothing).")
    ] = "real",
    loss: Annotated[
        bool,
        typer.Option("--loss", help="Bound the mean cross-entropy from above, not the accuracy."),
    ] = False,
    out: CertificateFile = None,
    as_json: Json = False,
) -> None:
    """Prove a lower bound of a network's accuracy over all inputs, or an upper one of its loss."""
    from assay.studies.names import require_proof

    require_proof(task, weights, strategy, level)
    from assay.studies.proofs import prove_task

    summary = prove_task(task, weights, strategy=strategy, level=level, loss=loss, certificate=out)
    print_summary(summary, as_json)


def check(
    certificate: Annotated[Path, typer.Argument(metavar="CERT.json")],
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="WEIGHTS",
            help="Safetensors file with the network's weights. Certificates of gates hold their"
            " network, and are compared with it where it is given.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Recompute what a certificate claims; exit 0 if it is supported, 1 with the reason if not."""
    from assay.io.files import existing

    existing(certificate)
    if weights is not None:
        existing(weights)
    from assay.studies.proofs import check_certificate

    verdict, lines = check_certificate(certificate, weights)
    if as_json:
        print_summary(verdict, True)
    else:
        print_lines(lines)
    raise typer.Exit(0 if verdict["accepted"] else 1)
