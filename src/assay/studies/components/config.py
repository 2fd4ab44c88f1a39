"""The keys of the components study."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from assay.errors import InputError
from assay.io.files import existing
from assay.studies.agreement_config import AgreementModelConfig
from assay.studies.component_config import PenaltyConfig
from assay.studies.fields import (
    Amount,
    Count,
    Input,
    Name,
    Names,
    Positive,
    Size,
    StudyConfig,
    Whole,
)
from assay.studies.fields import Config as Keys


class LayoutConfig(Keys):
    """The sizes of a language model that is planned for and not loaded; those of an 8B Llama by
    default.
    """

    family: Name = "llama"
    hidden: Size = 4096
    intermediate: Size = 14_336
    layers: Count = Field(32, le=1024)
    heads: Count = Field(32, le=1024)
    key_value_heads: Count = Field(8, le=1024)
    vocabulary: Size = 128_256


class TargetConfig(Keys):
    """`path` is a Hugging Face folder or hub name; without one, a dry run plans for `layout`, and
    `train` trains the `agreement` model first. With `random`, every weight is drawn anew as if the
    model had never been trained: the control that says how much structure is found in noise.
    """

    path: Input | None = None
    train: bool = False
    agreement: AgreementModelConfig = AgreementModelConfig(size="short")
    random: bool = False
    layout: LayoutConfig = LayoutConfig()


class DataConfig(Keys):
    """`path` is a plain text file, cut into windows of `length` tokens; `held_out` of them are for
    evaluation, and of the others the first `share` are trained on. An agreement model has sentences
    instead, `held_out` of each construction.
    """

    path: Input | None = None
    length: Count = Field(32, ge=4)
    held_out: Count = Field(16, ge=2)
    share: Positive = Field(1.0, le=1)


class ComponentsConfig(Keys):
    """`per_site` components of each matrix, which start at directions of the `data` or at the
    `singular` parts of the matrices, and stay there if `frozen`; `importance` with its `hidden`
    units, and for the transformer its `width`, `blocks` and `heads`.
    """

    per_site: Count = 64
    start: Literal["data", "singular"] = "data"
    frozen: bool = False
    importance: Literal["scalar", "vector", "shared", "relative", "transformer"] = "transformer"
    hidden: Size = 256
    width: Size = 128
    blocks: Count = Field(2, le=64)
    heads: Count = Field(4, le=256)


class ReferenceConfig(Keys):
    """Where the coefficients come from; a dry run says what changes from there."""

    sites: Count = 27
    batch: Count = 512
    length: Count = 2048


class TrainingConfig(Keys):
    """`batch` windows a step; `adversary` is the coefficient of the persistent adversary's term,
    whose sources move by `adversary_rate`; `faithfulness` that of what is left of the matrices.
    """

    steps: Count = 400
    batch: Count = 16
    rate: Positive = 1e-3
    importance_rate: Positive = 1e-3
    warmup_steps: Whole = 200
    adversary: Amount = 0.5
    adversary_rate: Positive = 0.01
    adversary_warm: Whole = 2
    faithfulness: Amount = 0.0


class Config(StudyConfig):
    """`sites` are patterns over module paths. `frontier` are further coefficients of the penalty,
    `seeds` the number of decompositions that are compared, `singular` compares with gated singular
    parts, and `split` measures again with one component split into two equal halves.
    """

    target: TargetConfig = TargetConfig()
    sites: Names = ("*.mlp.*",)
    data: DataConfig = DataConfig()
    components: ComponentsConfig = ComponentsConfig()
    penalty: PenaltyConfig = PenaltyConfig(coefficient=1e-3)
    reference: ReferenceConfig = ReferenceConfig()
    training: TrainingConfig = TrainingConfig()
    pgd: tuple[Count, ...] = (20, 40, 80)
    frontier: tuple[Positive, ...] = ()
    seeds: Count = Field(1, le=100)
    singular: bool = False
    split: bool = False

    def require(self) -> None:
        """Refuse a missing model or text, and empty lists."""
        if self.target.train:
            if self.target.path is not None or self.data.path is not None:
                raise InputError(
                    "target.train trains the agreement model on its own sentences; it goes with"
                    " neither target.path nor data.path"
                )
            self.target.agreement.require_trainable()
        elif self.target.path is None or self.data.path is None:
            raise InputError(
                "this recipe takes your own model and text: --set target.path=MODEL_DIR --set"
                " data.path=TEXT_FILE; --dry-run plans without them"
            )
        else:
            existing(self.data.path)
        self.require_lists()

    def require_lists(self) -> None:
        """Refuse empty lists and a width that heads do not divide."""
        if not self.sites:
            raise InputError("sites is empty; give at least one pattern")
        if not self.pgd:
            raise InputError("pgd is empty; give at least one number of steps")
        chosen = self.components
        if chosen.importance == "transformer" and chosen.width % (2 * chosen.heads):
            raise InputError(
                f"components.width = {chosen.width} cannot be split into {chosen.heads} heads of an"
                f" even width; give a multiple of {2 * chosen.heads}"
            )
