"""Channels of residual bilinear networks: attribution, exact ablation and second order in closed form.

One idea a file: `weights` reads a network, `clean` runs and differentiates it, `attribution` is first order, `ablation` the
exact error scan, `second_order` the curvature of every gate, `forms` the matrices of a block, `tables` the static tables of
the last two blocks, `interaction` the weights alone; `data` and `training` make a network, `bind` makes its channels gated
parts for the operations that all kinds share.
"""

from assay.mechanisms.channels.bind import ChannelMechanisms, bind_channels, channels

__all__ = ["ChannelMechanisms", "bind_channels", "channels"]
