"""How dictionaries are trained, readable without loading PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from assay.errors import InputError, unknown

Penalty = Literal["l0", "tanh"]

SPARSITY = {"relu": 0.3, "gated": 1.0, "jumprelu": 2.0}
"""The coefficient of the penalty of every architecture that has one, where none is given."""


@dataclass(frozen=True)
class Training:
    """How to train dictionaries: Adam, linear warm-up, cosine to zero.

    `batch` positions a step, put together from `shares` parts that as many processes can divide
    among themselves. `sparsity` is the coefficient of the penalty of those architectures that have
    one (None: that in `SPARSITY`), which comes in over the first tenth; `penalty` is that of
    JumpReLU, its L0 or `tanh` of the features (Anthropic 2025). `auxiliary` is the coefficient of
    what dead features rebuild of the error (Gao et al. 2024), at most `auxiliary_features` of them
    at a position. Features that were
    silent for `revive_every` steps are dead and are moved to badly rebuilt inputs (Bricken et al.
    2023) every so many steps over the share `revive_until` of training; 0 steps: the twentieth part
    of all.

    The last share `end_to_end` of the steps descends the KL of the spliced network on `windows`
    windows a step, all sites at once and one at a time in turn, plus `local` times the local loss
    (Braun et al. 2024). Raises InputError for numbers out of range."""

    steps: int = 2000
    batch: int = 4096
    rate: float = 1e-3
    warmup: float = 0.02
    sparsity: float | None = None
    penalty: Penalty = "l0"
    bandwidth: float = 1.0
    threshold: float = 0.5
    auxiliary: float = 1 / 32
    auxiliary_features: int = 32
    revive_every: int = 0
    revive_until: float = 0.7
    end_to_end: float = 0.0
    local: float = 1.0
    windows: int = 32
    seed: int = 0
    shares: int = 1
    log_every: int = 50
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "windows", "shares", "auxiliary_features"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rate", "bandwidth"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("sparsity", "auxiliary", "local", "revive_every", "threshold"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"{name} must be at least 0, got {value}")
        for name in ("warmup", "revive_until", "end_to_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.penalty not in get_args(Penalty):
            raise unknown("penalty", str(self.penalty), get_args(Penalty))
        if self.batch % self.shares or self.windows % self.shares:
            raise InputError(
                f"shares = {self.shares} must divide batch = {self.batch} and windows ="
                f" {self.windows}"
            )

    def sparsity_of(self, architecture: str) -> float:
        """Return the coefficient of the penalty of an architecture."""
        return SPARSITY.get(architecture, 0.0) if self.sparsity is None else self.sparsity

    @property
    def between_revivals(self) -> int:
        """Steps without a value after which a feature is dead."""
        return self.revive_every or max(self.steps // 20, 1)

    @property
    def local_steps(self) -> int:
        """The steps before those end to end."""
        return self.steps - round(self.steps * self.end_to_end)
