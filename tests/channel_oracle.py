"""Brute force for channels: the network run again with channels gated, nothing shared with the
closed forms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as f

from assay.targets.bilinear import GATES, BilinearNetwork


def network(
    seed: int,
    *,
    blocks: int = 3,
    width: int = 6,
    hidden: int = 5,
    classes: int = 4,
    scale: float = 1.0,
    **options: object,
) -> BilinearNetwork:
    """A random float64 network; with `patches=True` it reads 4 x 4 images in four patches."""
    generator = torch.Generator().manual_seed(seed)
    if options.pop("patches", False):
        options |= {"image": (4, 4), "patch": 2}
    model = BilinearNetwork(
        16, classes, width=width, hidden=hidden, blocks=blocks, generator=generator, **options
    ).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "position":
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
            elif name.endswith("norm.weight"):
                weight.copy_(
                    1 + 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                )
            elif name.startswith("blocks"):
                weight.mul_(scale)
    return model


def batch(seed: int, examples: int = 4, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(examples, 16, generator=generator, dtype=torch.float64), torch.randint(
        0, classes, (examples,), generator=generator
    )


def gated(
    model: BilinearNetwork,
    x: Tensor,
    y: Tensor,
    functional: str,
    gates: Tensor,
    frozen: bool = False,
) -> Tensor:
    """The functional of every example with channel gates `(examples, blocks, hidden)`; frozen
    norms keep the clean scale.
    """
    scales: list[Tensor] = []
    for chosen in (torch.ones_like(gates), gates) if frozen else (gates,):
        state = model.embed(model.cut(x))
        if model.position is not None:
            state = state + model.position
        kept = list(scales)
        for index, block in enumerate(model.blocks):
            left = block.left(state)
            left = left if block.gate is None else GATES[block.gate](left)
            gate = chosen[:, index] if state.ndim == 2 else chosen[:, index].unsqueeze(1)
            state = state + block.down(gate * left * block.right(state))
            if isinstance(block.norm, nn.RMSNorm):
                rms = (state.square().mean(-1, keepdim=True) + block.norm.eps).sqrt()
                if not kept:
                    scales.append(rms)
                state = block.norm.weight * state / (kept[index] if kept else rms)
    logits = model.head(state.mean(1) if state.ndim == 3 else state)
    return (
        logits.gather(1, y[:, None])[:, 0]
        if functional == "logit"
        else f.cross_entropy(logits, y, reduction="none")
    )


def ablated(
    model: BilinearNetwork, x: Tensor, y: Tensor, functional: str, frozen: bool = False
) -> Tensor:
    """The effect of zeroing each channel, one forward pass per channel."""
    count, hidden = len(model.blocks), model.hidden
    effects = torch.empty(len(x), count, hidden, dtype=torch.float64)
    clean = gated(model, x, y, functional, torch.ones_like(effects), frozen)
    for block in range(count):
        for channel in range(hidden):
            gates = torch.ones_like(effects)
            gates[:, block, channel] = 0
            effects[:, block, channel] = clean - gated(model, x, y, functional, gates, frozen)
    return effects.detach()


def derivatives(
    model: BilinearNetwork, x: Tensor, y: Tensor, functional: str, frozen: bool = False
) -> tuple[Tensor, Tensor]:
    """First and (unmixed) second derivatives of the functional in the gates, by autograd."""
    gates = torch.ones(
        len(x), len(model.blocks), model.hidden, dtype=torch.float64, requires_grad=True
    )
    (first,) = torch.autograd.grad(
        gated(model, x, y, functional, gates, frozen).sum(), gates, create_graph=True
    )
    second = torch.zeros_like(first)
    for block in range(gates.shape[1]):
        for channel in range(gates.shape[2]):
            (row,) = torch.autograd.grad(first[:, block, channel].sum(), gates, retain_graph=True)
            second[:, block, channel] = row[:, block, channel]
    return first.detach(), second
