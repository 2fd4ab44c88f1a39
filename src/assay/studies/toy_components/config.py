"""The keys of the toy-components study."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from assay.errors import InputError
from assay.io.files import existing
from assay.memory import require_memory
from assay.studies.component_config import PenaltyConfig
from assay.studies.fields import Config as Keys
from assay.studies.fields import (
    Count,
    Input,
    Positive,
    Probability,
    Several,
    Size,
    StudyConfig,
    Whole,
)


class TargetConfig(Keys):
    """`weights` loads a tied autoencoder (`W`, `b`) from safetensors instead of training one;
    `identities` fixed identity matrices lie between its encoder and decoder. `width` and `layers`
    are those of a residual MLP, whose features are read and written along random directions or
    `orthonormal` ones. `networks` are trained from as many seeds.
    """

    kind: Literal["tms", "residual"] = "tms"
    features: Several = 5
    hidden: Size = 2
    identities: Whole = Field(0, le=64)
    width: Size = 512
    layers: Count = Field(1, le=64)
    orthonormal: bool = False
    steps: Count = 2000
    probability: Probability = Field(0.05, gt=0)
    networks: Count = 1
    weights: Input | None = None


class ComponentsConfig(Keys):
    """`per_site` components at each matrix; `decompositions` of the first network from as many
    seeds, so that they can be compared.
    """

    per_site: Count = 20
    importance: Literal["scalar", "vector", "shared"] = "scalar"
    hidden: Size = 16
    start: Literal["data", "random"] = "data"
    decompositions: Count = 2


class TrainingConfig(Keys):
    """`sources` of the stochastic masks: anywhere between importance and one, or at either end."""

    sources: Literal["binary", "uniform"] = "binary"
    steps: Count = 1000
    batch: Count = 4096
    rate: Positive = 1e-3
    importance_rate: Positive = 6e-3
    warmup_steps: Whole = 200


class EvaluationConfig(Keys):
    """`pgd` is the ladder of steps of the fresh adversary; `samples` inputs are bound."""

    pgd: tuple[Count, ...] = (20, 40, 80, 160, 320)
    samples: Several = Field(512, ge=8)


class Config(StudyConfig):
    target: TargetConfig = TargetConfig()
    components: ComponentsConfig = ComponentsConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def require(self) -> None:
        """Refuse keys that do not go together, and work that does not fit the memory."""
        target = self.target
        if target.weights is not None and target.kind != "tms":
            raise InputError(f"target.weights is for kind 'tms', not {target.kind!r}")
        if target.kind != "tms" and target.identities:
            raise InputError(f"target.identities is for kind 'tms', not {target.kind!r}")
        if target.orthonormal and target.width < target.features:
            raise InputError(
                f"{target.features} orthonormal features need target.width of at least"
                f" {target.features}, got {target.width}"
            )
        if not self.evaluation.pgd:
            raise InputError("evaluation.pgd is empty; give at least one number of steps")
        if target.weights is not None:
            existing(target.weights)
        sites = 2 * target.layers if target.kind == "residual" else 2 + target.identities
        wide = target.width if target.kind == "residual" else target.features
        parts = self.components.per_site
        # Factors and matrices with gradients and two moments; masks, sources and inner activations
        # of all sites, and one slice of the importance nets, for one batch.
        require_memory(
            16 * sites * (parts * (wide + target.hidden) + wide * target.hidden)
            + 4 * self.training.batch * (12 * sites * parts + 4 * wide),
            f"{parts} components at {sites} sites on a batch of {self.training.batch}",
        )
