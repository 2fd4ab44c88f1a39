"""Ablate some parts and put back the clean values of others: how much of the metric returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from assay.audit.intervals import ConfidenceInterval, ratio_interval
from assay.audit.population import distinct
from assay.core.mechanisms import Mechanisms
from assay.core.parts import Gates, Parts, mix
from assay.core.sites import Seen, read_sites


@dataclass(frozen=True)
class Restoration:
    """Metrics of every example, float64: of the untouched network, with parts ablated, and with
    others restored on top of it; `unit` numbers the distinct inputs.
    """

    clean: Float[Tensor, " examples"]
    ablated: Float[Tensor, " examples"]
    restored: Float[Tensor, " examples"]
    unit: np.ndarray

    def recovered(self, alpha: float = 0.05) -> ConfidenceInterval:
        """Return (restored - ablated) / (clean - ablated), a ratio of means with Fieller's
        interval; without an estimate where what the ablation changes is not clear of zero, and
        with fewer than two distinct inputs.
        """
        lost, back = self.clean - self.ablated, self.restored - self.ablated
        if len(lost) < 2:
            reason = "one input says nothing of the error"
            return ConfidenceInterval(None, None, None, alpha, len(lost), reason=reason)
        everything = (-math.inf, math.inf)
        return ratio_interval(back.cpu().numpy(), lost.cpu().numpy(), alpha, everything, self.unit)


@torch.no_grad()
def restore(mechanisms: Mechanisms, gates: Gates, kept: Mapping[str, Tensor]) -> Restoration:
    """Run with the gates (ablated parts at zero), and again with the kept parts (masks by group,
    which broadcast to the gates) at the values that they have in the untouched network.

    Parts behind an ablation change with what they read; a restored part is written as value -
    part_now + part_clean, whatever its input has become. Raises InputError for gates or masks of
    another shape."""
    mechanisms.check(gates)
    mechanisms.check(kept)
    named = {*gates, *kept}
    clean = read_sites(mechanisms.target.model, mechanisms.batch.inputs, mechanisms.touched(named))

    def change(site: str, seen: Seen) -> Tensor:
        now = mechanisms.parts(site, seen)
        written = mix(seen, now, gates)
        back = [name for name in now if name in kept]
        if not back:
            return written
        before: Mapping[str, Parts] = mechanisms.parts(site, replace(clean[site], earlier=clean))
        wide = torch.promote_types(written.dtype, torch.float32)
        total = written.to(wide)
        for name in back:
            mask = kept[name].to(wide)
            # A restored part has left with its gate what is not one of it already.
            gate = gates[name].to(wide) if name in gates else torch.ones((), dtype=wide)
            total = total + before[name].add(mask) - now[name].add(mask * gate)
        return total.to(written.dtype)

    values = [
        mechanisms.values(),
        mechanisms.values(gates),
        mechanisms.target.values(mechanisms.batch, mechanisms.edits_of(named, change)),
    ]
    untouched, ablated, restored = (entry.double() for entry in values)
    return Restoration(untouched, ablated, restored, distinct(mechanisms.batch))
