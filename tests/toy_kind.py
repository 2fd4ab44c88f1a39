"""A kind that the product does not know: squared readings of the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from cases import READERS, tiny_batch, tiny_target

import assay


@dataclass(frozen=True)
class SquareMechanisms(assay.Mechanisms):
    """part_k = (r_k . x)^2 r_k at the output of the second block."""

    kind = "squares"

    @property
    def groups(self) -> Mapping[str, assay.Group]:
        shape = (*self.batch.inputs.shape[:2], len(READERS))
        return {"squares": assay.Group("squares", ("blocks.1",), shape)}

    def parts(self, site: str, seen: assay.Seen) -> Mapping[str, assay.Parts]:
        readers = READERS.to(seen.value.dtype)
        codes = (seen.value @ readers.T).square()
        return {"squares": assay.Atoms(codes, readers, self.groups["squares"].shape)}


class Squares(assay.Kind):
    """The unbound form."""

    name = "squares"

    def bind(
        self,
        target: assay.Target,
        batch: assay.Batch,
        reference: assay.Reference | None = None,
    ) -> SquareMechanisms:
        self.refuse_reference(reference)
        return SquareMechanisms(target, batch)


def small(
    examples: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[assay.Target, assay.Batch]:
    return tiny_target(dtype=dtype), tiny_batch(examples, dtype=dtype)


def bound(examples: int = 5, dtype: torch.dtype = torch.float64) -> SquareMechanisms:
    return Squares().bind(*small(examples, dtype))
