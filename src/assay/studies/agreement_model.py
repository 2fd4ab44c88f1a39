"""The keys of the agreement model, for the studies that train it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from assay.io.runs import Run
from assay.learn.language import AGREEMENT, AgreementTraining, train_agreement_model
from assay.studies import runner


class AgreementModelConfig(runner.Config):
    """`size` names the values that the other keys have when they are left out."""

    size: Literal["full", "short"] = "full"
    layers: int = Field(AgreementTraining.layers, ge=1)
    width: int = Field(AgreementTraining.width, ge=4)
    heads: int = Field(AgreementTraining.heads, ge=1)
    steps: int = Field(AgreementTraining.steps, ge=1)
    rate: float = Field(AgreementTraining.rate, gt=0)
    required: float = Field(AgreementTraining.required, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("size", "full") not in AGREEMENT:
            return given
        known = asdict(AGREEMENT[given.get("size", "full")])
        chosen = {key: known[key] for key in AgreementModelConfig.model_fields if key in known}
        return {**chosen, **given}

    def train(self, run: Run, seed: int) -> Path:
        """Train the model, or go on with it, and return its folder in the run."""
        chosen = self.model_dump(include=set(AgreementModelConfig.model_fields) - {"size"})
        return train_agreement_model(run, AgreementTraining(**chosen, seed=seed))
