"""The keys of the attribution study."""

from __future__ import annotations

from typing import Literal

from assay.errors import InputError
from assay.io.files import existing, require_folder
from assay.studies.agreement_config import AgreementModelConfig
from assay.studies.fields import (
    Config as Keys,
)
from assay.studies.fields import Count, Input, Name, Positive, Several, Share, StudyConfig, Whole
from assay.studies.names import require_metric


class TargetConfig(AgreementModelConfig):
    """`path` is a Hugging Face folder or hub name; with `train` a small agreement model is trained
    with the other keys instead.
    """

    path: Input | None = None
    train: bool = False


class DataConfig(Keys):
    """`pairs` is a JSONL or CSV file of clean and patch prompts; without it the agreement
    model's held-out pairs.
    """

    pairs: Input | None = None
    limit: Several = 200


class AuditConfig(Keys):
    """`exact` nodes of every pair are patched to measure the error; `fix` more, where the bars
    say it matters, to mend the scores.
    """

    fix: Whole = 0
    exact: Count = 60
    alpha: Share = 0.1
    tolerance: Positive = 0.01
    kept: Share = 0.1


class Config(StudyConfig):
    """`method` is what is shown: exact effects, or an estimate with its audit; auto takes exact
    effects where patching every node costs less than integrated gradients with their audit. `more`
    names further estimates to compare beside it.
    """

    method: Literal["auto", "exact", "ig", "gradient"] = "auto"
    more: tuple[Literal["ig", "atp-star", "relp", "probes"], ...] = ()
    target: TargetConfig = TargetConfig()
    data: DataConfig = DataConfig()
    metric: Name = "logit_difference"
    sites: tuple[Name, ...] = ()
    reference: Literal["counterfactual", "mean", "zero"] = "counterfactual"
    audit: AuditConfig = AuditConfig()

    def require(self) -> None:
        """Refuse an unknown metric, a missing model, and pairs that are not there."""
        require_metric(self.metric)
        if self.target.path is None and not self.target.train:
            raise InputError(
                "this recipe takes your own model and pairs: --set target.path=MODEL_DIR --set"
                " data.pairs=PAIRS.jsonl (the recipe agreement-attribution trains a model of its"
                " own)"
            )
        if self.target.path is not None and self.target.train:
            raise InputError(
                "target.train trains a model and target.path names one; use the recipe attribution"
                " for a model of your own"
            )
        if self.data.pairs is not None:
            existing(self.data.pairs)
        elif self.target.path is not None:
            raise InputError(
                "a model of your own needs pairs of your own: --set data.pairs=PAIRS.jsonl"
            )
        if self.target.path is not None:
            require_folder(self.target.path)
        if self.target.train:
            self.target.require_trainable()
