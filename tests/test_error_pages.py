"""The pages of errors: each is in the index, and every message they quote is one that the package
prints.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ERRORS = ROOT / "docs" / "errors"
PAGES = sorted(path.name for path in ERRORS.glob("*.md") if path.name != "README.md")
INDEX = (ERRORS / "README.md").read_text()
ROWS = re.findall(r"^\| `(.+?)` \| (.+) \|$", INDEX, re.M)
HOLE = "\0"


@cache
def messages() -> tuple[str, ...]:
    """Return every text in the source, with a hole for each value that is put in."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (
                    part.value if isinstance(part, ast.Constant) else HOLE for part in node.values
                )
                found.append("".join(map(str, parts)))
    return tuple(" ".join(text.split(" ")) for text in found)


def is_printed(quote: str) -> bool:
    """Return whether one message holds the quote, whose `...` stand for anything."""
    words = [part.strip() for part in quote.split("...") if part.strip(" (),.:;'")]
    return bool(words) and any(holds(text, words) for text in messages())


def holds(text: str, words: list[str]) -> bool:
    """Return whether a text holds all words in their order."""
    at = 0
    for word in words:
        at = text.find(word, at)
        if at < 0:
            return False
        at += len(word)
    return True


def is_instance(line: str) -> bool:
    """Return whether a line is what a message looks like with its holes filled, or begins so."""
    for text in messages():
        fixed = text.split(HOLE)
        # A message that says little fits anything.
        if len(fixed) > 1 and max(map(len, fixed)) >= 10 and sum(map(len, fixed)) > len(line) / 4:
            pattern = ".*".join(map(re.escape, fixed))
            if re.search(pattern, line) or re.fullmatch(f"{pattern}.*", line):
                return True
        if len(text) >= 12 and HOLE not in text and text in line:
            return True
    return False


def test_there_are_rows_and_pages() -> None:
    assert len(ROWS) > 25
    assert len(PAGES) > 7


@pytest.mark.parametrize("page", PAGES)
def test_each_page_is_linked_and_has_its_parts(page: str) -> None:
    assert f"]({page})" in INDEX
    text = (ERRORS / page).read_text()
    for part in ("**Symptom.**", "**Cause.**", "**Wrong.**", "**Right.**"):
        assert text.count(part) == 1, part
    assert len(re.findall(r"^    \S", text, re.M)) >= 3


def test_each_link_leads_somewhere() -> None:
    for name in re.findall(r"\]\(([^)]+)\)", INDEX):
        assert (ERRORS / name).is_file(), name


@pytest.mark.parametrize("quote", [row[0] for row in ROWS])
def test_each_message_of_the_index_is_in_the_source(quote: str) -> None:
    assert is_printed(quote)


@pytest.mark.parametrize("page", PAGES)
def test_each_message_of_a_page_is_in_the_source(page: str) -> None:
    lines = re.findall(r"^    (?:assay|InputError): (.+)$", (ERRORS / page).read_text(), re.M)
    assert lines
    for line in lines:
        assert is_instance(line), line


def test_what_is_not_printed_is_found_out() -> None:
    assert not is_printed("... is a folder that nobody ... has written")
    assert not is_instance("runs/x was eaten by the dog and is left alone")
