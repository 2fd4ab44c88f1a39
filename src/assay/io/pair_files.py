"""Files of pairs of prompts: one JSON object per line, a CSV file with the same fields as columns,
or the CSV files of the indirect-object (arXiv 2211.00593) and greater-than (arXiv 2305.00586)
tasks.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Literal, get_args

from assay.errors import InputError, shown, unknown
from assay.io.files import existing, parse_json, read_text, require_unicode, write_text

Format = Literal["pairs", "ioi", "greater_than"]
_FIELDS = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")
_NAMES = re.compile(r"\b([A-Z]\w+) and ([A-Z]\w+)\b")
_YEAR = re.compile(r"\b(\d\d)(\d\d)\b")


@dataclass(frozen=True)
class TextPair:
    """One pair as text; `year` is the start year's last two digits in the greater-than task, -1
    elsewhere.
    """

    clean_prefix: str
    patch_prefix: str
    clean_answer: str
    patch_answer: str
    case: str = ""
    year: int = -1


def read_text_pairs(
    path: Path | str, format: Format | None = None, patch: str = "corrupted"
) -> tuple[list[TextPair], Counter[str]]:
    """Read a file of pairs: those that a row gives, and how many rows gave none by reason.

    Raises InputError with file and line for a malformed line, and when the file is empty."""
    path = existing(path)
    if format is not None and format not in get_args(Format):
        raise unknown("pair format", format, get_args(Format))
    lines = read_text(path)
    if format in (None, "pairs") and path.suffix != ".csv":
        found, dropped = list(_jsonl(path, lines)), Counter[str]()
    else:
        found, dropped = _csv(path, lines, format, patch)
    if not found and not dropped:
        raise InputError(f"{path} holds no pairs")
    return found, dropped


def write_pairs(path: Path | str, pairs: Iterable[TextPair]) -> Path:
    """Write pairs as one JSON object per line."""
    rows = (
        {**{name: getattr(pair, name) for name in _FIELDS}, "case": pair.case} for pair in pairs
    )
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _jsonl(path: Path, text: str) -> Iterable[TextPair]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise InputError(
                f"{path}, line {number}: a JSON object expected, got {type(row).__name__}"
            )
        for name in _FIELDS:
            if not isinstance(row.get(name), str):
                raise InputError(
                    f"{path}, line {number}: {name!r} must be a string, got {shown(row.get(name))}"
                )
        if not isinstance(row.get("case", ""), str):
            raise InputError(
                f"{path}, line {number}: 'case' must be a string, got {shown(row['case'])}"
            )
        kept = {name: row[name] for name in (*_FIELDS, "case") if name in row}
        require_unicode(kept, f"{path}, line {number}")
        yield TextPair(**kept)


def _csv(
    path: Path, text: str, format: Format | None, patch: str
) -> tuple[list[TextPair], Counter[str]]:
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or [])
    except csv.Error as error:
        raise InputError(f"{path}, line 1: {error}") from error
    plain = format == "pairs" or (format is None and set(_FIELDS) <= set(columns))
    task = ("clean", patch, *(["label"] if format == "greater_than" else []))
    for column in _FIELDS if plain else task:
        if columns and column not in columns:
            other = "" if format else f"; the columns may also be {', '.join(_FIELDS)}"
            raise InputError(
                f"{path}, line 1: no column {column!r}; there are {', '.join(map(repr, columns))}"
                f"{other}"
            )
    years = format == "greater_than" or (format is None and "label" in columns)
    pairs, dropped = [], Counter[str]()
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path}, line {reader.line_num}: {len(columns)} fields expected")
            pair: TextPair | str
            if plain:
                clean, patched, right, wrong = (row[name] for name in _FIELDS)
                pair = TextPair(clean, patched, right, wrong, row.get("case", ""))
            elif years:
                pair = _greater_than(row, patch, f"{path}, line {reader.line_num}")
            else:
                pair = _indirect_object(row, patch)
            if isinstance(pair, TextPair):
                pairs.append(pair)
            else:
                dropped[pair] += 1
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from error
    return pairs, dropped


def _indirect_object(row: Mapping[str, str], patch: str) -> TextPair | str:
    text = row["clean"]
    for match in _NAMES.finditer(text):
        again = [
            re.search(rf"\b{name}\b", text[match.end() :]) is not None for name in match.groups()
        ]
        if again.count(True) == 1:
            subject, other = match.groups() if again[0] else reversed(match.groups())
            return TextPair(
                text, row[patch], f" {other}", f" {subject}", "BABA" if again[0] else "ABBA"
            )
    return "no indirect object in the text"


def _greater_than(row: Mapping[str, str], patch: str, where: str) -> TextPair | str:
    match = _YEAR.search(row["clean"])
    if (
        match is None
        or not re.fullmatch("[0-9]{1,2}", row["label"].strip())
        or int(row["label"]) != int(match.group(2))
    ):
        raise InputError(
            f"{where}: 'label' must be the last two digits of the start year in 'clean', got"
            f" {shown(row['label'])}"
        )
    year = int(match.group(2))
    if not 1 <= year <= 98:
        return "start year without neighbours in its century"
    return TextPair(
        row["clean"], row[patch], f"{year + 1:02d}", f"{year - 1:02d}", match.group(1), year
    )
