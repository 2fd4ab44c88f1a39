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

DIGITS = 1797


class ModelConfig(Keys):
    """`path` is a safetensors file of a residual ReLU network of one block (embed, blocks.0.mlp_in,
    blocks.0.mlp_out, unembed; weight and bias); without it one is trained. `vocabulary` is that of
    the task "pairs".
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
    (one feature per token and position, one per answer) or at random ("random"). `cotrain` trains
    the network along with it, `batch` points a step, with the hinge in the loss of both:
    the network is then one that was made to be proved about.
    """

    path: Input | None = None
    features: Size = 72
    start: Literal["tokens", "random"] = "tokens"
    steps: Count = 200
    rate: Positive = 3e-4
    sparsity: Amount = 0.1
    interaction: Amount = 0.0
    hinge: Amount = 4.0
    margin: Positive = 1.0
    compact: Probability = 0.5
    cotrain: bool = False
    batch: Count = 512


class ProofsConfig(Keys):
    """`certified` writes the certificate; `depth` is the number of strongest features that split
    groups before they are halved.
    """

    certified: Name = "strongest"
    depth: Whole = 1


class Config(StudyConfig):
    """`task`: name the larger of two tokens, on all pairs, or the digits of scikit-learn."""

    task: Literal["pairs", "digits"] = "pairs"
    model: ModelConfig = ModelConfig()
    crosscoder: CrosscoderConfig = CrosscoderConfig()
    proofs: ProofsConfig = ProofsConfig()
    held_out: Share = 0.2

    def require(self) -> None:
        """Refuse files that are not there, an unknown strategy, and more features than a quarter of
        the points: a feature per point would explain nothing.
        """
        from assay.proofs.crosscoder.certificate import RULES

        if self.proofs.certified not in RULES:
            raise InputError(
                f"proofs.certified must be one of {', '.join(RULES)}, got {self.proofs.certified!r}"
            )
        chosen = self.crosscoder
        if chosen.cotrain and (chosen.path is not None or self.model.path is not None):
            raise InputError(
                "crosscoder.cotrain trains a network and a crosscoder anew; it goes with neither"
                " model.path nor crosscoder.path"
            )
        if chosen.start == "tokens" and self.task != "pairs" and chosen.path is None:
            raise InputError(
                f"crosscoder.start = tokens is for the task pairs; set it to random for {self.task}"
            )
        if self.model.path is not None:
            existing(self.model.path)
            return
        vocabulary = self.model.vocabulary
        points = vocabulary**2 if self.task == "pairs" else DIGITS
        if chosen.path is None and 4 * chosen.features > points:
            raise InputError(
                f"crosscoder.features must be at most a quarter of the {points} points, got"
                f" {chosen.features}"
            )
        if chosen.start == "tokens" and chosen.features < 3 * vocabulary:
            raise InputError(
                f"crosscoder.start = tokens needs {3 * vocabulary} features, three per token, got"
                f" {chosen.features}"
            )
