"""A realistic page that uses every picture, for the tests to render and look at."""

from __future__ import annotations

import numpy as np
import polars as pl

from assay import charts
from assay.report.page import Fact, Section, Table

LEAD = (
    "A bilinear network of four blocks reads 8 by 8 digits with 97.8 % accuracy. Each of its 256"
    " hidden channels was attributed with one backward pass and ablated exactly; the estimate"
    " agrees with the truth on 99 % of channels, and 96 % of its answers carry a certificate."
)


def facts() -> list[Fact]:
    return [
        Fact("test accuracy", 0.9783, "450 images never trained on"),
        Fact("agreement with exact", 0.9971, "Pearson r over 4,096 ablations; slope 1.02"),
        Fact("certified share", 0.9613, "effects proved within 10 %, no sampling"),
        Fact("threshold", 0.0371, "error at most 5 % with probability 95 %"),
        Fact("Hoyer sparsity", 0.9128),
        Fact("channels that matter", 41, "of 1,024, for 98 % of the effect"),
    ]


def sections() -> list[Section]:
    random = np.random.default_rng(0)
    blocks = random.integers(0, 4, 4096)
    exact = random.standard_t(3, 4096) * 0.4 * (1 + blocks) / 2
    scores = pl.DataFrame(
        {
            "channel": [f"block {block} · {index % 256}" for index, block in enumerate(blocks)],
            "block": [f"block {block}" for block in blocks],
            "exact": exact,
            "estimate": exact * (1 + 0.02 * blocks) + random.normal(0, 0.05, 4096),
        }
    ).with_columns(
        (pl.col("estimate") - pl.col("exact")).abs().alias("error"),
        (pl.col("estimate") - 0.15).alias("low"),
        (pl.col("estimate") + 0.15).alias("high"),
    )
    top = scores.sort("estimate", descending=True)
    steps = np.arange(0, 3000, 10)
    metrics = pl.concat(
        [
            pl.DataFrame(
                {
                    "phase": [phase] * len(steps),
                    "step": steps,
                    "cross entropy": (
                        scale * np.exp(-steps / 500) + 0.05 + random.normal(0, 0.01, len(steps))
                    ),
                    "accuracy": 1 - 0.9 * np.exp(-steps / 300),
                    "Hoyer": 0.3 + 0.6 * (1 - np.exp(-steps / 900)),
                    "delta loss": (
                        0.02 * np.exp(-steps / 700) * random.uniform(0.8, 1.2, len(steps))
                    ),
                }
            )
            for phase, scale in (("sparse", 2.3), ("dense", 1.9))
        ]
    )
    nominal = np.array([0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98])
    coverage = pl.DataFrame(
        {
            "nominal": nominal,
            "measured": nominal + 0.012,
            "sure": nominal + 0.002,
            "low": nominal,
            "high": nominal + 0.024,
        }
    )
    budget = pl.DataFrame(
        [
            {
                "passes": passes,
                "method": method,
                "error": scale / passes**power,
                "low": 0.8 * scale / passes**power,
                "high": 1.25 * scale / passes**power,
            }
            for method, scale, power in (
                ("gradient", 0.3, 0.02),
                ("integrated", 0.4, 0.9),
                ("second order", 0.25, 0.4),
            )
            for passes in (1, 2, 4, 8, 16, 32, 64)
        ]
    )
    grid = pl.DataFrame(
        [
            {
                "position": word,
                "site": f"layer {layer} {kind}",
                "effect": float(random.normal(0, 1) * np.exp(-abs(position - layer))),
                "certainty": float(random.uniform(0.2, 1)),
            }
            for layer in range(6)
            for kind in ("attention", "MLP")
            for position, word in enumerate(["The", "keys", "to", "the", "cabinet", "are"])
        ]
    )
    share = pl.DataFrame(
        {
            "budget": [f"{part} %" for part in (1, 2, 5, 10, 20)],
            "certified": [0.61, 0.79, 0.901, 0.961, 0.988],
            "low": [0.58, 0.76, 0.88, 0.95, 0.98],
            "high": [0.64, 0.82, 0.92, 0.97, 0.995],
        }
    )
    proofs = pl.DataFrame(
        {
            "strategy": [
                "brute force",
                "cubic",
                "sub-cubic exact",
                "low-rank QK",
                "low-rank QK and OV",
                "box exact",
                "recursive",
            ],
            "operations": [1.5e9, 3.1e7, 2.4e6, 1.6e6, 9e5, 6e6, 8e5],
            "bound": [1.0, 0.955, 0.88, 0.865, 0.70, 0.992, 0.52],
            "unexplained": [8.1e6, 2.6e5, 6e4, 4.2e4, 2e4, 9e4, 1.1e4],
        }
    )
    kinds = pl.DataFrame(
        {
            "kind": ["channels", "features", "components", "directions", "crosscoder"],
            "faithfulness": [0.98, 0.91, 0.87, 0.83, 0.79],
        }
    )
    return [
        Section(
            "How far to trust the scores",
            "Every channel was also switched off exactly, so each estimate can be held against the"
            " truth. Points on the dashed line are perfect.\n\nThe largest errors sit in the last"
            " block, where the estimate overshoots by 6 %.",
            charts=[
                charts.scatter_identity(
                    scores,
                    "exact",
                    "estimate",
                    colour="block",
                    tooltip=["channel", "error"],
                    x_title="exact effect on the logit",
                    y_title="estimated effect",
                ),
                charts.ecdf(
                    scores,
                    "error",
                    colour="block",
                    log_x=True,
                    marks=[("threshold", 0.0371)],
                    title="Nine errors in ten are below 0.08",
                ),
                charts.histogram(
                    scores,
                    "exact",
                    colour=None,
                    marks=[("zero", 0.0)],
                    log_y=True,
                    title="Most channels do almost nothing",
                ),
            ],
            tables=[Table(top.head(60).drop("low", "high"), "The sixty strongest channels")],
        ),
        Section(
            "Error against budget",
            "More passes buy accuracy only for the path methods.",
            charts=[
                charts.line(
                    budget,
                    "passes",
                    "error",
                    colour="method",
                    low="low",
                    high="high",
                    log_x=True,
                    log_y=True,
                    title="Sixteen passes bring the path method under every other",
                    y_title="mean absolute error",
                ),
                charts.bars(
                    share,
                    "budget",
                    "certified",
                    low="low",
                    high="high",
                    reference=0.95,
                    title="A tolerance of 10 % certifies 96 % of answers",
                    x_title="tolerance",
                ),
                charts.bars(
                    kinds, "kind", "faithfulness", horizontal=True, title="Channels keep the most"
                ),
            ],
        ),
        Section(
            "Error bars that hold",
            "The interval is calibrated on a random subset of exact ablations and checked on the"
            " rest.",
            charts=[
                charts.calibration(
                    coverage, "nominal", "measured", guarantee="sure", low="low", high="high"
                ),
                charts.intervals(
                    top, "channel", "estimate", "low", "high", truth="exact", limit=12
                ),
            ],
        ),
        Section(
            "Where the effect is",
            "Red raises the score, blue lowers it.",
            charts=[
                charts.heatmap(
                    grid,
                    "position",
                    "site",
                    "effect",
                    text=True,
                    title="The noun's number is read in the early layers",
                ),
                charts.heatmap(
                    grid.with_columns(pl.col("effect").abs()),
                    "position",
                    "site",
                    "effect",
                    size="certainty",
                    title="The same, small where uncertain",
                ),
            ],
        ),
        Section(
            "What a proof costs",
            "",
            charts=[
                charts.tradeoff(
                    proofs,
                    "operations",
                    "bound",
                    colour="unexplained",
                    label="strategy",
                    title="Understanding buys a hundredfold cheaper proof for 12 % of the bound",
                    y_title="proved accuracy",
                )
            ],
        ),
        Section(
            "Training",
            "",
            charts=[charts.training_curves(metrics, title="Sparsity costs no accuracy")],
        ),
    ]
