"""What stands for the MLPs of a frozen network: the features of transcoders that are active on the
prompt, and what they leave of every MLP.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from assay.dictionaries import Dictionary, DictionarySet, Placed
from assay.edges.prompt.frozen import FrozenNetwork, FrozenNorm
from assay.errors import InputError
from assay.io.files import require_finite
from assay.targets import families, names

_UNIT = re.compile(r"blocks\.(\d+)\.ln2\.hook_normalized")


@dataclass(frozen=True)
class Reading:
    """Where a dictionary reads in one layer: `early` in front of attention, else behind it, and
    through a norm or not.
    """

    layer: int
    early: bool
    norm: FrozenNorm | None
    value: Float[Tensor, "positions width"]

    def pull(self, gradient: Tensor, at: Tensor | slice | int) -> Tensor:
        """Return a gradient at the value that is read in the residual stream."""
        return gradient if self.norm is None else self.norm.pull(gradient, at)


@dataclass(frozen=True)
class Written:
    """The vectors that nodes write behind one layer's MLP: `vectors` (nodes, width) where they are
    added, `added` the same in the residual stream, behind a norm that may come after. They are
    sorted by position: those of position p are `starts[p]:starts[p + 1]`.
    """

    site: str
    vectors: Float[Tensor, "nodes width"]
    added: Float[Tensor, "nodes width"]
    columns: Int[Tensor, " nodes"]
    positions: Int[Tensor, " nodes"]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Skip:
    """A skip connection: `weight` (width read, width written) between a reading and a layer's MLP
    output, which a norm may follow.
    """

    reading: Reading
    weight: Tensor
    after: FrozenNorm | None


@dataclass(frozen=True)
class Replacement:
    """The active features in the order (layer, position, feature), and who writes where.

    `encoders` (features, width) are the derivatives of features in what they read, `written` and
    `skips` go by layer. The columns of written nodes count features first, then errors
    (layer * positions + position)."""

    features: Int[Tensor, "features 3"]
    activations: Float[Tensor, " features"]
    encoders: Float[Tensor, "features width"]
    readings: Mapping[int, Reading]
    written: tuple[Written, ...]
    skips: Mapping[int, tuple[Skip, ...]]
    names: Mapping[int, str]


@dataclass(frozen=True)
class _Share:
    """What one dictionary writes in one layer: a row per active feature, and what it adds without
    features (positions or 1, width).
    """

    layer: int
    site: str
    rows: Float[Tensor, "features width"]
    rest: Float[Tensor, "*positions width"]
    skip: Tensor | None


@dataclass(frozen=True)
class _Active:
    """The active features (position, feature) of one dictionary on the prompt."""

    name: str
    index: Int[Tensor, "features 2"]
    values: Float[Tensor, " features"]
    encoders: Float[Tensor, "features width"]
    reading: Reading
    shares: tuple[_Share, ...]


@torch.no_grad()
def replace_mlps(
    model: nn.Module, dictionaries: DictionarySet, frozen: FrozenNetwork, first: int
) -> Replacement:
    """Encode the prompt with every dictionary, one in memory at a time where the set streams.

    The first positions have neither features nor errors. A layer that no dictionary writes has its
    whole MLP for an error. Raises InputError for dictionaries that are no transcoders or do not
    fit."""
    if not isinstance(dictionaries, Mapping) or not dictionaries:
        raise InputError(
            "dictionaries must map names to placed dictionaries (assay.dictionaries.Placed), at"
            f" least one; got {type(dictionaries).__name__}"
        )
    outputs = _outputs(model, frozen)
    found: dict[int, _Active] = {}
    for name in dictionaries:
        active = _encode(model, frozen, name, dictionaries[name], outputs, first)
        layer = active.reading.layer
        if layer in found:
            raise InputError(
                f"dictionaries {found[layer].name!r} and {name!r} both read in layer {layer}; give"
                " one of them"
            )
        found[layer] = active
    order = [found[layer] for layer in sorted(found)]
    starts, total = {}, 0
    for active in order:
        starts[active.name], total = total, total + len(active.index)
    layers = [
        _written(frozen, outputs, order, starts, layer, total, first)
        for layer in range(len(frozen.blocks))
    ]
    skips: dict[int, list[Skip]] = {}
    for active in order:
        for share in active.shares:
            if share.skip is not None:
                norm = outputs[share.site][1]
                skips.setdefault(share.layer, []).append(Skip(active.reading, share.skip, norm))
    features = [
        torch.cat([torch.full_like(one.index[:, :1], one.reading.layer), one.index], 1)
        for one in order
    ]
    return Replacement(
        torch.cat(features),
        torch.cat([one.values for one in order]),
        torch.cat([one.encoders for one in order]),
        {one.reading.layer: one.reading for one in order},
        tuple(layers),
        {layer: tuple(entries) for layer, entries in skips.items()},
        {one.reading.layer: one.name for one in order},
    )


def _written(
    frozen: FrozenNetwork,
    outputs: Mapping[str, tuple[int, FrozenNorm | None]],
    order: list[_Active],
    starts: Mapping[str, int],
    layer: int,
    total: int,
    first: int,
) -> Written:
    """Gather what one layer is written, by position: features, and the error they leave."""
    shares = [(one, share) for one in order for share in one.shares if share.layer == layer]
    own = [site for site, (place, _) in outputs.items() if place == layer]
    sites = sorted({share.site for _, share in shares})
    if len(sites) > 1:
        raise InputError(f"dictionaries write layer {layer} at {sites[0]!r} and at {sites[1]!r}")
    site = sites[0] if sites else own[0]
    error = frozen.seen[site].clone()
    count = len(error)
    places = torch.arange(count, device=error.device)
    for one, share in shares:
        error -= share.rest
        error.index_add_(0, one.index[:, 0], share.rows, alpha=-1)
    error[:first] = 0
    vectors = torch.cat([*(share.rows for _, share in shares), error])
    positions = torch.cat([*(one.index[:, 0] for one, _ in shares), places])
    columns = [
        starts[one.name] + torch.arange(len(one.index), device=error.device) for one, _ in shares
    ]
    whole = torch.cat([*columns, total + layer * count + places])
    turn = positions.argsort(stable=True)
    vectors, positions, whole = vectors[turn], positions[turn], whole[turn]
    norm = outputs[site][1]
    added = vectors if norm is None else norm.push(vectors, positions)
    ends = torch.searchsorted(positions, torch.arange(count + 1, device=error.device))
    return Written(site, vectors, added, whole, positions, tuple(ends.tolist()))


def _encode(
    model: nn.Module,
    frozen: FrozenNetwork,
    name: str,
    placed: Placed,
    outputs: Mapping[str, tuple[int, FrozenNorm | None]],
    first: int,
) -> _Active:
    reading = _reading(model, frozen, name, placed.reads)
    written = _writes(model, name, placed, outputs, reading)
    x = reading.value
    dictionary = _cast(placed.dictionary, x)
    for width, what in ((dictionary.d_in, placed.reads), (placed.width, placed.writes[0])):
        if width != x.shape[1]:
            raise InputError(
                f"dictionary {name!r} is for vectors of width {width}, and the value at {what!r}"
                f" has width {x.shape[1]}: it belongs to another model"
            )
    for key, tensor in dictionary.state_dict().items():
        require_finite(tensor, f"{key} of the dictionary {name!r}")
    codes = dictionary.encode(x)
    codes[:first] = 0
    index = codes.nonzero()
    values = codes[tuple(index.T)]
    encoders = _encoders(name, dictionary, x, index)
    rest = dictionary.rest(x)
    skip = getattr(dictionary, "W_skip", None)
    decoders = dictionary.W_dec[index[:, 1]] * values[:, None]
    shares = []
    for place, site in enumerate(written):
        columns = slice(place * placed.width, (place + 1) * placed.width)
        layer, weight = outputs[site][0], None if skip is None else skip[:, columns]
        if weight is not None and weight.shape[1]:
            if layer != reading.layer:
                raise InputError(
                    f"dictionary {name!r} has a skip connection from layer {reading.layer} to layer"
                    f" {layer}; one that stays in its layer is supported"
                )
            gap = placed.width - weight.shape[1]
            weight = nn.functional.pad(weight.detach(), (0, gap)).clone()
        else:
            weight = None
        rows = decoders[:, columns]
        shares.append(_Share(layer, site, rows, rest[..., columns].clone(), weight))
    return _Active(name, index, values, encoders, reading, tuple(shares))


def _encoders(name: str, dictionary: Dictionary, x: Tensor, index: Tensor) -> Tensor:
    """Return the derivatives of active features in what is read; InputError where they are no
    multiples of an encoder's columns.
    """
    weight = getattr(dictionary, "W_enc", None)
    if not len(index):
        return x.new_zeros(0, x.shape[1])
    if isinstance(weight, Tensor) and weight.shape == (dictionary.d_in, dictionary.size):
        columns = weight[:, index[:, 1]].T.contiguous()
        generator = torch.Generator().manual_seed(0)

        def along() -> tuple[Tensor, Tensor]:
            tangent = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            moved = torch.func.jvp(dictionary.encode, (x,), (tangent,))[1][tuple(index.T)]
            return moved, (tangent[index[:, 0]] * columns).sum(1)

        moved, straight = along()
        tolerance = 1024 * torch.finfo(x.dtype).eps
        if bool(((moved - straight).abs() <= tolerance * moved.abs().max()).all()):
            return columns
        again, other = along()
        # The multiple is that of least squares over both tangents: one alone may be close to zero.
        squares = (straight.square() + other.square()).clamp_min(torch.finfo(x.dtype).tiny)
        scale = (moved * straight + again * other) / squares
        near = tolerance * float((moved.abs() + again.abs()).max())
        gap = torch.maximum((moved - scale * straight).abs(), (again - scale * other).abs())
        if bool((gap <= near).all()):
            return columns * scale[:, None]
    raise InputError(
        f"the features of dictionary {name!r} ({dictionary.architecture}) are not linear in what"
        " they read where they are active, so their edges are not defined; transcoders of"
        " architecture relu, jumprelu, topk, batchtopk, gated and matryoshka do"
    )


def _outputs(model: nn.Module, frozen: FrozenNetwork) -> dict[str, tuple[int, FrozenNorm | None]]:
    """Return the sites of MLP outputs with their layers, and the norm that comes after."""
    family = families.find_family(model)
    assert family is not None
    found: dict[str, tuple[int, FrozenNorm | None]] = {}
    for layer, block in enumerate(frozen.blocks):
        path = f"{family.blocks}.{layer}"
        found[f"{path}.{family.mlp}"] = (layer, None)
        if block.after_mlp is not None:
            found[f"{path}.{family.mlp_module}"] = (layer, block.after_mlp)
    return found


def _reading(model: nn.Module, frozen: FrozenNetwork, name: str, site: str) -> Reading:
    """Return where a dictionary reads; InputError for sites that are not on the way into an MLP."""
    family = families.find_family(model)
    assert family is not None
    unit = _UNIT.fullmatch(site)
    path = f"{family.blocks}.{int(unit[1])}" if unit else ""
    wanted = f"{path}.{family.before_mlp}" if unit else names.resolve(model, site).site
    for layer, block in enumerate(frozen.blocks):
        path, norm = f"{family.blocks}.{layer}", block.before_mlp
        normed = f"{path}.{family.before_mlp}"
        early = block.parallel
        if wanted in (normed, f"{path}.{family.mlp_module}:input"):
            if unit:  # in front of the gain, as TransformerLens names it
                return Reading(layer, early, norm.without_gain(), norm.unit)
            return Reading(layer, early, norm, frozen.seen[normed])
        if wanted == f"{path}:input":
            return Reading(layer, True, None, frozen.seen[wanted])
        if wanted in (f"{normed}:input", f"{path}.{family.attention} + {path}:input"):
            return Reading(layer, early, None, frozen.seen[f"{normed}:input"])
    raise InputError(
        f"dictionary {name!r} reads at {site!r}; an attribution graph takes transcoders, which read"
        " what goes into an MLP (blocks.L.mlp.hook_in, blocks.L.hook_resid_mid,"
        " blocks.L.ln2.hook_normalized or blocks.L.hook_resid_pre). For autoencoders use"
        " assay.features with assay.edges.part_edges"
    )


def _writes(
    model: nn.Module,
    name: str,
    placed: Placed,
    outputs: Mapping[str, tuple[int, FrozenNorm | None]],
    reading: Reading,
) -> list[str]:
    found = []
    for site in placed.writes:
        wanted = names.resolve(model, site).site
        if wanted not in outputs:
            kind = "an autoencoder" if placed.writes == (placed.reads,) else "no transcoder of MLPs"
            raise InputError(
                f"dictionary {name!r} is {kind}: it writes at {site!r}, and an attribution graph"
                " takes transcoders, which write what an MLP puts out (blocks.L.hook_mlp_out). For"
                " autoencoders use assay.features with assay.edges.part_edges"
            )
        if outputs[wanted][0] < reading.layer:
            raise InputError(
                f"dictionary {name!r} reads in layer {reading.layer} and writes before it, at"
                f" {site!r}"
            )
        found.append(wanted)
    return found


def _cast(dictionary: Dictionary, x: Tensor) -> Dictionary:
    weight = dictionary.W_dec
    if weight.dtype == x.dtype and weight.device == x.device:
        return dictionary
    return copy.deepcopy(dictionary).to(device=x.device, dtype=x.dtype)
