"""Bind a crosscoder to a batch under a rule of where its gates act."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from assay.core.target import Batch, Target
from assay.errors import InputError, unknown
from assay.io.files import require_finite
from assay.mechanisms.crosscoder.coder import Crosscoder
from assay.mechanisms.crosscoder.gates import (
    ClampedGates,
    CrosscoderMechanisms,
    EverywhereGates,
    FirstGates,
)
from assay.mechanisms.crosscoder.states import read_codes, residual_states

Rule = Literal["first", "everywhere", "clamp"]


@torch.no_grad()
def crosscoder(
    target: Target,
    batch: Batch,
    found: Crosscoder,
    rule: Rule = "first",
    *,
    share: float = 0.1,
) -> CrosscoderMechanisms:
    """Bind the features of a crosscoder to a batch; the codes are read there, once.

    `rule`: a gate acts at the first layer where the decoder's norm reaches `share` of its largest
    ("first"), at every layer ("everywhere"), or at every layer on clean states ("clamp"). Raises
    InputError for an unknown rule, a share outside (0, 1], a crosscoder of another network or with
    NaN, and states of another shape."""
    if rule not in get_args(Rule):
        raise unknown("gate rule", rule, get_args(Rule))
    if not 0 < share <= 1:
        raise InputError(f"share must lie in (0, 1], got {share}")
    for name, entry in found.state_dict().items():
        require_finite(entry, f"{name} of the crosscoder")
    found.require_network(target.model)
    states = residual_states(target.model, batch.inputs, found.sites)
    if states.shape[-1] != found.width or len(states) != len(batch):
        raise InputError(
            f"the residual states have shape {tuple(states.shape)}; the crosscoder reads"
            f" ({len(batch)}, ..., {len(found.sites)}, {found.width})"
        )
    codes = read_codes(found, states)
    if rule == "first":
        return FirstGates(target, batch, found, codes, states, share)
    bound = EverywhereGates if rule == "everywhere" else ClampedGates
    return bound(target, batch, found, codes, states)
