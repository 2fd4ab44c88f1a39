"""The keys of the digits guard study."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from assay.errors import InputError
from assay.guard.settings import Settings
from assay.studies.fields import (
    Amount,
    Count,
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
    """A ReLU network with two hidden layers; every hidden unit is a feature of the guard.

    `networks` are trained from as many seeds, each without another class."""

    first: Size = 128
    second: Size = 64
    steps: Count = 600
    rate: Positive = 3e-3
    decay: Amount = 1e-4
    networks: Count = Field(3, le=10)


class GuardConfig(Keys):
    """See `assay.guard.Settings`; `alpha` is the level of the tests."""

    theta: Share = 1e-5
    delta: Share = 0.05
    alpha: Share = 0.05
    bins: Several = 6
    least: Count = 20

    def settings(self, modes: tuple[str, ...] = ("constant", "marginal", "add")) -> Settings:
        """Return what guards are fitted with."""
        return Settings(modes=modes, **self.model_dump())


class DataConfig(Keys):
    """Numbers of digits in the splits: what tables and the network are fitted on, what tries
    explanations, and what calibrates; the rest is held out. `novel` is the class that the first
    network never sees.
    """

    laboratory: Count = 800
    fresh: Count = 200
    calibration: Count = 300
    novel: Whole = Field(9, le=9)


class AnomalyConfig(Keys):
    """Sizes of the anomalies: the standard deviation of the noise, and the largest change of a
    pixel by FGSM and by PGD, of pixels in [0, 1].
    """

    noise: Positive = 0.3
    fgsm: Positive = 0.15
    pgd: Positive = 0.1


class BackdoorConfig(Keys):
    """The share of training inputs that carry the trigger and the target's label."""

    share: Share = 0.1
    target: Whole = Field(0, le=8)


class Config(StudyConfig):
    """`resplits` of calibration and held-out inputs measure the level of the tests; `tolerance` is
    how far all pruned weights together may move a logit; `agreement` is the size of the language
    model that a second guard is fitted on.
    """

    model: ModelConfig = ModelConfig()
    guard: GuardConfig = GuardConfig()
    data: DataConfig = DataConfig()
    anomalies: AnomalyConfig = AnomalyConfig()
    backdoor: BackdoorConfig = BackdoorConfig()
    resplits: Several = 200
    tolerance: Probability = 0.5
    agreement: Literal["none", "short", "full"] = "short"

    def require(self) -> None:
        """Refuse splits that leave too few digits of nine classes to measure on."""
        data = self.data
        taken, there = data.laboratory + data.fresh + data.calibration, DIGITS * 89 // 100
        if taken > there - 100:
            raise InputError(
                f"data.laboratory, data.fresh and data.calibration take {taken} digits; nine"
                f" classes have about {there}, and 100 must be left to measure on"
            )
        if data.laboratory < 2 * self.guard.least:
            raise InputError(
                f"data.laboratory = {data.laboratory} is too few for bins of guard.least ="
                f" {self.guard.least}"
            )
