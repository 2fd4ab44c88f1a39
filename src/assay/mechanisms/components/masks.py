"""Masks of one forward pass: a number in [0, 1] for every component and for the delta part, and
which positions they hold at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from assay.core.sites import Edit, Seen, run_edited
from assay.core.target import evaluating
from assay.mechanisms.components.decomposition import Decomposition, plain_output
from assay.mechanisms.components.sites import Use, read_inner, written_by


@dataclass(frozen=True)
class Mask:
    """The mask of one site: `components` (*positions, C), `delta` (*positions), and the positions
    that are routed through the components (all, if None); the others keep y = x W."""

    components: Float[Tensor, "*positions components"]
    delta: Float[Tensor, "*positions"]
    routed: Bool[Tensor, "*positions"] | None = None


def make_mask(
    importance: Float[Tensor, "*positions components"],
    source: Tensor,
    delta: Tensor,
    routed: Tensor | None = None,
) -> Mask:
    """Return `m = g + (1 - g) r` of importances g and a source r in [0, 1]; the delta part takes
    its source as it is.
    """
    return Mask(torch.lerp(source, torch.ones_like(source[..., :1]), importance), delta, routed)


def run_masked(
    model: nn.Module, inputs: Any, found: Decomposition, masks: Mapping[str, Mask]
) -> Tensor:
    """Run the network with `y = ((x V) m) U + delta (x (W - V U))` at the masked sites.

    Sites without a mask are the network's own. Written as a correction of y = x W, the network's
    own value, and without ever forming the delta matrix:
    `y = x W + (delta - 1) x W + ((x V) (m - delta)) U`."""
    edits: dict[str, Edit] = {}
    for site in found.sites:
        if site.name in masks:
            v, u = found.factors(site.name)
            for use in site.uses:
                pair = (u.T, v.T) if use.transposed else (v, u)
                module = model.get_submodule(use.path)
                edits[use.path] = _edit(use, module, *pair, masks[site.name])
    with evaluating(model):
        return plain_output(run_edited(model, inputs, edits))


def _edit(use: Use, module: nn.Module, v: Tensor, u: Tensor, mask: Mask) -> Edit:
    def edit(seen: Seen) -> Tensor:
        delta = mask.delta.unsqueeze(-1)
        rest, shrink = mask.components - delta, delta - 1
        if mask.routed is not None:
            routed = mask.routed.unsqueeze(-1)
            rest, shrink = rest * routed, shrink * routed
        inner = read_inner(use, seen, v) * rest
        moved = shrink * written_by(module, seen) + inner @ u.to(inner.dtype)
        return (seen.written + moved).to(seen.written.dtype)

    return edit
