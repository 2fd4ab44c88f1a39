"""Four tiny mechanism kinds on tiny networks: the core must serve each of them without knowing
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import node_models
import torch
from torch import Tensor, nn

from assay.core.mechanisms import Mechanisms
from assay.core.parts import Atoms, Group, Parts, Shifts, Whole
from assay.core.sites import Seen, read_sites
from assay.core.target import Batch, Target, target
from assay.dictionaries import Placed, architecture
from assay.mechanisms.channels import channels
from assay.mechanisms.components import components, decomposition
from assay.mechanisms.crosscoder import Crosscoder, crosscoder
from assay.mechanisms.directions import directions
from assay.mechanisms.features import features
from assay.mechanisms.features.kind import identities
from assay.mechanisms.nodes import nodes
from assay.targets.bilinear import BilinearNetwork
from assay.targets.metrics import logit_difference
from assay.targets.toys import MLP

DIRECTIONS = 0.2 * torch.randn(
    5, 4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64
)
READERS = torch.randn(2, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 2


class TinyBlock(nn.Module):
    def __init__(self, width: int, generator: torch.Generator):
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        for layer in (self.up, self.down):
            layer.weight.data = 0.6 * torch.randn(layer.weight.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Tiny(nn.Module):
    """A residual network with a position axis, so that gates with and without positions both
    occur.
    """

    def __init__(self, width: int = 4, blocks: int = 3, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Linear(3, width, bias=False)
        self.embed.weight.data = torch.randn(width, 3, generator=generator)
        self.blocks = nn.ModuleList(TinyBlock(width, generator) for _ in range(blocks))
        self.head = nn.Linear(width, 2, bias=False)
        self.head.weight.data = torch.randn(2, width, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean(1)


def squared_logit(output: Tensor, batch: Batch) -> Tensor:
    return output[:, 0] - 0.3 * output[:, 1] ** 2


def tiny_target(seed: int = 0, dtype: torch.dtype = torch.float64) -> Target:
    return target(Tiny(seed=seed).to(dtype), squared_logit, "tiny")


def tiny_batch(
    examples: int = 5, positions: int = 3, seed: int = 1, dtype: torch.dtype = torch.float64
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(examples, positions, 3, generator=generator, dtype=torch.float64).to(dtype)
    )


@dataclass(frozen=True)
class Dictionary(Mechanisms):
    """A random linear-relu dictionary with a counterfactual base, plus the error as one
    whole-vector part a position.
    """

    patch: Batch = None  # type: ignore[assignment]
    site: str = "blocks.1"
    size: int = 6

    kind = "dictionary"
    reference = "counterfactual"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._weights  # bound to the batch before any gated run

    @cached_property
    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(7)
        encoder = torch.randn(4, self.size, generator=generator, dtype=torch.float64)
        decoder = torch.randn(self.size, 4, generator=generator, dtype=torch.float64) / 3
        base = read_sites(self.target.model, self.patch.inputs, [self.site])[
            self.site
        ].value.double()
        return encoder, decoder, base

    @property
    def groups(self) -> Mapping[str, Group]:
        examples, positions = self.batch.inputs.shape[:2]
        return {
            "features": Group("features", (self.site,), (examples, positions, self.size)),
            "error": Group("error", (self.site,), (examples, positions)),
        }

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        encoder, decoder, base = (entry.to(seen.value.dtype) for entry in self._weights)
        codes = torch.relu(seen.value @ encoder) - torch.relu(base @ encoder)
        error = seen.value - base - codes @ decoder
        return {
            "features": Atoms(codes, decoder, self.groups["features"].shape),
            "error": Whole(error, self.groups["error"].shape, tuple(seen.value.shape)),
        }


@dataclass(frozen=True)
class RankOne(Mechanisms):
    """A weight site: the matrix of `blocks.1.up` as rank-one parts of its input, gated per
    example over all positions, and a delta part.
    """

    kind = "rank one"
    site = "blocks.1.up"

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.target.model.get_parameter("blocks.1.up.weight").detach()
        left, values, right = (
            entry.to(weight.dtype)
            for entry in torch.linalg.svd(weight.T.double(), full_matrices=False)
        )
        inner, outer = left[:, :3] * values[:3], right[:3]
        return inner, outer, weight.T - inner @ outer

    @property
    def groups(self) -> Mapping[str, Group]:
        examples = len(self.batch)
        return {
            "components": Group("components", (self.site,), (examples, 1, 3)),
            "delta": Group("delta", (self.site,), (examples, 1)),
        }

    def box(self, name: str) -> tuple[Tensor, Tensor]:
        low, high = super().box(name)
        return (torch.full_like(low, 0.2), high) if name == "components" else (low, high)

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        inner, outer, delta = self._factors
        return {
            "components": Atoms(seen.input @ inner, outer, self.groups["components"].shape),
            "delta": Whole(seen.input @ delta, self.groups["delta"].shape, tuple(seen.value.shape)),
        }


@dataclass(frozen=True)
class Displacements(Mechanisms):
    """A parameter shift: five directions of one weight matrix, shared over the batch."""

    kind = "displacements"

    @property
    def groups(self) -> Mapping[str, Group]:
        return {
            "directions": Group("directions", ("blocks.0.down.weight",), (5,), per_example=False)
        }

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        return {"directions": Shifts(DIRECTIONS.to(seen.value.dtype))}


@dataclass(frozen=True)
class TwoSites(Mechanisms):
    """One gate at two sites: a direction read out of the residual stream after block 0 and again
    after block 1.
    """

    kind = "two sites"

    @property
    def groups(self) -> Mapping[str, Group]:
        return {
            "reader": Group("reader", ("blocks.0", "blocks.1"), (*self.batch.inputs.shape[:2], 2))
        }

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        readers = READERS.to(seen.value.dtype)
        return {
            "reader": Atoms(
                torch.tanh(seen.value @ readers.T), readers, self.groups["reader"].shape
            )
        }


def dictionary(examples: int = 5, dtype: torch.dtype = torch.float64) -> Dictionary:
    return Dictionary(
        tiny_target(dtype=dtype),
        tiny_batch(examples, dtype=dtype),
        patch=tiny_batch(examples, seed=2, dtype=dtype),
    )


def rank_one(examples: int = 5, dtype: torch.dtype = torch.float64) -> RankOne:
    return RankOne(tiny_target(dtype=dtype), tiny_batch(examples, dtype=dtype))


def displacements(examples: int = 5, dtype: torch.dtype = torch.float64) -> Displacements:
    return Displacements(tiny_target(dtype=dtype), tiny_batch(examples, dtype=dtype))


def two_sites(examples: int = 5, dtype: torch.dtype = torch.float64) -> TwoSites:
    return TwoSites(tiny_target(dtype=dtype), tiny_batch(examples, dtype=dtype))


@dataclass(frozen=True)
class Earlier(Mechanisms):
    """Parts read at one site that act at two later ones, as those of a cross-layer transcoder,
    behind a group whose gates move what is read.
    """

    kind = "earlier"

    @property
    def groups(self) -> Mapping[str, Group]:
        examples, positions = self.batch.inputs.shape[:2]
        later = ("blocks.1.down", "blocks.2.down")
        return {
            "before": Group("before", ("blocks.0.down",), (examples, positions)),
            "written": Group("written", later, (examples, positions, 2), reads=("blocks.0",)),
        }

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        if site == "blocks.0.down":
            return {"before": Whole(seen.value, self.groups["before"].shape, seen.value.shape)}
        readers = READERS.to(seen.value.dtype)
        codes = torch.tanh(seen.read("blocks.0").value @ readers.T)
        atoms = readers if site == "blocks.1.down" else readers.flip(1) / 2
        return {"written": Atoms(codes, atoms, self.groups["written"].shape)}


@dataclass(frozen=True)
class Fixed(Mechanisms):
    """Parts whose coefficients were read when the kind was bound, in front of a current group."""

    codes: Tensor = None  # type: ignore[assignment]

    kind = "fixed"

    @property
    def groups(self) -> Mapping[str, Group]:
        examples, positions = self.batch.inputs.shape[:2]
        return {
            "before": Group("before", ("blocks.0.down",), (examples, 1)),
            "fixed": Group("fixed", ("blocks.1",), (examples, positions, 2), fixed=True),
        }

    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        if site == "blocks.0.down":
            return {"before": Whole(seen.value, self.groups["before"].shape, seen.value.shape)}
        readers = READERS.to(seen.value.dtype)
        return {"fixed": Atoms(self.codes, readers, self.groups["fixed"].shape)}

    def take(self, index: Tensor | slice) -> Fixed:
        return replace(self, batch=self.batch.take(index), codes=self.codes[index])


def earlier(examples: int = 5, dtype: torch.dtype = torch.float64) -> Earlier:
    return Earlier(tiny_target(dtype=dtype), tiny_batch(examples, dtype=dtype))


def fixed(examples: int = 5, dtype: torch.dtype = torch.float64) -> Fixed:
    target, batch = tiny_target(dtype=dtype), tiny_batch(examples, dtype=dtype)
    value = read_sites(target.model, batch.inputs, ["blocks.1"])["blocks.1"].value
    return Fixed(target, batch, torch.tanh(value @ READERS.to(dtype).T))


KINDS = {
    "counterfactual": dictionary,
    "weight site": rank_one,
    "parameter shift": displacements,
    "two sites": two_sites,
    "reads earlier": earlier,
    "fixed": fixed,
}


def bound_channels(
    examples: int = 4, dtype: torch.dtype = torch.float64, functional: str = "logit", **options: Any
) -> Mechanisms:
    """The channels of a small bilinear network."""
    generator = torch.Generator().manual_seed(0)
    network = BilinearNetwork(
        16, 3, width=5, hidden=6, blocks=3, generator=generator, **options
    ).to(dtype)
    x = torch.randn(examples, 16, generator=generator, dtype=torch.float64).to(dtype)
    return channels(network, x, torch.arange(examples) % 3, functional)  # type: ignore[arg-type]


def bound_nodes(
    examples: int = 3,
    dtype: torch.dtype = torch.float64,
    family: str = "gpt2",
    sites: Sequence[str] = ("blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"),
    reference: str = "counterfactual",
    fast: bool = True,
) -> Mechanisms:
    """Heads and an MLP of a tiny language model on padded pairs of prompts."""
    clean, patch = (batch.take(slice(0, examples)) for batch in node_models.batches())
    model = Target(node_models.build(family, dtype), logit_difference)
    found = nodes(model, clean, patch, sites, reference)  # type: ignore[arg-type]
    return replace(found, fast=fast)


def bound_directions(
    examples: int = 6, dtype: torch.dtype = torch.float64, metric: str = "own"
) -> Mechanisms:
    """Directions in the parameters of a small MLP."""
    generator = torch.Generator().manual_seed(0)
    model = MLP([3, 5, 4], generator, torch.tanh).to(dtype)
    batch = Batch(torch.randn(6, 3, generator=generator, dtype=torch.float64).to(dtype))
    found = directions(
        target(model, lambda output, batch: output[:, 0]),
        batch,
        parameters="layers.*",
        k=4,
        amount=0.3,
        metric=metric,
    )
    return found.take(slice(0, examples))


def bound_components(
    examples: int = 4,
    dtype: torch.dtype = torch.float64,
    patterns: Sequence[str] = ("blocks.0.up", "blocks.1.down"),
    routed: bool = False,
    importance: str = "scalar",
) -> Mechanisms:
    """Rank-one components and delta parts of two matrices of a small residual network."""
    model, batch = tiny_target(dtype=dtype), tiny_batch(examples, positions=2, dtype=dtype)
    found = decomposition(
        model.model,
        list(patterns),
        3,
        importance=importance,
        generator=torch.Generator().manual_seed(0),
    )
    found = found.double() if dtype == torch.float64 else found
    some = torch.arange(2 * examples).reshape(examples, 2) % 3 > 0 if routed else None
    return components(model, batch, found, routed=some)


def bound_tied_components(examples: int = 3, dtype: torch.dtype = torch.float64) -> Mechanisms:
    """Components of a language model's tied embedding and of a Conv1D, on padded prompts."""
    clean = node_models.batches()[0].take(slice(0, examples))
    model = Target(node_models.build("gpt2", dtype), logit_difference)
    found = decomposition(
        model.model,
        ["transformer.wte", "lm_head", "transformer.h.1.mlp.c_fc"],
        2,
        generator=torch.Generator().manual_seed(0),
    )
    return components(model, clean, found.double() if dtype == torch.float64 else found)


def random_dictionary(
    d_in: int, size: int, seed: int = 0, name: str = "relu", **options: Any
) -> nn.Module:
    """A dictionary of an architecture with random weights: some features active, an error left."""
    dictionary = architecture(name)(d_in, size, **options)
    generator = torch.Generator().manual_seed(seed)
    for entry, parameter in dictionary.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        scale = 0.1 if parameter.ndim == 1 else 0.7 / parameter.shape[0] ** 0.5
        parameter.data = scale * (drawn.abs() if entry == "threshold" else drawn)
    return dictionary


def bound_features(
    examples: int = 3,
    dtype: torch.dtype = torch.float64,
    placed: Sequence[tuple[str, str, tuple[str, ...]]] = (
        ("relu", "blocks.0", ("blocks.0",)),
        ("relu", "blocks.1", ("blocks.1",)),
    ),
    reference: str = "counterfactual",
    seed: int = 0,
    options: Mapping[str, Any] = {"topk": {"k": 2}},
) -> Mechanisms:
    """Dictionaries of a small residual network: their architecture, and where each reads and
    writes.
    """

    def wide(reads: str, writes: tuple[str, ...]) -> dict[str, Any]:
        return {} if writes == (reads,) else {"d_out": 4 * len(writes), "skip": 4}

    model = tiny_target(dtype=dtype)
    dictionaries = {
        reads if writes == (reads,) else f"{reads} to {writes[-1]}": Placed(
            random_dictionary(
                4, 4, number + seed, name, **wide(reads, writes), **options.get(name, {})
            ),
            reads,
            writes,
        )
        for number, (name, reads, writes) in enumerate(placed)
    }
    clean, patch = (tiny_batch(3, positions=2, seed=seed, dtype=dtype) for seed in (1, 2))
    found = features(model, dictionaries, clean, patch, reference)  # type: ignore[arg-type]
    return found.take(slice(0, examples))


def bound_language_features(
    examples: int = 3, dtype: torch.dtype = torch.float64, reference: str = "counterfactual"
) -> Mechanisms:
    """Dictionaries of a tiny language model on padded pairs of prompts."""
    clean, patch = node_models.batches()
    model = Target(node_models.build("gpt2", dtype), logit_difference)
    dictionaries = {
        site: Placed(random_dictionary(16, 6, seed), site, (site,))
        for seed, site in enumerate(("blocks.1.hook_mlp_out",))
    }
    found = features(model, dictionaries, clean, patch, reference)  # type: ignore[arg-type]
    return found.take(slice(0, examples))


def bound_neurons(examples: int = 3, dtype: torch.dtype = torch.float64) -> Mechanisms:
    """Identity dictionaries: neurons as features, nothing left to errors."""
    model = tiny_target(dtype=dtype)
    clean, patch = (tiny_batch(examples, positions=2, seed=seed, dtype=dtype) for seed in (1, 2))
    return features(model, identities(model, clean, ["blocks.0", "blocks.1"]), clean, patch)


def bound_crosscoder(
    examples: int = 3, dtype: torch.dtype = torch.float64, rule: str = "first"
) -> Mechanisms:
    """Features and errors of a random crosscoder over three layers of a small residual network;
    some features begin after the first layer.
    """
    model, batch = tiny_target(dtype=dtype), tiny_batch(examples, positions=1, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    found = Crosscoder(("embed", "blocks.0", "blocks.2"), 4, 4, generator=generator)
    with torch.no_grad():
        found.W_dec[2:4, 0] = 0
        found.W_dec[3, 1] = 0
        found.b_dec.copy_(torch.randn(3, 4, generator=generator) / 4)
    found = found.double() if dtype == torch.float64 else found
    return crosscoder(model, batch, found, rule)  # type: ignore[arg-type]


CASES: dict[str, Callable[..., Mechanisms]] = {
    **KINDS,
    "channels": bound_channels,
    "channels, cross-entropy": partial(bound_channels, functional="cross_entropy"),
    "channels, norms": partial(bound_channels, norm=True),
    "channels, gate": partial(bound_channels, gate="gelu"),
    "channels, patches": partial(bound_channels, image=(4, 4), patch=2),
    "nodes": bound_nodes,
    "nodes, general rule": partial(bound_nodes, fast=False),
    "nodes, zero": partial(bound_nodes, reference="zero"),
    "nodes, residual": partial(
        bound_nodes, sites=("blocks.0.hook_resid_mid", "blocks.1.hook_resid_post")
    ),
    "nodes, neurons": partial(
        bound_nodes,
        sites=("blocks.1.attn.hook_q", "blocks.2.mlp.hook_post"),
    ),
    "components": bound_components,
    "components, routed": partial(bound_components, routed=True, importance="vector"),
    "components, tied": bound_tied_components,
    "features": bound_features,
    "features, language": bound_language_features,
    "features, zero": partial(
        bound_features,
        placed=(("gated", "blocks.0", ("blocks.0",)), ("topk", "blocks.1", ("blocks.1",))),
        reference="zero",
    ),
    "features, transcoders": partial(
        bound_features,
        placed=(
            ("relu", "blocks.0.up:input", ("blocks.0.down", "blocks.1.down")),
            ("jumprelu", "blocks.1.up:input", ("blocks.1.down",)),
        ),
        reference="mean",
        seed=1,
    ),
    "features, identity": bound_neurons,
    "crosscoder": bound_crosscoder,
    "crosscoder, everywhere": partial(bound_crosscoder, rule="everywhere"),
    "crosscoder, clamp": partial(bound_crosscoder, rule="clamp"),
    "directions": bound_directions,
    "directions, divergence": partial(bound_directions, metric="divergence"),
}
"""Every case by name; a kind's cases begin with the kind's name in `assay.mechanisms.KINDS`."""
