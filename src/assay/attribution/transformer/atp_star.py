"""AtP*: attribution patching repaired where attention saturates and where paths cancel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.attribution.gradient import gate_gradient
from assay.attribution.method import Estimate, Method
from assay.attribution.scores import Estimand
from assay.attribution.transformer.patterns import Pattern, changed_logits, read_patterns
from assay.core.mechanisms import Mechanisms
from assay.core.parts import mix
from assay.core.sites import Seen, resolve_site
from assay.errors import InputError
from assay.progress import progress
from assay.targets import families


@dataclass(frozen=True)
class AtPStar(Method):
    """Attribution patching with the two repairs of arXiv 2403.00745.

    Nodes named `attn.hook_q` and `attn.hook_k` get `<dm/dA, A(node at reference) - A>`, with the
    attention pattern A computed anew and exactly, where the gradient through a saturated softmax
    says nothing. With `drop`, every score is the mean over layers of |score with one layer's
    gradient dropped|: paths that cancel in the gradient do not cancel in all of these. The mean
    leaves out the layer that a node itself lies in, whose loss would cut all its paths. These
    scores have no sign.

    `layers` are the layers to drop, each a list of modules whose output passes no gradient; by
    default attention and MLP of each block of a language model."""

    drop: bool = True
    layers: Sequence[Sequence[str]] | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return "AtP*" if self.drop else "AtP, QK fix"

    @property
    def estimand(self) -> Estimand:  # type: ignore[override]
        return "size of single removal" if self.drop else "single removal"

    def estimate(self, mechanisms: Mechanisms) -> Estimate:
        baseline, plain = _first(mechanisms)
        return Estimate(baseline, self._dropped(mechanisms, plain) if self.drop else plain)

    def _dropped(self, mechanisms: Mechanisms, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model = mechanisms.target.model
        layers = _layers(model) if self.layers is None else self.layers
        if not layers:
            raise InputError("layers is empty; name at least one layer whose gradient to drop")
        total = {name: torch.zeros_like(values) for name, values in plain.items()}
        counted = dict.fromkeys(plain, 0)
        for layer in progress(layers, "AtP* without one layer's direct paths"):
            with _no_gradient(model, layer):
                _, scores = _first(mechanisms)
            for name, values in scores.items():
                if not _inside(mechanisms, name, layer):
                    total[name] += values.abs()
                    counted[name] += 1
        return {
            name: total[name] / counted[name] if counted[name] else values.abs()
            for name, values in plain.items()
        }


def fix_queries(
    pattern: Pattern, changed: Float[Tensor, "examples heads queries keys"]
) -> Float[Tensor, "examples queries heads"]:
    """Return `sum_j dm/dA_ij (A'_ij - A_ij)` for every query i, with A' the softmax of the
    changed logits, in float64.
    """
    difference = changed.double().softmax(-1) - pattern.logits.double().softmax(-1)
    return (pattern.gradient.double() * difference).sum(-1).transpose(1, 2)


def fix_keys(
    pattern: Pattern, changed: Float[Tensor, "examples heads queries keys"]
) -> Float[Tensor, "examples keys heads"]:
    """Return `sum_i sum_j' dm/dA_ij' (A'_ij' - A_ij')` for every key j, with A' the softmax when
    only logit ij is changed.

    The weight p of the key takes its share from the others in proportion, so that the inner sum is
    `(p' - p) (dm/dA_ij - mean of dm/dA_ij' over the other keys)`.
    """
    logits, slope = pattern.logits.double(), pattern.gradient.double()
    weights = logits.softmax(-1)
    rest = _all_but_one(weights)
    level, mean = (
        logits.logsumexp(-1, keepdim=True) + rest.log(),
        _all_but_one(weights * slope) / rest,
    )
    # Only beside the largest weight can the rest be too small for the whole softmax: it gets a
    # softmax without that key.
    best = weights.argmax(-1, keepdim=True)
    without = logits.scatter(-1, best, float("-inf"))
    level = level.scatter(-1, best, without.logsumexp(-1, keepdim=True))
    mean = mean.scatter(-1, best, (without.softmax(-1).nan_to_num() * slope).sum(-1, keepdim=True))
    moved = torch.sigmoid(changed.double() - level) - weights
    return (moved * (slope - mean)).sum(-2).transpose(1, 2)


def _first(mechanisms: Mechanisms) -> tuple[Tensor, dict[str, Tensor]]:
    """Return first-order scores, those of query and key nodes from patterns computed anew."""
    baseline, values = gate_gradient(mechanisms)
    fixed = mechanisms.query_key_groups()
    if fixed:
        model = mechanisms.target.model
        patterns = read_patterns(
            mechanisms.target, mechanisms.batch, sorted({path for _, path, _ in fixed.values()})
        )
        for name, (slot, path, projection) in fixed.items():

            def change(out: Tensor, name: str = name, projection: str = projection) -> Tensor:
                seen = Seen(out, out)
                return mix(
                    seen,
                    {name: mechanisms.parts(projection, seen)[name]},
                    mechanisms.full(0.0, [name]),
                )

            changed = changed_logits(model, path, patterns[path], projection, change)
            effect = (
                fix_queries(patterns[path], changed)
                if slot == "q"
                else fix_keys(patterns[path], changed)
            )
            shared = effect.shape[-1] // values[name].shape[-1]  # query heads that share a key head
            values[name] = -effect.unflatten(-1, (-1, shared)).sum(-1)
    return baseline, values


def _layers(model: nn.Module) -> list[list[str]]:
    found = families.find_family(model)
    if found is None:
        raise InputError(
            f"the layers of a {families.model_type(model)!r} model are not known; name them,"
            " layers=[[module path, ...], ...]"
        )
    blocks: Any = model.get_submodule(found.blocks)
    inner = (path.rsplit(".", 1)[0] for path in (found.attention_projection, found.neurons_out))
    paths = dict.fromkeys(
        (*inner, found.attention, found.mlp)
    )  # a norm behind attention or MLP stands beside it
    return [[f"{found.blocks}.{layer}.{path}" for path in paths] for layer in range(len(blocks))]


def _inside(mechanisms: Mechanisms, name: str, layer: Sequence[str]) -> bool:
    places = [
        resolve_site(mechanisms.target.model, site)[0].path for site in mechanisms.group(name).sites
    ]
    return any(place == path or place.startswith(path + ".") for place in places for path in layer)


@contextmanager
def _no_gradient(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    def stop(module: nn.Module, args: Any, out: Any) -> Any:
        return out.detach() if isinstance(out, Tensor) else (out[0].detach(), *out[1:])

    with ExitStack() as stack:
        for path in paths:
            resolve_site(model, path)
            stack.callback(model.get_submodule(path).register_forward_hook(stop).remove)
        yield


def _all_but_one(values: Tensor) -> Tensor:
    """Return the sum over the last axis without each entry itself, added up from both sides: a
    difference would cancel.
    """
    nothing = torch.zeros_like(values[..., :1])
    before = torch.cat([nothing, values[..., :-1].cumsum(-1)], dim=-1)
    after = torch.cat([nothing, values.flip(-1)[..., :-1].cumsum(-1)], dim=-1).flip(-1)
    return before + after
