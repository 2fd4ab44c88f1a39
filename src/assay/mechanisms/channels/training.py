"""How channels are trained, readable without loading PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from assay.errors import InputError


@dataclass(frozen=True)
class Training:
    """How to train; the defaults reach the digits' figures in a few CPU seconds.

    The loss is `CE + lam_sparse (1 - mean Hoyer(attr)) + lam_delta mean relu(delta - tau)^2`.
    `lam_sparse` is zero until the share `ramp_begin` of training and grows linearly until
    `ramp_end`. `noise` is the standard deviation of the Gaussian noise added to the training inputs
    (images lie in [-1, 1], columns of tables have variance one): without it, steps stay short on
    the training inputs only. The rate falls along a cosine when `assay.learn.fit` is given that
    schedule. Monitoring reads `monitored` training examples."""

    lam_sparse: float = 1.0
    lam_delta: float = 100.0
    tau: float = 0.1
    ramp_begin: float = 0.2
    ramp_end: float = 0.5
    steps: int = 2000
    batch: int = 128
    rate: float = 3e-3
    noise: float = 0.1
    weight_decay: float = 0.0
    log_every: int = 100
    monitored: int = 64

    def __post_init__(self) -> None:
        for name in ("lam_sparse", "lam_delta", "weight_decay", "tau", "noise"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("steps", "batch", "log_every", "monitored"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.rate > 0:
            raise InputError(f"rate must be above 0, got {self.rate}")
        if not 0 <= self.ramp_begin <= self.ramp_end <= 1:
            raise InputError(
                "the ramp must satisfy 0 <= begin <= end <= 1, got"
                f" {self.ramp_begin}..{self.ramp_end}"
            )
