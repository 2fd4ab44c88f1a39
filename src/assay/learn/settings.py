"""How small language models are trained, readable without loading PyTorch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageTraining:
    """Size and training of a small language model: AdamW, linear warm-up, cosine to zero."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 64
    steps: int = 1000
    batch: int = 16
    rate: float = 2e-3
    decay: float = 0.1
    seed: int = 0
    save_every: int = 100


@dataclass(frozen=True)
class AgreementTraining(LanguageTraining):
    """The agreement model: `sentences` to train on, `pairs` held out per construction, of which
    `required` must come out right.
    """

    layers: int = 2
    context: int = 16
    steps: int = 600
    batch: int = 128
    sentences: int = 24_000
    pairs: int = 300
    required: float = 0.99


AGREEMENT = {
    "full": AgreementTraining(),
    "short": AgreementTraining(width=64, steps=450, rate=4e-3, required=0.97),
}
"""The agreement model in the size that the recipes train, and a quick one."""
