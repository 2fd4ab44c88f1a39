"""The keys of the dictionaries study."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from assay.errors import InputError
from assay.io.files import existing
from assay.memory import require_memory
from assay.studies.fields import (
    Amount,
    Count,
    Input,
    Names,
    Positive,
    Probability,
    Size,
    StudyConfig,
    Whole,
)
from assay.studies.fields import (
    Config as Keys,
)

Architecture = Literal["batchtopk", "gated", "jumprelu", "matryoshka", "relu", "topk"]


class TargetConfig(Keys):
    """`path` is a Hugging Face folder or hub name; with `train` a small language model is trained
    on the text with the other keys instead: `vocabulary` byte pairs, windows of `data.length`
    tokens, `steps` of `batch` windows, and the last tenth of the text held out.
    """

    path: Input | None = None
    train: bool = False
    layers: Size = 2
    width: Size = Field(64, ge=4)
    heads: Size = 4
    vocabulary: Count = Field(1024, gt=256)
    steps: Count = 800
    batch: Count = 32
    rate: Positive = 2e-3


class DataConfig(Keys):
    """`path` is a plain text file, cut into windows of `length` tokens; `held_out` of them are for
    evaluation. The first `constant` positions of every window are left out, as their activations
    hardly vary.
    """

    path: Input | None = None
    length: Count = Field(64, ge=4)
    held_out: Count = Field(128, ge=2)
    constant: Whole = 1


class TrainingConfig(Keys):
    """See `assay.dictionaries.settings.Training`."""

    steps: Count = 2000
    batch: Count = 2048
    rate: Positive = 1e-3
    sparsity: Amount | None = None
    end_to_end: Probability = 0.1
    local: Amount = 1.0
    windows: Count = 32
    save_every: Count = 200


class Config(StudyConfig):
    """`sites` are patterns over TransformerLens names and module paths; `features` the size of
    every dictionary (by default eight times the width of its site), `k` the number of active
    features of those architectures that fix it.
    """

    target: TargetConfig = TargetConfig()
    data: DataConfig = DataConfig()
    sites: Names = (
        "blocks.*.hook_attn_out",
        "blocks.*.hook_mlp_out",
        "blocks.*.hook_resid_post",
    )
    architecture: Architecture = "topk"
    features: Count | None = None
    k: Count = 16
    training: TrainingConfig = TrainingConfig()

    def require(self) -> None:
        """Refuse a missing model or text, and an empty list of sites."""
        if self.data.path is None or (self.target.path is None and not self.target.train):
            raise InputError(
                "this recipe takes your own model and text: --set target.path=MODEL_DIR --set"
                " data.path=TEXT_FILE (the recipe text-dictionaries trains a model on the text)"
            )
        if self.target.path is not None and self.target.train:
            raise InputError(
                "target.train trains a model and target.path names one; use the recipe dictionaries"
                " for a model of your own"
            )
        if self.target.train and self.target.width % self.target.heads:
            raise InputError(
                f"target.width must be a multiple of target.heads, got {self.target.width} and"
                f" {self.target.heads}"
            )
        if self.target.train:  # weights, gradients and two moments; a block holds 12 width^2
            require_memory(
                16 * (12 * self.target.layers + 2) * self.target.width**2,
                f"training target.layers = {self.target.layers} of target.width ="
                f" {self.target.width}",
            )
        existing(self.data.path)
        if not self.sites:
            raise InputError("sites is empty; give at least one pattern")
        if self.data.constant >= self.data.length:
            raise InputError(
                f"data.constant = {self.data.constant} leaves nothing of windows of data.length ="
                f" {self.data.length} tokens"
            )
