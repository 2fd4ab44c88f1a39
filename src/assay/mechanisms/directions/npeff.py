"""Non-negative factors of per-sample Fisher matrices: the baseline at scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from assay.io.runs import Run
from assay.learn.loop import fit
from assay.mechanisms.directions.decomposition import Decomposition, check_count, finish
from assay.mechanisms.directions.factors import Factors, normalise


@dataclass(frozen=True)
class NonNegativeFisher:
    """Write every per-sample Fisher matrix as a non-negative sum of shared rank-one ones (NPEFF,
    arXiv 2310.04649).

    Minimises `sum_s ||F_s - sum_k w_sk h_k h_k^T||_F^2`, `F_s = G_s^T G_s`, `w >= 0`, `||h_k|| =
    1`, by multiplicative updates of `w` and Adam on `h`, from inner products alone: `<F_s, h h^T> =
    ||G_s h||^2` and `<h_k h_k^T, h_l h_l^T> = <h_k, h_l>^2`."""

    k: int
    steps: int = 1000
    rate: float = 0.01
    tolerance: float = 1e-6
    run: Run | None = None
    name: str = "npeff"

    def __call__(self, factors: Factors, *, generator: torch.Generator) -> Decomposition:

        check_count(self.k, factors)
        factors, kept = normalise(factors, self.tolerance)
        like = factors.traces()
        start = torch.randn(self.k, factors.size, generator=generator, dtype=like.dtype).to(
            like.device
        )
        model = _Factorisation(start, factors.samples)
        history: list[float] = []

        def objective(step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            along = factors.dot(model.rows).square().sum(1)
            overlaps = (model.rows @ model.rows.T).square()
            with torch.no_grad():
                model.weights.mul_(along / (model.weights @ overlaps).clamp_min(1e-12))
            # ||F_s||^2 is a constant; the loss is what remains of the squared error.
            loss = (
                ((model.weights @ overlaps) * model.weights - 2 * model.weights * along)
                .sum(1)
                .mean()
            )
            if step % 50 == 0:
                history.append(float(loss.detach()))
            return loss, {}

        fit(
            model,
            objective,
            torch.optim.Adam([model.rows], lr=self.rate),
            steps=self.steps,
            generator=generator,
            run=self.run,
            name=self.name,
            after_step=model.rescale,
        )
        return finish(
            factors, kept, model.rows.detach(), "npeff", generator=generator, history=tuple(history)
        )


class _Factorisation(nn.Module):
    weights: Tensor

    def __init__(self, start: Tensor, samples: int):
        super().__init__()
        self.rows = nn.Parameter(start / start.norm(dim=1, keepdim=True))
        self.register_buffer(
            "weights", torch.full((samples, start.shape[0]), 1 / start.shape[0], dtype=start.dtype)
        )

    @torch.no_grad()
    def rescale(self) -> None:
        self.rows.div_(self.rows.norm(dim=1, keepdim=True).clamp_min(1e-12))
