"""Bind a crosscoder to a batch under a rule of where its gates act."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from assay.core.target import Batch, Target
from assay.errors import InputError, unknown
from assay.io.files import hash_of
from assay.mechanisms.crosscoder.coder import Crosscoder
from assay.mechanisms.crosscoder.gates import (
    ClampedGates,
    CrosscoderMechanisms,
    EverywhereGates,
    FirstGates,
)
from assay.mechanisms.crosscoder.states import residual_states

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
    InputError for an unknown rule, a share outside (0, 1], a crosscoder of another network, and
    states of another shape."""
    if rule not in get_args(Rule):
        raise unknown("gate rule", rule, get_args(Rule))
    if not 0 < share <= 1:
        raise InputError(f"share must lie in (0, 1], got {share}")
    if found.model_hash and hash_of(target.model) != found.model_hash:
        raise InputError(
            "the crosscoder was trained on another network (the digest of the weights differs);"
            " load the one that it belongs to"
        )
    states = residual_states(target.model, batch.inputs, found.sites)
    if states.shape[-1] != found.width or len(states) != len(batch):
        raise InputError(
            f"the residual states have shape {tuple(states.shape)}; the crosscoder reads"
            f" ({len(batch)}, ..., {len(found.sites)}, {found.width})"
        )
    training = found.training
    wide = found.W_enc.dtype
    codes = found.eval().encode(states.to(wide)).to(states.dtype)
    found.train(training)
    if rule == "first":
        return FirstGates(target, batch, found, codes, states, share)
    bound = EverywhereGates if rule == "everywhere" else ClampedGates
    return bound(target, batch, found, codes, states)
