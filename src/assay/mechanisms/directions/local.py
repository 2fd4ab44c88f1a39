"""The network as a function of chosen parameters, around its weights, on a fixed set of samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from assay.core.target import evaluating
from assay.errors import InputError
from assay.mechanisms.directions.space import Space, choose

Inputs = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Local:
    """A model, the samples, and the parameters that may move; made by `around`.

    `positions (samples, m)` keeps those positions of a sequence output only.
    """

    model: nn.Module
    inputs: Inputs
    space: Space
    positions: Tensor | None = None

    @property
    def samples(self) -> int:
        return _length(self.inputs)

    def _all(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.model.named_parameters()}

    @property
    def weights(self) -> dict[str, Tensor]:
        """Return the chosen parameters at `W0`, detached."""
        named = self._all()
        return {name: named[name] for name in self.space.names}

    def take(self, chosen: slice | Tensor) -> Local:
        """Return the same model on some of the samples."""
        inputs = (
            self.inputs[chosen]
            if isinstance(self.inputs, Tensor)
            else {key: value[chosen] for key, value in self.inputs.items()}
        )
        return replace(
            self,
            inputs=inputs,
            positions=None if self.positions is None else self.positions[chosen],
        )

    def output(self, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the outputs, `(samples, o)` or `(samples, positions, o)`, with the chosen
        parameters set to `weights`.
        """
        args, kwargs = (
            ((self.inputs,), {}) if isinstance(self.inputs, Tensor) else ((), dict(self.inputs))
        )
        with evaluating(self.model):
            output = functional_call(self.model, {**self._all(), **(weights or {})}, args, kwargs)
        output = logits_or_vector(output)
        if self.positions is None:
            return output
        rows = torch.arange(output.shape[0], device=output.device)[:, None]
        return output[rows, self.positions]

    def moved(self, direction: Tensor, amount: float | Tensor) -> Tensor:
        """Return the outputs `f(x, W0 + amount * direction)`."""
        shift = self.space.split(direction)
        return self.output(
            {
                name: value + amount * shift[name].to(value.dtype)
                for name, value in self.weights.items()
            }
        )

    def tangents(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs `(samples, ..., o)` and `t = J u` for each direction `(k, samples,
        ..., o)`: one JVP each.
        """
        return self.pushed(self.shifts(directions))

    def shifts(self, directions: Tensor) -> dict[str, Tensor]:
        """Return directions `(k, size)` as displacements `(k, *shape)` of each parameter, each
        with its own memory.
        """
        # Forward mode copies, on every pass, a tangent that is a view into a larger tensor.
        weights = self.weights
        return {
            name: part.to(weights[name].dtype).clone()
            for name, part in self.space.split(directions).items()
        }

    def pushed(self, shifts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what `tangents` does, from displacements made by `shifts`."""
        weights = self.weights
        with _forward_mode():
            out_dims: Any = (None, 0)
            primal, *tangent = vmap(
                lambda shift: jvp(self.output, (weights,), (shift,)), out_dims=out_dims
            )(dict(shifts))
        return primal, tangent[0]


def around(
    model: nn.Module,
    inputs: Any,
    parameters: str | Sequence[str] = "*",
    *,
    positions: Tensor | None = None,
) -> Local:
    """Fix the samples and choose the parameters by pattern.

    `inputs` is a tensor `(samples, ...)` or keyword arguments of such tensors (`input_ids`,
    `attention_mask`). Raises InputError for fused attention, NaN weights, an unknown pattern, or an
    output that is neither logits nor a vector."""
    if isinstance(inputs, tuple) and len(inputs) == 1:
        inputs = inputs[0]
    if not isinstance(inputs, Tensor | Mapping):
        raise InputError(
            f"inputs must be a tensor or keyword arguments, got {type(inputs).__name__}"
        )
    space = choose(model, parameters)
    _refuse_fused(model)
    if _length(inputs) == 0:
        raise InputError("inputs hold no sample; give at least one")
    if positions is not None:
        positions = positions[:, None] if positions.ndim == 1 else positions
        if positions.shape[0] != _length(inputs):
            raise InputError(
                f"positions are for {positions.shape[0]} samples, inputs hold {_length(inputs)}"
            )
    local = Local(model, inputs, space, positions)
    with torch.no_grad():
        output = local.take(slice(0, 1)).output()
    if output.ndim < 2 or output.shape[0] != 1 or not output.is_floating_point():
        raise InputError(
            f"the model's output has shape {tuple(output.shape)} and type {output.dtype} on one"
            " sample; directions need logits or a vector per sample, (samples, outputs) or"
            " (samples, positions, outputs)"
        )
    return local


def _length(inputs: Inputs) -> int:
    if isinstance(inputs, Tensor):
        return inputs.shape[0]
    lengths = {key: value.shape[0] for key, value in inputs.items()}
    if len(set(lengths.values())) != 1:
        raise InputError(
            f"inputs must hold the same number of samples in every entry, got {lengths}"
        )
    return next(iter(lengths.values()))


def logits_or_vector(output: Any) -> Tensor:
    """Return the tensor in a model's output: itself, or its `logits`."""
    found = getattr(output, "logits", output)
    if isinstance(found, Tensor):
        return found
    raise InputError(
        f"the model returned {type(output).__name__}; directions need a tensor or an object with"
        " `logits`"
    )


def _refuse_fused(model: nn.Module) -> None:
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if used not in (None, "eager"):
        raise InputError(
            f"the model uses {used!r} attention, which has no forward-mode derivative; load it with"
            " attn_implementation='eager'"
        )


@contextmanager
def _forward_mode() -> Iterator[None]:
    try:
        yield
    except NotImplementedError as error:
        raise InputError(
            "an operation of the model has no forward-mode derivative (fused attention is the"
            " usual one); load it with attn_implementation='eager' or write the attention out:"
            f" {str(error).splitlines()[0]}"
        ) from error
