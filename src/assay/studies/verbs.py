"""The operations over a saved run: attribute, ablate, audit, explain one part, compare two runs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from assay.attribution import ablate, attribute
from assay.audit import compare, exact_top, keep_top
from assay.core.mechanisms import Mechanisms
from assay.core.values import at
from assay.errors import InputError, shown
from assay.io.files import existing
from assay.io.runs import Run, opened
from assay.proofs.gate_certificate import require_writable
from assay.proofs.gates import certify
from assay.studies.methods import method_for
from assay.studies.proofs import check_certificate
from assay.studies.runner import finished_summary, mechanisms_of, require_same_inputs, study_of


def attribute_run(
    folder: Path | str, *, by: str = "gradient", top: int = 20
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Score every part of a run by a method, save the table as `verb-scores-METHOD.parquet`, and
    return the largest.
    """
    run, mechanisms = _open(folder)
    taken, why = method_for(mechanisms, by)
    scores = attribute(mechanisms, taken)
    run.save_table(f"verb-scores-{by}.parquet", scores.table())
    summary = {
        "method": scores.method,
        "estimand": scores.estimand,
        "reference": scores.reference,
        "examples": len(mechanisms.batch),
        **scores.signs,
    }
    summary |= {"taken_because": why} if why else {}
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
    scores = attribute(mechanisms, method_for(mechanisms, by)[0])
    chosen = [find_part(mechanisms, name) for name in parts] or [
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
                "sd": float(effect.std()) if len(effect) > 1 else None,
                "estimate": float(estimate.mean()),
                "mean_abs_error": float((effect - estimate).abs().mean()),
                "n": len(effect),
            }
        )
    summary = {"estimate": scores.method, "reference": scores.reference, **scores.signs}
    return summary, pl.DataFrame(rows)


def audit_run(
    folder: Path | str,
    *,
    by: str = "gradient",
    exact: int = 64,
    alpha: float = 0.1,
    seed: int = 0,
    on: Path | str | None = None,
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Audit a method on a run with exact ablations, save the rows as `verb-audit-METHOD.parquet`,
    and return the top parts with their mean exact effects.

    With `on`, a file of inputs that were not there when the run was made, the study's own bars and
    thresholds are applied to them instead; InputError when the study has none."""
    if on is not None:
        return apply_run(folder, on)
    run, mechanisms = _open(folder)
    taken, why = method_for(mechanisms, by)
    scores = attribute(mechanisms, taken)
    if why and scores.exact:  # there is no estimate to audit
        summary = {"method": scores.method, "taken_because": why, **scores.signs}
        return summary, exact_top(scores, 20, seed=seed, alpha=alpha)
    audit = scores.audit(exact=exact, alpha=alpha, seed=seed)
    run.save_table(f"verb-audit-{by}.parquet", audit.table)
    return {**audit.summary(), **({"taken_because": why} if why else {})}, audit.top(20)


def apply_run(folder: Path | str, on: Path | str) -> tuple[dict[str, Any], pl.DataFrame]:
    """Apply what a finished run calibrated to a file of new inputs; see `Study.apply`."""
    run = opened(folder)
    finished_summary(run)
    found = getattr(study_of(run), "apply", None)
    if found is None:
        raise InputError(
            f"a run of {run.json('config.json')['study']!r} calibrates nothing that could be"
            " applied to new inputs"
        )
    require_same_inputs(run)
    summary, table = found(run, existing(on))
    return summary, table


def certify_run(
    folder: Path | str,
    keep: str,
    *,
    low: float | None = None,
    claim: str = "damage",
    by: str = "gradient",
    budget: float = 10.0,
    level: str = "real",
    examples: int = 10,
    radius: float | None = None,
    references: bool = False,
    certificate: Path | str | None = None,
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Bound what the parts outside the kept ones can do in the first examples of a run, save the
    brackets as `verb-certify-CLAIM.parquet`, and return them.

    keep: "top:N" keeps the N parts with the largest mean |score|. radius: how far inputs move.
    references: a gate of zero brings in any value between those of all examples. certificate:
    write the proof there, and have it checked. What was found and the open boxes are kept in the
    run's folder `verb-certify`: the same call goes on where it was stopped. Raises InputError for
    another form, for more parts than there are, and as `certify`."""
    if certificate is not None:
        require_writable(certificate, level)
    run, mechanisms = _open(folder)
    some = mechanisms.take(slice(0, examples))
    scores = attribute(some, method_for(some, by)[0])
    masks = keep_top(scores, _kept_share(keep, some))
    found = certify(
        some,
        masks,
        low=low,
        claim=claim,  # type: ignore[arg-type]
        budget=budget,
        level=level,
        radius=radius,
        references=mechanisms if references else None,
        certificate=certificate,
        work=run.child("verb-certify"),
    )
    table = pl.DataFrame(found.rows())
    run.save_table(f"verb-certify-{claim}.parquet", table)
    summary = {"keep": keep, "low": low, **found.summary()}
    if certificate is not None:
        verdict = check_certificate(certificate)[0]
        summary |= {"certificate": str(certificate), "checked": verdict["reason"]}
    return summary, table


def _kept_share(keep: str, mechanisms: Mechanisms) -> float:
    """Return the share of all parts that "top:N" names."""
    match = re.fullmatch(r"top:([0-9]{1,9})", keep.strip())
    total = sum(math.prod(group.axes) for group in mechanisms.groups.values())
    if match is None or int(match[1]) > total:
        raise InputError(
            f"--keep is written top:N, with N parts of {total} at most; got {shown(keep)}"
        )
    return int(match[1]) / total


def explain_run(
    folder: Path | str, part: str, *, by: str = "gradient", top: int = 10
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Return the examples in which one part matters most, with what the study says of each."""
    run, mechanisms = _open(folder)
    name, index = find_part(mechanisms, part)
    scores = attribute(mechanisms, method_for(mechanisms, by)[0])
    values = _column(scores.values[name], index)
    norms = _column(mechanisms.norms()[name], index)
    contexts = study_of(run).contexts(run)  # type: ignore[attr-defined]
    table = contexts.with_columns(
        pl.Series("score", values.tolist()), pl.Series("step", norms.tolist())
    )
    table = table.sort(pl.col("score").abs(), descending=True).head(top)
    active = float((norms > 0).double().mean())
    summary = {
        "part": mechanisms.describe(name, index),
        "method": scores.method,
        "mean": float(values.mean()),
        "active_share": active,
        **scores.signs,
        "step": "A step is the norm of the part: how far the value at its site moves without it.",
    }
    return summary, table


def compare_runs(
    first: Path | str, second: Path | str, *, by: str = "gradient"
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Match the parts of two runs on the same examples by how their scores vary over examples; see
    `assay.audit.compare`.
    """
    bound = [_open(folder)[1] for folder in (first, second)]
    taken = method_for(bound[0], by)[0]  # the same for both
    left, right = (attribute(mechanisms, taken) for mechanisms in bound)
    try:
        found = compare(left, right)
    except InputError as error:
        raise InputError(f"{first} and {second}: {error}") from error
    return {"method": left.method, **found.summary()}, found.table


def _open(folder: Path | str) -> tuple[Run, Mechanisms]:
    run = opened(folder)
    return run, mechanisms_of(run)


def _column(values: Tensor, index: tuple[int, ...]) -> Tensor:
    """Return one part's values over the examples."""
    examples = torch.tensor(index, dtype=torch.long).expand(1, len(values), len(index))
    return at(values, examples)[0]


def find_part(mechanisms: Mechanisms, text: str) -> tuple[str, tuple[int, ...]]:
    """Read `group[i, j]`, or `group[pos i, head j]` as tables show it; InputError when the group
    is unknown or the index out of range.
    """
    if text.strip() in mechanisms.groups and not mechanisms.group(text.strip()).axes:
        return text.strip(), ()  # a group of one part has no index
    match = re.fullmatch(r"(.+?)\[([^\[\]]*)\]", text.strip())
    # A table names the axis before each entry: "pos 3, head 1".
    entries = re.findall(r"(?:^|,)(?:[^,]*\s)?\s*([0-9]{1,9})\s*(?=,|$)", match[2]) if match else []
    if match is None or len(entries) != match[2].count(",") + 1:
        name, first = next(iter(mechanisms.groups.items()))
        example = mechanisms.describe(name, (0,) * len(first.axes))
        raise InputError(
            f"a part is written group[index], for example {example!r}; got {shown(text)}"
        )
    group, index = mechanisms.group(match[1]), tuple(map(int, entries))
    if len(index) != len(group.axes) or any(
        place >= size for place, size in zip(index, group.axes, strict=True)
    ):
        count = len(group.axes)
        raise InputError(
            f"{shown(text)}: the index takes {count} {'number' if count == 1 else 'numbers'}, below"
            f" {' and '.join(map(str, group.axes))}{'' if count == 1 else ' in turn'}"
        )
    return match[1], index
