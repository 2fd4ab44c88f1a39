"""The units of a small ReLU network as parts."""

from __future__ import annotations

import torch
from torch import nn

from assay import Batch, nodes, target
from assay.core.mechanisms import Mechanisms


def units(examples: int = 2) -> Mechanisms:
    """The units of a ReLU network of two layers, zero at gate zero."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    x = torch.rand(examples, 5, generator=generator)
    batch = Batch(x, model(x).argmax(-1))
    logit = target(model.double(), lambda out, batch: out.gather(1, batch.labels[:, None])[:, 0])
    batch = Batch(x.double(), batch.labels)
    return nodes(logit, batch, None, ["1", "3"], "zero", neurons=["1", "3"])
