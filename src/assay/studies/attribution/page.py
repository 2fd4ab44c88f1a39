"""The report of an attribution study, built from the saved run alone."""

from __future__ import annotations

from typing import Any

import polars as pl

from assay import charts
from assay.audit.coverage import percent
from assay.audit.selections import TOP_BY_SCORE
from assay.io.runs import Run
from assay.report.page import Fact, Section, Table
from assay.studies.attribution.page_bars import bars_section, coverage_words, number
from assay.studies.brackets import bracket_sections

_NAMES = {
    "exact": "exact patching",
    "gradient": "attribution patching",
    "ig": "integrated gradients",
    "atp-star": "AtP*",
    "relp": "RelP",
    "probes": "second order by probes",
}


def headline(run: Run) -> tuple[str, str]:
    """Return the report's title and lead."""
    summary, config = run.json("summary.json"), run.json("config.json")["config"]
    name = config["target"]["path"] or "a small model trained on subject-verb agreement"
    method, estimates = summary["method"], len(summary["methods"])
    shown = (
        "Every node was patched exactly"
        if method["taken"] == "exact"
        else f"Every node was scored by {_NAMES[method['taken']]}, and the nodes that are read and"
        " a random sample of the others were patched exactly"
    )
    were = "method was" if estimates == 1 else "methods were"
    beside = f"{estimates} cheap {were} audited against exact effects"
    return (
        "Attribution on a language model",
        f"Which heads, MLPs and positions of {name} (family {summary['model']['family']}) carry "
        f"the metric {config['metric']}? {shown}, on {summary['pairs']['kept']} pairs of prompts; "
        f"{beside}.",
    )


def sections(run: Run) -> tuple[list[Fact], list[Section]]:
    """Return the headline numbers and the sections."""
    summary = run.json("summary.json")
    covered = summary["coverage"]
    name = _NAMES[covered["method"]]
    audited = summary["methods"][covered["method"]]
    facts = [
        Fact(
            "effects shown",
            _NAMES[summary["method"]["taken"]],
            f"{summary['exact_effects']:,} exact effects of single nodes in single pairs",
        ),
        Fact(
            f"{name}, r",
            audited["agreement"]["pearson"],
            f"slope {number(audited['agreement']['slope'])}, against exact patching",
        ),
        *(
            Fact(
                f"bars that hold, {said}",
                covered[key]["share"],
                f"around {name}; {coverage_words(covered[key])}",
            )
            for key, said in (
                ("all", "all parts"),
                (TOP_BY_SCORE, "top 5 % by score"),
                ("listed", "parts listed"),
            )
            if key in covered
        ),
        Fact(
            "pairs",
            summary["pairs"]["kept"],
            f"{sum(summary['pairs']['dropped'].values())} dropped",
        ),
    ]
    parts = [
        _heat(run, summary),
        _listed(run, summary),
        _agreement(run, summary),
        bars_section(run, summary, name),
        _circuit(run, summary),
        *bracket_sections(run, "nodes"),
        _tables(run, summary),
    ]
    return facts, parts


def _heat(run: Run, summary: dict[str, Any]) -> Section:
    table = run.table("heat.parquet")
    taken = summary["method"]["taken"]
    picture = charts.heatmap(
        table,
        "position",
        "site",
        "score",
        tooltip=[name for name in ("bar", "exact", "sampled") if name in table.columns],
        title="Where the patch acts: effect of patching each site at each position",
        value_title="indirect effect",
    )
    bars = (
        ""
        if taken == "exact"
        else " Each cell's tooltip has the mean half-width of the bars behind it (heads' bars added"
        " up): the cell is no further from the exact effect where all of them hold."
    )
    text = (
        "The indirect effect is m(clean, with the node from the patch run) - m(clean), by "
        f"{_NAMES[taken]}, averaged over the pairs; heads of a layer are added up. It is positive "
        f"where patching the node raises the metric.{bars} The metric is "
        f"{summary['signs']['metric']}. Its mean over the clean runs is "
        f"{number(summary['model']['metric_mean'])}.\n\nWhy {_NAMES[taken]}: "
        f"{summary['method']['reason']}."
    )
    return Section("Where it happens", text, charts=[picture])


def _listed(run: Run, summary: dict[str, Any]) -> Section:
    top = run.table("top.parquet")
    shown = top.drop_nulls(["low", "high"])
    pictures = (
        [
            charts.intervals(
                shown,
                "part",
                "effect",
                "low",
                "high",
                title="The largest nodes: mean exact effect with its 90 % interval"
                if summary["methods"][summary["coverage"]["method"]]["bars"]["alpha"] == 0.1
                else "The largest nodes: mean exact effect with its interval",
            )
        ]
        if shown.height
        else []
    )
    level = 1 - summary["methods"][summary["coverage"]["method"]]["bars"]["alpha"]
    text = (
        "The nodes with the largest mean |score| on a quarter of the pairs, patched exactly on "
        f"all the others: effect is the mean over those {top['inputs'][0] if top.height else 0} "
        f"pairs, and [low, high] a {percent(level)} confidence interval for it. List and means "
        "come from different pairs, so being chosen does not make a mean too large. "
        f"{summary['signs']['score']}"
    )
    missing = top.filter(pl.col("reason") != "")
    if missing.height:
        reasons = "; ".join(missing["reason"].unique(maintain_order=True))
        text += f" No interval for {missing.height} of {top.height} nodes: {reasons}."
    columns = [
        "part",
        "effect",
        "low",
        "high",
        *(["score"] if summary["method"]["taken"] != "exact" else []),
        "inputs",
    ]
    return Section(
        "The largest nodes",
        text,
        charts=pictures,
        tables=[Table(top.select(columns), "Mean exact effects")],
    )


def _agreement(run: Run, summary: dict[str, Any]) -> Section:
    pictures = [
        charts.scatter_identity(
            run.table(f"audit-{name}.parquet"),
            "exact",
            "estimate",
            colour="kind",
            tooltip=["part", "example"],
            title=f"{title[:1].upper()}{title[1:]} against exact patching",
        )
        for name, title in _NAMES.items()
        if name in summary["methods"]
    ]
    rows = [
        {
            "method": _NAMES[name],
            "kind": kind,
            **{key: found[key] for key in ("pearson", "spearman", "slope", "sign", "mae", "n")},
        }
        for name, method in summary["methods"].items()
        for kind, found in [("pooled", method["agreement"]), *method["by_kind"].items()]
    ]
    text = (
        "Each point is one node of one pair: what the cheap score says (up) against what patching "
        "it exactly does (across). Correlation says nothing of scale, so the slope is beside it; "
        "a slope below one means that effects are under-estimated. "
        + (
            "Every node of every pair was patched."
            if summary["method"]["taken"] == "exact"
            else "Nodes that are listed were patched for certain and others at random; the table"
            " weights each by how rarely such a node is sampled."
        )
    )
    return Section(
        "Is a cheap score right?",
        text,
        charts=pictures,
        tables=[Table(pl.DataFrame(rows), "Agreement by kind of node")],
    )


def _circuit(run: Run, summary: dict[str, Any]) -> Section:
    table, found = run.table("faithfulness.parquet"), summary["circuit"]
    if not table.height:
        return Section(
            "The circuit", "No heads or MLPs among the sites: there is no circuit to keep."
        )
    picture = charts.faithfulness(table, "nodes", "How many nodes carry the metric")
    scrubbed = (
        f"keeps {number(found['scrubbed_share_kept'])} of the metric (causal scrubbing)"
        if found["scrubbed_share_kept"] is not None
        else f"cannot be measured: {found['scrubbed_reason']}"
    )
    text = (
        f"With {percent(found['kept_share'])} of the nodes kept on each pair, some combination of "
        "the others still moves the metric against the right answer by "
        f"{number(found['worst_damage_at_least'])} on average (found in "
        f"{found['worst_evaluations']} runs: a lower bound of the worst case). Swapping the kept "
        f"nodes between pairs of the same case, and all others between any pairs, {scrubbed}."
    )
    if found["faithfulness_reason"]:
        text = f"Faithfulness is not given: {found['faithfulness_reason']}. {text}"
    if found["alone_in_their_case"]:
        alone = found["alone_in_their_case"]
        text += f" {alone} pairs are alone in their case and keep their own nodes."
    tables = []
    if run.has("edges.parquet"):
        largest = (
            run.table("edges.parquet")
            .sort(pl.col("score").abs(), descending=True)
            .head(20)
            .select("edge", "score", "sd", "n")
        )
        tables.append(
            Table(
                largest,
                f"Largest edges ({summary['edges']['method']}); circuit.json and circuit.graphml "
                "hold the circuit",
            )
        )
    return Section("The circuit, and its worst case", text, charts=[picture], tables=tables)


def _tables(run: Run, summary: dict[str, Any]) -> Section:
    tables = []
    if summary["completeness_gaps"]:
        gaps = [{"site": name, "gap": gap} for name, gap in summary["completeness_gaps"].items()]
        tables.append(Table(pl.DataFrame(gaps), "Completeness gaps of integrated gradients"))
    if summary["pairs"]["dropped"]:
        dropped = [
            {"reason": reason, "pairs": count}
            for reason, count in summary["pairs"]["dropped"].items()
        ]
        tables.append(Table(pl.DataFrame(dropped), "Dropped pairs"))
    return Section("The numbers", _patching(summary["patching"]), tables=tables)


def _patching(words: str) -> str:
    if words == "suffix only":
        return "Exact patching recomputed only the layers after the patch."
    if words.startswith("suffix only; general for "):
        others = words.removeprefix("suffix only; general for ")
        return (
            f"Exact patching recomputed only the layers after the patch, except for {others}, where"
            " the whole network ran."
        )
    return f"Exact patching ran the whole network ({words.removeprefix('general: ')})."
