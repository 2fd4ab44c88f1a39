"""The training loop: checkpointed, resumable to the bit, and silent about losses except when it
logs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from assay.errors import AssayError, InputError
from assay.io.files import write_atomic
from assay.io.runs import Run

Objective = Callable[[int], tuple[Tensor, Mapping[str, Tensor]]]


def fit(
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    generator: torch.Generator,
    schedule: Callable[[float], float] = lambda done: 1.0,
    run: Run | None = None,
    name: str = "training",
    log_every: int = 50,
    save_every: int = 500,
    after_step: Callable[[], None] | None = None,
) -> None:
    """Minimise `objective` for `steps` steps, in place.

    `objective(step)` draws its batch with `generator` and returns the loss and the quantities to
    log (scalar tensors, read only on logged steps). The learning rate of each parameter group is
    its initial one times `schedule(step / steps)`. `after_step` runs after each update (a
    projection, say). With `run`, a checkpoint `<name>.pt` holds the model, the optimizer and the
    state of `generator`; a later call with the same run goes on from it and ends with the same
    bits.

    Raises AssayError when the loss is not finite (the last checkpoint stays), InputError when the
    checkpoint is of another model."""
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    rates = [group["lr"] for group in optimizer.param_groups]
    first = _restore(run, name, model, optimizer, generator) if run is not None else 0
    if run is not None and first:
        run.forget_after(name, first - 1)
    was_training = model.training
    model.train()
    for step in tqdm(
        range(first, steps), initial=first, total=steps, desc=name, disable=None, leave=False
    ):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss, metrics = objective(step)
        loss.backward()
        optimizer.step()
        if after_step is not None:
            after_step()
        last = step + 1 == steps
        if step % log_every == 0 or last:
            value = float(loss.detach())
            if not math.isfinite(value):
                raise AssayError(
                    f"{name}: the loss is {value} at step {step}; lower the learning rate or look"
                    " at the data"
                )
            if run is not None:
                run.log(
                    name,
                    step,
                    {
                        "losses/total": value,
                        **{key: float(entry.detach()) for key, entry in metrics.items()},
                    },
                )
        if run is not None and ((step + 1) % save_every == 0 or last):
            _save(run, name, step + 1, model, optimizer, generator)
    model.train(was_training)


def cosine(done: float, *, floor: float = 0.0, warmup: float = 0.0) -> float:
    """Return the cosine schedule's factor at a share `done` of training: linear warm-up, then
    from 1 down to `floor`.
    """
    if done < warmup:
        return done / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def ramp(done: float, begin: float, end: float) -> float:
    """Return 0 before `begin`, 1 after `end`, linear between (shares of training)."""
    return min(max((done - begin) / (end - begin), 0.0), 1.0)


def _save(
    run: Run,
    name: str,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
    }
    write_atomic(run.path(f"{name}.pt"), lambda temporary: torch.save(state, temporary))


def _restore(
    run: Run,
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    path = run.path(f"{name}.pt")
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        return int(state["step"])
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise InputError(
            f"{path} is not a checkpoint of this run:"
            f" {next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from error
