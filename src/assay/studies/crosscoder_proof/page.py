"""The report of a crosscoder proof, built from the saved run alone."""

from __future__ import annotations

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary, config = run.json("summary.json"), run.json("config.json")["config"]
    source = config["model"]["path"] or "trained here"
    does = {"pairs": "names the larger of two tokens", "digits": "reads digits"}[config["task"]]
    if config["crosscoder"]["cotrain"]:
        source += ", together with its crosscoder, so that much can be proved of it"
    return (
        "What do features prove?",
        f"A residual network ({source}) {does}. A crosscoder of"
        f" {summary['features']} features describes its {summary['points']} inputs. Errors are"
        " computed once per feature and added up per input, and give a lower bound of every margin:"
        " the certified shares below are proved in real arithmetic, and an independent checker"
        " has confirmed the certificate from the weights alone.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary = run.json("summary.json")
    certificate, estimate = summary["certificate"], summary["estimate"]
    facts = [
        Fact(
            f"certified share ({certificate['strategy']})",
            certificate["share"],
            "proved and checked, level real",
        ),
        Fact("true share", summary["right"] / summary["points"], "the network on every input"),
        Fact(
            "claimed share",
            summary["claimed"],
            "a claim, not a bound: the crosscoder's last layer, unembedded",
        ),
        Fact(
            "estimated share",
            estimate["right"],
            "a heuristic estimate, not a bound: the unexplained residual as independent noise",
        ),
        Fact("features", summary["features"], f"mean L0 {summary['mean_l0']:.3g}"),
    ]
    return facts, [
        _certificates(run),
        _curve(run),
        _growth(run),
        _margins(run),
        _independence(run),
        _estimate(run),
        *_training(run),
    ]


def _certificates(run: Run) -> Section:
    table = run.table("proofs.parquet")
    both = _with_held_out(table, "strategy")
    picture = charts.bars(
        both, "strategy", "share", colour="points", y_title="certified share", horizontal=True
    )
    return Section(
        "Certificates",
        "Each certificate is a lower bound of every margin; a point is certified where it is above"
        " zero. The linear ones replace the interaction of features by one side per neuron. The"
        " baselines propagate intervals or linear bounds through the network for every point. The"
        " crosscoder was not trained on the points that are held out.",
        charts=[picture],
        tables=[Table(table, "Every certificate")],
    )


def _curve(run: Run) -> Section:
    table, summary = run.table("curve.parquet"), run.json("summary.json")
    both = _with_held_out(table, "groups", "operations")
    cost = summary["evaluation_operations"]
    last = table["operations"].to_list()[-1]
    word = "less" if last < cost else "more"
    return Section(
        "Certified share against groups and operations",
        "Points are grouped by their strongest features; one linear bound holds for a whole group,"
        " and groups that fail are split. The left end explains most, the right end runs the"
        f" network point by point. Running the network on all {summary['points']} points takes"
        f" {cost:,} operations; the whole curve took {last:,}, which is {word}.",
        charts=[
            charts.line(both, "groups", "share", colour="points", y_title="certified share"),
            charts.line(
                both,
                "operations",
                "share",
                colour="points",
                y_title="certified share",
                log_x=True,
            ),
        ],
        tables=[Table(table, "Every round")],
    )


def _growth(run: Run) -> Section:
    table = run.table("growth.parquet")
    most = table["points"].to_list()[-1]
    last = dict(table.filter(pl.col("points") == most).select("what", "operations").iter_rows())
    cost = last.pop("running the network")
    cheap = [name for name, count in last.items() if count < cost]
    dear = [name for name, count in last.items() if count >= cost]
    return Section(
        "Operations of proofs and of running the network",
        f"Tables of the features are made once, whatever the points. At {most} points cheaper than"
        f" running the network: {', '.join(cheap) or 'none'}; dearer: {', '.join(dear) or 'none'}."
        " Codes are advice: the operations of the encoder are not counted.",
        charts=[
            charts.line(
                table, "points", "operations", colour="what", log_x=True, log_y=True, points=True
            )
        ],
        tables=[Table(table, "Operations by number of points")],
    )


def _margins(run: Run) -> Section:
    table = run.table("margins.parquet")
    chosen = run.json("config.json")["config"]["proofs"]["certified"]
    return Section(
        "Bounds and true margins",
        "No bound may lie above the line.",
        charts=[
            charts.scatter_identity(
                table,
                "true",
                chosen,
                x_title="true margin (logits)",
                y_title=f"lower bound ({chosen})",
                title="Lower bound of every margin",
            )
        ],
    )


def _independence(run: Run) -> Section:
    summary = run.json("summary.json")
    neurons, pairs = run.table("neurons.parquet"), run.table("pairs.parquet")
    share = summary["neuron_pairs_without_interaction"]
    shown = neurons.head(30).with_columns(pl.col("neuron").cast(pl.String))
    picture = charts.bars(shown, "neuron", "mean", y_title="mean interaction")
    costly = pairs.head(40).with_columns(pl.col("strongest", "other").cast(pl.String))
    squares = charts.heatmap(
        costly,
        "other",
        "strongest",
        "cost in margin",
        x_title="other feature",
        y_title="strongest feature",
        title="The pairs that cost most",
    )
    return Section(
        "Independence of features",
        f"At {100 * share:.0f} % of all pairs of point and neuron, features do not interact;"
        f" {summary['neurons_without_interaction']} neurons have no interaction at any point. The"
        " table lists pairs of a strongest feature and another one by what their interaction costs"
        " in margin: more interpretation pays most at its top. These numbers are measured.",
        charts=[picture, squares],
        tables=[Table(pairs, "Pairs of features by cost in margin")],
    )


def _estimate(run: Run) -> Section:
    summary = run.json("summary.json")
    estimate = summary["estimate"]
    gaps = run.table("proofs.parquet").select("strategy", "mean gap")
    return Section(
        "Estimate beside the bounds",
        "The heuristic estimate treats what the crosscoder does not explain as independent noise."
        f" Its 95 % bars reach {estimate['half_width']:.3g} to either side on average. They must be"
        f" {estimate['stretch']:.3g} times as wide to hold 95 % of the true margins. A proof needs"
        " no such assumption; the mean gap of each bound is in the table.",
        tables=[Table(gaps, "Mean distance from bound to true margin (logits)")],
    )


def _training(run: Run) -> list[Section]:
    metrics = run.metrics()
    return [Section("Training", charts=[charts.training_curves(metrics)])] if metrics.width else []


def _with_held_out(table: pl.DataFrame, *keys: str) -> pl.DataFrame:
    """Return the shares of all points and of those held out below one another, with the points'
    name.
    """
    columns = {"all points": "share", "held out": "held out"}
    return pl.concat(
        [
            table.select(*keys, pl.col(column).alias("share"), pl.lit(name).alias("points"))
            for name, column in columns.items()
        ]
    )
