"""The guard verbs: fit a guard of the user's own language model, try proposals, judge inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import torch

from assay.core.target import Batch, target
from assay.errors import InputError, shown
from assay.guard import Guard, Observed, Settings, fit, split
from assay.guard.explanations import Explanation, Refused, explained_table
from assay.guard.files import CONFIG, load, save
from assay.guard.gates import joined, last_column_off, swaps
from assay.guard.guard import REASONS
from assay.guard.observed import concatenate
from assay.guard.proposals import Swap, judge, predict, read_proposals
from assay.guard.quantise import Quantiser
from assay.guard.reading import Reading, read, reading_of, whole
from assay.guard.wrapper import hash_of, memory
from assay.io.files import existing, read_text
from assay.io.prompts import encode_texts, padded_inputs, require_tokenizer
from assay.mechanisms.nodes import nodes
from assay.memory import require_memory
from assay.progress import progress
from assay.targets import families
from assay.targets.language import LanguageModel, load_language_model, require_context
from assay.targets.names import match_names, resolve

SHARES = (0.5, 0.15, 0.35)
"""Of the inputs: what tables are made of, what tries explanations, what calibrates."""
_ROWS = 64  # inputs in one forward pass


def fit_guard(
    model_path: str,
    data: Path | str,
    folder: Path | str,
    *,
    sites: Sequence[str] = (),
    features: int = 128,
    settings: Settings | None = None,
    calibration: Path | str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Fit a guard of a Hugging Face model on a text file of one input per line, and save it.

    Its features are the `features` columns at `sites` (names or patterns; by default the MLP
    neurons of all blocks) that vary most, at the last token. With `calibration`, a second file,
    the first is for tables and their trial alone. Raises InputError for bad files and sites, when a
    split would be empty, and for calibration inputs that are in the first file."""
    settings = Settings() if settings is None else settings
    lines = read_lines(data, limit)
    extra = None if calibration is None else read_lines(calibration, limit)
    _require_place(folder)
    model = load_language_model(model_path)
    rows = _tokens(model, lines)
    own = _calibration(model, extra)
    reading = whole(model.model, padded_inputs(rows[:256]), _sites(model, sites), features)
    found = _observe(model, rows, reading)
    if own is None:
        shares: tuple[float, ...] = SHARES
        tables, fresh, calibrating = split(found, shares, seed)
    else:
        shares = (0.75, 0.25)
        tables, fresh = split(found, shares, seed)
        calibrating = _observe(model, own, reading)
    about = {"seed": seed, "shares": list(shares), "own_calibration": own is not None}
    guard = fit(
        tables,
        fresh,
        calibrating,
        settings,
        model_hash=hash_of(model.model),
        reading={**reading.to_json(), **about},
    )
    save(folder, guard)
    return _summary(guard, folder, calibrating), _table(guard).head(20)


def propose_to_guard(
    folder: Path | str,
    proposals: Path | str,
    model_path: str,
    data: Path | str,
    out: Path | str,
    *,
    calibration: Path | str | None = None,
    limit: int | None = None,
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Predict from gates how often the effects of proposals fire given their causes, try the
    predictions on the fresh split, and save the guard with those that were admitted in `out`.

    `data` (and `calibration`) are the files that the guard was fitted on. All predictions are made
    before any table of a pair is read. Raises InputError for other data, for unknown features, and
    for edges that close a cycle."""
    guard = load(folder)
    reading = reading_of(dict(guard.reading), str(Path(folder) / CONFIG))
    lines = read_lines(data, limit)
    extra = None if calibration is None else read_lines(calibration, limit)
    if bool(guard.reading.get("own_calibration")) != (extra is not None):
        raise InputError("give --calibration if, and only if, the guard was fitted with it")
    shares, seed = _parts(guard, folder)
    existing(proposals)
    _require_place(out)
    model = _same_model(guard, model_path)
    homes = _homes(model, reading)
    chosen = read_proposals(proposals, reading.names, nodes=homes)
    rows = _tokens(model, lines)
    found = _observe(model, rows, reading)
    parts = split(found, shares, seed)
    tables, fresh = parts[0], parts[1]
    if frozenset(tables.keys) != guard.training:
        raise InputError(f"{data} does not hold the inputs that the guard was fitted on")
    own = _calibration(model, extra)
    calibrating = parts[2] if own is None else _observe(model, own, reading)
    quantiser = guard.scorer.quantiser
    kept = set(tables.keys)
    own_rows = [row for row, key in zip(rows, found.keys, strict=True) if key in kept]
    swap = _swaps(model, reading, quantiser, own_rows)
    names = reading.names
    predictions = [predict(one, swap, names) for one in progress(chosen, "proposals")]
    rates = (quantiser(tables.values) >= quantiser.fires).double().mean(0)
    fires = quantiser(fresh.values) >= quantiser.fires
    verdicts = [
        judge(one, float(rates[names.index(one.proposal.effect)]), fires, names)
        for one in predictions
    ]
    admitted = [one for one in verdicts if isinstance(one, Explanation)]
    refused = [one for one in verdicts if isinstance(one, Refused)]
    again = fit(
        tables,
        fresh,
        calibrating,
        guard.settings,
        given=admitted,
        refused=refused,
        model_hash=guard.model_hash,
        reading=guard.reading,
    )
    save(out, again)
    table = pl.DataFrame(
        [
            {
                "cause": one.proposal.cause,
                "effect": one.proposal.effect,
                "parent": one.proposal.parent or "",
                "predicted": one.value,
                "low": one.low,
                "high": one.high,
                "runs": one.runs,
                "admitted": isinstance(verdict, Explanation),
                "reason": verdict.reason if isinstance(verdict, Refused) else "",
            }
            for one, verdict in zip(predictions, verdicts, strict=True)
        ]
    )
    summary = {"proposed": len(chosen), "admitted": len(admitted), "refused": len(refused)}
    return {**summary, **_summary(again, out, calibrating)}, table


def score_inputs(
    folder: Path | str, model_path: str, data: Path | str, *, limit: int | None = None
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Judge a text file of one input per line: acceptance, p-value, and what had no support."""
    guard = load(folder)
    reading = reading_of(dict(guard.reading), str(Path(folder) / CONFIG))
    lines = read_lines(data, limit)
    model = _same_model(guard, model_path)
    found = _observe(model, _tokens(model, lines), reading)
    verdicts = guard(found)
    rows = [
        {
            "input": line,
            "accepted": bool(verdicts.accepted[place]),
            "p": float(verdicts.p[place]),
            "reason": REASONS[int(verdicts.why[place])],
            "without support": "; ".join(guard.unsupported(verdicts, place)[:5]),
        }
        for place, line in enumerate(lines)
    ]
    return {**verdicts.summary(), **_promise(guard)}, pl.DataFrame(rows)


def explain_guard(folder: Path | str, *, top: int = 20) -> tuple[dict[str, Any], pl.DataFrame]:
    """Return what a saved guard knows: its explanations, then those that were refused."""
    guard = load(folder)
    forms: dict[str, int] = {}
    for one in guard.explanations:
        key = f"{one.sort} {one.form}"
        forms[key] = forms.get(key, 0) + 1
    table = _table(guard)
    admitted = table.filter(pl.col("admitted")).head(top)
    others = table.filter(~pl.col("admitted")).head(top)
    summary = {**forms, "refused": len(guard.refused), "bits": guard.bits, **_promise(guard)}
    return summary, pl.concat([admitted, others])


def _table(guard: Guard) -> pl.DataFrame:
    return explained_table(guard.explanations, guard.refused, guard.names)


def read_lines(path: Path | str, limit: int | None = None) -> list[str]:
    """Return the lines of a text file that are not empty; InputError when there are none."""
    found = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not found:
        raise InputError(f"{path} holds no inputs; one per line is expected")
    return found[:limit]


def _require_place(folder: Path | str) -> None:
    """Refuse a folder that holds anything, before any work."""
    place = Path(folder)
    try:
        # `exists` tells a name that is too long, `lexists` a link to nothing.
        there = place.exists() or os.path.lexists(place)
        if there and (not place.is_dir() or any(place.iterdir())):
            raise InputError(f"{place} exists and is not an empty folder; choose another with -o")
        above = next(parent for parent in place.absolute().parents if os.path.lexists(parent))
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise InputError(f"no guard can be saved in {place}: {above} is no folder to write in")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            f"no guard can be saved in {shown(str(place))}: {reason}; choose another with -o"
        ) from error


def _parts(guard: Guard, folder: Path | str) -> tuple[tuple[float, ...], int]:
    """Return how `fit_guard` split the inputs; InputError for a guard that was fitted otherwise."""
    shares, seed = guard.reading.get("shares"), guard.reading.get("seed")
    if (
        not isinstance(shares, list)
        or not isinstance(seed, int)
        or not 2 <= len(shares) <= 3
        or not all(isinstance(share, float) and share > 0 for share in shares)
    ):
        raise InputError(
            f"{Path(folder) / CONFIG} does not say how its inputs were split: it was not fitted by"
            " assay guard fit; use assay.guard.proposals in Python"
        )
    return tuple(shares), seed


def _same_model(guard: Guard, path: str) -> LanguageModel:
    model = load_language_model(path)
    if guard.model_hash and guard.model_hash != hash_of(model.model):
        raise InputError(
            f"this guard was fitted on another network than {path} (the digest of the weights"
            " differs); fit one for this network"
        )
    return model


def _sites(model: LanguageModel, patterns: Sequence[str]) -> list[str]:
    if not patterns and families.find_family(model.model) is None:
        raise InputError(
            f"models of type {model.family!r} have no default sites; name modules with --sites"
        )
    found = match_names(model.model, patterns or ("blocks.*.mlp.hook_post",))
    return list(dict.fromkeys(resolve(model.model, name).site for name in found))


def _homes(model: LanguageModel, reading: Reading) -> dict[str, str]:
    """Return the node of a circuit that each feature lies in: the MLP of its block."""
    homes = {}
    for feature, (site, _) in reading.places.items():
        layer = resolve(model.model, site).layer
        if layer >= 0 and "attn" not in site and "attention" not in site:
            homes[feature] = f"m{layer}"
    return homes


def _tokens(model: LanguageModel, lines: Sequence[str]) -> list[list[int]]:
    require_tokenizer(model.tokenizer)
    rows = encode_texts(lines, model.tokenizer)
    for line, row in zip(lines, rows, strict=True):
        if not row:
            raise InputError(f"the input {line[:60]!r} has no token")
        if max(row) >= model.vocab_size:
            raise InputError(
                f"the input {line[:60]!r} holds token {max(row)}, and the model has"
                f" {model.vocab_size} tokens"
            )
    require_context(model.model, max(map(len, rows)), "give shorter lines")
    return rows


def _calibration(model: LanguageModel, lines: list[str] | None) -> list[list[int]] | None:
    return None if lines is None else _tokens(model, lines)


def _observe(model: LanguageModel, rows: Sequence[list[int]], reading: Reading) -> Observed:
    require_memory(12 * len(rows) * model.vocab_size, f"the logits of {len(rows)} inputs")
    parts = [
        read(model.model, padded_inputs(rows[start : start + _ROWS]), reading)
        for start in progress(range(0, len(rows), _ROWS), "inputs")
    ]
    return concatenate(parts)


def _swaps(
    model: LanguageModel, reading: Reading, quantiser: Quantiser, rows: Sequence[list[int]]
) -> Swap:
    """Return interventions that swap values between laboratory inputs of one length."""
    plain = replace(reading, logits=False)
    metric = target(model.model, lambda output, batch: output.logits[:, -1, 0])
    parts: list[Swap] = []
    for length in sorted({len(row) for row in rows}):
        alike = [row for row in rows if len(row) == length]
        for start in range(0, len(alike), _ROWS):
            some = alike[start : start + _ROWS]
            if len(some) < 2:
                continue
            clean, paired = padded_inputs(some), padded_inputs([*some[1:], some[0]])
            bound = nodes(
                metric, Batch(clean), Batch(paired), list(reading.sites), neurons=reading.sites
            )
            positions = torch.full((len(some),), length - 1)
            reference = read(model.model, paired, plain)
            off = last_column_off(plain, positions)
            parts.append(swaps(bound, plain, quantiser, reference, off))
    if not parts:
        raise InputError("no two laboratory inputs are of one length: no values can be swapped")
    return joined(parts)


def _promise(guard: Guard) -> dict[str, Any]:
    settings = guard.settings
    return {
        "promise": f"the tests reject at most {settings.alpha:g} of inputs like those of the"
        f" calibration; every accepted event has probability >= {settings.theta:g} in the"
        f" laboratory with confidence {1 - settings.delta:g}, all events together; other inputs:"
        " no promise"
    }


def _summary(guard: Guard, folder: Path | str, calibrating: Observed) -> dict[str, Any]:
    return {
        "guard": str(folder),
        "features": len(guard.names),
        "explanations": len(guard.explanations),
        "refused": len(guard.refused),
        "bits": guard.bits,
        "laboratory_inputs": guard.figures["inputs"],
        "calibration_inputs": len(calibrating),
        "occurrences_needed": guard.figures["needed"],
        "calibration_supported": float(guard(calibrating).supported.double().mean()),
        "bytes": memory(guard),
        **_promise(guard),
    }
