"""The report of a channels study, built from the saved run alone."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table
from assay.studies.brackets import bracket_sections
from assay.studies.channels.page_of_promises import calibration
from assay.studies.channels.words import BOUNDS


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    config, summary = run.json("config.json")["config"], run.json("summary.json")
    model, source = config["model"], config["data"]["path"] or "scikit-learn's handwritten digits"
    return (
        "Channels of a bilinear network",
        f"A residual bilinear network with {model['blocks']} blocks of {model['hidden']} channels "
        f"was trained on {source} so that switching a channel off does what its attribution says. "
        f"Every channel was then attributed, switched off exactly on {summary['examples']} "
        "held-out inputs, and the error of the cheap answer measured, bounded and calibrated.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary, config = run.json("summary.json"), run.json("config.json")["config"]
    tolerance, top = config["audit"]["tolerance"], config["audit"]["top"]
    certified, measured = summary["certified_share"], summary["top"]
    first = summary["agreement"]["first"]
    best = next(
        (name for name in reversed(BOUNDS) if name in certified and name != "second_order_bound"),
        None,
    )
    needing, within = measured["need_certificate"], measured["within_tolerance_first"]
    proved = None if best is None or certified[best] is None else round(certified[best] * needing)
    facts = [
        Fact("held-out accuracy", summary["accuracy"], f"{summary['examples']} inputs attributed"),
        Fact(
            f"attribution within {tolerance:.0%} of the exact effect",
            f"{within:,} of {needing:,}",
            f"of the {top} largest channels of each input; {measured['exact_by_construction']:,} "
            "more are in the last block and exact",
        ),
        Fact(
            f"proved to be within {tolerance:.0%}",
            "none" if proved is None else f"{proved:,} of {needing:,}",
            "not available" if best is None else f"the same channels, by the {BOUNDS[best]}",
        ),
        Fact("sparsity (Hoyer)", summary["hoyer"], "0: all channels alike, 1: one channel"),
        Fact(
            "agreement r", first["pearson"], f"slope {first['slope']:.3f}, against exact ablation"
        ),
    ]
    parts = [
        _agreement(run, summary),
        _certificates(run, config, certified, summary["not_available"]),
    ]
    parts += _faces(run)
    parts += _networks(run, config)
    parts += [
        calibration(run, summary),
        _circuit(run, summary),
        *bracket_sections(run, "channels"),
        _training(run),
        _tables(run),
    ]
    return facts, parts


def _agreement(run: Run, summary: dict[str, Any]) -> Section:
    pictures = []
    for name, title in (
        ("first", "First-order attribution against exact ablation"),
        ("second", "Second order against exact ablation"),
    ):
        if run.has(f"audit-{name}.parquet"):
            table = run.table(f"audit-{name}.parquet")
            pictures.append(
                charts.scatter_identity(
                    table,
                    "exact",
                    "estimate",
                    colour="group",
                    tooltip=["part", "example"],
                    title=title,
                )
            )
    first = summary["agreement"]["first"]
    return Section(
        "Is the attribution right?",
        "Each point is one channel on one input: what attribution says (up) against what happens "
        "when the channel is switched off (across). On the line the two agree. Over "
        f"{first['n']:,} exact ablations the first-order slope is {first['slope']:.3f} and "
        f"{first['sign']:.1%} of the signs are right.",
        charts=pictures,
    )


def _certificates(
    run: Run, config: dict[str, Any], certified: dict[str, float], refused: dict[str, str]
) -> Section:
    table = run.table("channels.parquet")
    pictures: list[Any] = []
    tables: list[Table] = []
    text = (
        "The error of a channel's attribution is bounded from the weights and the clean pass "
        "alone, without switching anything off. The first-order bound follows the size of the "
        "step through the later blocks. The second-order bound is about the second-order "
        "estimate. The bound of second order plus remainder carries the step's linear part "
        "exactly and bounds only the rest. Shares are of the largest channels outside the last "
        "block; those of the last block need no certificate."
    )
    known = {name: share for name, share in certified.items() if share is not None}
    if known:
        tolerance = config["audit"]["tolerance"]
        shares = pl.DataFrame(
            {"certificate": [BOUNDS[name] for name in known], "share": list(known.values())}
        )
        title = f"Share of top channels whose estimate is proved within {tolerance:.0%}"
        pictures.append(
            charts.bars(
                shares,
                "certificate",
                "share",
                title=title,
                y_title="certified share",
                horizontal=False,
            )
        )
    if "bound" in table.columns:
        rows = table.filter(~pl.col("exact_by_construction"))
        kept = int((rows["error"].abs() <= rows["bound"]).sum())
        points = rows.filter((pl.col("error") != 0) & pl.col("bound").is_finite()).with_columns(
            pl.col("error").abs().log10(),
            pl.col("bound").log10(),
            pl.format("block {}", "block").alias("block"),
        )
        if points.height:
            pictures.append(
                charts.scatter_identity(
                    points,
                    "error",
                    "bound",
                    colour="block",
                    title=f"{kept:,} of {rows.height:,} errors lie within their bound"
                    " (above the line)",
                    x_title="log10 of the true error",
                    y_title="log10 of the certified bound",
                )
            )
        constants = rows.filter(pl.col("realised_constant") > 0).with_columns(
            pl.format("block {}", "block").alias("block")
        )
        if constants.height:
            low, high = constants.select(
                pl.col("realised_constant").quantile(0.05).alias("low"),
                pl.col("realised_constant").quantile(0.95).alias("high"),
            ).row(0)
            pictures.append(
                charts.ecdf(
                    constants,
                    "realised_constant",
                    colour="block",
                    log_x=True,
                    title="Error per squared step: the middle nine tenths span a factor of"
                    f" {high / low:,.0f}",
                    x_title="|error| / step squared",
                )
            )
            tables.append(
                Table(
                    run.table("constants.parquet"),
                    "|error| / step squared: realised, certified, and the product of norms it is "
                    "often taken for",
                )
            )
    if refused:
        text += "\n\nNot available for this network. " + " ".join(
            f"{name}: {reason}." for name, reason in refused.items()
        )
    return Section("What can be proved", text, charts=pictures, tables=tables)


def _faces(run: Run) -> list[Section]:
    if not run.has("faces.parquet"):
        return []
    table = run.table("faces.parquet")
    pictures = [
        charts.heatmap(
            part,
            "column",
            "row",
            "value",
            title=f"Class {name}, eigenvalue {part['eigenvalue'][0]:.2g}",
            x_title="",
            y_title="",
            height=180,
        )
        for (name,), part in table.group_by(["class"], maintain_order=True)
    ]
    text = (
        "A block of a bilinear network is a quadratic form in each output direction, so its "
        "weights can be read without any data. Shown is the first block's strongest eigenvector "
        "towards a class's logit, in pixels: a positive eigenvalue means that images like it, or "
        "like its negative, raise the logit; a negative one that they lower it."
    )
    return [Section("What the weights look for", text, charts=pictures)]


def _networks(run: Run, config: dict[str, Any]) -> list[Section]:
    table = run.table("networks.parquet")
    if not table.height:
        return []
    text = (
        "Networks trained on the same data, with other objectives or another number of blocks. "
        "The relative error of an attribution is C delta / (||g|| |cos|): delta is the step that "
        "switching a channel off takes, |cos| the alignment of what the channel writes with the "
        "gradient g, and C the constant of the error. Medians are over the largest channels "
        "outside the last block; an attribution is right within a tolerance of "
        f"{config['audit']['tolerance']:.0%}."
    )
    caption = "Objectives and depths, factor by factor"
    return [Section("What makes attributions right", text, tables=[Table(table, caption)])]


def _circuit(run: Run, summary: dict[str, Any]) -> Section:
    table, worst = run.table("faithfulness.parquet"), summary["worst_case"]
    picture = charts.faithfulness(table, "channels", "How few channels carry the logit")
    text = (
        "Faithfulness keeps only the channels with the largest attribution on each input; "
        f"completeness removes exactly those. With {worst['kept_share']:.0%} of the channels kept, "
        "the others can still be switched off in a combination that costs at least "
        f"{worst['mean_damage_at_least']:.3g} logits on average (found in {worst['evaluations']} "
        "runs: a lower bound of the worst case)."
    )
    return Section("A circuit, and its worst case", text, charts=[picture])


def _training(run: Run) -> Section:
    metrics = run.metrics()
    wanted = [
        "losses/cross_entropy",
        "losses/sparsity",
        "losses/delta",
        "metrics/accuracy",
        "metrics/agreement",
        "sparsity/hoyer_0",
    ]
    keys = [name for name in wanted if name in metrics.columns]
    text = (
        "Cross-entropy falls while channels become sparse and their steps small enough for the "
        "attribution to be right. Accuracy, agreement and sparsity are those on training inputs: "
        "the test part is read once, after training."
    )
    return Section("Training", text, charts=[charts.training_curves(metrics, keys=keys)])


def _tables(run: Run) -> Section:
    scores = (
        run.table("scores.parquet")
        .sort("size", descending=True)
        .head(20)
        .select("part", "score", "sd", "size")
    )
    return Section(
        "The largest channels",
        "Mean attribution to the correct class's logit over the held-out inputs.",
        tables=[Table(scores)],
    )
