"""The command and its verbs, in the order in which help lists them."""

from __future__ import annotations

from collections.abc import Callable

import typer

from assay.cli.guards import guard_explain, guard_fit, guard_propose, guard_score
from assay.cli.outside import verify
from assay.cli.runs import recipes, report, run, tour, train
from assay.cli.saved import ablate, attribute, compare, explain, steer
from assay.cli.scaling import scaling
from assay.cli.trust import audit, certify, check, prove

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # rich's own markup would swallow the brackets of `group[index]`
    help="Take a neural network apart into mechanisms and measure how far to trust the result.",
)
VERBS: tuple[Callable[..., None], ...] = (
    run,
    train,
    recipes,
    tour,
    report,
    attribute,
    ablate,
    audit,
    certify,
    steer,
    explain,
    compare,
    prove,
    verify,
    check,
    scaling,
)
for verb in VERBS:
    app.command()(verb)

guard = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Guard your own language model: reject every input until explanations are admitted.",
)
guard.command("fit")(guard_fit)
guard.command("propose")(guard_propose)
guard.command("score")(guard_score)
guard.command("explain")(guard_explain)
app.add_typer(guard, name="guard")
