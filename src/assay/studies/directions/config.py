"""The keys of the directions study."""

from __future__ import annotations

from pydantic import Field

from assay.errors import InputError
from assay.io.files import existing, require_folder
from assay.studies.fields import Config as Keys
from assay.studies.fields import Count, Input, Name, Positive, Several, StudyConfig


class TargetConfig(Keys):
    """`path` is a Hugging Face folder or hub name."""

    path: Input | None = None


class DataConfig(Keys):
    """`path` is a plain text file, cut into windows of `length` tokens."""

    path: Input | None = None
    length: Count = Field(32, ge=8)
    windows: Count = Field(64, ge=8)


class Config(StudyConfig):
    """`parameters` is a shell pattern over parameter names; each context stands against
    `references` others; steps change `kl` nats.
    """

    target: TargetConfig = TargetConfig()
    data: DataConfig = DataConfig()
    parameters: Name = "*.0.*attn*.weight"
    k: Several = 12
    references: Count = 4
    seeds: Count = 2
    kl: Positive = 0.1

    def require(self) -> None:
        """Refuse a missing model or text."""
        if self.target.path is None or self.data.path is None:
            raise InputError(
                "this recipe takes your own model and text: --set target.path=MODEL_DIR --set"
                " data.path=TEXT_FILE"
            )
        existing(self.data.path)
        require_folder(self.target.path)
