"""Training: one resumable loop for every model and decomposition."""

from assay.learn.loop import Objective, cosine, fit, ramp

__all__ = ["Objective", "cosine", "fit", "ramp"]
