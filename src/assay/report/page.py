"""One self-contained HTML file per run: no network, every string escaped, pictures before
tables.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from itertools import groupby
from typing import Any

import polars as pl
import vl_convert

from assay.charts import theme
from assay.charts.tables import show, table_html

ROWS = (
    3000,
    2000,
    1400,
    1000,
    700,
    500,
    350,
    250,
)  # rows of one data set drawn at most: the first number that keeps the page small
# characters of all pictures together; the script that draws them takes nearly as much
BUDGET = 1_000_000


@dataclass(frozen=True)
class Fact:
    """One headline number: what it is, its value, and how far to trust it."""

    label: str
    value: Any
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table with its title; a long one scrolls in its box."""

    frame: pl.DataFrame
    title: str = ""


@dataclass(frozen=True)
class Section:
    """One part of the page: a title, plain text (blank lines part paragraphs), pictures, then
    tables; without those it opens a chapter.
    """

    title: str
    text: str = ""
    charts: Sequence[Any] = ()
    tables: Sequence[Table] = ()


def render(title: str, lead: str, facts: Sequence[Fact], sections: Sequence[Section]) -> str:
    """Return the page as one HTML text that loads nothing.

    Charts are Altair charts; they take the width of their box and the colours of the reader's
    scheme. The content security policy allows the two scripts of the page by their hash and nothing
    else, so that no text from data could run or load anything."""
    for rows in ROWS:
        specs: list[str] = []
        parts = [
            _section(index, section, specs, rows) for index, section in enumerate(sections, start=1)
        ]
        if sum(map(len, specs)) <= BUDGET:
            break
    scripts = [_bundle(), _asset("page.js")] if specs else []
    style = _asset("page.css")
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src {_digest(style)}; script-src {' '.join(map(_digest, scripts)) or repr('none')}"
    )
    palette = _json(dict(theme.PALETTE.values()))
    links = _links(sections)
    page = "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            (
                '<meta name="color-scheme" content="light dark">\n<meta name="referrer"'
                ' content="no-referrer">'
            ),
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>",
            '<a class="skip" href="#content">Skip to the results</a>',
            f'<header>\n<p class="brand"><b>ASSAY</b> run report</p>\n<h1>{escape(title)}</h1>',
            f'<div class="lead">{_paragraphs(lead)}</div>' if lead.strip() else "",
            _facts(facts),
            f'<nav aria-label="Sections"><ol>{links}</ol></nav>' if links else "",
            f'</header>\n<main id="content">\n{"".join(parts)}</main>',
            (
                "<footer>Everything on this page comes from the files of its run folder. It is one"
                " file and loads nothing.</footer>"
            ),
            (
                '<noscript><p class="empty">The pictures need JavaScript; the numbers and tables do'
                " not.</p></noscript>"
                if specs
                else ""
            ),
            f'<script type="application/json" id="palette">{palette}</script>' if specs else "",
            *specs,
            *[f"<script>{script}</script>" for script in scripts],
            "</body>\n</html>\n",
        ]
    )
    return page.encode(errors="replace").decode()


def _links(sections: Sequence[Section]) -> str:
    """Return the list of contents: the chapters of a long page, the sections of a short one."""
    chapters = [not section.charts and not section.tables for section in sections]
    named = [
        f'<li><a href="#part-{index}">{escape(section.title)}</a></li>'
        for index, (section, chapter) in enumerate(zip(sections, chapters, strict=True), start=1)
        if chapter or sum(chapters) < 2
    ]
    return "".join(named) if len(named) > 1 else ""


def _facts(facts: Sequence[Fact]) -> str:
    if not facts:
        return ""
    cells = []
    for fact in facts:
        value = show(fact.value)
        kind = "value long" if len(value) > 14 else "value"
        note = f'<dd class="note">{escape(fact.note)}</dd>' if fact.note else ""
        cells.append(
            f'<div><dt>{escape(fact.label)}</dt><dd class="{kind}">{escape(value)}</dd>{note}</div>'
        )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _section(index: int, section: Section, specs: list[str], rows: int) -> str:
    drawn = [_figure(section.title, chart, specs, rows) for chart in section.charts]
    shapes = _layout([shape for shape, _ in drawn])
    figures = [
        f'<figure class="{shape}">{body}</figure>'
        for shape, (_, body) in zip(shapes, drawn, strict=True)
    ]
    tables = [_table(section.title, table) for table in section.tables]
    pictures = (
        f'<div class="charts{" several" if len(figures) > 1 else ""}">{"".join(figures)}</div>'
        if figures
        else ""
    )
    text = f'<div class="text">{_paragraphs(section.text)}</div>' if section.text.strip() else ""
    chapter = "" if figures or tables else ' class="chapter"'
    return (
        f'<section id="part-{index}"{chapter} aria-labelledby="title-{index}">'
        f'<div class="words"><h2 id="title-{index}">{escape(section.title)}</h2>{text}</div>'
        + ("" if chapter else f'<div class="body">{pictures}{"".join(tables)}</div>')
        + "</section>\n"
    )


def _figure(section: str, chart: Any, specs: list[str], rows: int) -> tuple[str, str]:
    """Return the shape of a picture and its HTML; its specification joins `specs`."""
    spec = theme.spec(chart)
    heading, note = _heading(spec.pop("title", ""))
    meta = spec.get("usermeta", {})
    square = bool(meta.get("square"))
    for key in ("$schema", "usermeta", "background"):
        spec.pop(key, None)
    spec["config"] = {**theme.config(), **spec.get("config", {})}
    spec["config"].pop("background", None)
    spec["background"] = "transparent"
    cut = _clean(spec, rows)
    if cut:
        note = f"{note}; {cut}" if note else cut
    name = f"spec-{len(specs) + 1}"
    specs.append(f'<script type="application/json" id="{name}">{_json(spec)}</script>')
    label = spec.get("description") or heading or section
    caption = (f"<b>{escape(heading)}</b>" if heading else "") + (
        f"<span>{escape(note)}</span>" if note else ""
    )
    several = any(key in spec for key in ("facet", "concat", "hconcat", "vconcat"))
    shape = "wide" if several or meta.get("wide") else "square" if square else "plain"
    told = (
        f'role="img" aria-label="{escape(str(label))}"'
        f' data-spec="{name}"{" data-square" if square else ""}'
    )
    opening = f"<figcaption>{caption}</figcaption>" if caption else ""
    return shape, f'{opening}<div class="chart" {told}></div>'


def _layout(shapes: Sequence[str]) -> list[str]:
    """Give one picture of every odd run of half-width ones the whole width, so that none stands
    alone; a square one only if it must.
    """
    laid: list[str] = []
    for wide, run in groupby(shapes, key=lambda shape: shape == "wide"):
        found = list(run)
        if not wide and len(found) % 2 and len(shapes) > 1:
            found[-1 if found[0] == "square" else 0] = "wide"
        laid += found
    return laid


def _table(section: str, table: Table) -> str:
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    label = escape(table.title or section)
    body = table_html(table.frame)
    return (
        f'<div class="table">{title}<div class="scroll" tabindex="0" role="region"'
        f' aria-label="{label}">{body}</div></div>'
    )


def _heading(title: Any) -> tuple[str, str]:
    """Take a chart's title and subtitle out of its specification: as HTML they wrap on a phone."""
    if isinstance(title, dict):
        return _joined(title.get("text", "")), _joined(title.get("subtitle", ""))
    return _joined(title), ""


def _joined(text: Any) -> str:
    return " ".join(map(str, text)) if isinstance(text, list) else str(text)


def _clean(spec: dict[str, Any], most: int) -> str:
    """Thin long data sets evenly, round floats to six digits, turn what JSON cannot say into
    null; return a note on what was cut.
    """
    notes = []
    for name, rows in spec.get("datasets", {}).items():
        if len(rows) > most:
            notes.append(f"{most:,} of {len(rows):,} rows are drawn, evenly spaced")
            rows = [rows[round(index * (len(rows) - 1) / (most - 1))] for index in range(most)]
        spec["datasets"][name] = [_plain(row) for row in rows]
    return "; ".join(notes)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _json(value: Any) -> str:
    """Return JSON that cannot end or open an HTML element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _paragraphs(text: str) -> str:
    return "".join(
        f"<p>{escape(' '.join(part.split()))}</p>" for part in text.split("\n\n") if part.strip()
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _asset(name: str) -> str:
    return resources.files("assay.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _bundle() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script, made offline; nothing in it can end
    the element that holds it.
    """
    return (
        vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
        .replace("</script", "<\\/script")
        .replace("<!--", "<\\!--")
    )
