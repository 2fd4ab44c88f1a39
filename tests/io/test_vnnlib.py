"""Reading VNN-LIB properties: exact numbers, and every refusal with its line."""

from fractions import Fraction
from pathlib import Path

import pytest

from assay.errors import InputError
from assay.io.vnnlib import read_vnnlib

HEAD = "(declare-const X_0 Real)\n(declare-const Y_0 Real)\n(declare-const Y_1 Real)\n"
BOX = "(assert (and (<= X_0 0.1) (>= X_0 -1e-1)))\n"


def read(folder: Path, text: str):
    path = folder / "p.vnnlib"
    path.write_text(text)
    return read_vnnlib(path)


def test_constraints_are_exact_and_in_disjunctive_normal_form(tmp_path: Path) -> None:
    text = HEAD + BOX + "; a comment (\n"
    text += "(assert (or (and (<= Y_0 (* 2 (+ Y_1 0.3))) (>= Y_1 3)) (<= (- Y_0) (- 1 Y_1))))\n"
    (case,) = read(tmp_path, text).cases
    assert (case.low, case.high) == ((Fraction(-1, 10),), (Fraction(1, 10),))
    first, second = case.unsafe
    y0, y1 = ("Y", 0), ("Y", 1)
    assert [(one.terms, one.constant) for one in first] == [
        ({y0: 1, y1: -2}, Fraction(-3, 5)),
        ({y1: -1}, 3),
    ]
    assert [(one.terms, one.constant) for one in second] == [({y0: -1, y1: 1}, -1)]


def test_boxes_in_a_disjunction_are_cases_of_their_own(tmp_path: Path) -> None:
    boxes = "(assert (or (and (>= X_0 0) (<= X_0 1)) (and (>= X_0 2) (<= 3 4) (<= X_0 3))))\n"
    with pytest.raises(InputError, match="line 4: a constraint has no variable"):
        read(tmp_path, HEAD + boxes + "(assert (<= Y_0 0))")
    text = HEAD + boxes.replace("(<= 3 4) ", "") + "(assert (or (<= Y_0 0) (<= Y_1 0)))"
    cases = read(tmp_path, text).cases
    assert [(case.low, case.high, len(case.unsafe)) for case in cases] == [
        ((0,), (1,), 2),
        ((2,), (3,), 2),
    ]


def test_the_nearest_of_several_ends_counts(tmp_path: Path) -> None:
    more = "(assert (and (<= X_0 9) (<= (* -2 X_0) 0.1) (>= X_0 -7)))(assert (<= Y_0 0))"
    (case,) = read(tmp_path, HEAD + BOX + more).cases
    assert (case.low, case.high) == ((Fraction(-1, 20),), (Fraction(1, 10),))


def test_what_stands_twice_counts_once(tmp_path: Path) -> None:
    line = "(assert (or (<= Y_0 0) (and (<= Y_1 0) (<= Y_1 0)) (<= (* 2 Y_1) Y_1)))"
    (case,) = read(tmp_path, HEAD + BOX + 3 * line).cases
    assert [len(group) for group in case.unsafe] == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD + "(assert (< Y_0 1))", "line 4: '<' is not known here"),
        (HEAD + "(set-logic QF_LRA)", "line 4: 'set-logic' is not known here"),
        (HEAD + "(assert (<= (/ Y_0 2) 1))", "line 4: '/' is not known here"),
        (HEAD + "(assert (<= (* Y_0 Y_1) 1))", "line 4: a product of two variables"),
        (HEAD + "(assert (<= Y_7 1))", "line 4: 'Y_7' is no number and was not declared"),
        (HEAD + "(assert (<= nan 1))", "line 4: 'nan' is no number"),
        (HEAD + "(assert (<= X_0 Y_0))", "line 4: a constraint has several inputs"),
        (HEAD + "(assert (<= Y_0))", "line 4: <= has the wrong number of arguments"),
        (HEAD + "(assert Y_0)", "line 4: a constraint is needed"),
        (HEAD + "(assert (<= Y_0 1)", "line 4: a bracket is never closed"),
        (HEAD + ")", "line 4: a bracket closes that was not opened"),
        (HEAD + "hello", "line 4: 'hello' stands outside of brackets"),
        (HEAD + "(declare-const Y_0 Real)", "line 4: Y_0 is declared twice"),
        (HEAD + "(declare-const Z Real)", "line 4: X_0, X_1 .. and Y_0"),
        (HEAD + "(" * 100, "line 4: more than 60 brackets are open"),
        (HEAD + "(assert (<= X_0 1))(assert (<= Y_0 1))", "the input X_0 has no lower end"),
        (HEAD + "(assert (>= X_0 1))(assert (<= Y_0 1))", "the input X_0 has no upper end"),
        (HEAD + BOX + "(assert (>= X_0 1))(assert (<= Y_0 1))", "the box is empty"),
        (HEAD + BOX + "(assert (>= X_0 1e999))(assert (<= Y_0 1))", "the box is empty"),
        (HEAD + "(assert (<= Y_0 (* 1e999 1e999 1e999 1e999)))", "a product of more than 10000"),
        (HEAD + BOX, "a case has no constraint of the outputs"),
        (HEAD.replace("Y_1", "Y_2") + BOX, "Y_0, Y_1 .. must be declared without gaps"),
        (
            HEAD + BOX + "(assert (or (<= Y_0 1) (<= Y_0 2)))\n" * 20,
            "more than 20000 combinations of alternatives",
        ),
    ],
)
def test_what_is_no_box_or_linear_constraint_is_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
