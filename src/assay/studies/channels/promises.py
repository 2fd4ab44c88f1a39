"""What a channels study promises about new inputs: a threshold below which the largest channels are
right, and bars that hold for all of them at once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import betabinom, binom

from assay.audit.risk import ListBars, SelectiveRisk, calibrate_list_bars, calibrate_risk
from assay.errors import InputError
from assay.studies.channels.config import AuditConfig

RESPLITS = 100
LEVEL = 0.025
"""The probability with which chance makes one promise look broken on new inputs."""
_ERRORS = {"attribution": "error", "second_order": "second_error"}
_SCALES = ("second_order_bound", "first_order_bound", "squared_step")


@dataclass(frozen=True)
class Promises:
    """A threshold on certificate / |attribution|, None where there is no certificate, and bars
    around the column `estimate` whose half-widths are a multiple of the column `scale`, and the
    rounding of float64.
    """

    threshold: SelectiveRisk | None
    bars: ListBars
    estimate: str
    scale: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "threshold": None if self.threshold is None else self.threshold.to_dict(),
            "bars": asdict(self.bars),
            "estimate": self.estimate,
            "scale": self.scale,
        }

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> Promises:
        """Return what `to_dict` saved; InputError for anything else."""
        try:
            threshold, bars = saved["threshold"], ListBars(**saved["bars"])
            if bars.quantile is None:  # JSON has no infinity
                bars = replace(bars, quantile=math.inf)
            found = Promises(
                None if threshold is None else SelectiveRisk.from_dict(threshold),
                bars,
                saved["estimate"],
                saved["scale"],
            )
            right = 0 < bars.alpha < 1 and bars.quantile >= 0 and bars.inputs >= 0
            right &= found.estimate in _ERRORS and found.scale in _SCALES
        except (KeyError, TypeError) as error:
            raise InputError(
                "the run's promises.json does not hold a threshold and bars"
            ) from error
        if not right:
            raise InputError("the run's promises.json does not hold a threshold and bars")
        return found


def calibrate_promises(table: pl.DataFrame, audit: AuditConfig, seed: int) -> Promises:
    """Calibrate the threshold and the bars on the largest channels of held-out inputs.

    Bars are around the second-order estimate, where it exists, and first order otherwise. Their
    scale is the estimate's certificate, and the squared step where there is none. Copies of an
    input count once."""
    group = table["group"].to_numpy()
    threshold = None
    if "score" in table.columns:
        threshold = calibrate_risk(
            table["score"].to_numpy(),
            table["relative_error"].to_numpy(),
            group,
            exact=table["exact_by_construction"].to_numpy(),
            promise=audit.promise,
            tolerance=audit.tolerance,
            alpha=audit.risk,
            eta=audit.eta,
            seed=seed,
        )
    estimate, scale = next(
        (estimate, scale)
        for estimate, scale in (
            ("second_order", "second_order_bound"),
            ("attribution", "first_order_bound"),
            ("second_order", "squared_step"),
            ("attribution", "squared_step"),
        )
        if {estimate, scale} <= {*table.columns, "squared_step"}
    )
    bars = calibrate_list_bars(
        table[_ERRORS[estimate]].to_numpy(), _scales(table, scale), group, alpha=audit.alpha
    )
    return Promises(threshold, bars, estimate, scale)


def put_on(table: pl.DataFrame, promises: Promises) -> pl.DataFrame:
    """Return a table of largest channels with what is promised of each: `trusted`, `low` and `high`
    of its bar, and whether each holds.
    """
    half = promises.bars.half_width(_scales(table, promises.scale))
    if "rounding" in table.columns:
        half = half + table["rounding"].to_numpy()
    estimate = table[promises.estimate].to_numpy()
    # Errors are kept on their own: the difference of the columns rounds.
    columns = {
        "low": estimate - half,
        "high": estimate + half,
        "in_bar": np.abs(table[_ERRORS[promises.estimate]].to_numpy()) <= half,
    }
    if promises.threshold is not None:
        trusted = promises.threshold.trusts(
            table["score"].to_numpy(), table["exact_by_construction"].to_numpy()
        )
        right = table["relative_error"].to_numpy() <= promises.threshold.tolerance
        columns |= {"trusted": trusted, "right": right}
    return table.with_columns(**{name: pl.Series(values) for name, values in columns.items()})


def measure_promises(found: pl.DataFrame, promises: Promises) -> dict[str, Any]:
    """Return how the promises fare on inputs with known effects (`put_on`'s table): inputs whose
    trusted channels include a wrong one, and inputs whose bars all hold.
    """
    inputs = found.group_by("group").agg(pl.col("in_bar").all())
    measured: dict[str, Any] = {
        "inputs": inputs.height,
        "inputs_with_all_effects_in_bars": int(inputs["in_bar"].sum()),
    }
    if promises.threshold is not None:
        needing = found.filter(~pl.col("exact_by_construction"))
        trusted = needing.filter(pl.col("trusted"))
        wrong = trusted.filter(~pl.col("right"))
        measured |= {
            "channels": found.height,
            "exact_by_construction": found.height - needing.height,
            "trusted_channels": trusted.height,
            "trusted_wrong": wrong.height,
            "inputs_with_trusted_channels": trusted["group"].n_unique(),
            "inputs_with_a_wrong_one": wrong["group"].n_unique(),
        }
    return measured


def resplit(table: pl.DataFrame, audit: AuditConfig, times: int = RESPLITS) -> pl.DataFrame:
    """Calibrate on a random half of the inputs and measure on the other, many times: one row a
    split.
    """
    groups = table["group"].unique().sort().to_numpy()
    rows = []
    for seed in range(times):
        order = np.random.default_rng(seed).permutation(groups)
        half = set(order[: len(order) // 2].tolist())
        known = table["group"].is_in(list(half))
        promises = calibrate_promises(table.filter(known), audit, seed)
        measured = measure_promises(put_on(table.filter(~known), promises), promises)
        share = measured["inputs_with_all_effects_in_bars"] / measured["inputs"]
        row: dict[str, Any] = {"split": seed, "inputs_in_bars": share}
        if promises.threshold is not None and promises.threshold.threshold is not None:
            trusted = measured["inputs_with_trusted_channels"]
            row |= {
                "trusted_share": measured["trusted_channels"]
                / max(measured["channels"] - measured["exact_by_construction"], 1),
                "inputs_wrong": measured["inputs_with_a_wrong_one"] / trusted if trusted else 0.0,
            }
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def describe_promises(promises: Promises) -> dict[str, str]:
    """Return the promises in words."""
    threshold = promises.threshold
    return {
        "threshold": "There is no certificate for this network, so no threshold on it."
        if threshold is None
        else threshold.guarantee,
        "bars": promises.bars.guarantee,
    }


def judge_promises(measured: dict[str, Any], promises: Promises) -> str:
    """Say whether what was measured on new inputs speaks against the promises.

    The bars' promise is about a random calibration. Of m new inputs the bars miss as many as, with
    a share drawn from the beta distribution of the calibration's k-th order statistic, the
    beta-binomial law of (m, n + 1 - k, k) says (arXiv 2107.07511), or fewer where there are
    ties."""
    broken = []
    missed = measured["inputs"] - measured["inputs_with_all_effects_in_bars"]
    bars = promises.bars
    if np.isfinite(bars.quantile) and missed:
        law = betabinom(measured["inputs"], bars.inputs + 1 - bars.rank, bars.rank)
        unlucky = float(law.sf(missed - 1)) < LEVEL
    else:
        unlucky = False
    if unlucky:
        broken.append("more inputs than promised have an effect outside their bars")
    threshold = promises.threshold
    if threshold is not None and _above(
        measured["inputs_with_a_wrong_one"],
        measured["inputs_with_trusted_channels"],
        threshold.alpha,
    ):
        broken.append("more inputs than promised have a wrong channel among the trusted ones")
    if broken:
        return f"These inputs are unlike those that calibrated: {' and '.join(broken)}."
    return "Nothing measured on these inputs speaks against the promises."


def summarise_resplits(splits: pl.DataFrame, risk: float) -> dict[str, Any]:
    """Return what the promises came to over random halves of the inputs."""
    summary: dict[str, Any] = {
        "splits": splits.height,
        "mean_share_of_inputs_in_bars": splits["inputs_in_bars"].mean(),
    }
    if "inputs_wrong" in splits.columns:
        wrong = splits["inputs_wrong"].drop_nulls()
        summary |= {
            "splits_with_a_threshold": len(wrong),
            "mean_share_of_trusted_channels": splits["trusted_share"].mean(),
            "mean_share_of_inputs_wrong": wrong.mean(),
            "splits_above_the_risk": int((wrong > risk).sum()),
        }
    return summary


def _above(failures: int, trials: int, level: float) -> bool:
    """Return whether the lower confidence bound of a share lies above a level."""
    return bool(failures) and float(binom.sf(failures - 1, trials, level)) < LEVEL


def compare_rules(table: pl.DataFrame, promises: Promises) -> pl.DataFrame:
    """Return what each rule accepts among the channels that need a certificate, and how many of
    those are wrong: the budget's closed form with the product of norms, and with constants of 1 and
    10, beside the certificate itself and the calibrated threshold.
    """
    if "closed_form_step" not in table.columns or promises.threshold is None:
        return pl.DataFrame()
    tolerance = promises.threshold.tolerance
    rows = table.filter(~pl.col("exact_by_construction"))
    # The limits scale with one over the root of the constant.
    unit = pl.col("closed_form_step") * pl.col("norm_product").sqrt()
    rules = {
        "step < sqrt(tolerance |attribution| / (C L)), C = product of norms": pl.col("step")
        < pl.col("closed_form_step"),
        "the same, C = 1": pl.col("step") < unit,
        "the same, C = 10": pl.col("step") < unit / 10**0.5,
        "certified": pl.col("score") <= tolerance / (1 + tolerance),
    }
    if promises.threshold.threshold is not None:
        rules["calibrated threshold"] = pl.col("score") <= promises.threshold.threshold
    found = []
    for name, rule in rules.items():
        accepted = rows.filter(rule)
        wrong = accepted.filter(pl.col("relative_error") > tolerance)
        found.append(
            {
                "rule": name,
                "accepted": accepted.height,
                "of": rows.height,
                "wrong": wrong.height,
                "inputs with a wrong one": wrong["group"].n_unique(),
            }
        )
    return pl.DataFrame(found)


def _scales(table: pl.DataFrame, scale: str) -> np.ndarray:
    if scale == "squared_step":
        return table["step"].to_numpy() ** 2
    return table[scale].to_numpy()
