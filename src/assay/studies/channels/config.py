"""The keys of the channels study."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from assay.errors import InputError
from assay.io.files import existing
from assay.mechanisms.channels.training import Training
from assay.memory import require_memory
from assay.studies.fields import Amount, Count, Input, Name, Positive, Share, Size, StudyConfig
from assay.studies.fields import Config as Keys


class DataConfig(Keys):
    """`path` is an npz or safetensors file with `x` and `y`; with `digits` the data are
    scikit-learn's digits instead.

    `layout` says which axis of images holds the channels, where it cannot be told. With `choosing`
    the test part is left unread, and the study is of the training part split again: keys are chosen
    on that validation part."""

    path: Input | None = None
    digits: bool = False
    train: Share = 0.75
    layout: Literal["auto", "channels-first", "channels-last"] = "auto"
    choosing: bool = False


class ModelConfig(Keys):
    width: Size = 32
    hidden: Size = 64
    blocks: Size = 4
    norm: bool = False
    gate: Name | None = None
    patch: Size | None = None


class TrainingConfig(Keys):
    lam_sparse: Amount = Training.lam_sparse
    lam_delta: Amount = Training.lam_delta
    tau: Amount = Training.tau
    steps: Count = Training.steps
    batch: Count = Training.batch
    rate: Positive = Training.rate
    weight_decay: Amount = Training.weight_decay
    noise: Amount = Training.noise


class AuditConfig(Keys):
    """`tolerance` is the relative error rho to certify; a calibrated threshold keeps the risk with
    probability 1 - eta: the share of new inputs with a wrong channel among their trusted ones
    (promise `input`), or of channels drawn at random, one from each (`channel`). The coverage by
    level is measured over `resplits` random splits of the inputs.
    """

    functional: Literal["logit", "cross_entropy"] = "logit"
    examples: Count = Field(500, ge=8)
    exact: Count = 32
    alpha: Share = 0.1
    top: Count = 5
    resplits: Count = Field(20, ge=2)
    promise: Literal["input", "channel"] = "input"
    tolerance: Positive = 0.1
    risk: Share = 0.05
    eta: Share = 0.05

    def require_bars(self, held_out: int) -> None:
        """Raise InputError when the examples, half of which calibrate, are too few for bars."""
        needed, there = 2 * (math.ceil(1 / self.alpha) - 1), min(self.examples, held_out)
        if there < needed:
            raise InputError(
                f"error bars at audit.alpha = {self.alpha} need {needed} distinct held-out"
                f" examples, and there are {there} (audit.examples takes at most {self.examples})"
            )


class CompareConfig(Keys):
    """Other networks trained on the same data: with `objectives`, under each of five objectives,
    from cross-entropy alone to sparse and short steps; with each number of blocks in `depths`.
    """

    objectives: bool = False
    depths: tuple[Size, ...] = ()


class Config(StudyConfig):
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    audit: AuditConfig = AuditConfig()
    compare: CompareConfig = CompareConfig()

    def require(self) -> None:
        """Refuse missing data, and a network that does not fit the memory."""
        if self.data.path is None and not self.data.digits:
            raise InputError(
                "this recipe takes your own data: --set data.path=FILE, an npz or safetensors file"
                " with x and y (the recipe digits-channels takes scikit-learn's digits)"
            )
        if self.data.path is not None and self.data.digits:
            raise InputError(
                "data.digits takes scikit-learn's digits and data.path names a file; use the recipe"
                " channels for data of your own"
            )
        if self.data.path is not None:
            existing(self.data.path)
        self.audit.require_bars(self.audit.examples)
        if self.audit.exact < self.model.blocks:
            raise InputError(
                f"audit.exact = {self.audit.exact} parts per example cannot cover model.blocks ="
                f" {self.model.blocks}; give at least one per block"
            )
        model, blocks = self.model, max(self.model.blocks, *self.compare.depths, 1)
        # Weights, gradients and two moments in float32.
        require_memory(
            16 * 3 * blocks * model.width * model.hidden,
            f"training {blocks} blocks of {model.width} x {model.hidden}",
        )
