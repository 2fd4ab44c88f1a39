"""The one visual theme of every picture: palette, Vega-Lite configuration, and the same chart as
PNG.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from assay.io.files import write_atomic
from assay.io.ours import require_ours

# role: (light scheme, dark scheme). Categorical colours follow Okabe and Ito (safe for colour-blind
# readers), moved until each has at least 3:1 contrast on its own background. The light values are
# pairwise different, so that a page can swap them by value.
PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#171b21"),
    "ink": ("#1c2530", "#e6e9ee"),
    "quiet": ("#566273", "#a3adba"),
    "rule": ("#aab3bf", "#5b6674"),
    "grid": ("#e9ecf0", "#272d36"),
    "blue": ("#1667a8", "#5aa9e6"),
    "vermilion": ("#cf5508", "#f5915a"),
    "green": ("#00855f", "#3cc79c"),
    "violet": ("#8a4fa8", "#c39ae0"),
    "amber": ("#b27a00", "#e8b84a"),
    "rose": ("#b5487e", "#ec8fb8"),
    "slate": ("#5f6b7a", "#98a4b3"),
    "ramp0": ("#eef3f8", "#1f2731"),
    "ramp1": ("#bcd3e8", "#22486b"),
    "ramp2": ("#74a8d4", "#2f77ad"),
    "ramp3": ("#2b74b3", "#69b1e8"),
    "ramp4": ("#0b3d6b", "#d3ebff"),
    "dots0": ("#3a98ae", "#3f86b8"),
    "dots1": ("#1d66a3", "#74bcec"),
    "dots2": ("#0c2d54", "#dcf1ff"),
    "cold2": ("#0f4f87", "#7cc0f5"),
    "cold1": ("#7db0da", "#2c6596"),
    "middle": ("#f4f5f7", "#20262e"),
    "warm1": ("#eaa072", "#9a4a1a"),
    "warm2": ("#a83f00", "#ffa873"),
    "reverse": ("#fefefe", "#10141a"),
}


def hue(role: str) -> str:
    """Return the light-scheme colour of a role of `PALETTE`."""
    return PALETTE[role][0]


CATEGORIES = tuple(
    hue(role) for role in ("blue", "vermilion", "green", "violet", "amber", "rose", "slate")
)
RAMP = tuple(hue(f"ramp{step}") for step in range(5))
DOTS = tuple(hue(f"dots{step}") for step in range(3))
DIVERGING = tuple(hue(role) for role in ("cold2", "cold1", "middle", "warm1", "warm2"))
FONT = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans',"
    " sans-serif"
)


def config() -> dict[str, Any]:
    """Return the Vega-Lite configuration that every picture carries."""
    ink, quiet, rule, grid = (hue(role) for role in ("ink", "quiet", "rule", "grid"))
    blue = hue("blue")
    return {
        "background": hue("paper"),
        "font": FONT,
        "aria": False,
        "padding": 4,
        "view": {
            "stroke": None,
            "continuousWidth": 520,
            "continuousHeight": 280,
            "discreteWidth": 520,
            "discreteHeight": 280,
        },
        "title": {
            "anchor": "start",
            "color": ink,
            "fontSize": 14,
            "fontWeight": 600,
            "offset": 12,
            "subtitleColor": quiet,
            "subtitleFontSize": 12,
        },
        "axis": {
            "domainColor": rule,
            "tickColor": rule,
            "gridColor": grid,
            "labelColor": quiet,
            "titleColor": ink,
            "labelFontSize": 11,
            "titleFontSize": 12,
            "titleFontWeight": 500,
            "titlePadding": 8,
            "labelOverlap": True,
            "labelLimit": 150,
            "tickCount": 6,
            "tickSize": 4,
        },
        "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
        "axisX": {"grid": False},
        "header": {
            "labelColor": ink,
            "titleColor": ink,
            "labelFontSize": 12,
            "labelFontWeight": 600,
            "labelAnchor": "start",
            "title": None,
        },
        "legend": {
            "orient": "top",
            "direction": "horizontal",
            "labelColor": ink,
            "titleColor": quiet,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": 500,
            "titleOrient": "left",
            "titlePadding": 10,
            "labelLimit": 220,
            "symbolSize": 90,
            "symbolStrokeWidth": 2,
            "symbolOpacity": 1,
            "gradientLength": 180,
            "gradientThickness": 10,
            "offset": 10,
        },
        "range": {
            "category": list(CATEGORIES),
            "ramp": list(RAMP),
            "heatmap": list(RAMP),
            "diverging": list(DIVERGING),
        },
        "mark": {"color": blue},
        "bar": {"color": blue},
        "line": {"color": blue, "strokeWidth": 2.25, "strokeJoin": "round", "strokeCap": "round"},
        "point": {"color": blue, "filled": True, "size": 36, "opacity": 0.7},
        "rule": {"color": quiet},
        "text": {"color": ink, "fontSize": 11},
    }


def themed(chart: Any) -> Any:
    """Return the chart with the theme; a themed chart is finished: combine unthemed ones, or use
    `layer`.
    """
    chart = chart.copy(deep=False)
    chart.config = _config()
    return chart


@cache
def _config() -> alt.Config:
    return alt.Config.from_dict(config())


def layer(*charts: Any) -> Any:
    """Draw themed or unthemed charts over one another, in one themed chart."""
    bare = []
    for chart in charts:
        chart = chart.copy(deep=False)
        chart.config = alt.Undefined
        bare.append(chart)
    return themed(alt.layer(*bare))


def spec(chart: Any) -> dict[str, Any]:
    """Return the Vega-Lite specification of an Altair chart as plain JSON values, whatever its
    number of rows.
    """
    # The parts of a chart are checked when they are made; the whole takes four times as long.
    with alt.data_transformers.enable("default", max_rows=None):
        return chart.to_dict(validate=False)


def png(chart: Any, path: Path | str, *, scale: float = 2.0) -> Path:
    """Write a chart as PNG, `scale` pixels per unit, without a browser or network; InputError where
    a file is there already.
    """
    require_ours(path, {})
    picture = vl_convert.vegalite_to_png(spec(chart), scale=scale)
    return write_atomic(path, lambda temporary: _put(temporary, picture))


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)
