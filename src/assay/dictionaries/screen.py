"""The largest features of every position without a dense product in float32.

A product in bfloat16 says which features can be among the largest, with a bound of its error; their
values are then computed in float32 and compared. What is chosen is what the dense product chooses,
up to rounding in float32. It pays where the processor multiplies bfloat16 matrices (AMX)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from assay.dictionaries import sparse

WIDTH, SIZE = 256, 2048
"""The width and the number of features from which on screening is faster."""
GROUP = 16
"""Features whose largest stands for them where the limit is looked for."""
MOST = 0.05
"""The share of likely features from which on the dense product is faster."""
UNIT = 2.0**-8
"""The distance of two neighbours in bfloat16, relative; rounding errs by half of it."""

Limit = Callable[[Float[Tensor, "positions groups"]], Float[Tensor, "#positions 1"]]


def pays(centred: Tensor, size: int) -> bool:
    """Return whether screening is possible and faster for vectors and a number of features."""
    # Older releases cannot tell.
    capabilities = getattr(torch.cpu, "get_capabilities", dict[str, bool])
    return (
        centred.device.type == "cpu"
        and centred.dtype == torch.float32
        and centred.shape[1] >= WIDTH
        and size >= SIZE
        and size % GROUP == 0
        and bool(capabilities().get("amx_bf16", False))
    )


@torch.no_grad()
def likely(
    centred: Float[Tensor, "positions d_in"],
    W_enc: Float[Tensor, "d_in size"],
    b_enc: Float[Tensor, " size"],
    limit: Limit,
) -> tuple[sparse.Active, Float[Tensor, " active"]] | None:
    """Return a pattern with every feature whose value `centred W_enc + b_enc` can reach a limit,
    and the values there; None where so many can that the dense product is faster.

    `limit` is given numbers, each below the value of another feature of its position, and returns
    what a value must reach. With x' and w' the vectors with a one and the bias at their ends, the
    product in bfloat16 errs by at most (2^-8 + n 2^-23) ||x'|| ||w'|| + 2^-9 |product| (rounding of
    both factors, sums in float32 over n terms, rounding of the result)."""
    positions, size = len(centred), W_enc.shape[1]
    rough = _rough(centred, W_enc, b_enc)
    length = centred.norm(dim=1, keepdim=True) + 1
    longest = (W_enc.norm(dim=0) + b_enc.abs()).amax()
    error = (UNIT + 2.0**-23 * (centred.shape[1] + 64)) * length * longest
    tops = rough.view(positions, GROUP, size // GROUP).amax(1).float()
    reached = limit(tops - UNIT * tops.abs() - error)
    lowest = (reached - error) - UNIT * (reached - error).abs()
    lowest = (lowest - UNIT * lowest.abs()).to(torch.bfloat16)  # below, whichever way it rounds
    mask = rough >= lowest
    places = _true(mask)
    if len(places) > MOST * mask.numel():
        return None
    rows = places // size
    counts = torch.bincount(rows, minlength=positions)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    active = sparse.Active(offsets, places - rows * size, size)
    return active, sparse.products(centred, W_enc.T, active) + active.of_feature(b_enc)


@torch.no_grad()
def largest(
    centred: Float[Tensor, "positions d_in"],
    W_enc: Float[Tensor, "d_in size"],
    b_enc: Float[Tensor, " size"],
    k: int,
) -> tuple[sparse.Active, Float[Tensor, " active"]] | None:
    """Return the k largest features of every position and their values, or None where the dense
    product is faster.
    """
    if k > W_enc.shape[1] // GROUP:
        return None

    def limit(below: Tensor) -> Tensor:
        return below.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)

    found = likely(centred, W_enc, b_enc, limit)
    if found is None:
        return None
    active, values = found
    counts = active.offsets.diff()
    if int(counts.min()) < k:  # values that are not finite
        return None
    first = active.offsets[:-1]
    places = torch.arange(len(values)) - first.repeat_interleave(counts, output_size=len(values))
    padded = values.new_full((len(active), int(counts.max())), -torch.inf)
    padded[active.rows, places] = values
    kept = padded.topk(k, dim=1, sorted=False)
    features = active.features[kept.indices + first[:, None]]
    return sparse.active_at(features, active.size), kept.values.flatten()


def _rough(centred: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """Return `centred W_enc + b_enc` in bfloat16, the bias a row of the product."""
    width = centred.shape[1]
    wide = -(-(width + 1) // 32) * 32  # matrix units take whole blocks
    left = centred.new_zeros(len(centred), wide, dtype=torch.bfloat16)
    right = centred.new_zeros(W_enc.shape[1], wide, dtype=torch.bfloat16)
    left[:, :width], left[:, width] = centred, 1.0
    right[:, :width], right[:, width] = W_enc.T, b_enc
    return left @ right.T


def _true(mask: Tensor) -> Tensor:
    """Return the places of a sparse mask's true entries in memory, eight looked at together."""
    words = mask.view(-1, 8)
    some = words.view(torch.int64)[:, 0].nonzero()[:, 0]
    inside = words[some].nonzero()
    return some[inside[:, 0]] * 8 + inside[:, 1]
