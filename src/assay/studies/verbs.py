"""The operations over a saved run: attribute, ablate, audit, explain one part, compare two runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from assay.attribution import Scores, ablate, attribute
from assay.core.mechanisms import Mechanisms
from assay.errors import InputError, shown
from assay.io.runs import Run, opened
from assay.studies.methods import method
from assay.studies.runner import mechanisms_of, study_of


def attribute_run(
    folder: Path | str, *, by: str = "gradient", top: int = 20
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Score every part of a run by a method, save the table as `verb-scores-METHOD.parquet`, and
    return the largest.
    """
    run, mechanisms = _open(folder)
    scores = attribute(mechanisms, method(by))
    run.save_table(f"verb-scores-{by}.parquet", scores.table())
    summary = {
        "method": scores.method,
        "estimand": scores.estimand,
        "reference": scores.reference,
        "examples": len(mechanisms.batch),
    }
    summary |= (
        {"gaps": {name: gap.relative for name, gap in scores.gaps.items()}} if scores.gaps else {}
    )
    return summary, scores.top(top)


def ablate_run(
    folder: Path | str, parts: list[str], *, by: str = "gradient", top: int = 10
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Ablate parts of a run exactly (named `group[index]`, or the `top` by a method) beside
    their estimates.
    """
    _, mechanisms = _open(folder)
    scores = attribute(mechanisms, method(by))
    chosen = [_part(mechanisms, name) for name in parts] or [
        (row["group"], tuple(row["index"])) for row in scores.top(top).iter_rows(named=True)
    ]
    record = mechanisms.record()
    rows = []
    for name, index in chosen:
        effect = ablate(
            mechanisms,
            name,
            torch.tensor([index], dtype=torch.long).reshape(1, len(index)),
            record=record,
        )[0]
        estimate = _column(scores.values[name], index)
        rows.append(
            {
                "part": mechanisms.describe(name, index),
                "exact": float(effect.mean()),
                "sd": float(effect.std()) if len(effect) > 1 else 0.0,
                "estimate": float(estimate.mean()),
                "mean_abs_error": float((effect - estimate).abs().mean()),
                "n": len(effect),
            }
        )
    return {"estimate": scores.method, "reference": scores.reference}, pl.DataFrame(rows)


def audit_run(
    folder: Path | str, *, by: str = "gradient", exact: int = 64, alpha: float = 0.1, seed: int = 0
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Audit a method on a run with exact ablations, save the rows as `verb-audit-METHOD.parquet`,
    and return the top parts with bars.
    """
    run, mechanisms = _open(folder)
    audit = attribute(mechanisms, method(by)).audit(exact=exact, alpha=alpha, seed=seed)
    run.save_table(f"verb-audit-{by}.parquet", audit.table)
    return audit.summary(), audit.top(20)


def explain_run(
    folder: Path | str, part: str, *, by: str = "gradient", top: int = 10
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Return the examples in which one part matters most, with what the study says of each."""
    run, mechanisms = _open(folder)
    name, index = _part(mechanisms, part)
    values = _column(attribute(mechanisms, method(by)).values[name], index)
    norms = _column(mechanisms.norms()[name], index)
    contexts = study_of(run).contexts(run)  # type: ignore[attr-defined]
    table = contexts.with_columns(
        pl.Series("score", values.tolist()), pl.Series("step", norms.tolist())
    )
    table = table.sort(pl.col("score").abs(), descending=True).head(top)
    active = float((norms > 0).double().mean())
    summary = {
        "part": mechanisms.describe(name, index),
        "mean": float(values.mean()),
        "active_share": active,
    }
    return summary, table


def compare_runs(
    first: Path | str, second: Path | str, *, by: str = "gradient"
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Match the parts of two runs on the same examples by how their scores vary over examples, one
    to one within a group.

    The similarity is the absolute correlation of two parts' per-example scores; the matching
    maximises its sum. Stability is the mean similarity of the matched parts, weighted by their
    share of the first run's mean |score|. Raises InputError when the runs have other groups or
    another number of examples."""
    left, right = (attribute(_open(folder)[1], method(by)) for folder in (first, second))
    if set(left.values) != set(right.values) or len(left.mechanisms.batch) != len(
        right.mechanisms.batch
    ):
        raise InputError(
            f"{first} and {second} cannot be compared: they differ in gate groups or in the number"
            " of examples"
        )
    rows = []
    for name in left.values:
        similarity = _similarity(left, right, name)
        for one, two in zip(*linear_sum_assignment(-similarity), strict=True):
            rows.append(
                {
                    "first": left.mechanisms.describe(name, _place(left, name, int(one))),
                    "second": right.mechanisms.describe(name, _place(right, name, int(two))),
                    "similarity": float(similarity[one, two]),
                    "size": float(left.values[name].flatten(1)[:, int(one)].abs().mean()),
                }
            )
    table = pl.DataFrame(rows).sort("size", descending=True)
    weights = table["size"].to_numpy()
    stability = (
        float(np.average(table["similarity"].to_numpy(), weights=weights))
        if weights.sum() > 0
        else float("nan")
    )
    return {
        "matched": table.height,
        "stability": stability,
        "above_0.9": float((table["similarity"].to_numpy() > 0.9).mean()),
    }, table


def _similarity(left: Scores, right: Scores, name: str) -> np.ndarray:
    def standard(scores: Scores) -> Tensor:
        flat = scores.values[name].flatten(1)
        flat = flat - flat.mean(0)
        return flat / flat.norm(dim=0).clamp_min(torch.finfo(flat.dtype).tiny)

    return (standard(left).T @ standard(right)).abs().numpy()


def _place(scores: Scores, name: str, flat: int) -> tuple[int, ...]:
    axes = scores.mechanisms.group(name).axes
    return tuple(int(entry) for entry in np.unravel_index(flat, axes)) if axes else ()


def _open(folder: Path | str) -> tuple[Run, Mechanisms]:
    run = opened(folder)
    return run, mechanisms_of(run)


def _column(values: Tensor, index: tuple[int, ...]) -> Tensor:
    """Return one part's values over the examples."""
    place: tuple[Any, ...] = (slice(None), *index)
    return values[place]


def _part(mechanisms: Mechanisms, text: str) -> tuple[str, tuple[int, ...]]:
    """Read `group[i, j]`, or `group[pos i, head j]` as tables show it; InputError when the group
    is unknown or the index out of range.
    """
    if text.strip() in mechanisms.groups and not mechanisms.group(text.strip()).axes:
        return text.strip(), ()  # a group of one part has no index
    match = re.fullmatch(r"(.+?)\[([^\[\]]*)\]", text.strip())
    # A table names the axis before each entry: "pos 3, head 1".
    entries = re.findall(r"(?:^|,)(?:[^,]*\s)?\s*([0-9]{1,9})\s*(?=,|$)", match[2]) if match else []
    if match is None or len(entries) != match[2].count(",") + 1:
        raise InputError(
            f"a part is written group[index], for example {next(iter(mechanisms.groups))}[0]; got"
            f" {shown(text)}"
        )
    group, index = mechanisms.group(match[1]), tuple(map(int, entries))
    if len(index) != len(group.axes) or any(
        place >= size for place, size in zip(index, group.axes, strict=True)
    ):
        raise InputError(
            f"{shown(text)}: the index must have {len(group.axes)} entries within {group.axes}"
        )
    return match[1], index
