"""Sparse reconstruction of pair gradients by low-rank directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from assay.errors import InputError
from assay.io.runs import Run
from assay.learn.loop import cosine, fit
from assay.mechanisms.directions.decomposition import Decomposition, check_count, finish
from assay.mechanisms.directions.factors import DenseFactors, Factors
from assay.mechanisms.directions.power import PowerIteration
from assay.mechanisms.directions.space import Space
from assay.mechanisms.directions.tucker import Tucker


@dataclass(frozen=True)
class PairGradientRefinement:
    """Local loss landscape decomposition (arXiv 2504.00194): encode gradients, keep the largest
    coefficients, decode.

    `c = V_in g`, the largest share `kept` of `|c|` in the batch stays, `ghat = V_out^T c`, and `sum
    ||g - ghat||^2 / sum ||g||^2` is minimised over low-rank `V_in` and unit-norm low-rank `V_out`,
    from the directions of the power iteration. The directions of the result are `V_out`, which need
    not be orthogonal; its encoder is `V_in`. Raises InputError for bad `k`, `kept` outside (0, 1],
    or factors that are not held densely."""

    k: int
    space: Space
    rank: int = 1
    kept: float = 0.1
    steps: int = 500
    rate: float = 3e-3
    batch: int = 512
    tolerance: float = 1e-6
    run: Run | None = None
    name: str = "refinement"

    def __call__(self, factors: Factors, *, generator: torch.Generator) -> Decomposition:

        check_count(self.k, factors)
        if not 0 < self.kept <= 1:
            raise InputError(f"kept is a share of the coefficients in (0, 1], got {self.kept}")
        if not isinstance(factors, DenseFactors):
            raise InputError("the pair-gradient refinement needs dense factors (pair_gradients)")
        power = PowerIteration(self.k, tolerance=self.tolerance)
        unit, kept = power.check(factors)
        start, _ = power.climb(unit, generator)
        gradients = factors.values[kept].flatten(0, 1)
        gradients = gradients / gradients.square().sum(1).mean().sqrt()
        model = _Autoencoder(self.space, start, self.rank)
        history: list[float] = []

        def objective(step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            chosen = torch.randint(gradients.shape[0], (self.batch,), generator=generator).to(
                gradients.device
            )
            loss = reconstruction_loss(
                gradients[chosen], model.encoder(), model.decoder(), self.kept
            )
            if step % 50 == 0:
                history.append(float(loss.detach()))
            return loss, {}

        fit(
            model,
            objective,
            torch.optim.Adam(model.parameters(), lr=self.rate),
            steps=self.steps,
            generator=generator,
            schedule=cosine,
            run=self.run,
            name=self.name,
            after_step=model.decoder.rescale,
        )
        with torch.no_grad():
            encoder, decoder = model.encoder(), model.decoder()
        return finish(
            unit,
            kept,
            decoder,
            "pair-gradient refinement",
            generator=generator,
            history=tuple(history),
            encoder=encoder,
        )


def reconstruction_loss(gradients: Tensor, encoder: Tensor, decoder: Tensor, kept: float) -> Tensor:
    """Return `sum ||g - ghat||^2 / sum ||g||^2` with the largest share `kept` of all
    coefficients; gradients are `(rows, size)`.
    """
    coefficients = gradients @ encoder.T
    count = max(1, round(kept * coefficients.numel()))
    threshold = (
        coefficients.detach().abs().flatten().kthvalue(coefficients.numel() - count + 1).values
    )
    coefficients = coefficients * (coefficients.detach().abs() >= threshold)
    return (gradients - coefficients @ decoder).square().sum() / gradients.square().sum()


class _Autoencoder(nn.Module):
    def __init__(self, space: Space, directions: Tensor, rank: int):
        super().__init__()
        self.encoder = Tucker(space, directions, rank)
        self.decoder = Tucker(space, directions, rank)
        self.decoder.rescale()
