"""General pictures: functions from polars frames to themed Altair charts, the same in a report,
a notebook and a PNG.
"""

from assay.charts.general import bars, heatmap, line, scatter_identity
from assay.charts.graphs import graph
from assay.charts.scatter import scatter
from assay.charts.spread import ecdf, histogram
from assay.charts.tables import notebook_html, show, table_html
from assay.charts.theme import layer, png, themed
from assay.charts.trust import calibration, faithfulness, intervals, tradeoff, training_curves

__all__ = [
    "bars",
    "calibration",
    "ecdf",
    "faithfulness",
    "graph",
    "heatmap",
    "histogram",
    "intervals",
    "layer",
    "line",
    "notebook_html",
    "png",
    "scatter",
    "scatter_identity",
    "show",
    "table_html",
    "themed",
    "tradeoff",
    "training_curves",
]
