"""A random sample of parts for exact ablation: for every input, parts of its own among the
active ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay.core.mechanisms import Mechanisms
from assay.errors import InputError


def sample(
    mechanisms: Mechanisms, rows: int, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Draw parts without replacement, uniformly among those of non-zero norm, `rows` passes split
    evenly over the groups.

    Returns by group the indices (rows, examples, axes) and a mask (rows, examples) of the draws
    that exist (an input may have fewer active parts than rows). Groups shared over the batch draw
    one part a row: indices (rows, axes). Raises InputError when there are fewer rows than groups.
    """
    groups = mechanisms.groups
    if rows < len(groups):
        raise InputError(
            f"exact={rows} passes cannot cover {len(groups)} gate groups; give at least"
            f" {len(groups)}"
        )
    norms = mechanisms.norms()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for place, (name, group) in enumerate(groups.items()):
        size = norms[name][0].numel()
        share = min(rows // len(groups) + (place < rows % len(groups)), size)
        active = norms[name].flatten(1).cpu() > 0
        if group.per_example:
            keys = torch.rand(active.shape, generator=generator, dtype=torch.float64).masked_fill(
                ~active, -1.0
            )
            best = keys.topk(share, dim=1)
            flat, mask = best.indices.T, (best.values >= 0).T
        else:
            flat = torch.randperm(size, generator=generator)[:share]
            mask = active[:, flat].T
        axes = group.axes
        index = (
            torch.stack(torch.unravel_index(flat, axes), dim=-1)
            if axes
            else torch.zeros(*flat.shape, 0, dtype=torch.long)
        )
        found[name] = (index, mask)
    return found
