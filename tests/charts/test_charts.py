import math
import struct

import altair as alt
import numpy as np
import polars as pl
import pytest

from assay import charts
from assay.charts import theme
from assay.charts.theme import spec
from assay.errors import InputError

SMALL = pl.DataFrame(
    {
        "x": [0.0, 1.0, 2.0, 3.0, math.nan, math.inf],
        "y": [0.1, 1.1, 1.9, None, 2.0, 1.0],
        "low": [0.0, 1.0, 1.5, 0.0, 1.0, 0.0],
        "high": [0.2, 1.2, 2.5, 0.0, 3.0, 2.0],
        "kind": ["a", "b", "a", "b", "a", None],
        "count": [1, 2, 3, 4, 5, 6],
        "step": [1, 2, 3, 4, 5, 6],
    }
)
PICTURES = {
    "scatter": lambda frame: charts.scatter_identity(
        frame, "x", "y", colour="kind", low="low", high="high", tooltip=["kind", "count", "low"]
    ),
    "scatter by number": lambda frame: charts.scatter_identity(frame, "x", "y", colour="high"),
    "line": lambda frame: charts.line(
        frame, "x", "y", colour="kind", low="low", high="high", reference=1.0
    ),
    "log line": lambda frame: charts.line(frame, "x", "y", log_x=True, log_y=True),
    "bars": lambda frame: charts.bars(
        frame, "kind", "y", colour="count", low="low", high="high", reference=1.0
    ),
    "lying bars": lambda frame: charts.bars(frame, "kind", "y", horizontal=True, tooltip=["x"]),
    "heatmap": lambda frame: charts.heatmap(frame, "count", "kind", "y", text=True),
    "sized heatmap": lambda frame: charts.heatmap(
        frame, "count", "kind", "y", size="high", text="kind"
    ),
    "histogram": lambda frame: charts.histogram(
        frame, "y", colour="kind", marks=[("here", 1.0)], log_y=True
    ),
    "ecdf": lambda frame: charts.ecdf(frame, "y", colour="kind", log_x=True, marks=[("here", 1.0)]),
    "training": lambda frame: charts.training_curves(frame.select("step", "x", "y", phase="kind")),
    "calibration": lambda frame: charts.calibration(frame, "x", "y", low="low", high="high"),
    "intervals": lambda frame: charts.intervals(
        frame, "kind", "y", "low", "high", truth="x", colour="kind"
    ),
    "tradeoff": lambda frame: charts.tradeoff(frame, "x", "y", colour="count", label="kind"),
}


def rows(chart):
    return [row for data in spec(chart)["datasets"].values() for row in data]


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_valid_with_and_without_rows(name):
    for frame in (SMALL, SMALL.clear(), SMALL.head(1)):
        chart = PICTURES[name](frame)
        drawn = spec(chart)
        assert drawn == chart.to_dict(validate=True)
        assert drawn["config"]["font"] == theme.FONT
        numbers = [
            value
            for data in drawn["datasets"].values()
            for row in data
            for value in row.values()
            if isinstance(value, float)
        ]
        assert all(map(math.isfinite, numbers))


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_renders_to_png(name, tmp_path):
    path = charts.png(PICTURES[name](SMALL), tmp_path / "chart.png", scale=1.0)
    head = path.read_bytes()[:24]
    width, height = struct.unpack(">II", head[16:24])
    assert head.startswith(b"\x89PNG")
    assert min(width, height) > 100


def test_the_scatter_title_states_r_and_slope():
    x = np.linspace(-1, 1, 50)
    chart = charts.scatter_identity(pl.DataFrame({"x": x, "y": 2 * x}), "x", "y")
    assert spec(chart)["title"] == "Pearson r = 1, slope 2 over 50 points"


def test_a_large_scatter_is_sampled_and_says_so():
    frame = pl.DataFrame({"x": np.arange(5000.0), "y": np.arange(5000.0)})
    chart = charts.scatter_identity(frame, "x", "y", limit=100)
    assert len(rows(chart)) == 102
    assert "a random 100 of 5,000" in spec(chart)["title"]["subtitle"]
    assert spec(chart) == spec(charts.scatter_identity(frame, "x", "y", limit=100))


def test_a_thinned_line_keeps_its_ends():
    chart = charts.line(pl.DataFrame({"x": np.arange(5000.0), "y": np.arange(5000.0)}), "x", "y")
    drawn = sorted({row["x"] for row in rows(chart)})
    assert drawn[0] == 0
    assert drawn[-1] == 4999
    assert len(drawn) <= 402


def test_a_histogram_counts_every_finite_value():
    values = np.random.default_rng(0).normal(size=1000)
    chart = charts.histogram(pl.DataFrame({"x": [*values, math.nan, math.inf]}), "x", bins=13)
    assert sum(row["count"] for row in rows(chart)) == 1000


def test_an_ecdf_ends_at_one_and_matches_the_shares():
    values = np.random.default_rng(0).normal(size=2000)
    drawn = rows(charts.ecdf(pl.DataFrame({"x": values}), "x"))
    assert len(drawn) <= 300
    assert max(row["y"] for row in drawn) == 1.0
    for row in drawn[::25]:
        assert row["y"] == pytest.approx((values <= row["x"]).mean())


def test_the_calibration_title_counts_the_levels_that_hold():
    frame = pl.DataFrame({"n": [0.8, 0.9, 0.95], "m": [0.81, 0.89, 0.96], "g": [0.8, 0.9, 0.95]})
    assert "at 2 of 3 levels" in spec(charts.calibration(frame, "n", "m", guarantee="g"))["title"]
    assert "at 2 of 3 levels" in spec(charts.calibration(frame, "n", "m"))["title"]


def test_the_interval_title_counts_what_is_covered():
    frame = pl.DataFrame(
        {"i": ["a", "b"], "e": [1.0, 1.0], "l": [0.0, 0.0], "h": [2.0, 2.0], "t": [1.5, 3.0]}
    )
    assert (
        spec(charts.intervals(frame, "i", "e", "l", "h", truth="t"))["title"]
        == "The interval holds the true value for 1 of 2"
    )


def test_the_tradeoff_line_joins_the_best_so_far():
    frame = pl.DataFrame({"ops": [10.0, 100.0, 1000.0, 1e4], "bound": [0.5, 0.4, 0.9, 0.8]})
    best = spec(charts.tradeoff(frame, "ops", "bound"))
    joined = best["datasets"][best["layer"][0]["data"]["name"]]
    assert [row["y"] for row in joined] == [0.5, 0.9]


def test_training_curves_have_one_picture_per_metric():
    drawn = spec(charts.training_curves(SMALL.select("step", "x", "y"), keys=["y", "x"]))
    assert drawn["facet"]["sort"] == ["y", "x"]
    assert {row["key"] for data in drawn["datasets"].values() for row in data} == {"x", "y"}


def test_a_run_without_metrics_has_empty_curves():
    assert rows(charts.training_curves(pl.DataFrame())) == [{"text": "nothing to draw"}]


def test_categories_that_differ_by_number_are_in_its_order():
    frame = pl.DataFrame(
        {"x": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0], "layer": ["layer 10", "layer 9", "layer 2"]}
    )
    drawn = spec(charts.line(frame, "x", "y", colour="layer"))
    assert drawn["layer"][0]["encoding"]["color"]["scale"]["domain"] == [
        "layer 2",
        "layer 9",
        "layer 10",
    ]


def test_hostile_column_names_are_only_titles():
    name = "a'] || alert(1) || datum['b.c[0]"
    frame = pl.DataFrame({name: [1.0, 2.0], "y": [1.0, 2.0]})
    drawn = spec(charts.scatter_identity(frame, name, "y", colour=name, tooltip=[name]))
    fields = {line["field"] for line in drawn["layer"][1]["encoding"]["tooltip"]}
    assert fields == {"x", "y", "group", "t0"}


def test_layers_of_finished_pictures_are_one_picture():
    both = charts.layer(PICTURES["line"](SMALL), charts.line(SMALL, "x", "high"))
    assert spec(both)["config"]["font"] == theme.FONT


def test_a_missing_column_names_the_nearest():
    with pytest.raises(InputError, match="estimate"):
        charts.scatter_identity(
            pl.DataFrame({"estimate": [1.0], "exact": [1.0]}), "exact", "estimat"
        )
    with pytest.raises(InputError, match="holds String, not numbers"):
        charts.line(SMALL, "kind", "y")
    with pytest.raises(InputError, match="step"):
        charts.training_curves(pl.DataFrame({"steps": [1]}))
    with pytest.raises(InputError, match="loss"):
        charts.training_curves(pl.DataFrame({"step": [1], "loss": [1.0]}), keys=["los"])


def _luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
        for channel in channels
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_have_the_contrast_of_wcag_aa(scheme):
    paper = theme.PALETTE["paper"][scheme]
    for role in ("ink", "quiet"):
        assert _contrast(theme.PALETTE[role][scheme], paper) >= 4.5
    for role in (
        "blue",
        "vermilion",
        "green",
        "violet",
        "amber",
        "rose",
        "slate",
        "dots0",
        "dots1",
        "dots2",
    ):
        assert _contrast(theme.PALETTE[role][scheme], paper) >= 3.0


def test_light_colours_are_distinct_so_that_a_page_can_swap_them():
    assert len({light for light, _ in theme.PALETTE.values()}) == len(theme.PALETTE)


def test_drawing_leaves_altair_as_it_was():
    before = alt.data_transformers.active, dict(alt.data_transformers.options), alt.theme.active
    for picture in PICTURES.values():
        spec(picture(SMALL))
    assert (
        alt.data_transformers.active,
        dict(alt.data_transformers.options),
        alt.theme.active,
    ) == before
