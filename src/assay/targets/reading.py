"""What a batch's run has at sites, and what a reference puts there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from assay.core.kind import ReferenceName
from assay.core.sites import read_sites
from assay.core.target import Batch, Target
from assay.errors import InputError
from assay.io.files import require_finite


def read_values(target: Target, batch: Batch, sites: Sequence[str], what: str) -> dict[str, Tensor]:
    """Run the batch once and return the values (examples, ..., width) at sites, in the order in
    which the network reaches them; InputError for values that are NaN, infinite or of another
    shape.
    """
    values, examples = {}, len(batch)
    for site, seen in read_sites(target.model, batch.inputs, sites).items():
        if (
            not seen.value.sum().isfinite()
        ):  # one cheap pass; the exact count only where something is wrong
            require_finite(seen.value, f"{what} activation at {site!r}")
        if seen.value.ndim < 2 or len(seen.value) != examples:
            raise InputError(
                f"the value at {site!r} has shape {tuple(seen.value.shape)}; a node needs"
                f" (examples, ..., width) with {examples} examples"
            )
        values[site] = seen.value
    return values


def read_patched(
    target: Target, clean: Batch, patch: Batch, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the values of a paired batch at the same sites; InputError where it is no pair: other
    examples, other padding, other shapes.
    """
    ours, theirs = real_positions(clean), real_positions(patch)
    if len(clean) != len(patch):
        raise InputError(
            f"clean has {len(clean)} examples and patch {len(patch)}; they must be paired"
        )
    if (
        ours is not None
        and theirs is not None
        and (ours.shape != theirs.shape or not torch.equal(ours, theirs))
    ):
        raise InputError(
            "clean and patch prompts must be of equal length, example by example: their attention"
            " masks differ"
        )
    others = read_values(target, patch, list(values), "the patch run's")
    for site, value in values.items():
        if others[site].shape != value.shape:
            came, wanted = tuple(others[site].shape), tuple(value.shape)
            raise InputError(
                f"the patch run's value at {site!r} has shape {came}, the clean run's {wanted};"
                " they must be equal"
            )
    return others


def real_positions(batch: Batch) -> Tensor | None:
    """Return where a batch has tokens (examples, positions), None where it says nothing of it."""
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def reference_value(value: Tensor, mask: Tensor | None, reference: ReferenceName) -> Tensor:
    """Return what a gate of zero puts at a site, given the value of the run that it is read from:
    it broadcasts to the value.
    """
    match reference:
        case "zero":
            return torch.zeros_like(value[:1])
        case "mean":
            wide = value.double()
            if mask is None or mask.shape != value.shape[:2]:
                return wide.mean(0, keepdim=True).to(value.dtype)
            weights = mask.double().reshape(*mask.shape, *[1] * (value.ndim - 2))
            return (
                (wide * weights).sum(0, keepdim=True) / weights.sum(0, keepdim=True).clamp_min(1)
            ).to(value.dtype)
        case "counterfactual":
            return value


def stretched(values: Tensor, length: int, fill: float | bool) -> Tensor:
    """Return values (examples, positions, ...) at their first `length` positions, `fill` at those
    that are new.
    """
    more = length - values.shape[1]
    if more <= 0:
        return values[:, :length]
    return torch.cat([values, values.new_full((len(values), more, *values.shape[2:]), fill)], 1)


def agrees(value: Tensor, base: Tensor) -> Tensor:
    """Return where two runs (examples, ..., width) differ by no more than rounding: a part of
    rounding errors would count as an active one.
    """
    distance, size = (value - base).abs().amax(-1), value.abs().amax(-1)
    return ~(distance > 8 * torch.finfo(value.dtype).eps * size)
