"""The keys of the crosscoder study."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from assay.errors import InputError
from assay.io.files import existing
from assay.studies.fields import (
    Amount,
    Count,
    Input,
    Names,
    Positive,
    Share,
    Size,
    StudyConfig,
    Whole,
)
from assay.studies.fields import Config as Keys


class TargetConfig(Keys):
    """`path` is a Hugging Face folder or hub name."""

    path: Input | None = None


class DataConfig(Keys):
    """`path` is a plain text file, cut into windows of `length` tokens; `held_out` of them are for
    evaluation. The first `constant` positions of every window are left out, as their activations
    hardly vary. The verbs over a finished run look at `shown` of the held-out windows.
    """

    path: Input | None = None
    length: Count = Field(64, ge=4)
    held_out: Count = Field(128, ge=2)
    constant: Whole = 1
    shown: Count = 8


class TrainingConfig(Keys):
    """`sparsity` weighs the codes times the norms of their decoders, summed over layers, with the
    states of every layer scaled to a mean square of one; BatchTopK needs none.
    """

    steps: Count = 2000
    batch: Count = 1024
    rate: Positive = 1e-3
    sparsity: Amount | None = None
    save_every: Count = 200


class Config(StudyConfig):
    """`sites` are patterns over TransformerLens names and module paths of residual states;
    `features` is by default eight times their width; `k` is the mean number of active features of
    BatchTopK. `path` is a folder of a crosscoder, ours or in the layout of dictionary_learning
    (layers in the order of the sites): it is evaluated and nothing is trained. A feature's gate
    acts at the first layer where its decoder's norm reaches `share` of its largest.
    """

    target: TargetConfig = TargetConfig()
    data: DataConfig = DataConfig()
    sites: Names = ("blocks.*.hook_resid_post",)
    path: Input | None = None
    activation: Literal["relu", "jumprelu", "batch_topk"] = "batch_topk"
    features: Size | None = None
    k: Count = 16
    share: Share = 0.1
    training: TrainingConfig = TrainingConfig()

    def require(self) -> None:
        """Refuse a missing model or text, and an empty list of sites."""
        if self.target.path is None or self.data.path is None:
            raise InputError(
                "this recipe takes your own model and text: --set target.path=MODEL_DIR --set"
                " data.path=TEXT_FILE"
            )
        existing(self.data.path)
        if not self.sites:
            raise InputError("sites is empty; give at least one pattern")
        if self.data.constant >= self.data.length:
            raise InputError(
                f"data.constant = {self.data.constant} leaves nothing of windows of data.length ="
                f" {self.data.length} tokens"
            )
        if self.data.shown > self.data.held_out:
            raise InputError(
                f"data.shown = {self.data.shown} is more than data.held_out = {self.data.held_out}"
            )
