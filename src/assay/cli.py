"""The command: verbs only. Exit codes: 0 done, 1 failed, 2 bad input."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Take a neural network apart into mechanisms and measure how far to trust the result.",
)

Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of the run (default: runs/RECIPE).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run in the folder.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a config key: --set training.steps=500. Repeatable."),
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished run.")]
By = Annotated[str, typer.Option("--method", help="gradient, ig, second-order or exact.")]


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (see `assay recipes`) or a YAML file.")
    ],
    out: Out = None,
    overrides: Set = None,
    resume: Resume = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run a recipe from nothing to a report."""
    from assay.studies import runner

    loaded = runner.load(recipe, overrides or ())
    folder = out or Path("runs") / loaded.name
    summary = runner.execute(loaded, folder, resume=resume, force=force)
    if as_json:
        _show(summary, True)
    else:
        _facts(runner.facts(folder), folder)


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes."""
    from assay.studies import runner

    loaded = [runner.load(name) for name in runner.shipped()]
    _show({recipe.name: recipe.about for recipe in loaded}, as_json)


@app.command()
def tour(out: Out = None, as_json: Json = False) -> None:
    """Run the short recipe of every kind that exists and write one report."""
    from assay.studies import runner
    from assay.studies.tour.study import tour as take

    folder = out or Path("runs") / "tour"
    summary = take(folder)
    if as_json:
        _show(summary, True)
    else:
        _facts([fact for name in summary for fact in runner.facts(folder / name)], folder)


@app.command()
def report(folder: Folder, as_json: Json = False) -> None:
    """Build the report of a saved run again."""
    from assay.io.runs import opened
    from assay.studies import runner

    _show({"report": str(runner.report(opened(folder)))}, as_json)


@app.command()
def attribute(
    folder: Folder, method: By = "gradient", top: int = 20, as_json: Json = False
) -> None:
    """Score every part of a saved run."""
    from assay.studies.verbs import attribute_run

    _table(*attribute_run(folder, by=method, top=top), as_json)


@app.command()
def ablate(
    folder: Folder,
    part: Annotated[
        list[str] | None,
        typer.Option("--part", help="group[index]; repeatable. Default: the top parts."),
    ] = None,
    method: By = "gradient",
    top: int = 10,
    as_json: Json = False,
) -> None:
    """Ablate parts of a saved run exactly, beside their estimates."""
    from assay.studies.verbs import ablate_run

    _table(*ablate_run(folder, part or [], by=method, top=top), as_json)


@app.command()
def audit(
    folder: Folder,
    method: By = "gradient",
    exact: Annotated[int, typer.Option(help="Parts ablated exactly in every input.")] = 64,
    alpha: Annotated[float, typer.Option(help="Share of parts that a bar may miss.")] = 0.1,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Measure how far to trust a method on a saved run: agreement with exact ablation, and error
    bars.
    """
    from assay.studies.verbs import audit_run

    _table(*audit_run(folder, by=method, exact=exact, alpha=alpha, seed=seed), as_json)


@app.command()
def explain(
    folder: Folder,
    part: Annotated[str, typer.Argument(help="group[index], as `assay attribute` prints it.")],
    method: By = "gradient",
    top: int = 10,
    as_json: Json = False,
) -> None:
    """Show the examples in which one part matters most."""
    from assay.studies.verbs import explain_run

    _table(*explain_run(folder, part, by=method, top=top), as_json)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="DIR")],
    second: Annotated[Path, typer.Argument(metavar="DIR")],
    method: By = "gradient",
    as_json: Json = False,
) -> None:
    """Match the parts of two saved runs and say how stable they are."""
    from assay.studies.verbs import compare_runs

    _table(*compare_runs(first, second, by=method), as_json)


@app.command()
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
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="CERT.json", help="Write the certificate here."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove a lower bound of a network's accuracy over all inputs, or an upper one of its loss."""
    from assay.studies.proofs import prove_task

    summary = prove_task(task, weights, strategy=strategy, level=level, loss=loss, certificate=out)
    _show(summary, as_json)


@app.command()
def check(
    certificate: Annotated[Path, typer.Argument(metavar="CERT.json")],
    weights: Annotated[
        Path,
        typer.Option(
            "--weights", metavar="WEIGHTS", help="Safetensors file with the network's weights."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Recompute what a certificate claims; exit 0 if the weights support it, 1 with the reason
    if not.
    """
    from assay.studies.proofs import check_certificate

    verdict = check_certificate(certificate, weights)
    _show(verdict, as_json)
    raise typer.Exit(0 if verdict["accepted"] else 1)


def main() -> None:
    """Run the command: one clear line and exit code 2 for bad input, 1 for a failure."""
    _settle()
    from assay.errors import AssayError

    try:
        app()
    except AssayError as error:
        print(f"assay: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("assay: interrupted; go on with --resume", file=sys.stderr)
        sys.exit(130)


def _settle() -> None:
    # Spinning threads cost more than they bring on small work, and must be limited before torch is
    # imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The allocator's default gives large buffers back at every free; keeping them halves the time
    # of a training step.
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30)
            libc.mallopt(-1, (1 << 31) - 1)
        except (OSError, AttributeError):
            pass


def _facts(facts: list[Any], folder: Path) -> None:
    from assay.charts import show

    for fact in facts:
        print(f"{fact.label:<28} {show(fact.value):>10}  {fact.note}".rstrip())
    print(f"report: {folder / 'report.html'}")


def _show(summary: Any, as_json: bool) -> None:
    if as_json:
        from assay.io.files import plain

        print(json.dumps(plain(summary), indent=2, allow_nan=False))
        return
    for key, value in _flat(summary):
        print(f"{key:<44} {value:.4g}" if isinstance(value, float) else f"{key:<44} {value}")


def _table(summary: dict[str, Any], table: Any, as_json: bool) -> None:
    if as_json:
        _show({**summary, "rows": table.to_dicts()}, True)
        return
    import polars as pl

    _show(summary, False)
    with pl.Config(
        tbl_rows=-1,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
        float_precision=4,
        fmt_str_lengths=60,
    ):
        print(table)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [
            item
            for key, entry in value.items()
            for item in _flat(entry, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, value)]


if __name__ == "__main__":
    main()
