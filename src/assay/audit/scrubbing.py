"""Causal scrubbing: swap parts between inputs that an explanation calls equivalent, and measure
what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from assay.audit.faithfulness import Keep, kept_gates
from assay.core.mechanisms import Mechanisms
from assay.core.parts import Parts, mix
from assay.core.sites import Seen
from assay.errors import InputError
from assay.progress import progress


@dataclass(frozen=True)
class Scrubbed:
    """share kept = (m(scrubbed) - m(all swapped)) / (m(M) - m(all swapped)), means over examples
    before the ratio.

    `share` is the mean over `draws` of random donors and `error` its standard error, from two draws
    on; `metric` is the mean metric of the scrubbed network, `full` the untouched one's and
    `swapped` the one with every part swapped at random. `alone` counts the inputs whose class has
    no other member: the explanation's parts stay there. Where the share has no support it is None
    and `reason` says why."""

    share: float | None
    error: float | None
    metric: float
    full: float
    swapped: float
    draws: int
    alone: int = 0
    reason: str = ""


@torch.no_grad()
def scrub(
    mechanisms: Mechanisms,
    keep: Keep,
    classes: Tensor | None = None,
    *,
    draws: int = 10,
    seed: int = 0,
) -> Scrubbed:
    """Give parts outside the explanation those of a random other input, and parts inside it those
    of an input of its class.

    `keep` marks the explanation's parts by group, `classes` (examples,) the inputs that it calls
    equivalent; without classes the explanation's parts stay. Every donor part is the one of the
    untouched run (resampling ablation; the causal scrubbing of Chan et al. 2022 on gated sums).
    Raises InputError for gates shared over the batch: they have no other input to come from."""
    if not all(group.per_example for group in mechanisms.groups.values()):
        raise InputError(
            "scrubbing swaps parts between inputs; gates shared over the batch have nothing to swap"
        )
    if classes is not None and classes.shape != (len(mechanisms.batch),):
        raise InputError(
            f"classes must be one label per example, shape ({len(mechanisms.batch)},); got"
            f" {tuple(classes.shape)}"
        )
    if draws < 1:
        raise InputError(f"draws must be at least 1, got {draws}")
    generator = torch.Generator().manual_seed(seed)
    donors = dict(mechanisms.clean_parts())
    kept = kept_gates(mechanisms, keep)
    none = mechanisms.full(0.0)
    full = float(mechanisms.values().double().mean())
    metrics, swapped = [], []
    for _ in progress(range(draws), "scrubbing"):
        anyone = derangement(torch.zeros(len(mechanisms.batch)), generator)
        same = derangement(classes, generator) if classes is not None else None
        metrics.append(float(_swap(mechanisms, donors, kept, anyone, same).double().mean()))
        swapped.append(float(_swap(mechanisms, donors, none, anyone, None).double().mean()))
    floor = sum(swapped) / draws
    found = Scrubbed(None, None, sum(metrics) / draws, full, floor, draws, _alone(classes))
    if len(mechanisms.batch) < 2:
        return replace(found, reason="a single input has no other to swap parts with")
    if abs(full - floor) <= 1e-9 * max(abs(full), abs(floor)):
        return replace(found, reason="swapping every part does not change the mean metric")
    shares = torch.tensor(
        [(metric - floor) / (full - floor) for metric in metrics], dtype=torch.float64
    )
    error = float(shares.std(correction=1) / draws**0.5) if draws > 1 else None
    return replace(found, share=float(shares.mean()), error=error)


def _alone(classes: Tensor | None) -> int:
    if classes is None:
        return 0
    return int((classes.unique(return_counts=True)[1] == 1).sum())


def derangement(classes: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random permutation of the examples within classes that moves everyone whose class
    has another member.
    """
    order = torch.arange(len(classes))
    for label in classes.unique():
        members = (classes.cpu() == label.cpu()).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        order[members] = members.roll(1)
    return order


def _swap(
    mechanisms: Mechanisms,
    donors: Mapping[str, Mapping[str, Parts]],
    kept: dict[str, Tensor],
    anyone: Tensor,
    same: Tensor | None,
) -> Tensor:
    gates = {name: mask if same is None else torch.zeros_like(mask) for name, mask in kept.items()}

    def change(site: str, seen: Seen) -> Tensor:
        total = mix(seen, mechanisms.parts(site, seen), gates)
        for name, parts in donors[site].items():
            total = total + _from(parts, 1 - kept[name], anyone).to(total.dtype)
            if same is not None:
                total = total + _from(parts, kept[name], same).to(total.dtype)
        return total

    edits = mechanisms.edits_of(mechanisms.groups, change)
    return mechanisms.target.values(mechanisms.batch, edits)


def _from(parts: Parts, weights: Tensor, donor: Tensor) -> Tensor:
    # The receiver's weights are carried to its donor, summed there, and the sum is brought back.
    carried = torch.empty_like(weights)
    carried[donor] = weights
    return parts.add(carried)[donor]
