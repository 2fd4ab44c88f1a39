"""Training by several processes: sums over them, with the gradients that a global loss needs."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def join() -> tuple[int, int]:
    """Join the processes that `torchrun` started, over gloo, and return this one's rank and their
    number: (0, 1) without it.
    """
    if not dist.is_initialized() and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        atexit.register(_leave)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _leave() -> None:
    # Gloo's threads must end before the interpreter does, or the process aborts.
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum over processes; backwards the gradient passes unchanged.

    A loss of the sum, computed by every process, then gives each the gradient of its own share: the
    sum of those gradients over processes (`sum_gradients`) is the gradient of the one global loss.
    """
    return values if _alone() else _Sum.apply(values)


def sum_gradients(model: nn.Module) -> None:
    """Sum the gradients of all parameters over processes, in place: `before_step` of `fit`."""
    if _alone():
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


def from_first(values: Tensor) -> Tensor:
    """Return the first process's values in all of them."""
    if _alone():
        return values
    found = values.contiguous()
    dist.broadcast(found, 0)
    return found


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor) -> Tensor:
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
