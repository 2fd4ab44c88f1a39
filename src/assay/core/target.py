"""A target: a frozen network and the number, one per example, whose mechanisms are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a network in evaluation mode; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Batch:
    """A batch of examples: `inputs` for the model (tensor, tuple or keyword arguments), `labels`
    for the metric.

    Inputs are checked once; `checked` says that they were, as those of a batch cut from another.

    Raises InputError when there is no example, or an input that is NaN or infinite."""

    inputs: Any
    labels: Any = None
    checked: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.checked:  # cut from a batch that was
            return
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

    def __repr__(self) -> str:
        return f"Batch({len(self)} examples)"

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

        found = Batch(tree_map(pick, self.inputs), tree_map(pick, self.labels), checked=True)
        if not len(found):
            raise InputError("the batch is empty")
        return found


@dataclass(frozen=True)
class Target:
    """A network in evaluation mode and a metric `(output, batch) -> (examples,)`.

    `higher_is_right` says in which direction the metric moves as the network's answer gets better:
    damage, worst cases and certificates are about the loss of the right answer. By default it is
    the metric's own attribute of that name, or true where the metric has none.
    Raises InputError when a parameter is NaN or infinite.
    """

    model: nn.Module = field(repr=False)
    metric: Metric
    name: str = "model"
    higher_is_right: bool | None = None

    def __post_init__(self) -> None:
        if self.higher_is_right is None:
            stated = bool(getattr(self.metric, "higher_is_right", True))
            object.__setattr__(self, "higher_is_right", stated)
        for name, parameter in self.model.named_parameters():
            require_finite(parameter, f"the model's parameter {name!r}")
        self.model.eval()

    @property
    def device(self) -> torch.device:
        return next(
            (entry.device for entry in chain(self.model.parameters(), self.model.buffers())),
            torch.device("cpu"),
        )

    def damage(self, full: Tensor, values: Tensor) -> Tensor:
        """Return how much of the right answer is lost from metric values `full` to `values`:
        `full - values` where higher is right, else `values - full`.
        """
        return full - values if self.higher_is_right else values - full

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


def target(
    model: nn.Module,
    metric: Metric,
    name: str = "model",
    *,
    higher_is_right: bool | None = None,
) -> Target:
    """Make a target of any torch module and a metric `(output, batch) -> (examples,)`; see `Target`
    for `higher_is_right`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch module, got {type(model).__name__}")
    return Target(model, metric, name, higher_is_right)
