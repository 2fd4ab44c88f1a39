"""Channels as gated parts: at every block's down-projection, part_k = h_k D[:,k]."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as f

from assay.core.kind import Kind, Reference
from assay.core.mechanisms import Mechanisms
from assay.core.parts import Atoms, Group, Parts
from assay.core.sites import Seen
from assay.core.target import Batch, Target
from assay.core.values import at
from assay.errors import InputError, unknown
from assay.mechanisms.channels.ablation import Ablation, ablate_channels
from assay.mechanisms.channels.attribution import attribute_channels
from assay.mechanisms.channels.clean import Clean, Functional, run_clean
from assay.mechanisms.channels.second_order import half_curvatures
from assay.mechanisms.channels.weights import ChannelWeights, read_weights


@dataclass(frozen=True)
class ChannelMechanisms(Mechanisms):
    """The channels of a residual bilinear network on a batch, with the closed forms in float64
    beside the gated sum.

    One group of gates a block, `blocks.{l}`, acts at `blocks.{l}.down`; a channel is gated at all
    positions together. Norms are live: they move when a gate does."""

    functional: Functional = "logit"

    kind = "channels"

    @cached_property
    def weights(self) -> ChannelWeights:
        return read_weights(self.target.model, torch.float64)

    @cached_property
    def clean(self) -> Clean:
        """The clean pass in float64, from which attribution, exact effects and certificates are
        computed.
        """
        with torch.no_grad():
            return run_clean(
                self.weights, self.batch.inputs.double(), self.batch.labels, self.functional
            )

    @cached_property
    def groups(self) -> Mapping[str, Group]:
        axes = (1, self.weights.hidden) if self.weights.positions > 1 else (self.weights.hidden,)
        names = [f"blocks.{block}" for block in range(len(self.weights.layers))]
        return {name: Group(name, (f"{name}.down",), (len(self.batch), *axes)) for name in names}

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        name = site.removesuffix(".down")
        down = self.target.model.get_parameter(f"{site}.weight")
        return {name: Atoms(seen.input, down.T, self.group(name).shape)}

    def ablate_rule(self, name: str, index: Tensor, budget: int | None = None) -> Tensor:
        """Look the exact effects up in the error scan, which computes those of all channels at
        once.
        """
        return at(self.by_group(self.ablation.effects)[name], index)

    def second_rule(self) -> Mapping[str, Tensor] | None:
        """Return the second derivatives in closed form; None (the general rule) behind a gate
        nonlinearity.
        """
        return (
            None
            if self.weights.gate is not None
            else self.by_group(2 * half_curvatures(self.clean))
        )

    @cached_property
    def ablation(self) -> Ablation:
        return ablate_channels(self.clean)

    def attributions(self) -> Float[Tensor, "examples blocks hidden"]:
        """Return the first-order attributions of all blocks in one tensor."""
        return attribute_channels(self.clean)

    def by_group(self, values: Float[Tensor, "examples blocks hidden"]) -> dict[str, Tensor]:
        """Split values of all channels into the gates' groups and shapes."""
        return {
            name: values[:, block].reshape(group.shape)
            for block, (name, group) in enumerate(self.groups.items())
        }


@dataclass(frozen=True)
class Channels(Kind):
    """The channels of a residual bilinear network that no batch is bound to; `functional` is what
    they are attributed to: the logit of the class, or the cross-entropy.
    """

    functional: Functional = "logit"

    name = "channels"

    def bind(
        self, target: Target, batch: Batch, reference: Reference | None = None
    ) -> ChannelMechanisms:
        """Return the channels as gates on a batch of inputs and classes; see `channels`. The
        target's metric is replaced by the functional, the network by a copy of it in float64."""
        self.refuse_reference(reference)
        network, x, functional = target.model, batch.inputs, self.functional
        weights = read_weights(network)
        # One pass in the model's own precision validates the batch before it is bound.
        with torch.no_grad():
            logits = run_clean(weights, x.to(weights.head.dtype), batch.labels, functional).logits
            output = network(x.to(weights.head.dtype))
        if not isinstance(output, Tensor) or output.shape != logits.shape:
            raise InputError(f"model must return logits of shape {tuple(logits.shape)}")
        gap, size = float((output - logits).abs().max()), float(logits.abs().max())
        tolerance = max(1e-3, 16 * torch.finfo(weights.head.dtype).eps)
        if not gap <= tolerance * (size + 1e-3):
            raise InputError(
                "model computes something else than its embedding, bilinear blocks and head: its"
                f" logits differ by {gap:.3g} (largest logit {size:.3g})"
            )
        metric, higher = _METRICS[functional], functional == "logit"
        # Copies: what is computed later must be of the weights and inputs that were computed with
        # before, whatever a step or a write in place does to them.
        return ChannelMechanisms(
            Target(copy.deepcopy(network).double(), metric, target.name, higher_is_right=higher),
            Batch(x.to(torch.float64, copy=True), batch.labels.clone()),
            functional,
        )


def channels(
    model: nn.Module | Target, x: Tensor, y: Tensor, functional: Functional = "logit"
) -> ChannelMechanisms:
    """Bind the channels of a residual bilinear network to inputs `x` (examples, ...) and classes
    `y` (examples,).

    Scores, exact effects and certificates are all those of the network with these weights computed
    in float64, as they are now: the network is copied, since rounding in float32 alone exceeds most
    bounds, and since later steps must not change what was bound. The functional attributed is the
    logit of the class, or the cross-entropy; of a target, the model and the name are used. The
    closed forms follow bilinear MLPs (arXiv 2410.08417).

    Raises InputError when the model has another structure than blocks of bilinear projections
    without biases, or computes something else than they do, and for wrong shapes, NaN, or labels
    out of range."""
    if not isinstance(model, nn.Module | Target):
        raise InputError(f"model must be a torch module or a target, got {type(model).__name__}")
    if functional not in _METRICS:
        raise unknown("functional", str(functional), _METRICS)
    read_weights(model.model if isinstance(model, Target) else model)  # refused before anything
    whole = model if isinstance(model, Target) else Target(model, logit, "bilinear network")
    return Channels(functional).bind(whole, Batch(x, y))


def logit(output: Tensor, batch: Batch) -> Tensor:
    """Return the logit of each example's class."""
    return output.gather(1, batch.labels[:, None])[:, 0]


def cross_entropy(output: Tensor, batch: Batch) -> Tensor:
    """Return each example's cross-entropy."""
    return f.cross_entropy(output, batch.labels, reduction="none")


_METRICS: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "logit": logit,
    "cross_entropy": cross_entropy,
}
