"""A kind of part before it is bound to a batch: what is trained, loaded, saved and compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from assay.core.mechanisms import Mechanisms
from assay.core.target import Batch, Target
from assay.errors import InputError, unknown

ReferenceName = Literal["counterfactual", "mean", "zero"]


@dataclass(frozen=True)
class Reference:
    """What a gate of zero puts at a site: the value of a paired run ("counterfactual"), the mean
    over the examples of a run at the same position ("mean"), or zero ("zero").

    `batch` is the run that values are read from; a mean without one is that of the batch bound to.

    Raises InputError for another name, and for a counterfactual without a batch.
    """

    name: ReferenceName = "zero"
    batch: Batch | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(ReferenceName):
            raise unknown("reference", str(self.name), get_args(ReferenceName))
        if self.name == "counterfactual" and self.batch is None:
            raise InputError(
                "reference 'counterfactual' needs a patch batch; give patch=, or use"
                " reference='zero' or 'mean'"
            )


class Kind(ABC):
    """Parts of a network that no batch is bound to yet; `bind` gives their gates on one."""

    name: ClassVar[str]

    @abstractmethod
    def bind(self, target: Target, batch: Batch, reference: Reference | None = None) -> Mechanisms:
        """Return the parts as gates on a batch.

        Raises InputError where the parts do not fit the target, and for a reference that the kind
        does not have."""

    def refuse_reference(self, reference: Reference | None) -> None:
        """Raise InputError for a reference, in a kind whose base is fixed."""
        if reference is not None:
            raise InputError(
                f"{self.name} have one base and take no reference, got {reference.name!r}"
            )
