"""Weight sites: the matrices of a model that are taken apart, found by patterns over module
paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from assay.core.sites import Seen, read_sites
from assay.core.target import evaluating
from assay.errors import InputError, unknown

LAYERS = (nn.Linear, Conv1D, nn.Embedding)


@dataclass(frozen=True)
class Use:
    """One module that applies a site's matrix: by look-up (an embedding), and transposed where it
    is tied to a module that applies it the other way round.
    """

    path: str
    lookup: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class WeightSite:
    """One weight matrix W (inputs, outputs), y = x W, and the number of its components.

    Modules that share the matrix are one site with several uses; it is named after the first, and
    its importances are read there."""

    name: str
    uses: tuple[Use, ...]
    inputs: int
    outputs: int
    components: int

    @property
    def lookup(self) -> bool:
        """Whether the first use is an embedding, whose input is an index and not a vector."""
        return self.uses[0].lookup

    @property
    def tied(self) -> tuple[str, ...]:
        """The paths of the further modules that share the matrix."""
        return tuple(use.path for use in self.uses[1:])

    def matrix(self, model: nn.Module) -> Float[Tensor, "inputs outputs"]:
        """Return W of the model, a view."""
        return matrix_of(model.get_submodule(self.name))


def matrix_of(module: nn.Module) -> Float[Tensor, "inputs outputs"]:
    """Return the matrix W with y = x W of a Linear, a Conv1D or an Embedding (rows looked up)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, nn.Linear) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """Return the bias of a layer, which is not taken apart; None where it has none."""
    return getattr(module, "bias", None)


def read_inner(use: Use, seen: Seen, factor: Tensor) -> Float[Tensor, "*positions components"]:
    """Return x V, by look-up of rows for an embedding."""
    if use.lookup:
        return factor[seen.input]
    wide = torch.promote_types(seen.input.dtype, factor.dtype)
    return seen.input.to(wide) @ factor.to(wide)


def written_by(module: nn.Module, seen: Seen) -> Float[Tensor, "*positions outputs"]:
    """Return what the matrix writes, the module's output without its bias, in float32 or wider."""
    bias = bias_of(module)
    written = seen.written.to(torch.promote_types(seen.written.dtype, torch.float32))
    return written if bias is None else written - bias


def read_uses(model: nn.Module, inputs: Any, sites: Sequence[WeightSite]) -> dict[str, Seen]:
    """Return what every use of the sites sees on the untouched network.

    Raises InputError for a use without an example axis in front, such as an embedding of positions,
    and for a module that writes something else than `x W` and its bias, such as an embedding that
    scales its rows: on the first example, in the precision of the network."""
    with evaluating(model):
        seen = read_sites(model, inputs, [use.path for site in sites for use in site.uses])
    examples = len(next(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)))
    for path, one in seen.items():
        if one.written.ndim < 2 or len(one.written) != examples:
            raise InputError(
                f"what {path!r} reads has no example axis of {examples} in front; leave it out of"
                " the sites"
            )
    for use in (use for site in sites for use in site.uses):
        module = model.get_submodule(use.path)
        one = replace(
            seen[use.path],
            written=seen[use.path].written[:1].detach(),
            inputs=(seen[use.path].input[:1].detach(),),
        )
        whole = written_by(module, one).detach()
        gap = (read_inner(use, one, matrix_of(module).detach().to(whole)) - whole).abs().max()
        size = one.written.abs().max() + whole.abs().max()
        if not float(gap) <= max(1e-3, 8 * torch.finfo(one.written.dtype).eps) * float(size):
            raise InputError(
                f"{use.path!r} writes something else than the product with its matrix and its bias"
                f" ({type(module).__name__}; off by {float(gap):.3g} of {float(size):.3g}); it has"
                " no components"
            )
    return seen


def match_sites(
    model: nn.Module,
    patterns: str | Sequence[str] | Mapping[str, int],
    components: int | None = None,
) -> tuple[WeightSite, ...]:
    """Return the weight sites whose module paths match patterns such as `layers.*.mlp_in`, in the
    order of the model.

    `components` is the number of each site's components; a mapping gives it by pattern. Modules
    that share their weight become one site with all their uses, whichever of them is matched.

    Raises InputError when a pattern matches no Linear, Conv1D or Embedding (with the nearest
    paths), for fewer than one component, and for two patterns that give one site two numbers."""
    counts = _counts(patterns, components)
    layers = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LAYERS)
    }
    found: dict[str, int] = {}
    for pattern, count in counts.items():
        paths = [path for path in layers if fnmatchcase(path, pattern)]
        if not paths:
            raise unknown("module path of a Linear, Conv1D or Embedding", pattern, layers)
        for path in paths:
            if found.setdefault(path, count) != count:
                raise InputError(
                    f"{path!r} matches patterns that give it {found[path]} and {count} components;"
                    " give one number"
                )
    return _joined(layers, found)


def _counts(
    patterns: str | Sequence[str] | Mapping[str, int], components: int | None
) -> dict[str, int]:
    if isinstance(patterns, Mapping):
        counts = dict(patterns)
    else:
        if components is None:
            raise InputError("components is missing; give the number of components of a site")
        names = [patterns] if isinstance(patterns, str) else list(patterns)
        counts = dict.fromkeys(names, components)
    if not counts:
        raise InputError("no patterns were given; name at least one module path")
    for pattern, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise InputError(
                f"components of {pattern!r} is {count}; a site needs at least 1 component, a whole"
                " number of them"
            )
    return counts


def _joined(layers: Mapping[str, nn.Module], counts: Mapping[str, int]) -> tuple[WeightSite, ...]:
    # Held, because a weight that is computed anew at every look would share its id with others.
    weights = {path: layer.weight for path, layer in layers.items()}
    owners: dict[int, list[str]] = {}
    for path, weight in weights.items():
        owners.setdefault(id(weight), []).append(path)
    sites = []
    for paths in owners.values():
        first = layers[paths[0]]
        wrong = {counts[path] for path in paths if path in counts}
        if not wrong:
            continue
        for path in paths:
            if getattr(layers[path], "max_norm", None) is not None:
                raise InputError(
                    f"the embedding {path!r} rescales its rows (max_norm); it is not one fixed"
                    " matrix"
                )
        if len(wrong) > 1:
            raise InputError(
                f"{', '.join(paths)} share one matrix and so are one site; give them one number of"
                f" components, not {sorted(wrong)}"
            )
        uses = tuple(
            Use(
                path,
                lookup=isinstance(layers[path], nn.Embedding),
                transposed=isinstance(layers[path], nn.Linear) != isinstance(first, nn.Linear),
            )
            for path in paths
        )
        inputs, outputs = matrix_of(first).shape
        sites.append(WeightSite(paths[0], uses, inputs, outputs, wrong.pop()))
    return tuple(sites)
