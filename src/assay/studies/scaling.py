"""The verb `assay scaling`: what to keep and what to change when components are learned at another
size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from assay.errors import InputError, shown
from assay.mechanisms.components.advice import Setting, advise, batch_table
from assay.mechanisms.components.scaling import eps_floor, shard_bias


def scale(
    *,
    sites: str,
    batch: str,
    sequence: str,
    beta: float,
    p: float,
    eps: float,
    components: int,
    means: Sequence[float],
    world: int,
    positions: int | None,
    rates: Sequence[float],
) -> dict[str, Any]:
    """Return the keep / change table, the change of the penalty at every mean, the eps floor and
    the bias of a local estimator.

    Sizes are `BEFORE:AFTER`, or one number for both. Raises InputError for sizes that are no whole
    numbers of at least 1 and for coefficients that are not positive."""
    pairs = [_pair(*entry) for entry in (("sites", sites), ("batch", batch), ("seq", sequence))]
    before, after = (Setting(*(pair[end] for pair in pairs)) for end in (0, 1))
    _require(p=p, eps=eps, components=components, world=world)
    if not 0 <= beta < float("inf"):
        raise InputError(f"--beta must be at least 0, got {beta}")
    for mean in means:
        if not 0 < mean <= 1:
            raise InputError(f"--mean must lie in (0, 1], got {mean}")
    for rate in rates:
        if not 0 < rate <= 1:
            raise InputError(f"--rate must lie in (0, 1], got {rate}")
    own = max(1, after.positions // world) if positions is None else positions
    _require(positions_per_rank=own)
    floors = {
        end: asdict(eps_floor(setting.positions, p=p, eps=eps, beta=beta, components=components))
        for end, setting in (("before", before), ("after", after))
    }
    shards = [
        {
            "rate": rate,
            "world": world,
            "positions_per_rank": own,
            **{
                f"local_{key}": value
                for key, value in asdict(
                    shard_bias(rate=rate, world=world, positions=own, beta=beta)
                ).items()
            },
            "all_reduced": shard_bias(rate=rate, world=1, positions=world * own, beta=beta).penalty,
        }
        for rate in rates
    ]
    return {
        "before": {**asdict(before), "positions": before.positions},
        "after": {**asdict(after), "positions": after.positions},
        "terms": [asdict(row) for row in advise(before, after, beta=beta, p=p, eps=eps)],
        "batch": batch_table(before, after, beta, means),
        "eps_floor": floors,
        "shards": shards,
    }


def _pair(flag: str, text: str) -> tuple[int, int]:
    ends = text.split(":")
    try:
        found = [int(end) for end in ends]
    except ValueError:
        found = []
    if not 1 <= len(found) <= 2 or not all(1 <= end < 1 << 53 for end in found):
        raise InputError(
            f"--{flag} takes BEFORE:AFTER, two whole numbers of at least 1, or one for both, got"
            f" {shown(text)}"
        )
    return found[0], found[-1]


def _require(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} must be above 0, got {value}")
