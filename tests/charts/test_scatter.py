"""Scatter plots: which points are drawn, and how they are coloured."""

from __future__ import annotations

import polars as pl
import pytest

from assay import charts
from assay.errors import InputError


def test_only_what_a_scale_can_show_is_drawn():
    frame = pl.DataFrame(
        {"x": [1.0, 0.0, -2.0, 10.0], "y": [1.0, 2.0, 3.0, None], "size": [1.0, 2.0, 3.0, 4.0]}
    )
    plain = charts.scatter(frame, "x", "y", colour="size").to_dict()
    (drawn,) = plain["datasets"].values()
    assert [row["x"] for row in drawn] == [1, 0, -2]
    assert plain["encoding"]["color"]["type"] == "quantitative"
    (drawn,) = charts.scatter(frame, "x", "y", log_x=True).to_dict()["datasets"].values()
    assert [row["x"] for row in drawn] == [1]


def test_names_are_colours_and_unknown_columns_are_refused():
    frame = pl.DataFrame({"x": [1.0, 2.0], "y": [1.0, 2.0], "kind": ["mlp", "attention"]})
    spec = charts.scatter(frame, "x", "y", colour="kind", tooltip=["kind"]).to_dict()
    assert "nominal" in str(spec)
    with pytest.raises(InputError, match="did you mean kind"):
        charts.scatter(frame, "x", "y", colour="kinds")
