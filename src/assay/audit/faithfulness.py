"""Faithfulness and completeness: what a kept set of parts does on its own, and what is left
without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from assay.attribution.scores import Scores
from assay.core.mechanisms import Mechanisms
from assay.core.values import dense
from assay.errors import InputError
from assay.progress import progress

Keep = Mapping[str, Tensor]

TRACK = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Faithfulness:
    """faithfulness = (m(C) - m(empty)) / (m(M) - m(empty)), completeness the same with the
    complement of C.

    Means over examples are taken before the ratio; `median_faithfulness` is the median of the
    per-example ratios. `kept` is the share of the gates that stay at one."""

    faithfulness: float
    completeness: float
    median_faithfulness: float
    median_completeness: float
    kept: float


@torch.no_grad()
def faithfulness(mechanisms: Mechanisms, keep: Keep) -> Faithfulness:
    """Keep the gates where `keep[group]` is true (broadcast to the gates' shape; groups left out
    are kept out) and ablate the rest.
    """
    gates = kept_gates(mechanisms, keep)
    full = mechanisms.values().double()
    empty = mechanisms.values(mechanisms.full(0.0)).double()
    circuit = mechanisms.values(gates).double()
    rest = mechanisms.values({name: 1 - gate for name, gate in gates.items()}).double()
    total = sum(gate.numel() for gate in gates.values())
    ones = sum(float(gate.sum()) for gate in gates.values())
    return summarise(full, empty, circuit, rest, ones / total)


def summarise(
    full: Tensor, empty: Tensor, circuit: Tensor, rest: Tensor, kept: float
) -> Faithfulness:
    """Return the ratios of metrics (examples,) of the whole network, of nothing kept, of the
    circuit and of its complement.
    """
    return Faithfulness(
        _ratio(circuit.mean(), empty.mean(), full.mean()),
        _ratio(rest.mean(), empty.mean(), full.mean()),
        _median((circuit - empty) / (full - empty)),
        _median((rest - empty) / (full - empty)),
        kept,
    )


def kept_gates(mechanisms: Mechanisms, keep: Keep) -> dict[str, Tensor]:
    """Return gates of one where a part is kept and zero elsewhere."""
    for name, mask in keep.items():
        if mask.dtype != torch.bool:
            raise InputError(f"keep[{name!r}] must be a boolean mask, got {mask.dtype}")
    mechanisms.check(keep)
    gates = mechanisms.full(0.0)
    for name, mask in keep.items():
        gates[name] = mask.to(gates[name]).expand(mechanisms.group(name).shape).clone()
    return gates


def keep_top(scores: Scores, share: float, *, per_example: bool = False) -> dict[str, Tensor]:
    """Return masks of the parts with the largest |score|: a share of all, by the mean over
    examples or for each example.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share must be between 0 and 1, got {share}")
    if per_example and not all(group.per_example for group in scores.mechanisms.groups.values()):
        raise InputError(
            "per_example masks need gates with an example axis; these are shared over the batch"
        )
    values = (
        scores.values if per_example else {name: mean[None] for name, mean in scores.mean().items()}
    )
    rows = []
    for example in range(len(next(iter(values.values())))):  # dense for one example at a time
        size = torch.cat([dense(entry[example]).flatten().abs() for entry in values.values()])
        order = size.argsort(descending=True, stable=True)[: round(share * len(size))]
        rows.append(torch.zeros_like(size, dtype=torch.bool).scatter(0, order, True))
    chosen, masks, start = torch.stack(rows), {}, 0
    for name, entry in values.items():
        stop = start + torch.Size(entry.shape[1:]).numel()
        mask = chosen[:, start:stop].reshape(entry.shape)
        masks[name] = mask if scores.mechanisms.group(name).per_example else mask[0]
        start = stop
    return masks


def curve(
    scores: Scores, shares: Iterable[float] = TRACK, *, per_example: bool = False
) -> pl.DataFrame:
    """Return faithfulness and completeness over shares of kept parts, one row a share."""
    rows = []
    for share in progress(shares, "faithfulness"):
        found = faithfulness(scores.mechanisms, keep_top(scores, share, per_example=per_example))
        rows.append({"share": share, **found.__dict__})
    return pl.DataFrame(rows)


def areas(table: pl.DataFrame) -> dict[str, float]:
    """Return CPR, the area under faithfulness f over the share of parts, and CMD, the area under
    |1 - f| (arXiv 2504.13151).
    """
    table = table.sort("share")
    shares, values = table["share"].to_numpy(), table["faithfulness"].to_numpy()
    return {
        "cpr": float(np.trapezoid(values, shares)),
        "cmd": float(np.trapezoid(np.abs(1 - values), shares)),
    }


def _median(ratios: Tensor) -> float:
    return float(ratios.nanquantile(0.5))


def _ratio(value: Tensor, low: Tensor, high: Tensor) -> float:
    return float((value - low) / (high - low)) if float(high - low) != 0 else float("nan")
