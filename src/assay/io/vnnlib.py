"""Properties of networks in VNN-LIB (https://www.vnnlib.org): a box of inputs X and linear
constraints of outputs Y that together name an unsafe set.

Numbers are exact fractions. What the format allows beyond boxes and linear constraints joined by
`and` and `or` is refused by name and line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from assay.errors import InputError, shown
from assay.io.files import read_text

TOKEN = re.compile(r"[()]|[^\s();]+|;[^\n]*|\n")
NUMBER = re.compile(
    r"[-+]?([0-9]{1,60}\.?[0-9]{0,60}|\.[0-9]{1,60})([eE][-+]?[0-9]{1,3})?", re.ASCII
)
NAME = re.compile(r"([XY])_([0-9]{1,9})", re.ASCII)
DEPTH = 60
"""Brackets that may be open at once."""

CASES = 20_000
"""Conjunctions that a property may come to."""

BITS = 10_000
"""Binary digits that a product of constants may have."""


@dataclass(frozen=True)
class Linear:
    """`sum of coefficient * variable + constant`; a variable is ("X" or "Y", number)."""

    terms: dict[tuple[str, int], Fraction] = field(default_factory=dict)
    constant: Fraction = Fraction(0)

    def plus(self, other: Linear, factor: Fraction = Fraction(1)) -> Linear:
        terms = dict(self.terms)
        for name, value in other.terms.items():
            terms[name] = terms.get(name, Fraction(0)) + factor * value
        kept = {name: value for name, value in terms.items() if value}
        return Linear(kept, self.constant + factor * other.constant)

    def __hash__(self) -> int:
        return hash((frozenset(self.terms.items()), self.constant))


@dataclass(frozen=True)
class Case:
    """A box of inputs (ends by input), and what is unsafe there: any of several conjunctions of
    constraints `linear function of Y <= 0`.
    """

    low: tuple[Fraction, ...]
    high: tuple[Fraction, ...]
    unsafe: tuple[tuple[Linear, ...], ...]


@dataclass(frozen=True)
class Property:
    """An unsafe set: an input in the box of any case whose output is unsafe there. It holds for a
    network that has no such input.
    """

    path: Path
    inputs: int
    outputs: int
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class _List:
    """A bracket, with the line on which it opens."""

    entries: list[Any]
    line: int

    @property
    def head(self) -> str:
        first = self.entries[0] if self.entries else None
        return first.text if isinstance(first, _Word) else ""


@dataclass(frozen=True)
class _Word:
    text: str
    line: int


@dataclass(frozen=True)
class _Bound:
    """A constraint `linear <= 0`."""

    linear: Linear
    line: int


Clauses = list[tuple[_Bound, ...]]


def read_vnnlib(path: Path | str) -> Property:
    """Read a property.

    Raises InputError, with the line, for what is no box of inputs and no linear constraint of
    outputs, for an input without both ends, and for a box that is empty."""
    path = Path(path)
    reader = _Reader(path)
    for entry in _brackets(read_text(path), path):
        reader.take(entry)
    return reader.finished()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.declared: dict[tuple[str, int], int] = {}
        self.always = list[_Bound]()
        self.clauses: Clauses = [()]

    def wrong(self, line: int, what: str) -> InputError:
        return InputError(f"{self.path}, line {line}: {what}")

    def take(self, entry: _List) -> None:
        rest = entry.entries[1:]
        match entry.head:
            case "declare-const" if len(rest) == 2 and all(isinstance(x, _Word) for x in rest):
                self.declare(*rest)
            case "assert" if len(rest) == 1:
                found = self.formula(rest[0])
                if len(found) == 1:
                    self.always += found[0]
                else:
                    self.clauses = self.both(self.clauses, found, entry.line)
            case "declare-const" | "assert":
                raise self.wrong(entry.line, f"{entry.head} has the wrong number of arguments")
            case _:
                raise self.wrong(
                    entry.line,
                    f"{shown(entry.head, 60)} is not known here; known: declare-const, assert",
                )

    def declare(self, name: _Word, kind: _Word) -> None:
        found = NAME.fullmatch(name.text)
        if not found or kind.text != "Real":
            raise self.wrong(
                name.line, f"X_0, X_1 .. and Y_0, Y_1 .. of type Real, got {shown(name.text, 60)}"
            )
        key = (found[1], int(found[2]))
        if key in self.declared:
            raise self.wrong(name.line, f"{name.text} is declared twice")
        self.declared[key] = name.line

    def both(self, one: Clauses, other: Clauses, line: int) -> Clauses:
        if len(one) * len(other) > CASES:
            raise self.wrong(line, f"more than {CASES} combinations of alternatives")
        return [a + b for a in one for b in other]

    def formula(self, x: Any) -> Clauses:
        """Return a formula as a disjunction of conjunctions."""
        if isinstance(x, _Word):
            raise self.wrong(x.line, f"a constraint is needed, got {shown(x.text, 60)}")
        rest = x.entries[1:]
        match x.head:
            case "and" if rest:
                found: Clauses = [()]
                for entry in rest:
                    found = self.both(found, self.formula(entry), x.line)
                return found
            case "or" if rest:
                found = [clause for entry in rest for clause in self.formula(entry)]
                if len(found) > CASES:
                    raise self.wrong(x.line, f"more than {CASES} combinations of alternatives")
                return found
            case "<=" | ">=" if len(rest) == 2:
                left, right = (self.linear(entry) for entry in rest)
                one, other = (left, right) if x.head == "<=" else (right, left)
                return [(_Bound(one.plus(other, Fraction(-1)), x.line),)]
            case "and" | "or" | "<=" | ">=":
                raise self.wrong(x.line, f"{x.head} has the wrong number of arguments")
        raise self.wrong(x.line, f"{shown(x.head, 60)} is not known here; known: and, or, <=, >=")

    def linear(self, x: Any) -> Linear:
        if isinstance(x, _Word):
            return self.atom(x)
        rest = [self.linear(entry) for entry in x.entries[1:]]
        if x.head in ("+", "-", "*") and rest:
            total = rest[0]
            if x.head == "-" and len(rest) == 1:
                return Linear().plus(total, Fraction(-1))
            for other in rest[1:]:
                if x.head != "*":
                    total = total.plus(other, Fraction(1 if x.head == "+" else -1))
                    continue
                if total.terms and other.terms:
                    raise self.wrong(x.line, "a product of two variables is not linear")
                factor, kept = (other, total) if total.terms else (total, other)
                total = Linear().plus(kept, factor.constant)
                if any(_bits(x) > BITS for x in (total.constant, *total.terms.values())):
                    raise self.wrong(x.line, f"a product of more than {BITS} binary digits")
            return total
        raise self.wrong(x.line, f"{shown(x.head, 60)} is not known here; known: +, -, *")

    def atom(self, x: _Word) -> Linear:
        if NUMBER.fullmatch(x.text):
            return Linear({}, Fraction(x.text))
        found = NAME.fullmatch(x.text)
        key = (found[1], int(found[2])) if found else None
        if key is None or key not in self.declared:
            raise self.wrong(x.line, f"{shown(x.text, 60)} is no number and was not declared")
        return Linear({key: Fraction(1)})

    def finished(self) -> Property:
        counts = {}
        for kind in "XY":
            numbers = sorted(number for letter, number in self.declared if letter == kind)
            if not numbers or numbers != list(range(len(numbers))):
                raise InputError(
                    f"{self.path}: {kind}_0, {kind}_1 .. must be declared without gaps"
                )
            counts[kind] = len(numbers)
        boxes: dict[Any, dict[tuple[Linear, ...], None]] = {}
        for clause in self.clauses:
            box, unsafe = self.split((*self.always, *clause), counts["X"])
            boxes.setdefault(box, {})[unsafe] = None  # what stands twice says nothing new
        cases = tuple(Case(low, high, tuple(unsafe)) for (low, high), unsafe in boxes.items())
        return Property(self.path, counts["X"], counts["Y"], cases)

    def split(self, clause: tuple[_Bound, ...], count: int) -> tuple[Any, tuple[Linear, ...]]:
        """Return the box of a conjunction, and its constraints of the outputs."""
        ends: list[Fraction | None] = [None] * count
        low, high = ends.copy(), ends.copy()
        unsafe = dict[Linear, None]()
        for bound in clause:
            terms, constant = bound.linear.terms, bound.linear.constant
            kinds = {kind for kind, _ in terms}
            if kinds == {"Y"}:
                unsafe[bound.linear] = None
            elif kinds == {"X"} and len(terms) == 1:
                (((_, place), factor),) = terms.items()
                end = -constant / factor
                side, closer = (high, min) if factor > 0 else (low, max)
                old = side[place]
                side[place] = end if old is None else closer(old, end)
            else:
                what = "no variable" if not kinds else "several inputs, or inputs and outputs"
                raise self.wrong(bound.line, f"a constraint has {what}; inputs lie in boxes")
        for place, (a, b) in enumerate(zip(low, high, strict=True)):
            if a is None or b is None:
                raise InputError(
                    f"{self.path}: the input X_{place} has no {'lower' if a is None else 'upper'}"
                    " end; a proof needs a bounded box"
                )
            if a > b:
                raise InputError(
                    f"{self.path}: the box is empty: the lower end of X_{place} exceeds its upper"
                    " end"
                )
        if not unsafe:
            raise InputError(f"{self.path}: a case has no constraint of the outputs")
        return (tuple(low), tuple(high)), tuple(unsafe)


def _bits(x: Fraction) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def _brackets(text: str, path: Path) -> Iterator[_List]:
    """Yield the outermost brackets of a text."""
    line, open_ = 1, list[_List]()
    for found in TOKEN.finditer(text):
        token = found[0]
        if token == "\n":
            line += 1
        elif token == "(":
            if len(open_) == DEPTH:
                raise InputError(f"{path}, line {line}: more than {DEPTH} brackets are open")
            open_.append(_List([], line))
        elif token == ")":
            if not open_:
                raise InputError(f"{path}, line {line}: a bracket closes that was not opened")
            done = open_.pop()
            if open_:
                open_[-1].entries.append(done)
            else:
                yield done
        elif not token.startswith(";"):
            if not open_:
                raise InputError(
                    f"{path}, line {line}: {shown(token, 60)} stands outside of brackets"
                )
            open_[-1].entries.append(_Word(token, line))
    if open_:
        raise InputError(f"{path}, line {open_[0].line}: a bracket is never closed")
