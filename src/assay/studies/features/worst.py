"""The worst that everything outside a circuit can do, found by a search and, where there are rules
for it, bounded by a certificate.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from assay.audit import node_masks, worst_case
from assay.core.mechanisms import Mechanisms
from assay.edges.cut import Node
from assay.errors import AssayError
from assay.proofs.gates import certify
from assay.studies.brackets import BUDGET

_BUDGET = replace(BUDGET, steps=(0, 0), pins=0)
"""One sweep an example: `assay certify` spends more on a run's circuit."""
MOST = 1024
"""Free parts of an example up to which a run bounds them: seconds of work, not minutes."""


def worst_of(
    mechanisms: Mechanisms,
    nodes: Sequence[Node],
    always: Collection[str],
    *,
    searched: int,
    certified: int,
    seed: int,
) -> dict[str, Any]:
    """Return the damage of all parts but the nodes and the groups that are `always` kept, in any
    combination and at any strength: the largest that was found on the first `searched` examples,
    beside what removing everything costs there, and the bracket [found, proved] on the first
    `certified`, or why there is none.
    """
    if not searched:
        return {}
    some = mechanisms.take(slice(0, searched))
    keep = node_masks(some, nodes, always)
    worst = worst_case(some, keep, steps=8, restarts=2, flips=0, seed=seed)
    with torch.no_grad():
        full, empty = some.values().double(), some.values(some.full(0.0)).double()
    everything = float(some.target.damage(full, empty).mean())
    damage = float(worst.damage.mean())
    found = {
        "examples": len(worst.damage),
        "damage": damage,
        "damage_of_nothing_kept": everything,
        "faithfulness_at_most": 1 - damage / everything if everything else None,
        "evaluations": worst.evaluations,
    }
    return found | {"bracket": _bracket(mechanisms, nodes, always, certified, seed)}


def _bracket(
    mechanisms: Mechanisms,
    nodes: Sequence[Node],
    always: Collection[str],
    count: int,
    seed: int,
) -> dict[str, Any]:
    """Return what `certify` says of the first examples, or by name why it refuses."""
    if not count:
        return {"refused": "circuit.certified is 0"}
    some = mechanisms.take(slice(0, count))
    keep = node_masks(some, nodes, always)
    free = sum(int((~mask[0]).sum()) for mask in keep.values())
    if free > MOST:
        return {
            "refused": f"{free} parts of an example are free, more than the {MOST} that a run"
            " bounds; assay certify bounds them in as many seconds as --budget says"
        }
    try:
        bracket = certify(some, keep, budget=_BUDGET, seed=seed)
    except AssayError as error:
        return {"refused": str(error)}
    return bracket.summary()
