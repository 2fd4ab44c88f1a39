"""A target: a frozen network and the number, one per example, whose mechanisms are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from assay.core.sites import Edit, Record, run_edited
from assay.errors import InputError
from assay.io.files import require_finite

Metric = Callable[[Any, "Batch"], Tensor]


@dataclass(frozen=True)
class Batch:
    """A batch of examples: `inputs` for the model (tensor, tuple or keyword arguments), `labels`
    for the metric.
    """

    inputs: Any
    labels: Any = None

    def __post_init__(self) -> None:
        sizes = {
            leaf.shape[0]
            for leaf in tree_flatten(self.inputs)[0]
            if isinstance(leaf, Tensor) and leaf.ndim
        }
        if not sizes:
            raise InputError("a batch needs at least one input tensor with a batch axis")
        if sizes == {0}:
            raise InputError("the batch is empty")
        for leaf in tree_flatten(self.inputs)[0]:
            if isinstance(leaf, Tensor):
                require_finite(leaf, "the batch's input")

    def __len__(self) -> int:
        return next(
            leaf.shape[0]
            for leaf in tree_flatten(self.inputs)[0]
            if isinstance(leaf, Tensor) and leaf.ndim
        )

    def take(self, index: Tensor | slice) -> Batch:
        """Return the examples at `index`, in inputs and labels alike."""
        size = len(self)

        def pick(leaf: Any) -> Any:
            return (
                leaf[index]
                if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == size
                else leaf
            )

        return Batch(tree_map(pick, self.inputs), tree_map(pick, self.labels))


@dataclass(frozen=True)
class Target:
    """A network in evaluation mode and a metric `(output, batch) -> (examples,)`.

    Raises InputError when a parameter is NaN or infinite.
    """

    model: nn.Module
    metric: Metric
    name: str = "model"

    def __post_init__(self) -> None:
        for name, parameter in self.model.named_parameters():
            require_finite(parameter, f"the model's parameter {name!r}")
        self.model.eval()

    @property
    def device(self) -> torch.device:
        return next(
            (entry.device for entry in chain(self.model.parameters(), self.model.buffers())),
            torch.device("cpu"),
        )

    def values(
        self,
        batch: Batch,
        edits: Mapping[str, Edit] | None = None,
        *,
        record: Record | None = None,
        resume: Iterable[str] = (),
    ) -> Float[Tensor, " examples"]:
        """Return the metric of every example, with edits at sites (see `assay.core.sites.run`).

        Raises InputError when the metric is not one number per example.
        """
        values = self.metric(
            run_edited(self.model, batch.inputs, edits, record=record, resume=resume), batch
        )
        if not isinstance(values, Tensor) or values.shape != (len(batch),):
            came = (
                f"shape {tuple(values.shape)}"
                if isinstance(values, Tensor)
                else f"a {type(values).__name__}"
            )
            raise InputError(
                f"the metric must return one number per example, shape ({len(batch)},); got {came}"
            )
        return values


def target(model: nn.Module, metric: Metric, name: str = "model") -> Target:
    """Make a target of any torch module and a metric `(output, batch) -> (examples,)`."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch module, got {type(model).__name__}")
    return Target(model, metric, name)
