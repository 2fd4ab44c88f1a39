"""The training loop: checkpointed, resumable to the bit, and silent about losses except when it
logs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from assay.errors import AssayError, InputError
from assay.io.runs import Run
from assay.learn.processes import state_of_first
from assay.progress import progress

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
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
    together: bool = False,
) -> None:
    """Minimise `objective` for `steps` steps, in place.

    `objective(step)` draws its batch with `generator` and returns the loss and the quantities to
    log (scalar tensors, read only on logged steps). The learning rate of each parameter group is
    its initial one times `schedule(step / steps)`. `before_step` runs between the backward pass and
    each update (a sum of gradients over processes, say), `after_step` after it (a projection). With
    `run`, a checkpoint `<name>.pt` holds the model, the optimizer and the state of `generator`; a
    later call with the same run goes on from it and ends with the same bits. Processes that train
    `together` (`assay.learn.processes`) all begin with the state of the first, which alone has a
    run.

    Raises AssayError, with the terms, when the loss, a parameter or a moment of the optimizer is
    not finite (the last checkpoint stays: no other is written), InputError when the checkpoint is
    damaged or of another training, or when another process trains in the folder."""
    for what, count in (("steps", steps), ("log_every", log_every), ("save_every", save_every)):
        if count < 1:
            raise InputError(f"{what} must be at least 1, got {count}")
    with nullcontext() if run is None else run.held():
        rates = [group["lr"] for group in optimizer.param_groups]
        first = 0
        if run is not None:
            first = _restore(run, name, steps, model, optimizer, generator)
            run.forget_after(name, first - 1)
        if together:
            state = state_of_first(_state(first, model, optimizer, generator))
            first = _load(state, model, optimizer, generator)
        was_training = model.training
        unread: list[tuple[int, Tensor, Mapping[str, Tensor]]] = []
        model.train()
        for step in progress(range(first, steps), name, total=steps, initial=first):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step / steps)
            optimizer.zero_grad(set_to_none=True)
            loss, metrics = objective(step)
            loss.backward()
            metrics = {key: entry.detach() for key, entry in metrics.items()}
            unread.append((step, loss.detach(), metrics))
            if before_step is not None:
                before_step()
            optimizer.step()
            if after_step is not None:
                after_step()
            last = step + 1 == steps
            saves = run is not None and ((step + 1) % save_every == 0 or last)
            if saves or step % log_every == 0 or last:
                whole = (model, optimizer) if saves or last else None
                _require_finite(name, unread, whole)
                unread.clear()
            if run is not None and (step % log_every == 0 or last):
                _log(run, name, step, loss, metrics)
            if run is not None and saves:
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


def _log(run: Run, name: str, step: int, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
    others = {key: float(entry.detach()) for key, entry in metrics.items()}
    run.log(name, step, {"losses/total": float(loss.detach()), **others})


def _require_finite(
    name: str,
    steps: Sequence[tuple[int, Tensor, Mapping[str, Tensor]]],
    whole: tuple[nn.Module, torch.optim.Optimizer] | None,
) -> None:
    """Look at the last step and, where its loss is not finite, for the first such step since the
    last look: it names the cause, and spoils the terms of all later ones.
    """
    for step, loss, metrics in () if bool(steps[-1][1].isfinite()) else steps:
        value = float(loss)
        if math.isfinite(value):
            continue
        terms_not_finite = [
            f"{key} is {float(entry)}"
            for key, entry in metrics.items()
            if not bool(entry.isfinite().all())
        ]
        terms = f" ({', '.join(terms_not_finite)})" if terms_not_finite else ""
        raise AssayError(
            f"{name}: the loss is {value} at step {step}{terms}; lower the learning rate or look at"
            " the data"
        )
    wrong = None if whole is None else _find_not_finite(*whole)
    if wrong is not None:
        raise AssayError(
            f"{name}: {wrong} is not finite after step {steps[-1][0]}; lower the learning rate or"
            " look at the data"
        )


def _find_not_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Return the first parameter, or moment of the optimizer, with NaN or infinity.

    An infinite second moment leaves its parameter finite, and where it is for ever."""
    for key, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return key
    for state in optimizer.state.values():
        for key, entry in state.items():
            if isinstance(entry, Tensor) and not bool(entry.isfinite().all()):
                return f"the optimizer's {key}"
    return None


def _save(
    run: Run,
    name: str,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    run.save_state(f"{name}.pt", _state(step, model, optimizer, generator))


def _state(
    step: int, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> dict[str, Any]:
    return {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
    }


def _load(
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"].cpu())
    return int(state["step"])


def _restore(
    run: Run,
    name: str,
    steps: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Load the checkpoint and return how many steps it has behind it, 0 without one."""
    if not run.has(f"{name}.pt"):
        return 0
    state, path = run.state(f"{name}.pt"), run.path(f"{name}.pt")
    try:
        done = _load(state, model, optimizer, generator)
    except Exception as error:  # the entries may be anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is not a checkpoint of this training: {reason[:300]}") from error
    wrong = _find_not_finite(model, optimizer)
    if wrong is not None:
        raise InputError(f"{path} is damaged: {wrong} is not finite in it")
    if not 0 < done <= steps:
        raise InputError(f"{path} is at step {done}, and this training has {steps} steps")
    return done
