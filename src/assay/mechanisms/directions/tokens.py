"""Per-token gradients of linear layers: what stands in for a Jacobian in networks of realistic
size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp

from assay.errors import InputError
from assay.mechanisms.directions.divergence import Divergence, divergence
from assay.mechanisms.directions.local import Local
from assay.mechanisms.directions.token_factors import BiasGradients, TokenFactors, WeightGradients
from assay.progress import progress

Pull = Callable[[Tensor], Iterator[Tensor]]


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
    pass per draw for all samples, and one that checks them.

    By default they are random with `E[g g^T] = H_x`: `J^T R^T s` with random signs `s` and `R^T R =
    M` the output metric. With other outputs `towards (samples, references, ..., o)` they are the
    pair gradients `grad_W D(f(x, W), y)` at `W0`: where the network is sure, the curvature hides
    what it would take to change its mind, and these show it.

    Every chosen parameter must be the weight or bias of linear layers. Layers may share it, run
    several times in a forward pass, and read their tokens as (samples, tokens, d), (samples *
    tokens, d) or (tokens, samples, d). Raises InputError, with the name, for any other parameter,
    and when a layer's rows do not belong to one sample each or the factored gradients are not those
    of autograd."""
    measure = divergence(measure)
    if draws < 1:
        raise InputError(f"draws must be at least 1, got {draws}")
    if towards is not None and towards.shape[0] != local.samples:
        raise InputError(
            f"towards holds outputs for {towards.shape[0]} samples, the inputs are {local.samples}"
        )
    uses = _uses(local)
    found: list[TokenFactors] = []
    for first in progress(range(0, local.samples, chunk), "gradients per token"):
        part = slice(first, first + chunk)
        pull = (
            _pairs(measure, towards[part])
            if towards is not None
            else _signs(measure, draws, generator)
        )
        found.append(_backward(local.take(part), pull, uses))
    scale = 1.0 if towards is not None else draws**-0.5
    weights = [
        WeightGradients(
            parts[0].name,
            torch.cat([part.inputs for part in parts]).to(dtype),
            torch.cat([part.deltas for part in parts]).to(dtype) * scale,
            parts[0].transposed,
        )
        for parts in zip(*(entry.weights for entry in found), strict=True)
    ]
    biases = [
        BiasGradients(parts[0].name, torch.cat([part.sums for part in parts]).to(dtype) * scale)
        for parts in zip(*(entry.biases for entry in found), strict=True)
    ]
    return TokenFactors(local.space, tuple(weights), tuple(biases))


@dataclass(frozen=True)
class _Use:
    """A parameter's role, "weight" or "bias", in the layers that hold it."""

    role: str
    layers: tuple[str, ...]
    transposed: bool


@dataclass
class _Call:
    """One run of a layer: its input and output as the layer sees them, and, once they are known,
    the gradients of every draw and those of the check, in the same shape."""

    inputs: Tensor
    output: Tensor
    deltas: list[Tensor] = field(default_factory=list)


def _uses(local: Local) -> dict[str, _Use]:
    """Return, for every chosen parameter, the layers that use it; InputError when one is not
    linear.
    """
    from transformers.pytorch_utils import Conv1D

    parameters = dict(local.model.named_parameters())
    found: dict[str, _Use] = {}
    wrong = []
    for name in local.space.names:
        holders = [
            (path, layer, role)
            for path, layer in local.model.named_modules()
            for role, value in layer._parameters.items()
            if value is parameters[name]
        ]
        roles = {role for _, _, role in holders}
        stored = {isinstance(layer, Conv1D) for _, layer, _ in holders}
        linear = all(isinstance(layer, nn.Linear | Conv1D) for _, layer, _ in holders)
        if linear and len(roles) == 1 and (len(stored) == 1 or roles == {"bias"}):
            found[name] = _Use(roles.pop(), tuple(path for path, _, _ in holders), stored.pop())
        else:
            wrong.append((name, ", ".join(type(layer).__name__ for _, layer, _ in holders)))
    if wrong:
        names = ", ".join(f"{name} (of {kind})" for name, kind in wrong[:4])
        raise InputError(
            f"per-token gradients are for linear layers; not of linear layers alone: {names};"
            " choose parameters by a pattern such as '*.attn.c_*'"
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


def _backward(local: Local, cotangents: Pull, uses: dict[str, _Use]) -> TokenFactors:
    """Return the factors of one chunk of samples, checked against autograd."""
    weights = {name: value.requires_grad_() for name, value in local.weights.items()}
    paths = dict.fromkeys(path for use in uses.values() for path in use.layers)
    output, calls = _forward(local, weights, paths)
    flat = [call for path in paths for call in calls[path]]
    missing = [path for path in paths if not calls[path]]
    if missing:
        raise InputError(
            f"layer {missing[0]!r} does not run in a forward pass; leave its parameters out"
        )
    outputs = [call.output for call in flat]
    first: Tensor | None = None
    for cotangent in cotangents(output.detach()):
        first = cotangent if first is None else first
        for call, delta in zip(flat, _gradients(output, outputs, cotangent), strict=True):
            call.deltas.append(delta)
    assert first is not None
    # The check: every sample's cotangent times a power of two, which floating point keeps exact.
    amounts = torch.tensor([2.0 ** (s % 5 - 2) for s in range(local.samples)]).to(first)
    scaled = first * amounts.reshape(-1, *[1] * (first.ndim - 1))
    check = _gradients(output, [*outputs, *weights.values()], scaled)
    tokens: dict[str, list[tuple[Tensor, Tensor]]] = {}
    ends = iter(check)
    for path in paths:
        tokens[path] = [_by_sample(path, call, next(ends), amounts) for call in calls[path]]
    factors = _gather(local, uses, tokens)
    _compare(factors, uses, tokens, dict(zip(weights, ends, strict=True)), amounts)
    return factors


def _forward(
    local: Local, weights: dict[str, Tensor], paths: dict[str, None]
) -> tuple[Tensor, dict[str, list[_Call]]]:
    modules = dict(local.model.named_modules())
    calls: dict[str, list[_Call]] = {path: [] for path in paths}
    with ExitStack() as stack:
        for path in paths:

            def keep(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: Tensor,
                path: str = path,
            ) -> Tensor:
                inputs = args[0] if args else next(iter(kwargs.values()))
                calls[path].append(_Call(inputs.detach(), output))
                # A copy goes on: an operation in place on the output would take its history.
                return output.clone()

            handle = modules[path].register_forward_hook(keep, with_kwargs=True)
            stack.callback(handle.remove)
        with torch.enable_grad():
            output = local.output(weights)
    return output, calls


def _gradients(output: Tensor, of: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(output, of, cotangent, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(at) if one is None else one.detach()
        for at, one in zip(of, found, strict=True)
    ]


def _by_sample(path: str, call: _Call, scaled: Tensor, amounts: Tensor) -> tuple[Tensor, Tensor]:
    """Return a call's inputs `(samples, tokens, in)` and gradients `(samples, draws, tokens, out)`
    in the order of rows in which scaling a sample's cotangent scales its own rows and no other.
    """
    samples, shape = len(amounts), tuple(call.inputs.shape)
    if call.inputs[..., 0].numel() % samples == 0:
        for order in (_samples_first, _tokens_first):
            first, moved = order(call.deltas[0], samples), order(scaled, samples)
            gap = (moved - first * amounts[:, None, None]).abs().amax()
            if gap <= torch.finfo(moved.dtype).eps ** 0.5 * moved.abs().amax():
                deltas = [order(delta, samples) for delta in call.deltas]
                return order(call.inputs, samples), torch.stack(deltas, dim=1)
    raise InputError(
        f"layer {path!r} reads {shape} for {samples} samples, and its rows do not belong to one"
        " sample each in the order (samples, tokens) or (tokens, samples); leave its parameters out"
    )


def _samples_first(value: Tensor, samples: int) -> Tensor:
    return value.reshape(samples, -1, value.shape[-1])


def _tokens_first(value: Tensor, samples: int) -> Tensor:
    return value.reshape(-1, samples, value.shape[-1]).transpose(0, 1)


def _gather(
    local: Local, uses: dict[str, _Use], tokens: dict[str, list[tuple[Tensor, Tensor]]]
) -> TokenFactors:
    weights, biases = [], []
    for name, use in uses.items():
        inputs, deltas = _pairs_of(use, tokens)
        if use.role == "weight":
            joined = torch.cat(inputs, dim=1), torch.cat(deltas, dim=2)
            weights.append(WeightGradients(name, *joined, use.transposed))
        else:
            biases.append(BiasGradients(name, torch.cat(deltas, dim=2).sum(2)))
    return TokenFactors(local.space, tuple(weights), tuple(biases))


def _pairs_of(
    use: _Use, tokens: dict[str, list[tuple[Tensor, Tensor]]]
) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [pair for path in use.layers for pair in tokens[path]]
    return [inputs for inputs, _ in pairs], [deltas for _, deltas in pairs]


def _compare(
    factors: TokenFactors,
    uses: dict[str, _Use],
    tokens: dict[str, list[tuple[Tensor, Tensor]]],
    whole: dict[str, Tensor],
    amounts: Tensor,
) -> None:
    """Raise InputError unless the first draw, summed over samples with the amounts, is autograd's
    gradient: nothing else of the network may read the parameter.
    """
    chosen = torch.zeros(factors.samples, factors.draws, 1).to(amounts)
    chosen[:, 0, 0] = amounts
    for part in factors.parts:
        expected, use = whole[part.name], uses[part.name]
        # Rounding is relative to the tokens' own gradients: their sum may cancel to nothing.
        size = expected.norm().square()
        for inputs, deltas in zip(*_pairs_of(use, tokens), strict=True):
            rows = (deltas[:, 0] * amounts[:, None, None]).square().sum(2)
            size = size + (rows * inputs.square().sum(2) if use.role == "weight" else rows).sum()
        gap = float((part.add(chosen)[0] - expected).norm())
        if not gap <= torch.finfo(expected.dtype).eps ** 0.5 * float(size.sqrt()):
            raise InputError(
                f"parameter {part.name!r} is used outside the forward pass of its linear layer: the"
                f" per-token gradients miss {gap / max(float(expected.norm()), 1e-30):.0%} of"
                " autograd's; leave it out"
            )
