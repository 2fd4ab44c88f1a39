"""The keys of the toy-directions study."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from assay.errors import InputError
from assay.io.files import existing
from assay.memory import require_memory
from assay.studies.fields import Config as Keys
from assay.studies.fields import Count, Input, Probability, Several, Size, StudyConfig


class TargetConfig(Keys):
    """`weights` loads a tied autoencoder (`W`, `b`) from safetensors instead of training one;
    `networks` are trained from as many seeds.
    """

    kind: Literal["tms", "superposition", "groups", "squares", "xor", "digits"] = "tms"
    features: Several = 5
    hidden: Size = 2
    group: Size = 2
    steps: Count = 2000
    probability: Probability = Field(0.05, gt=0)
    samples: Several = 1000
    networks: Count = 1
    weights: Input | None = None


class MethodConfig(Keys):
    """`factors`: per-input Fisher factors, pair gradients, or those in which directions stand out
    most on a check. `references` counts the other samples of a pair gradient; `zero` takes the zero
    output instead.
    """

    name: Literal["power", "refinement", "bilevel", "npeff"] = "power"
    factors: Literal["check", "fisher", "pairs"] = "check"
    references: Count | Literal["zero"] = 8
    k: tuple[Count, ...] = (7,)
    rank: Size = 1
    steps: Count | None = None


class Config(StudyConfig):
    target: TargetConfig = TargetConfig()
    method: MethodConfig = MethodConfig()

    def require(self) -> None:
        """Refuse keys that do not go together, and networks that do not fit the memory."""
        target, method = self.target, self.method
        if not method.k:
            raise InputError("method.k is empty; give at least one number of directions")
        if target.weights is not None and target.kind != "tms":
            raise InputError(f"target.weights is for kind 'tms', not {target.kind!r}")
        if target.weights is not None:
            existing(target.weights)
        if target.kind == "groups" and target.features % target.group:
            raise InputError(
                f"target.features must be a multiple of target.group, got {target.features} and"
                f" {target.group}"
            )
        # Weights, gradients and two moments in float32, and one batch of inputs.
        require_memory(
            16 * target.features * (target.hidden + target.features) + 4 * 1024 * target.features,
            f"training {target.features} features in {target.hidden} hidden units",
        )
        require_memory(
            8 * target.samples * target.features,
            f"drawing {target.samples} samples of {target.features} features",
        )
