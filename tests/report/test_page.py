import html.parser
import json
import math
import re

import altair as alt
import polars as pl
import pytest
import report_demo
from hypothesis import given, settings
from hypothesis import strategies as st

from assay import charts
from assay.io.files import write_text
from assay.report.page import ROWS, Fact, Section, Table, _layout, render

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)><!-- ]]> \" ' &amp; \u2028 {{x}}"
)


class Reader(html.parser.HTMLParser):
    """Collect a page's elements, attributes, visible text and scripts as a browser's parser
    would see them.
    """

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data):
        tag = self.elements[-1][0] if self.elements else ""
        if tag == "script" and self.cdata_elem == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.text.append(data)

    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(tag, tuple(sorted(attributes))) for tag, attributes in self.elements]


def everything(text: str, *, pictures: bool) -> str:
    frame = pl.DataFrame({text: [1.0, 2.0], "other": [2.0, 1.0], "name": [text, text + "2"]})
    drawn = (
        [
            charts.scatter_identity(
                frame, text, "other", colour="name", tooltip=[text, "name"], title=text
            )
        ]
        if pictures
        else []
    )
    tables = [Table(frame, text)]
    sections = [
        Section(text, text, drawn, tables),
        Section("second", "", [], [Table(frame.clear())]),
    ]
    return render(text, text, [Fact(text, text, text)], sections)


@pytest.fixture(scope="module")
def demo() -> str:
    return render(
        "Digits, opened into channels",
        report_demo.LEAD,
        report_demo.facts(),
        report_demo.sections(),
    )


def test_a_picture_may_ask_for_the_whole_width():
    nodes = pl.DataFrame({"name": ["a"], "x": [0], "y": [0], "value": [1.0]})
    edges = pl.DataFrame({"source": ["a"], "receiver": ["a"], "score": [1.0]})
    drawn = [charts.graph(nodes, edges), charts.graph(nodes, edges)]
    html = render("Title", "", [], [Section("Wide", charts=drawn)])
    assert html.count('<figure class="wide">') == 2


def test_a_full_page_is_one_file_under_two_megabytes(demo):
    assert len(demo.encode()) < 2_000_000
    reader = Reader(demo)
    loads = [
        (tag, name)
        for tag, attributes in reader.elements
        for name in attributes
        if name in ("src", "srcset", "action", "poster", "data")
    ]
    assert loads == []
    addresses = [
        attributes["href"] or "" for _, attributes in reader.elements if "href" in attributes
    ]
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    specs = [
        json.loads(text)
        for attributes, text in reader.scripts
        if attributes.get("id", "").startswith("spec-")
    ]
    assert len(specs) == sum(len(section.charts) for section in report_demo.sections())
    assert not any("http" in json.dumps(spec) for spec in specs)


def test_the_policy_allows_the_scripts_of_the_page_and_nothing_else(demo):
    policy = next(
        attributes["content"]
        for _, attributes in Reader(demo).elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert policy.count("sha256-") == 3


def test_pictures_come_before_tables_and_every_picture_has_a_text(demo):
    reader = Reader(demo)
    order = [tag for tag, _ in reader.elements if tag in ("section", "figure", "table")]
    for part in " ".join(order).split("section"):
        assert "table figure" not in part
    for tag, attributes in reader.elements:
        if "data-spec" in attributes:
            assert tag == "div"
            assert attributes["role"] == "img"
            assert attributes["aria-label"]


def test_the_same_input_gives_the_same_bytes(demo):
    again = render(
        "Digits, opened into channels",
        report_demo.LEAD,
        report_demo.facts(),
        report_demo.sections(),
    )
    assert again == demo


def test_hostile_text_changes_no_element_and_no_script():
    plain, hostile = (
        Reader(everything("plain", pictures=True)),
        Reader(everything(HOSTILE, pictures=True)),
    )
    assert hostile.shape() == plain.shape()
    assert "alert(1)" in "".join(hostile.text)
    for attributes, text in hostile.scripts:
        if attributes.get("type") == "application/json":
            assert not re.search("[<>&\u2028]", text)
            json.loads(text)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=60).filter(lambda text: text not in ("other", "name")))
def test_any_text_leaves_the_elements_as_they_are(text):
    """Only paragraphs may differ: blank text has none, and blank lines part them."""
    assert skeleton(everything(text, pictures=False)) == skeleton(
        everything("plain", pictures=False)
    )


def skeleton(page: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the elements without paragraphs, and without classes, which a text's length
    decides.
    """
    shape = Reader(page.split("</head>")[1]).shape()
    return [
        (tag, tuple(name for name in names if name != "class"))
        for tag, names in shape
        if tag not in ("p", "div")
    ]


@settings(max_examples=12, deadline=None)
@given(st.text(alphabet="</script>!-&\"'\\", min_size=1, max_size=40))
def test_any_text_inside_a_picture_stays_data(text):
    reader = Reader(everything(text, pictures=True))
    spec = next(
        json.loads(body) for attributes, body in reader.scripts if attributes.get("id") == "spec-1"
    )
    names = {row["group"] for rows in spec["datasets"].values() for row in rows if "group" in row}
    assert names == {text, text + "2"}


def test_lone_surrogates_and_blank_parts_can_be_written(tmp_path):
    page = render("\ud800", "", [], [Section("", "", [], [])])
    path = write_text(tmp_path / "report.html", page)
    assert path.name == "report.html"
    assert path.read_text(encoding="utf-8") == page
    assert "script" not in page.split("</head>")[1].replace("noscript", "")


def test_missing_numbers_are_dashes_and_null():
    frame = pl.DataFrame({"x": [1.0, math.nan], "y": [math.inf, 2.0]})
    chart = alt.Chart(frame).mark_point().encode(x="x:Q", y="y:Q")
    page = render("t", "", [Fact("nothing", math.nan)], [Section("s", "", [chart], [Table(frame)])])
    reader = Reader(page)
    spec = next(
        json.loads(body) for attributes, body in reader.scripts if attributes.get("id") == "spec-1"
    )
    (rows,) = spec["datasets"].values()
    assert rows == [{"x": 1.0, "y": None}, {"x": None, "y": 2.0}]
    assert "NaN" not in "".join(reader.text)
    assert "nan" not in "".join(reader.text)


def test_a_huge_picture_is_thinned_with_a_note():
    frame = pl.DataFrame({"x": range(20_000), "y": range(20_000)})
    page = render(
        "t",
        "",
        [],
        [Section("s", "", [alt.Chart(frame, title="all").mark_point().encode(x="x:Q", y="y:Q")])],
    )
    assert f"{ROWS[0]:,} of 20,000 rows are drawn" in page
    spec = next(
        json.loads(body)
        for attributes, body in Reader(page).scripts
        if attributes.get("id") == "spec-1"
    )
    (rows,) = spec["datasets"].values()
    assert len(rows) == ROWS[0]
    assert (rows[0]["x"], rows[-1]["x"]) == (0, 19_999)


def test_many_large_pictures_stay_under_two_megabytes():
    frame = pl.DataFrame(
        {
            "x": [index / 7 for index in range(6000)],
            "name": [f"a rather long name {index}" for index in range(6000)],
        }
    )
    chart = alt.Chart(frame).mark_point().encode(x="x:Q", tooltip="name:N")
    page = render("t", "", [], [Section("s", "", [chart] * 15)])
    assert len(page.encode()) < 2_000_000
    assert page.count("of 6,000 rows are drawn") == 15


def test_embedding_options_and_addresses_of_a_chart_are_dropped():
    chart = (
        alt.Chart(pl.DataFrame({"x": [1]}), usermeta={"embedOptions": {"loader": {"target": "x"}}})
        .mark_point()
        .encode(x="x:Q")
    )
    page = render("t", "", [], [Section("s", "", [chart])])
    body = next(
        body for attributes, body in Reader(page).scripts if attributes.get("id") == "spec-1"
    )
    assert "embedOptions" not in body
    assert "$schema" not in body


def test_a_long_page_lists_its_chapters():
    table = Table(pl.DataFrame({"a": [1]}))
    short = render("t", "", [], [Section("one", "", [], [table]), Section("two", "", [], [table])])
    long = render(
        "t",
        "",
        [],
        [
            Section("first", "words"),
            Section("one", "", [], [table]),
            Section("second"),
            Section("two", "", [], [table]),
        ],
    )
    assert re.findall(r'href="#part-(\d)"', short) == ["1", "2"]
    assert re.findall(r'href="#part-(\d)"', long) == ["1", "3"]
    assert long.count('class="chapter"') == 2


@pytest.mark.parametrize(
    ("shapes", "laid"),
    [
        (["plain"], ["plain"]),
        (["plain", "plain"], ["plain", "plain"]),
        (["plain", "plain", "plain"], ["wide", "plain", "plain"]),
        (["square", "plain", "plain"], ["square", "plain", "wide"]),
        (["plain", "wide", "square", "square"], ["wide", "wide", "square", "square"]),
    ],
)
def test_no_half_width_picture_stands_alone(shapes, laid):
    assert _layout(shapes) == laid
