"""Residual bilinear networks: every block adds `D (L x * R x)`, so that every logit is a
polynomial of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as f

from assay.errors import InputError, unknown

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": f.gelu,
    "relu": f.relu,
    "sigmoid": torch.sigmoid,
    "silu": f.silu,
    "tanh": torch.tanh,
}


class BilinearBlock(nn.Module):
    """`x + D (s(L x) * R x)`, then RMSNorm if asked for; `s` is the identity unless a gate is
    named.
    """

    def __init__(self, width: int, hidden: int, *, norm: bool = False, gate: str | None = None):
        super().__init__()
        self.left = nn.Linear(width, hidden, bias=False)
        self.right = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.norm = nn.RMSNorm(width, eps=1e-6) if norm else nn.Identity()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        if self.gate is not None:
            left = GATES[self.gate](left)
        return self.norm(x + self.down(left * self.right(x)))


class BilinearNetwork(nn.Module):
    """Embedding, residual bilinear blocks, head; no biases (arXiv 2410.08417).

    Inputs are `(examples, inputs)`, or any shape with that many entries per example. With `image =
    (height, width)` or `(channels, height, width)` and `patch`, the image is cut into square
    patches, each patch goes through the blocks with a learned position added after the embedding,
    and the last states are averaged before the head.

    Raises InputError for sizes that are not positive, an unknown gate, or patches that do not tile
    the image."""

    def __init__(
        self,
        inputs: int,
        classes: int,
        *,
        width: int = 32,
        hidden: int = 64,
        blocks: int = 4,
        norm: bool = False,
        gate: str | None = None,
        image: tuple[int, ...] | None = None,
        patch: int | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        sizes = {
            "inputs": inputs,
            "classes": classes,
            "width": width,
            "hidden": hidden,
            "blocks": blocks,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} must be at least 1, got {size}")
        if gate is not None and gate not in GATES:
            raise unknown("gate", gate, GATES)
        self.inputs, self.classes, self.width, self.hidden = inputs, classes, width, hidden
        self.gate, self.normed = gate, norm
        self.image, self.patch = _checked_image(inputs, image, patch)
        self.positions = 1
        entries = inputs
        if self.image is not None and self.patch is not None:
            channels, height, across = self.image
            self.positions = (height // self.patch) * (across // self.patch)
            entries = channels * self.patch * self.patch
        self.embed = nn.Linear(entries, width, bias=False)
        self.position = (
            nn.Parameter(torch.zeros(self.positions, width)) if self.positions > 1 else None
        )
        self.blocks = nn.ModuleList(
            BilinearBlock(width, hidden, norm=norm, gate=gate) for _ in range(blocks)
        )
        self.head = nn.Linear(width, classes, bias=False)
        self.reset(generator)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights; the embedding is large and the blocks read it scaled back.

        The states are then several times longer than the step that one channel takes, which is what
        makes first-order attribution good: rescaling the states by s divides every block's
        quadratic form by s^2."""
        factors = {
            "embed": 3.0,
            "left": 1 / 3,
            "right": 1 / 3,
            "down": (2 * len(self.blocks)) ** -0.5,
            "head": 1.0,
        }
        for name, weight in self.named_parameters():
            kind = name.removesuffix(".weight").rpartition(".")[2]
            if kind == "norm":
                weight.fill_(1.0)
            else:
                scale = factors.get(kind, 1.0) * weight.shape[-1] ** -0.5
                weight.copy_(
                    torch.randn(weight.shape, generator=generator, dtype=torch.float32) * scale
                )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, `(examples, classes)`."""
        x = self.embed(self.cut(x))
        if self.position is not None:
            x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1) if self.positions > 1 else x)

    def cut(self, x: Tensor) -> Tensor:
        """Return what the embedding reads: `(examples, inputs)`, or `(examples, positions,
        entries)` with patches.
        """
        return cut(x, self.inputs, self.image, self.patch)


def cut(x: Tensor, inputs: int, image: tuple[int, int, int] | None, patch: int | None) -> Tensor:
    """Flatten each example, or cut it into patches in row order: `(examples, positions, channels *
    patch * patch)`.

    Raises InputError when an example has another number of entries than `inputs`.
    """
    if x.ndim < 2 or math.prod(x.shape[1:]) != inputs:
        raise InputError(
            f"x must be (examples, {inputs}) or hold {inputs} entries per example, got shape"
            f" {tuple(x.shape)}"
        )
    if image is None or patch is None:
        return x.flatten(1)
    channels, height, across = image
    rows, columns = height // patch, across // patch
    x = x.reshape(len(x), channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(len(x), rows * columns, -1) if rows * columns > 1 else x.reshape(len(x), -1)


def _checked_image(
    inputs: int, image: tuple[int, ...] | None, patch: int | None
) -> tuple[tuple[int, int, int] | None, int | None]:
    if (image is None) != (patch is None):
        raise InputError(
            "image and patch come together: the shape of one image and the side of a square patch"
        )
    if image is None or patch is None:
        return None, None
    if len(image) not in (2, 3) or min(image) < 1:
        raise InputError(
            f"image must be (height, width) or (channels, height, width), got {tuple(image)}"
        )
    channels, height, across = image if len(image) == 3 else (1, *image)
    if channels * height * across != inputs:
        raise InputError(
            f"image {tuple(image)} holds {channels * height * across} entries, but inputs is"
            f" {inputs}"
        )
    if patch < 1 or height % patch or across % patch:
        raise InputError(f"patch {patch} does not tile an image of {height} x {across}")
    return (channels, height, across), patch
