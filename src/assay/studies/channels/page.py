"""The report of a channels study, built from the saved run alone."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table

BOUNDS = {
    "B1": "first-order bound",
    "B3": "second-order bound",
    "q+B3": "bound by second order and remainder",
}
"""What the certificates of a summary are called in words."""


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    config, summary = run.json("config.json")["config"], run.json("summary.json")
    model, source = config["model"], config["data"]["path"] or "scikit-learn's handwritten digits"
    return (
        "Channels of a bilinear network",
        f"A residual bilinear network with {model['blocks']} blocks of {model['hidden']} channels was trained on {source} so that "
        "switching a channel off does what its attribution says. Every channel was then attributed, switched off exactly on "
        f"{summary['examples']} held-out inputs, and the error of the cheap answer measured, bounded and calibrated.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary, config = run.json("summary.json"), run.json("config.json")["config"]
    tolerance, top = config["audit"]["tolerance"], config["audit"]["top"]
    certified = summary["certified_share"]
    first = summary["agreement"]["first"]
    best = next((name for name in ("q+B3", "B1") if name in certified), None)
    facts = [
        Fact("held-out accuracy", summary["accuracy"], f"{summary['examples']} inputs attributed"),
        Fact(
            f"attribution within {tolerance:.0%}",
            summary["top"]["share_within_tolerance_first"],
            f"share of the top {top} channels of all inputs, against their exact effects",
        ),
        Fact(
            f"proved within {tolerance:.0%}",
            certified[best] if best else "none",
            f"share of the same channels, by the {BOUNDS[best]}" if best else "not available",
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
    parts += [
        _calibration(run, summary, config),
        _circuit(run, summary),
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
        "Each point is one channel on one input: what attribution says (up) against what happens when the channel is switched off "
        f"(across). On the line the two agree. Over {first['n']:,} exact ablations the first-order slope is {first['slope']:.3f} and "
        f"{first['sign']:.1%} of the signs are right.",
        charts=pictures,
    )


def _certificates(
    run: Run, config: dict[str, Any], certified: dict[str, float], refused: dict[str, str]
) -> Section:
    table = run.table("channels.parquet")
    pictures: list[Any] = []
    text = (
        "The error of a channel's attribution is bounded from the weights and the clean pass alone, without switching anything off. "
        "The first-order bound follows the size of the step through the later blocks. The second-order bound is about the second-order "
        "estimate. The bound by second order and remainder carries the step's linear part exactly and bounds only the rest."
    )
    if certified:
        tolerance = config["audit"]["tolerance"]
        named = [BOUNDS[name] for name in certified]
        shares = pl.DataFrame({"certificate": named, "share": list(certified.values())})
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
        points = table.with_columns((pl.col("attribution") - pl.col("exact")).abs().alias("error"))
        points = points.filter(
            (pl.col("error") > 0) & (pl.col("bound") > 0) & pl.col("bound").is_finite()
        ).with_columns(
            pl.col("error").log10(),
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
                    title="No error exceeds its bound: every point lies above the line",
                    x_title="log10 of the true error",
                    y_title="log10 of the certified bound",
                )
            )
        constants = table.filter(
            (pl.col("step") > 0) & (pl.col("attribution") != pl.col("exact"))
        ).with_columns(
            ((pl.col("attribution") - pl.col("exact")).abs() / pl.col("step") ** 2).alias(
                "constant"
            ),
            pl.format("block {}", "block").alias("block"),
        )
        if constants.height:
            title = "The error per squared step is no constant: it spans orders of magnitude"
            pictures.append(
                charts.ecdf(
                    constants,
                    "constant",
                    colour="block",
                    log_x=True,
                    title=title,
                    x_title="|error| / step squared",
                )
            )
    if refused:
        text += "\n\nNot available for this network. " + " ".join(
            f"{name}: {reason}." for name, reason in refused.items()
        )
    return Section("What can be proved", text, charts=pictures)


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
        "A block of a bilinear network is a quadratic form in each output direction, so its weights can be read without any data. Shown is the first "
        "block's strongest eigenvector towards a class's logit, in pixels: a positive eigenvalue means that images like it, or like its negative, "
        "raise the logit; a negative one that they lower it."
    )
    return [Section("What the weights look for", text, charts=pictures)]


def _calibration(run: Run, summary: dict[str, Any], config: dict[str, Any]) -> Section:
    coverage = run.table("coverage.parquet")
    bars = summary["bars"]["second" if "second" in summary["bars"] else "first"]
    pictures = [
        charts.calibration(
            coverage,
            "nominal",
            "measured",
            low="low",
            high="high",
            colour="estimate",
            title="Coverage against the promise (dashed), over 20 resplits of the inputs",
        ),
        charts.line(
            coverage.filter(pl.col("width").is_finite()),
            "nominal",
            "width",
            colour="estimate",
            log_y=True,
            title="Narrow bars are what a scale is for",
            x_title="nominal coverage",
            y_title="mean width of a bar",
        ),
    ]
    text = f"Error bars from a random, exactly ablated subset: {bars['guarantee']}. "
    if bars["coverage"] is None:
        text += "The estimate is exact up to rounding on every held-out row, so there is nothing for a bar to cover."
    else:
        text += (
            f"On {bars['held_out']:,} held-out rows the bars cover {bars['coverage']:.1%} at a mean width of {bars['mean_width']:.3g}; "
            f"a constant bar around the first-order estimate needs {bars['constant_first_order_width']:.3g}."
        )
    threshold, audit = summary["calibrated_threshold"], config["audit"]
    if threshold is not None and threshold.get("threshold") is not None:
        text += (
            f"\n\nSelective risk: among top channels whose certificate is below {threshold['threshold']:.3g} of their attribution, at most "
            f"{audit['risk']:.0%} are wrong by more than {audit['tolerance']:.0%}, with probability {1 - audit['eta']:.0%} over the "
            "calibration inputs."
        )
    elif threshold is not None:
        text += "\n\nSelective risk: no threshold keeps the promised risk at the promised confidence on these data; the answer is none."
    return Section("Error bars, and what they promise", text, charts=pictures)


def _circuit(run: Run, summary: dict[str, Any]) -> Section:
    table, worst = run.table("faithfulness.parquet"), summary["worst_case"]
    long = table.unpivot(
        index="share",
        on=["faithfulness", "completeness"],
        variable_name="measure",
        value_name="value",
    )
    picture = charts.line(
        long,
        "share",
        "value",
        colour="measure",
        title="How few channels carry the logit",
        x_title="share of channels kept (or, for completeness, removed)",
        y_title="share of the effect",
        reference=1.0,
    )
    text = (
        "Faithfulness keeps only the channels with the largest attribution on each input; completeness removes exactly those. "
        f"With {worst['kept_share']:.0%} of the channels kept, the others can still be switched off in a combination that costs at least "
        f"{worst['mean_damage_at_least']:.3g} logits on average (found in {worst['evaluations']} runs: a lower bound of the worst case)."
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
    text = "Cross-entropy falls while channels become sparse and their steps small enough for the attribution to be right."
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
