"""A random sample of parts for exact ablation: for every input, parts of its own among the
active ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay.core.mechanisms import Mechanisms
from assay.core.values import active_rows, data, unravel
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
        sizes = norms[name].cpu()
        share = rows // len(groups) + (place < rows % len(groups))
        if group.per_example:
            keys = torch.rand(data(sizes).shape, generator=generator, dtype=torch.float64)
            index, mask = active_rows(sizes, keys)
            found[name] = (index[:share], mask[:share])
        else:
            count = sizes[0].numel()
            flat = torch.randperm(count, generator=generator)[:share]
            found[name] = (unravel(flat, group.axes), (sizes.flatten(1)[:, flat] > 0).T)
    return found
