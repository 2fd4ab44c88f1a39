"""The keys of the crosscoder proof study."""

from __future__ import annotations

from typing import Literal

from assay.errors import InputError
from assay.io.files import existing
from assay.studies.fields import (
    Amount,
    Count,
    Input,
    Name,
    Positive,
    Probability,
    Several,
    Share,
    Size,
    StudyConfig,
    Whole,
)
from assay.studies.fields import Config as Keys

CERTIFIED = ("one_side", "strongest", "compact", "exact")


class ModelConfig(Keys):
    """`path` is a safetensors file of a residual ReLU network of one block for pairs of tokens
    (embed, blocks.0.mlp_in, blocks.0.mlp_out, unembed; weight and bias); without it one is trained.
    """

    path: Input | None = None
    vocabulary: Several = 24
    width: Size = 64
    hidden: Size = 128
    steps: Count = 700
    rate: Positive = 3e-3
    decay: Amount = 0.5


class CrosscoderConfig(Keys):
    """`path` is a folder of a crosscoder; without it one is trained, starting at proposed codes
    (one feature per token and position, one per answer) or at random ("random").
    """

    path: Input | None = None
    features: Size = 72
    start: Literal["tokens", "random"] = "tokens"
    steps: Count = 200
    rate: Positive = 3e-4
    sparsity: Amount = 0.1
    interaction: Amount = 0.0
    hinge: Amount = 1.0
    margin: Positive = 1.0
    compact: Probability = 0.5


class ProofsConfig(Keys):
    """`certified` writes the certificate; `depth` is the number of strongest features that split
    groups before they are halved.
    """

    certified: Name = "strongest"
    depth: Whole = 1


class Config(StudyConfig):
    model: ModelConfig = ModelConfig()
    crosscoder: CrosscoderConfig = CrosscoderConfig()
    proofs: ProofsConfig = ProofsConfig()
    held_out: Share = 0.2

    def require(self) -> None:
        """Refuse files that are not there, an unknown strategy, and more features than a quarter of
        the points: a feature per point would explain nothing.
        """
        if self.proofs.certified not in CERTIFIED:
            raise InputError(
                f"proofs.certified must be one of {', '.join(CERTIFIED)}, got"
                f" {self.proofs.certified!r}"
            )
        if self.model.path is not None:
            existing(self.model.path)
            return
        points, needed = self.model.vocabulary**2, 3 * self.model.vocabulary
        if self.crosscoder.path is None and 4 * self.crosscoder.features > points:
            raise InputError(
                f"crosscoder.features must be at most a quarter of the {points} points, got"
                f" {self.crosscoder.features}"
            )
        if self.crosscoder.start == "tokens" and self.crosscoder.features < needed:
            raise InputError(
                f"crosscoder.start = tokens needs {needed} features, three per token, got"
                f" {self.crosscoder.features}"
            )
