import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.charts.tables import column, notebook_html, show, table_html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),  # noqa: RUF001
        (math.nan, "–"),  # noqa: RUF001
        (math.inf, "∞"),
        (-math.inf, "−∞"),  # noqa: RUF001
        (True, "yes"),
        (0.0, "0"),
        (-0.0, "0"),
        (1797, "1,797"),
        (-3, "−3"),  # noqa: RUF001
        (0.978333, "0.9783"),
        (0.95, "0.95"),
        (12345.678, "12,346"),
        (9.9999999, "10"),
        (1.5e-7, "1.5×10⁻⁷"),  # noqa: RUF001
        (-2.5e9, "−2.5×10⁹"),  # noqa: RUF001
        (np.float32(0.5), "0.5"),
        (np.int64(1200), "1,200"),
        ([1, 2.5, None], "1, 2.5, –"),  # noqa: RUF001
        ("block 1", "block 1"),
    ],
)
def test_values_read_well(value, text):
    assert show(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_shown_number_is_the_number_to_its_digits(value):
    text = show(value).replace(",", "").replace("−", "-")  # noqa: RUF001
    if "×10" in text:  # noqa: RUF001
        mantissa, power = text.split("×10")  # noqa: RUF001
        text = f"{mantissa}e{power.translate(str.maketrans('⁻⁰¹²³⁴⁵⁶⁷⁸⁹', '-0123456789'))}"
    if math.isfinite(float(text)):
        assert float(text) == pytest.approx(value, rel=6e-3, abs=0)


def test_a_column_of_floats_lines_up():
    assert column([14.5, 1.25, 0.0, None]) == ["14.50", "1.25", "0.00", "–"]  # noqa: RUF001
    assert column([0.5, 0.25, 1.0]) == ["0.50", "0.25", "1.00"]
    assert column([100.0, 1e-9]) == ["100", "1×10⁻⁹"]  # noqa: RUF001
    assert column([]) == []


def test_tables_escape_names_and_cells_and_count_what_they_cut():
    frame = pl.DataFrame(
        {"<b>name</b>": ["<script>alert(1)</script>", "a & b"], "value": [0.5, None]}
    )
    html = table_html(frame, title="<i>t</i>", limit=1)
    assert "<script" not in html
    assert "<b>" not in html
    assert "<i>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "The first 1 of 2 rows" in html


def test_empty_tables_say_so():
    assert "no rows" in table_html(pl.DataFrame({"a": []}))
    assert "No columns" in table_html(pl.DataFrame())


def test_a_notebook_table_scrolls_in_its_own_box():
    html = notebook_html(pl.DataFrame({"a": [1, 2]}), title="scores")
    assert html.startswith("<div")
    assert "<caption>scores</caption>" in html
