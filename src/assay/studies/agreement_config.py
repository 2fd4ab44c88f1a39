"""The keys of the agreement model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field, model_validator

from assay.errors import InputError
from assay.learn.settings import AGREEMENT, AgreementTraining
from assay.memory import require_memory
from assay.studies.fields import Config, Count, Positive, Probability, Size


class AgreementModelConfig(Config):
    """`size` names the values that the other keys have when they are left out."""

    size: Literal["full", "short"] = "full"
    layers: Size = AgreementTraining.layers
    width: Size = Field(AgreementTraining.width, ge=4)
    heads: Size = AgreementTraining.heads
    steps: Count = AgreementTraining.steps
    rate: Positive = AgreementTraining.rate
    required: Probability = AgreementTraining.required

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        size = given.get("size", "full") if isinstance(given, dict) else None
        if not isinstance(size, str) or size not in AGREEMENT:
            return given
        known = asdict(AGREEMENT[size])
        chosen = {key: known[key] for key in AgreementModelConfig.model_fields if key in known}
        return {**chosen, **given}

    def require_trainable(self) -> None:
        """Raise InputError for a network that cannot be built or does not fit the memory."""
        if self.width % self.heads:
            raise InputError(
                f"target.width must be a multiple of target.heads, got {self.width} and"
                f" {self.heads}"
            )
        # Weights, gradients and two moments in float32; a block holds 12 width^2 weights.
        require_memory(
            16 * 12 * self.layers * self.width**2,
            f"training target.layers = {self.layers} of target.width = {self.width}",
        )
