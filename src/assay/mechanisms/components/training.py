"""Training of a decomposition: faithfulness warm-up, then the whole objective with AdamW and a
cosine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from assay.errors import InputError
from assay.io.runs import Run
from assay.learn.loop import cosine, fit
from assay.learn.processes import join, sum_gradients, sum_over_processes
from assay.mechanisms.components.decomposition import Decomposition
from assay.mechanisms.components.objective import Faithfulness, Objective
from assay.mechanisms.components.problem import Problem
from assay.mechanisms.components.scene import Rows
from assay.memory import require_memory

Draw = Callable[[torch.Generator], Rows]


@dataclass(frozen=True)
class Training:
    """How to train. `importance_rate` is the importance function's learning rate (the factors', if
    None); rates fall along a cosine to the share `floor`; warm-up minimises relative faithfulness
    alone."""

    steps: int = 2000
    rate: float = 1e-3
    importance_rate: float | None = None
    floor: float = 0.1
    warmup_steps: int = 200
    warmup_rate: float = 1e-2
    log_every: int = 100
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warmup_steps < 0:
            raise InputError(f"warmup_steps must be at least 0, got {self.warmup_steps}")
        for name in ("rate", "warmup_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.importance_rate is not None and not self.importance_rate > 0:
            raise InputError(f"importance_rate must be above 0, got {self.importance_rate}")
        if not 0 <= self.floor <= 1:
            raise InputError(f"floor must lie in [0, 1], got {self.floor}")


def train(
    model: nn.Module,
    found: Decomposition,
    objective: Objective,
    draw: Draw,
    training: Training,
    *,
    generator: torch.Generator,
    run: Run | None = None,
    name: str = "components",
) -> None:
    """Train a decomposition of a network on drawn batches, in place; the network stays as it is.

    With `run`, checkpoints hold factors, importance function, optimizer, adversaries, running means
    and the generator; a later call goes on from the last one and ends with the same bits. Of
    several processes (`torchrun`), which all call this with equal arguments, each takes its share
    of every batch, and the first alone has a run; their number may change from one call to the
    next.

    Raises AssayError, with the term, when the loss is not finite, and where another process stops:
    the last good checkpoint stays. Raises InputError for a batch that cannot be split, and for
    more parameters than can be trained in the memory there is."""
    rank, world = join()
    optimizer = make_optimizer(found, training)
    warm_up(model, found, training, generator=generator, run=run, name=f"{name}-warmup")
    reduce = None if world == 1 else sum_over_processes
    problem = Problem(model, found, objective, generator, reduce=reduce, world=world)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rows = draw(generator)
        rows = rows if world == 1 else rows.share(rank, world)
        total, terms = problem(rows, step / training.steps)
        return total, {f"losses/{key}": term for key, term in terms.items()}

    fit(
        problem,
        loss,
        optimizer,
        steps=training.steps,
        generator=generator,
        schedule=partial(cosine, floor=training.floor),
        run=run,
        name=name,
        log_every=training.log_every,
        save_every=training.save_every,
        before_step=partial(sum_gradients, problem),
        after_step=problem.finish,
        together=world > 1,
    )


def warm_up(
    model: nn.Module,
    found: Decomposition,
    training: Training,
    *,
    generator: torch.Generator,
    run: Run | None = None,
    name: str = "components-warmup",
) -> None:
    """Minimise relative faithfulness alone over the factors."""
    if not training.warmup_steps:
        return
    faithfulness = Faithfulness()
    fit(
        found,
        lambda step: (faithfulness(model, found), {}),
        torch.optim.AdamW(
            [*found.V, *found.U], lr=training.warmup_rate, weight_decay=0.0, fused=True
        ),
        steps=training.warmup_steps,
        generator=generator,
        run=run,
        name=name,
        log_every=training.log_every,
        save_every=training.warmup_steps,
        together=join()[1] > 1,
    )


def make_optimizer(found: Decomposition, training: Training) -> torch.optim.Optimizer:
    """Return AdamW without weight decay over the factors and the importance function."""
    count = sum(entry.numel() for entry in found.parameters() if entry.requires_grad)
    require_memory(12 * count, f"training {count:,} parameters")  # gradients and two moments
    rate = training.rate if training.importance_rate is None else training.importance_rate
    groups = [
        {"params": [*found.V, *found.U], "lr": training.rate},
        {"params": list(found.importance.parameters()), "lr": rate},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
