"""Training by several processes: sums over them, with the gradients that a global loss needs."""

from __future__ import annotations

import atexit
import io
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from assay.errors import AssayError

_ENDED = (
    "another process of the group has stopped, and this one with it; the last checkpoint stands:"
    " start the group again with --resume"
)
_SPOKEN = "assay/spoken"
"""The key under which the group counts how many processes had something to say."""


def join() -> tuple[int, int]:
    """Join the processes that `torchrun` started, over gloo, and return this one's rank and their
    number: (0, 1) without it. AssayError where one of them stopped.
    """
    if not dist.is_initialized() and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        with _together():
            dist.init_process_group("gloo")
        atexit.register(_leave)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _stopped)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _leave() -> None:
    # Gloo's threads must end before the interpreter does, or the process aborts.
    if dist.is_initialized():
        dist.destroy_process_group()


def speaks_first() -> bool:
    """Return whether no other process of the group asked this before: of several that fail
    together, one says why. True without a group.
    """
    if _alone():
        return True
    try:
        return int(dist.distributed_c10d._get_default_store().add(_SPOKEN, 1)) == 1
    except RuntimeError:  # the store went with the process that kept it
        return True


@contextmanager
def _together() -> Iterator[None]:
    """Raise AssayError, in one line, where the others are not there any more."""
    try:
        yield
    except RuntimeError as error:
        raise AssayError(_ENDED) from error


def _stopped(*_: object) -> None:
    # What torchrun sends to the others when one has died.
    raise AssayError(_ENDED)


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
    with _together():
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)


def from_first(values: Tensor) -> Tensor:
    """Return the first process's values in all of them."""
    if _alone():
        return values
    found = values.contiguous()
    with _together():
        dist.broadcast(found, 0)
    return found


def state_of_first(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first process's state, tensors and plain values nested as they come, in all of
    them.
    """
    if _alone():
        return dict(state)
    first = dist.get_rank() == 0
    buffer = io.BytesIO()
    if first:
        torch.save(dict(state), buffer)
    size = from_first(torch.tensor(len(buffer.getvalue())))
    held = bytearray(buffer.getvalue()) if first else bytearray(int(size))
    sent = from_first(torch.frombuffer(held, dtype=torch.uint8))
    found: dict[str, Any] = torch.load(io.BytesIO(sent.numpy().tobytes()), weights_only=True)
    return found


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor) -> Tensor:
        total = values.detach().clone()
        with _together():
            dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
