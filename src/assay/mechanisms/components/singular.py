"""Singular-vector parts, gated by a simple importance at a given L0: what a decomposition must
beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from assay.errors import unknown
from assay.mechanisms.components.decomposition import Decomposition, Reading, decomposition
from assay.mechanisms.components.initial import copy_singular
from assay.mechanisms.components.masks import Mask, run_masked
from assay.mechanisms.components.scene import Scene, widened

Gate = Literal["size", "share", "gradient"]
GATES: tuple[Gate, ...] = get_args(Gate)


def singular_parts(model: nn.Module, like: Decomposition) -> Decomposition:
    """Return the same matrices as sums of their singular parts, `V U = W` with `V = A sqrt(s)` and
    `U = sqrt(s) B` of `W = A s B`: as many components as a matrix has rank.
    """
    ranks = {site.name: min(site.inputs, site.outputs) for site in like.sites}
    uses = {use.path: ranks[site.name] for site in like.sites for use in site.uses}
    found = decomposition(model, uses, importance="shared", hidden=1).requires_grad_(False)
    copy_singular(model, found)
    return found


def gate_scene(
    scene: Scene,
    parts: Decomposition,
    gate: Gate,
    l0: Mapping[str, float],
    labels: Int[Tensor, "*positions"],
    *,
    together: bool = False,
) -> Scene:
    """Return a scene in which importances of one stand at the strongest parts and zero elsewhere,
    so many that every site has its `l0` per position on average, or, `together`, that all have.

    Strength is `|h_c| |U_c|` ("size"), that over the norm of y at the position ("share"), or what
    the gate's gradient says of the cross-entropy on `labels` ("gradient"). Raises InputError for
    another gate."""
    if gate not in GATES:
        raise unknown("gate", gate, GATES)
    strengths = _strengths(scene, parts, gate, labels)
    kept = scene.rows.kept(next(iter(strengths.values())))
    for entry in strengths.values():
        entry[~kept] = -1.0
    positions = int(kept.sum())
    if together:
        every = torch.cat([entry.flatten() for entry in strengths.values()])
        chosen = _strongest(every, sum(l0.values()) * positions)
        parts_of = chosen.split([entry.numel() for entry in strengths.values()])
        flat = dict(zip(strengths, parts_of, strict=True))
    else:
        flat = {
            name: _strongest(entry.flatten(), l0[name] * positions)
            for name, entry in strengths.items()
        }
    importance = {name: flat[name].reshape(entry.shape) for name, entry in strengths.items()}
    return replace(scene, found=parts, importance=importance)


def _strongest(strengths: Float[Tensor, " places"], count: float) -> Tensor:
    """Return one at the `count` largest strengths and zero elsewhere; padding, below zero, is never
    chosen.
    """
    chosen = torch.zeros_like(strengths)
    most = min(round(count), int((strengths >= 0).sum()))
    chosen[strengths.topk(most).indices] = 1.0
    return chosen


def _strengths(
    scene: Scene, parts: Decomposition, gate: Gate, labels: Tensor
) -> dict[str, Float[Tensor, "*positions components"]]:
    inner = parts.inner(Reading(scene.reading.output, scene.reading.inputs))
    if gate == "gradient":
        return _gradients(scene, parts, inner, labels)
    found = {}
    for name, h in inner.items():
        _, u = parts.factors(name)
        strength = h.abs() * u.norm(dim=1)
        if gate == "share":
            strength = strength / (h @ u).norm(dim=-1, keepdim=True).clamp_min(1e-12)
        found[name] = strength.detach().clone()
    return found


def _gradients(
    scene: Scene, parts: Decomposition, inner: Mapping[str, Tensor], labels: Tensor
) -> dict[str, Tensor]:
    with torch.enable_grad():
        gates = {name: torch.ones_like(h).requires_grad_() for name, h in inner.items()}
        masks = {name: Mask(gate, gate.new_zeros(())) for name, gate in gates.items()}
        output = run_masked(scene.model, scene.rows.inputs, parts, masks)
        loss = cross_entropy(widened(output).flatten(0, -2), labels.flatten(), ignore_index=-100)
        gradients = torch.autograd.grad(loss, list(gates.values()))
    return {name: entry.abs() for name, entry in zip(gates, gradients, strict=True)}
