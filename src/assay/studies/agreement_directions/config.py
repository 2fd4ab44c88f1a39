"""The keys of the agreement-directions study."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from assay.errors import InputError
from assay.studies.agreement_config import AgreementModelConfig
from assay.studies.fields import Count, Input, Place, Positive, Several, StudyConfig


class TargetConfig(AgreementModelConfig):
    """The agreement model, trained with these keys; `path` takes one that was saved by an
    earlier run instead.
    """

    path: Input | None = None


class Config(StudyConfig):
    """`block` counts from the last one when negative; `kl` is the size of the compared steps, in
    nats per sentence.

    `whiten` compares directions at equal disturbance of all outputs instead of equal length.
    """

    target: TargetConfig = TargetConfig()
    construction: Literal["nounpp", "rc", "within_rc"] = "nounpp"
    prompts: Count = Field(100, ge=4)
    block: Place = -1
    k: Several = 8
    references: Count = 2
    whiten: bool = True
    kl: Positive = 0.2

    def require(self) -> None:
        """Refuse a block that the model does not have, and a model that cannot be trained."""
        layers = self.target.layers
        if not -layers <= self.block < layers:
            raise InputError(f"block = {self.block}, and the model has {layers} blocks")
        if self.target.path is None:
            self.target.require_trainable()
