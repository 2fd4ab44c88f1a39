"""The agreement model, for the studies that train it."""

from __future__ import annotations

from pathlib import Path

from assay.io.runs import Run
from assay.learn.language import train_agreement_model
from assay.learn.settings import AgreementTraining
from assay.studies.agreement_config import AgreementModelConfig


def train_agreement(config: AgreementModelConfig, run: Run, seed: int) -> Path:
    """Train the model, or go on with it, and return its folder in the run."""
    chosen = config.model_dump(include=set(AgreementModelConfig.model_fields) - {"size"})
    return train_agreement_model(run, AgreementTraining(**chosen, seed=seed))
