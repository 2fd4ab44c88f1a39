"""The command: verbs only. Exit codes: 0 done, 1 failed, 2 bad input."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # rich's own markup would swallow the brackets of `group[index]`
    help="Take a neural network apart into mechanisms and measure how far to trust the result.",
)


def _within(flag: str, low: int, high: int) -> Callable[[int], int]:
    """Return a callback that refuses integers outside of a range."""

    def check(value: int) -> int:
        if not low <= value <= high:
            raise _refusal(f"{flag} must lie between {low} and {high}, got {value}")
        return value

    return check


def _share(value: float) -> float:
    if not 0 < value < 1:
        raise _refusal(f"--alpha must lie between 0 and 1, both excluded, got {value}")
    return value


def _method(name: str) -> str:
    from assay.studies.methods import require_method

    return require_method(name)


def _refusal(message: str) -> Exception:
    from assay.errors import InputError

    return InputError(message)


_ROWS = 100  # of a table in a terminal
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of the run (default: runs/RECIPE).")
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
    typer.Option("--method", help="gradient, ig, second-order, exact or auto.", callback=_method),
]
Top = Annotated[int, typer.Option(help="Rows to show.", callback=_within("--top", 1, 1_000_000))]


@app.command()
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

        _several(runner.plan(recipes.load(recipe, overrides or ())), as_json)
        return
    _one_of(resume, force)
    folder = out or Path("runs") / Path(recipe).stem
    loaded = recipes.load(recipe, overrides or (), resumes=folder if resume else None)
    require_startable(folder, resume=resume, force=force)
    loaded.config.require()
    with _going_on("run", recipe, "-o", str(folder), "--resume"):
        from assay.studies import runner

        summary = runner.execute(loaded, folder, resume=resume, force=force)
        if as_json:
            _show(summary, True)
        else:
            _facts(runner.facts(folder), folder)


@app.command()
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


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes."""
    from assay.studies import recipes

    loaded = [recipes.load(name) for name in recipes.shipped()]
    _show({recipe.name: recipe.about for recipe in loaded}, as_json)


@app.command()
def tour(
    out: Out = None, resume: Resume = False, force: Force = False, as_json: Json = False
) -> None:
    """Run the short recipe of every kind that exists and write one report."""
    from assay.io.runs import require_startable

    _one_of(resume, force)
    folder = out or Path("runs") / "tour"
    require_startable(folder, resume=resume, force=force)
    with _going_on("tour", "-o", str(folder), "--resume"):
        from assay.studies import runner
        from assay.studies.tour.study import tour as take

        summary = take(folder, resume=resume, force=force)
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
    folder: Folder, method: By = "gradient", top: Top = 20, as_json: Json = False
) -> None:
    """Score every part of a saved run."""
    _opened(folder)
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
    top: Top = 10,
    as_json: Json = False,
) -> None:
    """Ablate parts of a saved run exactly, beside their estimates."""
    _opened(folder)
    from assay.studies.verbs import ablate_run

    _table(*ablate_run(folder, part or [], by=method, top=top), as_json)


@app.command()
def audit(
    folder: Folder,
    method: By = "gradient",
    exact: Annotated[
        int,
        typer.Option(
            help="Parts ablated exactly in every input.",
            callback=_within("--exact", 1, 1_000_000_000),
        ),
    ] = 64,
    alpha: Annotated[
        float, typer.Option(help="Share of parts that a bar may miss.", callback=_share)
    ] = 0.1,
    seed: Annotated[
        int, typer.Option(help="Seed of the sample.", callback=_within("--seed", 0, 2**31 - 1))
    ] = 0,
    on: Annotated[
        Path | None,
        typer.Option(
            "--on", metavar="NEW", help="New inputs: apply the run's own bars and thresholds there."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how far to trust a method on a saved run: agreement with exact ablation, and error
    bars.
    """
    _opened(folder)
    if on is not None and (method, exact, alpha, seed) != ("gradient", 64, 0.1, 0):
        raise _refusal(
            "--on applies what the run calibrated, by its own method and level; leave out --method,"
            " --exact, --alpha and --seed"
        )
    from assay.studies.verbs import audit_run

    _table(*audit_run(folder, by=method, exact=exact, alpha=alpha, seed=seed, on=on), as_json)


@app.command()
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
        typer.Option(
            help="Examples, from the first.", callback=_within("--examples", 1, 1_000_000)
        ),
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
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="CERT.json", help="Write the certificate here."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bound what all other parts of a saved run can do, in any combination and at any strength:
    the bracket of the damage that a search found and a proof allows.
    """
    _opened(folder)
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
    _table(*found, as_json)


@app.command()
def explain(
    folder: Folder,
    part: Annotated[str, typer.Argument(help="group[index], as `assay attribute` prints it.")],
    method: By = "gradient",
    top: Top = 10,
    as_json: Json = False,
) -> None:
    """Show the examples in which one part matters most."""
    _opened(folder)
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
    _opened(first)
    _opened(second)
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
    from assay.studies.names import require_proof

    require_proof(task, weights, strategy, level)
    from assay.studies.proofs import prove_task

    summary = prove_task(task, weights, strategy=strategy, level=level, loss=loss, certificate=out)
    _show(summary, as_json)


@app.command()
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
        _show(verdict, True)
    else:
        print("\n".join(lines))
    raise typer.Exit(0 if verdict["accepted"] else 1)


@app.command()
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
    _several(found, as_json)


guard = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Guard your own language model: reject every input until explanations are admitted.",
)
app.add_typer(guard, name="guard")
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of the model.")]
Lines = Annotated[Path, typer.Argument(metavar="DATA", help="Text file, one input per line.")]
GuardFolder = Annotated[Path, typer.Argument(metavar="GUARD", help="Folder of a saved guard.")]
Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", help="Inputs that only calibrate; default: a part of DATA."),
]
Limit = Annotated[
    int, typer.Option(help="Lines read at most.", callback=_within("--limit", 1, 1_000_000))
]
GuardOut = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="New folder of the guard.")
]


@guard.command("fit")
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
        typer.Option(help="Features that are guarded.", callback=_within("--features", 1, 1024)),
    ] = 128,
    modes: Annotated[
        str, typer.Option(help="memorise, constant, marginal, add; with commas.")
    ] = "constant,marginal,add",
    theta: Annotated[float, typer.Option(help="Least probability of an accepted event.")] = 1e-5,
    delta: Annotated[float, typer.Option(help="One minus the confidence of all events.")] = 0.05,
    alpha: Annotated[float, typer.Option(help="Level of the tests.")] = 0.05,
    calibration: Calibration = None,
    limit: Limit = 4000,
    seed: Annotated[
        int, typer.Option(help="Seed of the splits.", callback=_within("--seed", 0, 2**31 - 1))
    ] = 0,
    as_json: Json = False,
) -> None:
    """Fit a guard on inputs of your own and save it."""
    from assay.guard.settings import Settings
    from assay.io.files import existing

    chosen = tuple(mode.strip() for mode in modes.split(",") if mode.strip())
    settings = Settings(modes=chosen, theta=theta, delta=delta, alpha=alpha)
    if bounds := {"single-edit", "prune"} & set(chosen):
        raise _refusal(
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
    _table(*found, as_json)


@guard.command("propose")
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
    _guard_there(folder, proposals, data)
    from assay.studies.guard_verbs import propose_to_guard

    found = propose_to_guard(
        folder, proposals, model, data, out, calibration=calibration, limit=limit
    )
    _table(*found, as_json)


@guard.command("score")
def guard_score(
    folder: GuardFolder, model: Model, data: Lines, limit: Limit = 4000, as_json: Json = False
) -> None:
    """Judge inputs: which are accepted, and which events of the others had no support."""
    _guard_there(folder, data)
    from assay.studies.guard_verbs import score_inputs

    _table(*score_inputs(folder, model, data, limit=limit), as_json)


@guard.command("explain")
def guard_explain(folder: GuardFolder, top: Top = 20, as_json: Json = False) -> None:
    """Show what a guard knows: explanations that were admitted, and those that were refused."""
    _guard_there(folder)
    from assay.studies.guard_verbs import explain_guard

    _table(*explain_guard(folder, top=top), as_json)


def _guard_there(folder: Path, *paths: Path) -> None:
    """Refuse what is no guard, or no file, before anything large is loaded."""
    from assay.io.files import existing

    for path in (folder / "guard.json", *paths):
        existing(path)


def main() -> None:
    """Run the command: one clear line and exit code 2 for bad input, 1 for a failure, 130 when it
    was stopped.
    """
    _settle()
    from assay.errors import AssayError, StoppedError

    message: object = ""
    try:
        _require_place()
        code = app(sys.argv[1:] or ["--help"], prog_name="assay", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        if code == StoppedError.exit_code:
            message = "stopped; no file is left half-written: run the same command again"
    except AssayError as error:
        message, code = error, error.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message, code = f"out of memory: {error}", 1
    except BrokenPipeError:
        _silence()
        code = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO) or error.filename is not None:
            raise
        _silence()
        message, code = f"the output cannot be written: {error.strerror}", 1
    except Exception as error:
        # Wrong usage; the classes live in another package from one version of typer to the next.
        if not hasattr(error, "format_message"):
            raise
        message, code = f"{error.format_message()} (see assay --help)", 2
    if text := " ".join(str(message).split()):
        print("assay:", text, file=sys.stderr)
    sys.exit(code or 0)


def _require_place() -> None:
    """Refuse to work in a folder that was deleted, in which libraries cannot be loaded."""
    try:
        os.getcwd()
    except OSError as error:
        raise _refusal("the working folder was deleted; change to another one") from error


def _silence() -> None:
    """Send what is left in the output's buffer nowhere: the interpreter would fail on it again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _is_out_of_memory(error: BaseException) -> bool:
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _one_of(resume: bool, force: bool) -> None:
    if resume and force:
        raise _refusal("--resume goes on with a run and --force replaces it; give one of them")


def _opened(folder: Path) -> None:
    """Refuse what is no run before anything large is loaded."""
    from assay.io.runs import opened

    opened(folder)


@contextmanager
def _going_on(*words: str) -> Iterator[None]:
    """Say, when the user stops the command, with which one it goes on."""
    from assay.errors import StoppedError

    try:
        yield
    except KeyboardInterrupt as error:
        raise StoppedError(f"stopped; go on with: {shlex.join(['assay', *words])}") from error


def _settle() -> None:
    # Names of files may hold bytes that are no text.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
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
    if "part" in table.columns:  # a part's name holds its group and index
        table = table.drop("group", "index", strict=False)
    empty = [
        name
        for name, kind in table.schema.items()
        if kind == pl.String and (table[name].fill_null("") == "").all()
    ]
    digits = pl.selectors.float().map_elements(lambda value: f"{value:.4g}", pl.String)
    with _unshortened(shutil.get_terminal_size((160, 24)).columns, 60):
        print(table.head(_ROWS).drop(empty).with_columns(digits))
    if table.height > _ROWS:
        print(f"the first {_ROWS} of {table.height:,} rows; --json gives all")


def _unshortened(width: int, words: int) -> Any:
    """Print tables with every row and column, texts up to a length, and no header of types."""
    import polars as pl

    return pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=width,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
        fmt_str_lengths=words,
    )


def _several(summary: dict[str, Any], as_json: bool) -> None:
    """Show what is no table as lines, then every list of rows as a table under its name."""
    if as_json:
        _show(summary, True)
        return
    import polars as pl

    from assay.charts import show

    _show({key: entry for key, entry in summary.items() if not isinstance(entry, list)}, False)
    with _unshortened(200, 110):
        for key, rows in summary.items():
            if isinstance(rows, list):
                cells = [{name: show(value) for name, value in row.items()} for row in rows]
                print(f"\n{key.replace('_', ' ')}\n{pl.DataFrame(cells)}")


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and "sentence" in value:
        return [(prefix, value["sentence"])]  # numbers that say themselves what they mean
    if isinstance(value, dict):
        return [
            item
            for key, entry in value.items()
            for item in _flat(entry, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, value)]


if __name__ == "__main__":
    main()
