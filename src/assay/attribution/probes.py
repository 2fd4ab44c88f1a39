"""Second order at the price of a few gradients: the diagonal of the curvature from probes of
plus and minus one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.linalg import hadamard
from torch import Tensor

from assay.attribution.gradient import gate_gradient
from assay.attribution.method import Estimate, Method
from assay.core.mechanisms import Mechanisms
from assay.core.values import add
from assay.errors import InputError
from assay.progress import progress


@dataclass(frozen=True)
class ProbedSecondOrder(Method):
    """score_k = dF/dgate_k - 1/2 D_k, D the mean over probes e of `e * (H e)`, H the curvature in
    the gates of one group.

    An unbiased estimate of the diagonal d2F/dgate_k^2 (Bekas, Kokiopoulou and Saad 2007): its error
    is the sum of H_kj over the other gates j of k's colour, with random signs. Gates of one group
    are coloured at random in `probes` colours, so that the diagonal is exact from as many probes as
    a group has gates an example. Each probe is confined to one group and costs one Hessian-vector
    product for all examples; `SecondOrder` computes the exact diagonal, one product a gate."""

    probes: int = 4
    seed: int = 0

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"second order, {self.probes} probes"

    def estimate(self, mechanisms: Mechanisms) -> Estimate:
        if self.probes < 1 or self.probes & (self.probes - 1):
            raise InputError(f"probes must be a power of two, got {self.probes}")
        generator = torch.Generator().manual_seed(self.seed)
        baseline, first = gate_gradient(mechanisms)
        return Estimate(
            baseline,
            {
                name: add(first[name], -probe(mechanisms, name, self.probes, generator) / 2)
                for name in mechanisms.groups
            },
        )


def probe(
    mechanisms: Mechanisms, name: str, probes: int, generator: torch.Generator
) -> Float[Tensor, "examples ..."]:
    """Return the estimate of d2F/dgate^2 at all ones for every gate of one group, in float64.

    Raises InputError for gates that are shared over the batch: there a reverse-mode product mixes
    the examples."""
    group = mechanisms.group(name)
    if not group.per_example:
        raise InputError(
            f"the gates of {name!r} are shared over the batch; use SecondOrder, which keeps"
            " examples apart"
        )
    ones = mechanisms.ones([name])[name].requires_grad_()
    total = torch.zeros(group.shape, dtype=torch.float64, device=ones.device)
    with torch.enable_grad():
        value = mechanisms.values({name: ones}).double().sum()
        (slope,) = torch.autograd.grad(value, ones, create_graph=True)
        if not slope.requires_grad:  # linear in the gates
            return total
        for signs in progress(draw_signs(group.axes, probes, generator).to(ones), "probes"):
            (product,) = torch.autograd.grad(
                (slope * signs).sum(), ones, retain_graph=True, allow_unused=True
            )
            if product is not None:
                total += (signs * product).double()
    return total / probes


def draw_signs(
    axes: tuple[int, ...], probes: int, generator: torch.Generator
) -> Float[Tensor, "probes ..."]:
    """Return probes whose entries at two gates of different colour are orthogonal, with a random
    sign for every gate.
    """
    count = int(torch.tensor(axes).prod()) if axes else 1
    colours = torch.randperm(count, generator=generator) % probes
    flips = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return (torch.from_numpy(hadamard(probes)).double()[:, colours] * flips).reshape(probes, *axes)
