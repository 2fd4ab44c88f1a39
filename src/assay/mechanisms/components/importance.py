"""Importance functions: from what the frozen network computes to one logit per site, position and
component."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.utils.checkpoint import checkpoint

from assay.errors import InputError, unknown
from assay.mechanisms.components.scalar import SLICE, scalar_nets
from assay.mechanisms.components.sites import WeightSite
from assay.mechanisms.components.transformer import Bidirectional
from assay.memory import require_memory

Named = Mapping[str, Tensor]

SHARPNESS = 24.0
"""How many times a kink of a spread net is narrower than the range of its input, about."""

KEPT = 0.3
"""The part of all shares above which importances start above one half."""

FAINT = 1e-4
"""A share that is as good as none."""


class Importance(nn.Module, ABC):
    """A function from every site's input and inner activations to logits of causal importance.

    `inputs` maps a site to what its module read, (*positions, inputs), or indices (*positions) for
    an embedding; `inner` to h = x V, (*positions, components), where it is read. The answer has
    those shapes. Where an embedding has no input vector, its inner activations stand in for one."""

    reads_inner = False
    """Whether the inner activations of every site are read, and not only those of embeddings."""

    reads_shares = False
    """Whether every component's share of what its site writes is read."""

    def __init__(self, sites: Sequence[WeightSite]):
        super().__init__()
        self.sites = tuple(sites)

    @abstractmethod
    def forward(
        self, inputs: Named, inner: Named, shares: Named | None = None
    ) -> dict[str, Tensor]:
        """Return the logits of every site; `shares` are given where they are read."""

    @torch.no_grad()
    def spread(self, inner: Named, generator: torch.Generator, shares: Named | None = None) -> None:
        """Fit the untrained function to the inner activations and shares of a batch, in place;
        nothing where it reads neither."""

    def vectors(self, inputs: Named, inner: Named) -> dict[str, Tensor]:
        """Return one vector a position for every site: its input, or an embedding's inner
        activations.
        """
        return {
            site.name: inner[site.name] if site.lookup else inputs[site.name] for site in self.sites
        }


class _TwoLayers(Importance):
    """Nets of one hidden layer, with weights and biases for every site."""

    def __init__(self, sites: Sequence[WeightSite]):
        super().__init__(sites)
        self.w1, self.b1, self.w2, self.b2 = (nn.ParameterList() for _ in range(4))

    def nets(self) -> Iterator[tuple[WeightSite, Tensor, Tensor, Tensor, Tensor]]:
        """Return every site with its weights and biases."""
        return zip(self.sites, self.w1, self.b1, self.w2, self.b2, strict=True)


class ScalarMLPs(_TwoLayers):
    """One net of one input per component, its own inner activation; fused over components."""

    reads_inner = True

    def __init__(
        self, sites: Sequence[WeightSite], generator: torch.Generator, hidden: int = 16
    ) -> None:
        super().__init__(sites)
        for site in self.sites:
            shape = (site.components, hidden)
            self.w1.append(torch.randn(shape, generator=generator))
            self.b1.append(torch.zeros(shape))
            self.w2.append(torch.randn(shape, generator=generator) / hidden**0.5)
            self.b2.append(torch.zeros(site.components))

    @torch.no_grad()
    def spread(self, inner: Named, generator: torch.Generator, shares: Named | None = None) -> None:
        """Let every net rise with the size of its inner activation h, from about 0 at h = 0 to 1 at
        the largest on the batch.

        Hidden unit `gelu(w (h - u))` has its kink at u, uniform over the range [low, high] of h
        (with 0), rises away from zero, and has w of the size `SHARPNESS / (high - low)`; all output
        weights are equal. Kinks that are all at zero and as wide as the range can only be trained
        to slow ramps, and nets that start below zero are nearly dead."""
        for site, w1, b1, w2, b2 in zip(
            self.sites, self.w1, self.b1, self.w2, self.b2, strict=True
        ):
            h = inner[site.name].flatten(0, -2)
            low, high = h.amin(0).clamp(max=0), h.amax(0).clamp(min=0)
            width = (high - low).clamp_min(torch.finfo(h.dtype).tiny ** 0.5)
            drawn = torch.rand(w1.shape, generator=generator, dtype=w1.dtype).to(w1.device)
            places = low[:, None] + width[:, None] * drawn
            w1.copy_(torch.where(places < 0, -1, 1) * w1.abs() * SHARPNESS / width[:, None])
            b1.copy_(-w1 * places)
            w2.fill_(1.0)
            b2.fill_(0.0)
            most = scalar_nets(torch.stack([low, high]), w1, b1, w2, b2).amax(0)
            w2.div_(most.clamp_min(1e-6)[:, None])

    def forward(
        self, inputs: Named, inner: Named, shares: Named | None = None
    ) -> dict[str, Tensor]:
        return {
            site.name: scalar_nets(inner[site.name], *weights) for site, *weights in self.nets()
        }


class VectorMLPs(_TwoLayers):
    """One net per component that reads the whole input of its site; hidden layers in chunks."""

    def __init__(
        self, sites: Sequence[WeightSite], generator: torch.Generator, hidden: int = 16
    ) -> None:
        super().__init__(sites)
        for site in self.sites:
            width = _width(site)
            shape = (site.components, hidden)
            self.w1.append(torch.randn(*shape, width, generator=generator) * (2 / width) ** 0.5)
            self.b1.append(torch.zeros(shape))
            self.w2.append(torch.randn(shape, generator=generator) / hidden**0.5)
            self.b2.append(torch.zeros(site.components))

    def forward(
        self, inputs: Named, inner: Named, shares: Named | None = None
    ) -> dict[str, Tensor]:
        vectors = self.vectors(inputs, inner)
        return {
            site.name: self._logits(vectors[site.name], *weights) for site, *weights in self.nets()
        }

    def _logits(self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        step = max(1, 16 * SLICE // max(1, len(rows) * w1.shape[1]))
        parts = []
        for first in range(0, len(w1), step):
            own = [entry[first : first + step] for entry in (w1, b1, w2)]
            if step < len(w1) and torch.is_grad_enabled():
                parts.append(checkpoint(_vector_nets, rows, *own, use_reentrant=False))
            else:
                parts.append(_vector_nets(rows, *own))
        return (torch.cat(parts).T + b2).reshape(*x.shape[:-1], len(w1))


class SharedMLP(_TwoLayers):
    """One net per site that reads its input and gives the logits of all components."""

    def __init__(
        self, sites: Sequence[WeightSite], generator: torch.Generator, hidden: int = 128
    ) -> None:
        super().__init__(sites)
        for site in self.sites:
            width = _width(site)
            self.w1.append(torch.randn(width, hidden, generator=generator) * (2 / width) ** 0.5)
            self.b1.append(torch.zeros(hidden))
            self.w2.append(torch.randn(hidden, site.components, generator=generator) / hidden**0.5)
            self.b2.append(torch.zeros(site.components))

    def forward(
        self, inputs: Named, inner: Named, shares: Named | None = None
    ) -> dict[str, Tensor]:
        return self.logits(self.vectors(inputs, inner))

    def logits(self, vectors: Named) -> dict[str, Tensor]:
        """Return the logits from one vector a position for every site."""
        return {
            site.name: f.gelu(vectors[site.name] @ w1 + b1) @ w2 + b2
            for site, w1, b1, w2, b2 in self.nets()
        }


class TransformerOverSites(Importance):
    """A bidirectional transformer over the positions that reads the inputs of all sites together.

    Every site's input is divided by its root mean square and projected; the projections are summed,
    pass through the blocks, and are read out for every site. Inputs without a position axis are
    sequences of one."""

    def __init__(
        self,
        sites: Sequence[WeightSite],
        generator: torch.Generator,
        hidden: int = 256,
        *,
        width: int = 128,
        blocks: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__(sites)
        self.read, self.write, self.bias = (nn.ParameterList() for _ in range(3))
        total = sum(_width(site) for site in self.sites)
        for site in self.sites:
            rows = torch.randn(_width(site), width, generator=generator)
            self.read.append(rows / total**0.5)
            self.write.append(torch.randn(width, site.components, generator=generator) / width**0.5)
            self.bias.append(torch.zeros(site.components))
        self.body = Bidirectional(width, blocks, heads, hidden, generator)

    def forward(
        self, inputs: Named, inner: Named, shares: Named | None = None
    ) -> dict[str, Tensor]:
        vectors = self.vectors(inputs, inner)
        streams = [
            f.rms_norm(vectors[site.name], vectors[site.name].shape[-1:]) @ read
            for site, read in zip(self.sites, self.read, strict=True)
        ]
        if len({entry.shape for entry in streams}) > 1:
            raise InputError(
                "a transformer over sites needs sites that all see the same positions, got"
                f" {sorted({tuple(entry.shape[:-1]) for entry in streams})}; choose other sites or"
                " another importance function"
            )
        stream = torch.stack(streams).sum(0)
        alone = stream.ndim == 2
        stream = self.body(stream.unsqueeze(1) if alone else stream)
        stream = stream.squeeze(1) if alone else stream
        return {
            site.name: stream @ write + bias
            for site, write, bias in zip(self.sites, self.write, self.bias, strict=True)
        }


class RelativeNets(SharedMLP):
    """`z_c = a_c log(s_c + FAINT) + b_c + MLP(x)_c`: what each component writes beside what its
    site writes, `s_c = |h_c| |U_c| / |h U|`, corrected by one net per site.

    The net starts at zero, and so the function as a threshold on the share. It reads the site's
    input over its root mean square."""

    reads_inner = True
    reads_shares = True

    def __init__(
        self, sites: Sequence[WeightSite], generator: torch.Generator, hidden: int = 128
    ) -> None:
        super().__init__(sites, generator, hidden)
        self.slope = nn.ParameterList()
        for site, w2 in zip(self.sites, self.w2, strict=True):
            nn.init.zeros_(w2)
            self.slope.append(torch.ones(site.components))

    @torch.no_grad()
    def spread(self, inner: Named, generator: torch.Generator, shares: Named | None = None) -> None:
        """Put an importance of one half where the share is the `KEPT`-th largest of all shares of a
        batch.
        """
        assert shares is not None
        every = torch.cat([entry.flatten() for entry in shares.values()])
        cut = every.kthvalue(1 + int((len(every) - 1) * (1 - KEPT))).values
        for bias in self.b2:
            bias.fill_(0.5 - float((cut + FAINT).log()))

    def forward(
        self, inputs: Named, inner: Named, shares: Named | None = None
    ) -> dict[str, Tensor]:
        assert shares is not None
        vectors = self.vectors(inputs, inner)
        normed = {name: f.rms_norm(x, x.shape[-1:]) for name, x in vectors.items()}
        corrections = self.logits(normed)
        return {
            site.name: slope * (shares[site.name] + FAINT).log() + corrections[site.name]
            for site, slope in zip(self.sites, self.slope, strict=True)
        }


IMPORTANCES: dict[str, Callable[..., Importance]] = {
    "scalar": ScalarMLPs,
    "vector": VectorMLPs,
    "shared": SharedMLP,
    "relative": RelativeNets,
    "transformer": TransformerOverSites,
}


def make_importance(
    name: str, sites: Sequence[WeightSite], generator: torch.Generator, **options: int
) -> Importance:
    """Return an importance function by name; InputError for an unknown name and for sizes below
    one.
    """
    if name not in IMPORTANCES:
        raise unknown("importance function", name, IMPORTANCES)
    for key, value in options.items():
        if value < 1:
            raise InputError(f"{key} of the importance function must be at least 1, got {value}")
    if name == "vector":
        entries = sum(site.components * _width(site) for site in sites) * options.get("hidden", 16)
        require_memory(4 * entries, "one net per component that reads the whole input of its site")
    return IMPORTANCES[name](sites, generator, **options)


def _width(site: WeightSite) -> int:
    return site.components if site.lookup else site.inputs


def _vector_nets(rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    hidden = f.gelu(w1 @ rows.T + b1.unsqueeze(-1))
    return (w2.unsqueeze(1) @ hidden).squeeze(1)
