"""Channels of residual bilinear networks: attribution that says what switching a channel off
does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.mechanisms.channels.bind import ChannelMechanisms, Channels, channels

__all__ = ["ChannelMechanisms", "Channels", "channels"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the training's settings are read without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from assay.mechanisms.channels import bind

    return getattr(bind, name)
