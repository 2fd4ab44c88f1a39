"""Factored per-token gradients of linear layers: what stands in for a Jacobian in networks of
realistic size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp

from assay.errors import InputError
from assay.mechanisms.directions.divergence import Divergence, divergence
from assay.mechanisms.directions.local import Local
from assay.mechanisms.directions.space import Space

Pull = Callable[[Tensor], Iterator[Tensor]]


@dataclass(frozen=True)
class TokenBlock:
    """One linear layer: inputs `a (samples, tokens, in)`, output gradients `delta (samples, draws,
    tokens, out)`.

    The gradient in the weight is `sum_t delta_t a_t^T` (its transpose where the weight is stored as
    (in, out)), in the bias `sum_t delta_t`; it is never formed for single samples."""

    inputs: Tensor
    deltas: Tensor
    weight: str | None
    bias: str | None
    transposed: bool


@dataclass(frozen=True)
class TokenFactors:
    """Factors whose rows are sums over tokens of outer products `delta a^T`; see
    `token_gradients`.
    """

    space: Space
    blocks: tuple[TokenBlock, ...]

    @property
    def samples(self) -> int:
        return self.blocks[0].inputs.shape[0]

    @property
    def size(self) -> int:
        return self.space.size

    def dot(self, directions: Tensor) -> Tensor:
        parts = self.space.split(directions)
        total = torch.zeros((), dtype=directions.dtype, device=directions.device)
        for block in self.blocks:
            if block.weight is not None:
                matrix = parts[block.weight].mT if block.transposed else parts[block.weight]
                # One direction at a time: `U a` for all of them together would be k times the
                # activations.
                rows = [
                    torch.einsum("srto,sto->sr", block.deltas, block.inputs @ one.mT)
                    for one in matrix
                ]
                total = total + torch.stack(rows, dim=2)
            if block.bias is not None:
                total = total + block.deltas.sum(2) @ parts[block.bias].mT
        return total

    def dot_low_rank(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Return `<delta a^T, sum_r left_r right_r^T>` for one weight, `(samples, draws, k)`, at
        O(rank (in + out)) a token.

        `left` is `(k, out, rank)`, `right` `(k, in, rank)`.
        """
        block = next(block for block in self.blocks if block.weight == name)
        read = torch.einsum("sti,kir->sktr", block.inputs, right)
        write = torch.einsum("sdto,kor->sdktr", block.deltas, left)
        return torch.einsum("sdktr,sktr->sdk", write, read)

    def add(self, weights: Tensor) -> Tensor:
        parts: dict[str, Tensor] = {}
        for block in self.blocks:
            tokens = block.inputs.flatten(0, 1)
            rows, biases = [], []
            for one in weights.unbind(2):
                mixed = torch.einsum("srto,sr->sto", block.deltas, one).flatten(0, 1)
                gradient = mixed.mT @ tokens
                rows.append(gradient.mT if block.transposed else gradient)
                biases.append(mixed.sum(0))
            if block.weight is not None:
                parts[block.weight] = torch.stack(rows)
            if block.bias is not None:
                parts[block.bias] = torch.stack(biases)
        return self.space.join(parts)

    def traces(self) -> Tensor:
        total = torch.zeros(
            self.samples, dtype=self.blocks[0].deltas.dtype, device=self.blocks[0].deltas.device
        )
        for block in self.blocks:
            if block.weight is not None:
                inner = block.inputs @ block.inputs.mT
                total = total + torch.einsum("srto,sruo,stu->s", block.deltas, block.deltas, inner)
            if block.bias is not None:
                total = total + block.deltas.sum(2).square().sum((1, 2))
        return total

    def scaled(self, kept: Tensor, scales: Tensor) -> TokenFactors:
        moved = [
            replace(
                block,
                inputs=block.inputs[kept],
                deltas=block.deltas[kept] * scales[:, None, None, None],
            )
            for block in self.blocks
        ]
        return replace(self, blocks=tuple(moved))

    def joined(self, other: TokenFactors) -> TokenFactors:
        """Return the samples of both, these first. Raises InputError when parameters, tokens or
        rows per sample differ.
        """
        same = self.space == other.space and all(
            one.inputs.shape[1:] == two.inputs.shape[1:]
            and one.deltas.shape[1:] == two.deltas.shape[1:]
            for one, two in zip(self.blocks, other.blocks, strict=True)
        )
        if not same:
            raise InputError(
                "the two sets of factors must be over the same parameters, with as many tokens and"
                " rows per sample"
            )
        blocks = [
            replace(
                one,
                inputs=torch.cat([one.inputs, two.inputs]),
                deltas=torch.cat([one.deltas, two.deltas]),
            )
            for one, two in zip(self.blocks, other.blocks, strict=True)
        ]
        return replace(self, blocks=tuple(blocks))

    def dense(self) -> Tensor:
        """Return the rows themselves, `(samples, draws, size)`: for small layers and for checks."""
        parts: dict[str, Tensor] = {}
        for block in self.blocks:
            if block.weight is not None:
                gradient = torch.einsum("srto,sti->sroi", block.deltas, block.inputs)
                parts[block.weight] = gradient.mT if block.transposed else gradient
            if block.bias is not None:
                parts[block.bias] = block.deltas.sum(2)
        return self.space.join(parts)


def token_gradients(
    local: Local,
    measure: str | Divergence = "kl",
    *,
    draws: int = 4,
    towards: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    chunk: int = 64,
) -> TokenFactors:
    """Return gradients of every sample, factored over tokens, without any Jacobian: one backward
    pass a draw for all samples.

    By default they are random with `E[g g^T] = H_x`: `J^T R^T s` with random signs `s` and `R^T R =
    M` the output metric. With other outputs `towards (samples, references, ..., o)` they are the
    pair gradients `grad_W D(f(x, W), y)` at `W0`: where the network is sure, the curvature hides
    what it would take to change its mind, and these show it. Every chosen parameter must be the
    weight or bias of a linear layer that runs once in a forward pass. Raises InputError, with the
    names, when one is not."""
    measure = divergence(measure)
    if draws < 1:
        raise InputError(f"draws must be at least 1, got {draws}")
    if towards is not None and towards.shape[0] != local.samples:
        raise InputError(
            f"towards holds outputs for {towards.shape[0]} samples, the inputs are {local.samples}"
        )
    layers = _layers(local)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in layers}
    for first in range(0, local.samples, chunk):
        part = slice(first, first + chunk)
        pull = (
            _pairs(measure, towards[part])
            if towards is not None
            else _signs(measure, draws, generator)
        )
        for path, pair in _backward(local.take(part), pull, layers).items():
            found[path].append(pair)
    blocks = []
    for path, layer in layers.items():
        inputs, deltas = (torch.cat(entry).to(dtype) for entry in zip(*found[path], strict=True))
        weight, bias = (
            name if name in local.space.names else None
            for name in (f"{path}.weight", f"{path}.bias")
        )
        scale = 1.0 if towards is not None else draws**-0.5
        blocks.append(
            TokenBlock(inputs, deltas * scale, weight, bias, not isinstance(layer, nn.Linear))
        )
    return TokenFactors(local.space, tuple(blocks))


def _layers(local: Local) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    modules = dict(local.model.named_modules())
    found: dict[str, nn.Module] = {}
    wrong = []
    for name in local.space.names:
        path = name.rpartition(".")[0]
        layer = modules[path]
        if isinstance(layer, nn.Linear | Conv1D):
            found[path] = layer
        else:
            wrong.append(name)
    if wrong:
        raise InputError(
            f"per-token gradients are for linear layers; {', '.join(wrong[:4])}"
            f" {'is' if len(wrong) == 1 else 'are'} not of one; choose parameters by a pattern such"
            " as '*.attn.c_*'"
        )
    return found


def _signs(measure: Divergence, draws: int, generator: torch.Generator | None) -> Pull:
    def cotangents(output: Tensor) -> Iterator[Tensor]:
        pull = vjp(lambda tangent: measure.root(tangent, output), torch.zeros_like(output))[1]
        for _ in range(draws):
            signs = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
            yield pull(signs)[0] / output[0, ..., 0].numel() ** 0.5

    return cotangents


def _pairs(measure: Divergence, towards: Tensor) -> Pull:
    def cotangents(output: Tensor) -> Iterator[Tensor]:
        for other in towards.unbind(1):
            yield measure.pull(output, other) / output[0, ..., 0].numel()

    return cotangents


def _backward(
    local: Local, cotangents: Pull, layers: dict[str, nn.Module]
) -> dict[str, tuple[Tensor, Tensor]]:
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for path, layer in layers.items():

        def keep(
            module: nn.Module, args: tuple[Any, ...], output: Tensor, path: str = path
        ) -> None:
            if path in seen:
                raise InputError(
                    f"layer {path!r} runs more than once in a forward pass; its gradient is not one"
                    " sum over tokens"
                )
            seen[path] = (args[0].detach(), output)

        handles.append(layer.register_forward_hook(keep))
    try:
        with torch.enable_grad():
            output = local.output(
                {name: value.requires_grad_() for name, value in local.weights.items()}
            )
    finally:
        for handle in handles:
            handle.remove()
    outputs = [seen[path][1] for path in layers]
    rows: list[list[Tensor]] = [[] for _ in outputs]
    for cotangent in cotangents(output.detach()):
        for row, gradient in zip(
            rows, torch.autograd.grad(output, outputs, cotangent, retain_graph=True), strict=True
        ):
            row.append(gradient.detach())
    return {
        path: (
            _with_tokens(seen[path][0]),
            torch.stack([_with_tokens(entry) for entry in row], dim=1),
        )
        for path, row in zip(layers, rows, strict=True)
    }


def _with_tokens(value: Tensor) -> Tensor:
    return value.reshape(value.shape[0], -1, value.shape[-1])
