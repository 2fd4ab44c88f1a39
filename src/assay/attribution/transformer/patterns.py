"""Attention patterns, read inside the modules that make them: logits, weights, and the metric's
gradient at the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from assay.attribution.transformer.relp import SOFTMAX
from assay.core.sites import run_edited
from assay.core.target import Batch, Target
from assay.errors import InputError

_CACHES = ("past_key_values", "past_key_value", "layer_past")
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pattern:
    """One module's attention on a batch: masked logits and softmax weights, and the module's own
    arguments.

    `gradient` is that of the metric, summed over examples, at the weights.
    """

    logits: Float[Tensor, "examples heads queries keys"]
    weights: Float[Tensor, "examples heads queries keys"]
    gradient: Float[Tensor, "examples heads queries keys"]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def read_patterns(target: Target, batch: Batch, paths: Sequence[str]) -> dict[str, Pattern]:
    """Run a target once, forward and backward, and return the pattern of each attention module.

    Raises InputError for a module that takes no softmax of its own, as fused attention does not.
    """
    reader = _Reader(target.model, paths)
    with reader.listening(), torch.enable_grad():
        values = target.values(batch)
        reader.require(paths)
        tensors = [reader.weights[path] for path in paths]
        cut = not values.requires_grad  # no pattern reaches the metric
        gradients = (
            [None] * len(tensors)
            if cut
            else torch.autograd.grad(values.double().sum(), tensors, allow_unused=True)
        )
    found = {}
    for path, weights, gradient in zip(paths, tensors, gradients, strict=True):
        slope = torch.zeros_like(weights) if gradient is None else gradient
        found[path] = Pattern(reader.logits[path], weights.detach(), slope, *reader.calls[path])
    return found


@torch.no_grad()
def changed_logits(
    model: nn.Module, path: str, pattern: Pattern, projection: str, change: Change
) -> Tensor:
    """Return the logits of an attention module run again on its own arguments, with the output
    of its projection changed.
    """
    reader = _Reader(model, [path])

    def edit(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return change(out)

    handle = model.get_submodule(projection).register_forward_hook(edit)
    try:
        with reader.listening():
            model.get_submodule(path)(*pattern.args, **pattern.kwargs)
    finally:
        handle.remove()
    return reader.logits[path]


@torch.no_grad()
def attention_weights(
    model: nn.Module, inputs: Any, paths: Sequence[str]
) -> tuple[Any, dict[str, Float[Tensor, "examples heads queries keys"]]]:
    """Run a model once without gradients and return its output and the pattern of each attention
    module.

    Raises InputError for a module that takes no softmax of its own, as fused attention does not."""
    reader = _Reader(model, paths)
    with reader.listening():
        output = run_edited(model, inputs)
    reader.require(paths)
    return output, dict(reader.weights)


class _Reader(TorchFunctionMode):
    """Keeps what softmax is given and returns while one of the modules runs."""

    def __init__(self, model: nn.Module, paths: Sequence[str]):
        super().__init__()
        self.model, self.paths = model, paths
        self.current: str | None = None
        self.logits: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as stack:
            for path in self.paths:
                module = self.model.get_submodule(path)
                stack.callback(
                    module.register_forward_pre_hook(self._enter(path), with_kwargs=True).remove
                )
                stack.callback(module.register_forward_hook(self._leave).remove)
            stack.enter_context(self)
            yield

    def require(self, paths: Sequence[str]) -> None:
        for path in paths:
            if path not in self.weights:
                raise InputError(
                    f"module {path!r} takes no softmax over four axes; load the model with"
                    " attn_implementation='eager'"
                )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func not in SOFTMAX or self.current is None or out.ndim != 4:
            return out
        if self.current in self.weights:
            raise InputError(
                f"module {self.current!r} takes more than one softmax in a forward pass: its"
                " pattern is not one tensor"
            )
        # With frozen weights nothing before the first pattern tracks gradients; the pattern then
        # starts the graph.
        tracked = (
            out
            if out.requires_grad or not torch.is_grad_enabled()
            else out.detach().requires_grad_()
        )
        self.logits[self.current] = (args[0] if args else kwargs["input"]).detach()
        self.weights[self.current] = tracked
        return tracked

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.current = path
            # A cache has taken this run's keys: the module run again must not see them twice.
            kept = {
                key: None if key in _CACHES else _detached(value) for key, value in kwargs.items()
            }
            self.calls[path] = (_detached(args), kept)

        return hook

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.current = None


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return tuple(_detached(entry) for entry in value) if isinstance(value, tuple) else value
