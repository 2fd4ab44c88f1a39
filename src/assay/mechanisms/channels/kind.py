"""Channels as a mechanism kind: part_k = h_k D[:,k] at the down-projection of every block, base zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from assay.errors import InputError
from assay.hooks import Seen
from assay.mechanisms.base import Mechanisms
from assay.mechanisms.channels.ablation import ablate_channels
from assay.mechanisms.channels.attribution import attribute_channels
from assay.mechanisms.channels.clean import Clean, Functional, run_clean
from assay.mechanisms.channels.second_order import half_curvatures
from assay.mechanisms.channels.weights import read_weights
from assay.parts import Atoms, Group, Parts
from assay.targets.base import Batch, Metric, Target


@dataclass(frozen=True)
class Channels(Mechanisms):
    """The channels of a bilinear network bound to a batch; a gate switches a channel off at all positions together.

    Where the blocks are quadratic, second order and exact effects come in closed form from the error identity.
    """

    functional: Functional = "logit"

    kind = "channels"
    reference = "zero"

    @cached_property
    def clean(self) -> Clean:
        """The clean pass that the closed forms read."""
        return run_clean(read_weights(self.target.model), self.batch.inputs, self.batch.labels, self.functional)

    @cached_property
    def groups(self) -> Mapping[str, Group]:  # type: ignore[override]
        weights = self.clean.weights
        positions = (1,) if weights.positions > 1 else ()
        names = [f"blocks.{block}" for block in range(len(weights.layers))]
        return {name: Group(name, (f"{name}.down",), (len(self.batch), *positions, weights.hidden)) for name in names}

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        name = site.removesuffix(".down")
        atoms = self.target.model.get_parameter(f"{site}.weight").T
        return {name: Atoms(seen.input, atoms, self.groups[name].shape)}

    def second_rule(self) -> Mapping[str, Tensor] | None:
        if self.clean.weights.gate is not None:
            return None
        return self.by_group(2 * half_curvatures(self.clean))

    def exact_rule(self) -> Mapping[str, Tensor] | None:
        return self.by_group(ablate_channels(self.clean).effects)

    def attributions(self) -> Tensor:
        """Return the first-order attributions in closed form, (examples, blocks, hidden)."""
        return attribute_channels(self.clean)

    def by_group(self, values: Tensor) -> dict[str, Tensor]:
        """Give values (examples, blocks, hidden) the shapes of the gates."""
        return {name: values[:, block].reshape(group.shape) for block, (name, group) in enumerate(self.groups.items())}


def channels(model: nn.Module, x: Tensor, y: Tensor, functional: Functional = "logit") -> Channels:
    """Bind the channels of a residual bilinear network to labelled examples.

    The metric is the logit of the label, or the cross-entropy. Any module with `embed`, `blocks.{i}.left/right/down` and
    `head`, all without biases, will do; its weights' dtype is the dtype of the work (float64 for certificates).
    Raises InputError when the module is of another shape, or inputs and labels do not fit.
    """
    weights = read_weights(model)
    if x.shape[:1] != y.shape:
        raise InputError(f"y must hold one label per example: x is {tuple(x.shape)}, y {tuple(y.shape)}")
    batch = Batch(x.to(weights.head.dtype), y)
    bound = Channels(Target(model, _METRICS[functional], "bilinear network"), batch, functional)
    _ = bound.groups
    return bound


def _logit(output: Tensor, batch: Batch) -> Tensor:
    return output.gather(-1, batch.labels[:, None])[:, 0]


def _cross_entropy(output: Tensor, batch: Batch) -> Tensor:
    return torch.nn.functional.cross_entropy(output, batch.labels, reduction="none")


_METRICS: dict[str, Metric] = {"logit": _logit, "cross_entropy": _cross_entropy}
