"""Attribution by several processes: every one scores its share of the examples, and all get all
the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from assay.attribution.gradient import Gradient
from assay.attribution.scores import Gap, Scores
from assay.core.mechanisms import Mechanisms
from assay.errors import AssayError, InputError
from assay.learn.processes import join as start

__all__ = ["attribute_distributed", "start"]


def attribute_distributed(mechanisms: Mechanisms, method: Any = None) -> Scores:
    """Return the scores of `attribute`, with the examples split over the processes of `torchrun`.

    Every process binds the whole batch, so that references are those of the whole, and calls this
    with equal arguments. `cpu_seconds` is the sum over processes; the gap of a path is the worst of
    theirs, since every process refines the path for its own examples.

    Raises InputError when there are fewer examples than processes, AssayError when another process
    failed."""
    method = Gradient() if method is None else method
    rank, world = start()
    if world == 1:
        found: Scores = method.scores(mechanisms)
        return found
    if len(mechanisms.batch) < world:
        raise InputError(
            f"{len(mechanisms.batch)} examples cannot be split over {world} processes; start fewer"
        )
    shares = [len(part) for part in torch.arange(len(mechanisms.batch)).tensor_split(world)]
    first = sum(shares[:rank])
    own, failure = None, ""
    try:
        own = method.scores(mechanisms.take(slice(first, first + shares[rank])))
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    # Tell the others before waiting for them: a process that is alone in failing would leave them
    # waiting.
    told = _tell(
        {
            "failure": failure,
            "gaps": dict(own.gaps) if own else {},
            "seconds": own.cpu_seconds if own else 0.0,
        },
        world,
    )
    failed = [
        f"process {number}: {entry['failure']}"
        for number, entry in enumerate(told)
        if entry["failure"]
    ]
    if own is None or failed:
        raise AssayError("; ".join(failed))
    return replace(
        own,
        mechanisms=mechanisms,
        values={name: _gather(values, shares, rank) for name, values in own.values.items()},
        baseline=_gather(own.baseline, shares, rank),
        gaps=_worst([entry["gaps"] for entry in told]),
        cpu_seconds=sum(entry["seconds"] for entry in told),
    )


def _gather(values: Tensor, shares: list[int], rank: int) -> Tensor:
    # Sparse in one process and dense in another: all must take part in the same transfers.
    kinds = _tell({"sparse": values.is_sparse}, len(shares))
    if any(entry["sparse"] for entry in kinds):
        held = (values if values.is_sparse else values.to_sparse()).coalesce().cpu()
        parts = [entry["part"] for entry in _tell({"part": held}, len(shares))]
        return torch.cat(parts).coalesce().to(values.device)
    parts = []
    for source, share in enumerate(shares):
        part = (
            values.cpu().contiguous()
            if source == rank
            else torch.empty(share, *values.shape[1:], dtype=values.dtype)
        )
        dist.broadcast(part, source)
        parts.append(part)
    return torch.cat(parts).to(values.device)


def _tell(entry: dict[str, Any], world: int) -> list[dict[str, Any]]:
    told: list[Any] = [None] * world
    dist.all_gather_object(told, entry)
    return told


def _worst(gaps: list[Mapping[str, Gap]]) -> dict[str, Gap]:
    def worst(name: str) -> Gap:
        theirs = [entry[name] for entry in gaps]
        return Gap(
            max(gap.relative for gap in theirs),
            max(gap.absolute for gap in theirs),
            max(gap.nodes for gap in theirs),
        )

    return {name: worst(name) for name in gaps[0]}
