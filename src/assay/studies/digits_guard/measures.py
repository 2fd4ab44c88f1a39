"""What is measured of a guard: its level, the curve from nothing, and detection by family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy.stats import rankdata
from torch import Tensor

from assay.guard import Guard, Observed, Settings
from assay.guard.compiled import compile_explanations
from assay.guard.conformal import level
from assay.guard.fitting import calibrate, laboratory
from assay.guard.guard import Verdicts
from assay.guard.quantise import quantise
from assay.guard.tables import interval

COMBINED, LEAST, LATENTS = "combination", "least p-value", "dictionary latents"


def auroc(usual: Tensor, strange: Tensor) -> float:
    """Return the probability that a strange input scores above a usual one, ties half."""
    both = np.concatenate([usual.double().numpy(), strange.double().numpy()])
    ranks = rankdata(both)[len(usual) :].sum()
    return float((ranks - len(strange) * (len(strange) + 1) / 2) / len(usual) / len(strange))


def level_over_resplits(
    guard: Guard, pool: Observed, count: int, share: float, seed: int
) -> dict[str, float]:
    """Return the share that the tests reject of held-out inputs, over random splits of a pool into
    calibration and held-out inputs, with its standard error and the nominal share.

    The nominal share is `floor(alpha (n + 1)) / (n + 1)` for n calibration inputs. The combination
    of an input does not depend on the split, only its level does."""
    statistic = guard.combined(guard.scorer(pool).scores)
    alpha, calibrating = guard.settings.alpha, round(share * len(pool))
    rates = np.empty(count)
    for offset in range(count):
        generator = torch.Generator().manual_seed(seed + offset)
        order = torch.randperm(len(pool), generator=generator)
        one, other = statistic[order[:calibrating]], statistic[order[calibrating:]]
        rates[offset] = float((level(other, one.sort().values) <= alpha).double().mean())
    nominal = np.floor(alpha * (calibrating + 1) + 1e-9) / (calibrating + 1)
    error = float(rates.std(ddof=1) / count**0.5)
    return {
        "mean": float(rates.mean()),
        "standard_error": error,
        "nominal": float(nominal),
        "errors_from_nominal": float((rates.mean() - nominal) / error),
        "resplits": count,
        "calibrating": calibrating,
    }


def learning_curve(
    guard: Guard, parts: Mapping[str, Observed], settings: Settings, points: int = 24
) -> pl.DataFrame:
    """Return, by number of explanations in the order of admission, what is explained and accepted
    of the held-out inputs, each time with the tests calibrated again.
    """
    lab, _, _ = laboratory(parts["laboratory"], parts["fresh"], settings)
    total = len(guard.explanations)
    counts = sorted({0, total, *np.linspace(0, total, points).astype(int).tolist()})
    rows = []
    for count in counts:
        some = guard.explanations[:count]
        scorer = replace(guard.scorer, compiled=compile_explanations(lab, some))
        here = calibrate(replace(guard, scorer=scorer), parts["fresh"], parts["calibration"])
        verdicts = here(parts["held out"])
        rows.append(
            {
                "explanations": count,
                "bits": sum(one.bits for one in some),
                "accepted": float(verdicts.accepted.double().mean()),
                "supported": float(verdicts.supported.double().mean()),
                "events explained": float(verdicts.explained.double().mean()),
            }
        )
    return pl.DataFrame(rows)


def first_at(curve: pl.DataFrame, share: float) -> dict[str, float] | None:
    """Return the first point of a learning curve that accepts a share, None where none does."""
    found = curve.filter(pl.col("accepted") >= share)
    return None if found.is_empty() else found.row(0, named=True)


def detectors(guard: Guard, verdicts: Verdicts) -> dict[str, Tensor]:
    """Return the strangeness of inputs by every detector: single tests (minus the logarithm of
    their p-value), the least p-value of the three plain tests, and the combination.
    """
    single = {
        name: -p.clamp_min(1e-300).log() for name, p in guard.single_p_values(verdicts).items()
    }
    plain = torch.stack([single[name] for name in ("likelihood", "dependence", "distance")])
    return {**single, LEAST: plain.max(0).values, COMBINED: fisher(guard, verdicts)}


def fisher(guard: Guard, verdicts: Verdicts) -> Tensor:
    """Return minus the logarithm of the p-value of all tests together."""
    return -verdicts.p.clamp_min(1e-300).log()


def latent_scores(codes: Mapping[str, Tensor], fitted: str) -> dict[str, Tensor]:
    """Return minus the log density of dictionary codes, features taken as independent, from bins
    fitted on one of the sets.
    """
    quantiser = quantise(codes[fitted], 5, least=10)
    bins = {name: quantiser(values) for name, values in codes.items()}
    counts = torch.nn.functional.one_hot(bins[fitted], quantiser.bins).sum(0).double()
    log = ((counts + 1) / (len(bins[fitted]) + quantiser.bins)).log()
    columns = torch.arange(log.shape[0])
    return {name: -log[columns, placed].sum(1) for name, placed in bins.items()}


def family_rows(
    guard: Guard,
    usual: Observed,
    anomalies: Iterable[tuple[str, Observed]],
    outside: Mapping[str, Mapping[str, Tensor]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return AUROC by family and detector, and acceptance by family. `outside` holds the scores of
    detectors that the guard does not have, by detector and set ("held out" is the usual one)."""
    clean = detectors(guard, guard(usual))
    scored, accepted = [], []
    for family, data in anomalies:
        verdicts = guard(data)
        for name, strange in detectors(guard, verdicts).items():
            value = auroc(clean[name], strange)
            scored.append({"family": family, "detector": name, "AUROC": value})
        for name, sets in outside.items():
            value = auroc(sets["held out"], sets[family])
            scored.append({"family": family, "detector": name, "AUROC": value})
        count, through = len(data), int(verdicts.accepted.sum())
        low, high = interval(through, count)
        accepted.append(
            {
                "family": family,
                "accepted": through / count,
                "low": low,
                "high": high,
                "passes the tests": float((verdicts.p > guard.settings.alpha).double().mean()),
                "supported": float(verdicts.supported.double().mean()),
                "inputs": count,
            }
        )
    return scored, accepted


def winners(table: pl.DataFrame) -> pl.DataFrame:
    """Return, per family, the AUROC of the combination beside that of the best single detector."""
    mean = table.group_by("family", "detector", maintain_order=True).agg(pl.col("AUROC").mean())
    single = mean.filter(~pl.col("detector").is_in([COMBINED, LEAST]))
    best = single.sort("AUROC", descending=True).group_by("family", maintain_order=True).first()
    best = best.rename({"detector": "best single detector", "AUROC": "its AUROC"})
    combined = mean.filter(pl.col("detector") == COMBINED).select(
        "family", pl.col("AUROC").alias("combination")
    )
    return combined.join(best, on="family", maintain_order="left").with_columns(
        (pl.col("combination") - pl.col("its AUROC")).alias("difference")
    )
