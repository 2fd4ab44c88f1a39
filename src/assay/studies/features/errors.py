"""The error-node study: what drives attribution patching of error nodes, how far it agrees with
exact patching, what a threshold on it misses, and whether features make up for errors.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import polars as pl
import torch

from assay.attribution import Exact, Scores, attribute
from assay.attribution.node_path import node_path
from assay.audit.agreement import agreement
from assay.audit.drivers import by_node, measure_drivers, with_effects
from assay.audit.restoration import restore
from assay.audit.trends import (
    missed_by_threshold,
    rank_with_layer,
    relative_sizes,
    shape_of,
    shares_of_variance,
)
from assay.core.target import Batch, Target
from assay.core.values import dense
from assay.io.runs import Run
from assay.mechanisms.features import FeatureParts
from assay.mechanisms.nodes import nodes
from assay.studies.features.config import Config

KINDS = ("residual", "mlp", "attention")
MISSED = 200


def measured_parts(
    bound: FeatureParts, kinds: pl.DataFrame, known: Scores | pl.DataFrame
) -> pl.DataFrame:
    """Return one row for every part of one site that is not zero, with what drives its AtP, and
    its exact indirect effect where it is known: by exact scores of all parts, or by the ablated
    rows of an audit.
    """
    names = [name for name, group in bound.groups.items() if len(group.sites) == 1]
    if isinstance(known, Scores):
        table = measure_drivers(bound, names).join(kinds, on="group", maintain_order="left")
        return with_effects(table, known, "exact")
    # Features are many: those that were not ablated are left out.
    features = {name for name in names if name in bound.spots}
    rows = known.select("example", "group", "index", -pl.col("exact"))
    only = {name: rows.filter(pl.col("group") == name) for name in features}
    table = measure_drivers(bound, names, only).join(kinds, on="group", maintain_order="left")
    return table.join(rows, on=["example", "group", "index"], how="left", maintain_order="left")


def with_node_paths(table: pl.DataFrame, bound: FeatureParts, config: Config) -> pl.DataFrame:
    """Return the table with the indirect effects by node paths, for the rows of the first pairs
    whose exact effect is known; null elsewhere.
    """
    pairs, points = config.effects.paths, config.effects.points
    some = table.filter((pl.col("example") < pairs) & pl.col("exact").is_not_null())
    if not len(some):
        return table.with_columns(pl.lit(None, dtype=pl.Float64).alias("node_path"))
    few = bound.take(slice(0, min(pairs, len(bound.batch))))
    parts = []
    for (group,), rows in some.group_by(["group"], maintain_order=True):
        place = pl.int_range(pl.len()).over("example").alias("place")
        rows = rows.with_columns(place)
        axes = len(rows["index"][0])
        most = max(rows["place"].to_list())
        index = torch.zeros(most + 1, len(few.batch), axes, dtype=torch.long)
        where = torch.tensor(rows["place"].to_list()), torch.tensor(rows["example"].to_list())
        index[where] = torch.tensor(rows["index"].to_list())
        found = -node_path(few, str(group), index, points=points)[where]
        column = pl.Series("node_path", found.tolist(), dtype=pl.Float64)
        parts.append(rows.select("example", "group", "index").with_columns(column))
    return table.join(
        pl.concat(parts), on=["example", "group", "index"], how="left", maintain_order="left"
    )


def agreements(table: pl.DataFrame, estimates: dict[str, str]) -> pl.DataFrame:
    """Return how estimates (column by name) agree with exact indirect effects: of features and
    errors, by kind of site, over single examples and over the means of nodes.
    """
    rows = []
    for estimate, column in estimates.items():
        known = table.filter(pl.col("exact").is_not_null() & pl.col(column).is_not_null())
        means = by_node(known) if len(known) else known
        for level, data in (("example", known), ("node mean", means)):
            for part in ("feature", "error", "rest"):
                for kind in ("all", *KINDS):
                    some = data.filter(pl.col("part") == part)
                    some = some if kind == "all" else some.filter(pl.col("kind") == kind)
                    if len(some) > 1:
                        found = agreement(some[column].to_numpy(), some["exact"].to_numpy())
                        words = {"estimate": estimate, "over": level, "part": part, "kind": kind}
                        rows.append({**words, **found.to_dict()})
    return pl.DataFrame(rows, infer_schema_length=None)


def drivers(table: pl.DataFrame) -> dict[str, Any]:
    """Return what drives |AtP| of error nodes, and of the others beside them."""
    found: dict[str, Any] = {}
    for part in table["part"].unique(maintain_order=True):
        some = table.filter(pl.col("part") == part)
        columns = ("norm", "gradient_norm", "atp")
        shapes = {}
        for (kind,), rows in some.group_by(["kind"], maintain_order=True):
            shape = shape_of(rows)
            shapes[str(kind)] = None if shape is None else asdict(shape)
        found[part] = {
            "shares": shares_of_variance(some, "kind").to_dicts(),
            "rank_with_layer": rank_with_layer(some, columns, "kind").to_dicts(),
            "shape": shapes,
            "attention_beside_others": relative_sizes(some, "attention").to_dicts(),
        }
    return found


def missed(table: pl.DataFrame, threshold: float) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Return the parts that a threshold on |AtP| misses, the largest of them as rows, and their
    counts by part, kind and reason.
    """
    known = table.filter(pl.col("exact").is_not_null())
    hidden = missed_by_threshold(known, threshold)
    large = known.filter(pl.col("exact").abs() >= threshold)
    counts = {
        part: {
            "above_threshold": large.filter(pl.col("part") == part).height,
            "missed": hidden.filter(pl.col("part") == part).height,
            "reasons": dict(
                hidden.filter(pl.col("part") == part).group_by("reason").len().sort("reason").rows()
            ),
        }
        for part in ("feature", "error")
    }
    return hidden.head(MISSED), {"threshold": threshold, **counts}


def whole_residual(
    config: Config, target: Target, clean: Batch, patch: Batch, names: dict[str, int]
) -> pl.DataFrame:
    """Return the same measures of the whole residual stream: site names with their layers."""
    if not names:
        return pl.DataFrame()
    bound = nodes(target, clean, patch, list(names), config.reference)
    table = measure_drivers(bound).with_columns(
        pl.lit("residual").alias("kind"),
        pl.lit("whole").alias("part"),
        pl.col("group").replace_strict(names, return_dtype=pl.Int64).alias("layer"),
    )
    return with_effects(table, attribute(bound, Exact()), "exact")


def restored(
    bound: FeatureParts, kinds: pl.DataFrame, scores: Scores, config: Config
) -> pl.DataFrame:
    """Return how much of the metric comes back when error nodes of the first layers are ablated at
    the last position and the largest features of later layers put back, by the last ablated layer
    and the number of features.

    The features are those with the largest |AtP| of every example, at any position."""
    layer = dict(zip(kinds["group"], kinds["layer"], strict=True))
    part = dict(zip(kinds["group"], kinds["part"], strict=True))
    last = bound.batch.labels["last"]
    layers = sorted({layer[name] for name in bound.groups if part[name] == "error"})
    rows = []
    for end in layers[:-1]:
        gates = {
            name: bound.ones([name])[name].scatter(1, last[:, None], 0.0)
            for name in bound.groups
            if part[name] == "error" and layer[name] <= end
        }
        later = [name for name in bound.groups if part[name] == "feature" and layer[name] > end]
        for count in (0, *config.effects.restored):
            kept = _largest(scores, later, count)
            found = restore(bound, gates, kept)
            recovered = found.recovered()
            rows.append(
                {
                    "ablated to layer": end,
                    "features restored": count,
                    "clean": float(found.clean.mean()),
                    "ablated": float(found.ablated.mean()),
                    "restored": float(found.restored.mean()),
                    "recovered": recovered.estimate,
                    "low": recovered.low,
                    "high": recovered.high,
                }
            )
    return pl.DataFrame(rows, infer_schema_length=None)


def _largest(scores: Scores, names: list[str], count: int) -> dict[str, torch.Tensor]:
    """Return masks of the largest |scores| of every example among some groups."""
    if not count or not names:
        return {}
    found = {name: torch.zeros(scores.values[name].shape, dtype=torch.bool) for name in names}
    for example in range(len(scores.baseline)):
        flat = [dense(scores.values[name][example]).abs().flatten() for name in names]
        best = [values.topk(min(count, len(values))) for values in flat]
        sizes = torch.cat([entry.values for entry in best])
        limit = sizes.topk(min(count, len(sizes))).values[-1]
        for name, entry in zip(names, best, strict=True):
            kept = (entry.values >= limit) & (entry.values > 0)
            found[name][example].view(-1)[entry.indices[kept]] = True
    return found


def bars_of_errors(
    bound: FeatureParts,
    kinds: pl.DataFrame,
    scores: Scores,
    against: Scores | None,
    exact: Scores | None,
    config: Config,
) -> dict[str, Any]:
    """Return, for the error nodes of every kind, how bars around AtP hold: of all of them, of the
    largest of an input, and of those at the top of the list.
    """
    found: dict[str, Any] = {}
    for kind in KINDS:
        chosen = kinds.filter((pl.col("part") == "error") & (pl.col("kind") == kind))
        names = chosen["group"].to_list()
        values = {name: scores.values[name] for name in names}
        if not any(dense(entry).any() for entry in values.values()):
            continue  # nothing is left to errors, as by identity dictionaries
        some = bound.only(names)
        effects = (
            None
            if exact is None
            else replace(
                exact, mechanisms=some, values={name: exact.values[name] for name in names}
            )
        )
        other = (
            None
            if against is None
            else replace(
                against, mechanisms=some, values={name: against.values[name] for name in names}
            )
        )
        audit = replace(scores, mechanisms=some, values=values).audit(
            exact=max(config.effects.exact, len(names)),
            top=10,
            alpha=config.effects.alpha,
            seed=config.seed,
            against=other,
            effects=effects,
        )
        top = audit.top(10)
        found[kind] = {
            "agreement": audit.pooled.to_dict(),
            "promises": {name: entry.to_dict() for name, entry in audit.promises.items()},
            "guarantee": audit.bars.guarantee,
            "scale": audit.bars.scale.words,
            "listed": top.select("part", "effect", "low", "high", "score").to_dicts(),
        }
    return found


def save_errors(run: Run, tables: dict[str, pl.DataFrame]) -> None:
    """Save the tables of the study."""
    for name, table in tables.items():
        run.save_table(f"{name}.parquet", table)
