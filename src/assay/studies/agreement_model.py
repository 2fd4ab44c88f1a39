"""The keys of the agreement model, for the studies that train it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from assay.io.runs import Run
from assay.learn.language import AgreementTraining, train_agreement_model
from assay.studies import runner


class AgreementModelConfig(runner.Config):
    layers: int = Field(AgreementTraining.layers, ge=1)
    width: int = Field(AgreementTraining.width, ge=4)
    heads: int = Field(AgreementTraining.heads, ge=1)
    steps: int = Field(AgreementTraining.steps, ge=1)
    rate: float = Field(AgreementTraining.rate, gt=0)
    required: float = Field(AgreementTraining.required, ge=0, le=1)

    def train(self, run: Run, seed: int) -> Path:
        """Train the model, or go on with it, and return its folder in the run."""
        chosen = self.model_dump(include=set(AgreementModelConfig.model_fields))
        return train_agreement_model(run, AgreementTraining(**chosen, seed=seed))
