"""Training: one resumable loop for every model and decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.learn.loop import Objective, cosine, fit, ramp

__all__ = ["Objective", "cosine", "fit", "ramp"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the settings beside the loop are read without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from assay.learn import loop

    return getattr(loop, name)
