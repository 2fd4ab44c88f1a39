"""The verb `assay steer` over a saved run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from assay.audit.setting import Place
from assay.audit.steering import continue_steered, steer
from assay.core.mechanisms import Mechanisms
from assay.errors import InputError, shown
from assay.io.runs import Run, opened, require_new, start
from assay.studies.recipes import STEERING
from assay.studies.runner import mechanisms_of, provenance, readable
from assay.studies.steer_page import page
from assay.studies.verbs import find_part
from assay.targets.language import load_tokenizer


def steer_run(
    folder: Path | str,
    settings: Sequence[str],
    *,
    values: Sequence[str] = (),
    out: Path | str | None = None,
    count: int = 0,
    examples: int = 4,
    temperature: float = 0.0,
    alpha: float = 0.1,
    seed: int = 0,
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Steer a saved run, see `steer`, and save the rows as `verb-steer.parquet`; with a `count`,
    also continue the prompts of its first `examples` by so many tokens, and with `out` save rows,
    summary and a report in that new folder.

    settings: "PART=GATE", values: "PART=ACTIVATION", with the part as tables show it and * for all
    of an axis. Raises InputError for another form, for parts that are not there, and for runs that
    cannot be continued."""
    if out is not None:
        require_new(out)
    run = opened(folder)
    mechanisms = mechanisms_of(run)
    gates = _read_all(mechanisms, settings, "GATE")
    to = _read_all(mechanisms, values, "VALUE")
    said = []
    if count:
        said = continue_steered(
            mechanisms,
            gates,
            _tokenizer(mechanisms),
            to=to,
            examples=range(min(examples, len(mechanisms.batch))),
            count=count,
            temperature=temperature,
            seed=seed,
        )
    found = steer(mechanisms, gates, to=to, alpha=alpha, seed=seed)
    run.save_table("verb-steer.parquet", found.table())
    summary = found.summary()
    if said:
        summary["continuations"] = [one.__dict__ for one in said]
    if out is not None:
        config = {
            STEERING: str(folder),
            "settings": list(settings),
            "values": list(values),
            "continue": count,
            "examples": examples,
            "temperature": temperature,
            "alpha": alpha,
            "seed": seed,
        }
        with start(out, config) as made:
            made.save_table("examples.parquet", found.table())
            made.save_json("summary.json", summary)
            report(made)
        summary["report"] = str(Path(out) / "report.html")
    return summary, found.table()


def report(run: Run) -> Path:
    """Build `report.html` of a folder of steering from what it holds."""
    with readable(run):
        config, summary = run.json("config.json"), run.json("summary.json")
        words = ["assay", "steer", config[STEERING], *config["settings"]]
        words += [word for one in config["values"] for word in ("--set", one)]
        for key in ("continue", "examples", "temperature", "alpha", "seed"):
            words += [f"--{key}", str(config[key])]
        again = shlex.join([*words, "-o", "NEW_FOLDER"])
        html = page(
            config[STEERING],
            summary,
            run.table("examples.parquet"),
            [provenance(run, again)],
        )
    return run.save_text("report.html", html)


def _read_all(mechanisms: Mechanisms, texts: Sequence[str], what: str) -> dict[Place, float]:
    found: dict[Place, float] = {}
    for text in texts:
        place, value = read_setting(mechanisms, text, what)
        if place in found and found[place] != value:
            raise InputError(
                f"{shown(text)}: the part is set to {found[place]:g} too; give it one value"
            )
        found[place] = value
    return found


def read_setting(mechanisms: Mechanisms, text: str, what: str = "GATE") -> tuple[Place, float]:
    """Read "PART=GATE", or "PART=VALUE"."""
    part, _, value = text.rpartition("=")
    try:
        gate = float(value)
    except ValueError as error:
        raise InputError(
            f"a setting is written PART={what}, such as 'group[3, 1]=2' or 'group[*, 1]=-1'; got"
            f" {shown(text)}"
        ) from error
    group, bracket, inside = part.rpartition("[")
    if re.search(r"[^\s,]\*|\*[^\s,\]]", inside):
        raise InputError(f"{shown(text)}: * stands alone, for all of an axis")
    name, index = find_part(mechanisms, group + bracket + inside.replace("*", "0"))
    stars = ["*" in entry for entry in inside.split(",")] if index else []
    return (name, tuple(None if s else i for s, i in zip(stars, index, strict=True))), gate


def _tokenizer(mechanisms: Mechanisms) -> Any:
    known = getattr(mechanisms.target, "tokenizer", None)
    if known is None and Path(mechanisms.target.name).is_dir():
        return load_tokenizer(mechanisms.target.name)
    return known
