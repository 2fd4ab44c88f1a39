"""The report of a digits guard, built from the saved run alone."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary = run.json("summary.json")
    return (
        "A guard that starts by rejecting everything",
        f"A network classifies digits ({summary['accuracy']:.1%} right on held-out ones). Its guard"
        " knows nothing at first and rejects every input. Each explanation that is admitted makes"
        " events of the hidden units likely; an input is accepted if every unit is explained there"
        " and the tests pass.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary = run.json("summary.json")
    held, level = summary["held_out"], summary["level"]
    low, high = held["accepted_interval"]
    with_, without = (
        summary["backdoor"][name]["triggered accepted"]
        for name in ("with triggered inputs", "clean")
    )
    facts = [
        Fact(
            "held-out digits accepted",
            held["accepted"],
            f"95 %: {low:.1%} to {high:.1%}; {summary['accepted_without_explanations']:.0%} without"
            " explanations",
        ),
        Fact(
            "mean AUROC of the combination",
            summary["mean_auroc"],
            f"over families; at worst {summary['worst_difference']:+.3f} from the best single"
            " detector",
        ),
        Fact(
            "triggered inputs accepted",
            without,
            f"a backdoor's, with a clean laboratory; {with_:.1%} with triggered inputs in it",
        ),
        Fact(
            "rejected by the tests",
            level["mean"],
            f"of inputs like the calibration ones, over {level['resplits']} resplits; nominal"
            f" {level['nominal']:.4f}, standard error {level['standard_error']:.4f}",
        ),
        Fact(
            "explanations",
            summary["explanations"],
            f"{summary['mechanistic']} of them mechanistic; together they save"
            f" {summary['bits']:,.0f} bits",
        ),
    ]
    found = [_promises(summary), _curve(run), _families(run), _explanations(run), _proposals(run)]
    found += [_modes(run, summary), _backdoor(run)]
    if summary["agreement"] is not None:
        found.append(_agreement(run, summary["agreement"]))
    return facts, found


def _promises(summary: dict[str, Any]) -> Section:
    held = summary["held_out"]
    low, high = held["unsupported_interval"]
    return Section(
        "What is promised",
        f"The tests reject at most {summary['alpha']:.0%} of inputs that are exchangeable with the"
        f" calibration inputs. Every accepted event occurred at least {summary['needed']} times in"
        f" the laboratory; with confidence {1 - summary['delta']:.0%}, over all events together,"
        f" its probability there is at least {summary['theta']:.0e}. An event without evidence is"
        " never accepted.\n\nNothing is promised about other inputs: what the guard accepts of them"
        " is measured family by family. Features without support reject a further"
        f" {held['unsupported']:.1%} of held-out digits (95 %: {low:.1%} to {high:.1%}).",
    )


def _curve(run: Run) -> Section:
    curve = run.table("curve.parquet")
    long = curve.unpivot(
        ["accepted", "supported", "events explained"],
        index=["explanations", "bits"],
        variable_name="share of",
        value_name="share",
    )
    return Section(
        "From nothing",
        "Explanations in the order of admission: each time the one that explains most events of"
        " laboratory inputs that were unexplained, ties by the bits that it saves. The tests are"
        " calibrated again at every point.",
        charts=[
            charts.line(long, "explanations", "share", colour="share of"),
            charts.line(long, "bits", "share", colour="share of", x_title="bits saved"),
        ],
        tables=[Table(curve, "Every point")],
    )


def _families(run: Run) -> Section:
    table = run.table("detectors.parquet")
    mean = table.group_by("family", "detector", maintain_order=True).agg(pl.col("AUROC").mean())
    accepted = run.table("acceptance.parquet")
    through = accepted.group_by("family", maintain_order=True).agg(
        pl.col("accepted", "passes the tests", "supported").mean(), pl.col("inputs").sum()
    )
    return Section(
        "Families of anomalies",
        "AUROC of held-out digits against each family, means over the networks. likelihood,"
        " dependence and distance need no class; root_distance is the Mahalanobis distance from the"
        " predicted class, confidence the largest softmax probability. The combination is Fisher's"
        " sum of all six, calibrated as a whole.",
        charts=[
            charts.heatmap(
                mean, "detector", "family", "AUROC", text=True, title="AUROC by detector"
            ),
            charts.bars(
                through, "family", "accepted", horizontal=True, title="Anomalies accepted (share)"
            ),
        ],
        tables=[
            Table(run.table("winners.parquet"), "Who wins"),
            Table(accepted, "What is accepted, with 95 % intervals"),
        ],
    )


def _explanations(run: Run) -> Section:
    return Section(
        "Explanations",
        "Statistical ones come from laboratory tables. Each has to save more bits than it takes to"
        " state, and the fresh split must agree with its table.",
        tables=[Table(run.table("explanations.parquet"), "Admitted, then refused")],
    )


def _proposals(run: Run) -> Section:
    return Section(
        "Predictions from gates",
        "Proposed: a unit of the first layer fires the unit of the second that it drives most."
        " Its value is swapped in from another input by its gate, and the share of runs in which"
        " the second unit fires predicts how often the two fire together. The table of the two was"
        " not looked at; the fresh split decides.",
        tables=[Table(run.table("proposals.parquet"), "Every proposal")],
    )


def _modes(run: Run, summary: dict[str, Any]) -> Section:
    weights = summary["weights"]
    return Section(
        "Modes",
        "A guard of the second hidden layer alone, which bounds know. A changed activation is"
        " accepted inside its certified interval; with pruning, units of which no value changes the"
        f" decision need no explanation. Of {weights['weights']:,} weights, {weights['inactive']:,}"
        f" are provably inactive on the domain, and {weights['redundant']:,} more together move no"
        f" logit by more than {weights['proved_most']:.3g}; on held-out digits removing them moved"
        f" one by at most {weights['moved']:.3g}.",
        tables=[Table(run.table("modes.parquet"), "Share accepted, by mode")],
    )


def _backdoor(run: Run) -> Section:
    return Section(
        "A backdoor",
        "A network was trained to answer the target whenever a bright square is in the corner. Its"
        " guard was fitted on a clean laboratory, and on one with triggered inputs in it.",
        tables=[Table(run.table("backdoor.parquet"), "What the guard accepts")],
    )


def _agreement(run: Run, summary: dict[str, Any]) -> Section:
    table = run.table("agreement_detectors.parquet")
    return Section(
        "Sentences outside of a grammar",
        f"A guard of a language model of subject-verb agreement: {summary['explanations']}"
        f" explanations, {summary['held_out']['accepted']:.1%} of held-out sentences accepted.",
        charts=[charts.heatmap(table, "detector", "family", "AUROC", text=True)],
        tables=[
            Table(run.table("agreement_winners.parquet"), "Who wins"),
            Table(run.table("agreement_acceptance.parquet"), "What is accepted"),
        ],
    )
