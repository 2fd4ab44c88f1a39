"""Channels of residual bilinear networks: attribution that says what switching a channel off
does.
"""

from assay.mechanisms.channels.bind import ChannelMechanisms, Channels, channels

__all__ = ["ChannelMechanisms", "Channels", "channels"]
