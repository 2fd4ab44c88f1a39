"""Training of a crosscoder on residual states that are drawn, in coordinates of equal norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.errors import InputError
from assay.io.runs import Run
from assay.learn.loop import cosine, fit, ramp
from assay.mechanisms.crosscoder.coder import Crosscoder
from assay.mechanisms.crosscoder.objective import Folded, Term
from assay.memory import require_memory

Draw = Callable[[int, torch.Generator], tuple[Float[Tensor, "rows layers width"], Tensor | None]]
"""Draws the states of a step, with the indices of their points where terms need them."""


@dataclass(frozen=True)
class Training:
    """How to train: `sparsity` weighs `sum_f z_f sum_l ||d_{f,l}||`, in coordinates in which the
    states of every layer have the mean square one per coordinate; terms grow from nothing over the
    first `ramp_share` of the steps.
    """

    steps: int = 2000
    rate: float = 3e-3
    sparsity: float = 0.02
    ramp_share: float = 0.3
    floor: float = 0.01
    log_every: int = 100
    save_every: int = 1000

    def __post_init__(self) -> None:
        if min(self.steps, self.log_every, self.save_every) < 1:
            raise InputError(
                f"steps, log_every and save_every must be at least 1, got {self.steps},"
                f" {self.log_every} and {self.save_every}"
            )
        if not self.rate > 0 or not self.sparsity >= 0:
            raise InputError(
                f"rate must be above 0 and sparsity at least 0, got {self.rate} and {self.sparsity}"
            )
        if not 0 < self.ramp_share <= 1:
            raise InputError(f"ramp_share must lie in (0, 1], got {self.ramp_share}")


def train(
    found: Crosscoder,
    draw: Draw,
    training: Training,
    *,
    terms: Sequence[Term] = (),
    scales: Float[Tensor, " layers"] | None = None,
    generator: torch.Generator,
    run: Run | None = None,
    name: str = "crosscoder",
) -> None:
    """Train a crosscoder in place with Adam and a cosine; afterwards it reads and writes states in
    the network's own units.

    Loss: `sum_l ||r_l - rhat_l||^2 + sparsity sum_f z_f sum_l ||d_{f,l}||` on scaled states, mean
    over rows, and the terms on unscaled ones. `scales` bring every layer to equal norm (by default
    measured on one draw). With `run`, training is resumed from its checkpoint and ends with the
    same bits. Raises InputError for states of another shape or all zero, AssayError for a loss that
    is not finite."""
    first, _ = draw(0, torch.Generator().manual_seed(0))
    if first.ndim != 3 or first.shape[1:] != (len(found.sites), found.width):
        raise InputError(
            f"states have shape {tuple(first.shape)}; the crosscoder reads (rows,"
            f" {len(found.sites)}, {found.width})"
        )
    scales = equal_norm_scales(first) if scales is None else scales
    count = sum(entry.numel() for entry in found.parameters())
    require_memory(12 * count, f"training {count:,} parameters")  # gradients and two moments
    tracker = Threshold(found)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        states, rows = draw(step, generator)
        total, losses, codes = losses_of(
            found, states, rows, scales, training, terms, step / training.steps
        )
        tracker.see(codes)
        return total, losses

    fit(
        found,
        loss,
        torch.optim.Adam(found.parameters(), lr=training.rate),
        steps=training.steps,
        generator=generator,
        schedule=partial(cosine, floor=training.floor),
        run=run,
        name=name,
        log_every=training.log_every,
        save_every=training.save_every,
    )
    fold(found, scales)


def losses_of(
    found: Crosscoder,
    states: Float[Tensor, "rows layers width"],
    rows: Tensor | None,
    scales: Float[Tensor, " layers"],
    training: Training,
    terms: Sequence[Term],
    done: float,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return the loss of one step at a share `done` of training, what it is made of, and codes."""
    scaled = states * scales[:, None]
    codes = found.encode(scaled)
    rest = (scaled - found.decode(codes)).square().sum((1, 2)).mean()
    sparse = (codes @ found.W_dec.norm(dim=2).sum(1)).mean()
    losses = {"losses/reconstruction": rest, "losses/sparsity": sparse}
    total = rest + training.sparsity * sparse
    folded = Folded(
        found.W_dec / scales[:, None], found.b_dec / scales[:, None], codes, states, rows
    )
    grown = ramp(done, 0.0, training.ramp_share)
    for term in terms:
        value = term(folded)
        losses[f"losses/{term.name}"] = value
        total = total + grown * term.weight * value
    losses["metrics/l0"] = (codes > 0).float().sum(1).mean()
    return total, losses, codes


@torch.no_grad()
def fold(found: Crosscoder, scales: Float[Tensor, " layers"]) -> None:
    """Fold the scales of the layers into a crosscoder that was trained on scaled states, so
    that it reads and writes states in the network's own units; codes stay what they were.
    """
    found.W_enc.mul_(scales[:, None, None])
    found.W_dec.div_(scales[:, None])
    found.b_dec.div_(scales[:, None])


@torch.no_grad()
def equal_norm_scales(states: Float[Tensor, "rows layers width"]) -> Float[Tensor, " layers"]:
    """Return the factors that bring the mean square per coordinate of every layer to one.

    Raises InputError for a layer whose states are all zero."""
    sizes = states.square().mean((0, 2)).sqrt()
    if not bool((sizes.isfinite() & (sizes > 0)).all()):  # the squares overflow, or vanish
        norms = torch.linalg.vector_norm(states, dim=(0, 2), dtype=torch.float64)
        sizes = (norms / (len(states) * states.shape[2]) ** 0.5).to(states.dtype)
    if not bool((sizes > 0).all()):
        raise InputError("the states of a layer are all zero; they cannot be scaled")
    return 1 / sizes


@torch.no_grad()
def unexplained(
    found: Crosscoder, states: Float[Tensor, "rows layers width"]
) -> Float[Tensor, " layers"]:
    """Return the fraction of variance unexplained at every layer, over rows and coordinates."""
    wide = states.double()
    rest = (wide - found(states)).square().sum((0, 2))
    return (rest / (wide - wide.mean(0)).square().sum((0, 2))).to(states.dtype)


class Threshold:
    """The running mean of the smallest code that BatchTopK kept: its threshold after training."""

    def __init__(self, found: Crosscoder):
        self.found = found
        self.used = found.activation == "batch_topk"

    @torch.no_grad()
    def see(self, codes: Tensor) -> None:
        if not self.used or not bool((codes > 0).any()):
            return
        held = self.found.get_buffer("threshold")
        least = codes[codes > 0].min()
        held.copy_(torch.where(held > 0, 0.99 * held + 0.01 * least, least))


def rows_of(states: Float[Tensor, "points layers width"], index: Int[Tensor, " some"]) -> Draw:
    """Return a draw of the states of some points, all of them at every step."""
    chosen = states[index]

    def draw(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return chosen, index

    return draw
