"""Site names of language models: TransformerLens names and module paths, resolved to sites of the
hook layer.

A site is a string: `module.path` (the module's output, its first element if it is a tuple),
`module.path:input` (its first input), the name of a parameter, or `A + B` (the sum of the values at
A and B is seen, a change is written at A)."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from assay.core.sites import resolve_site
from assay.errors import InputError, unknown
from assay.targets.families import FAMILIES, Family, find_family, is_parallel, model_type
from assay.targets.lens import hook_point

Kind = Literal["embedding", "residual", "attention", "mlp", "head", "neurons", "module"]

_HOOKS: dict[str, Kind] = {
    "hook_resid_pre": "residual",
    "hook_resid_mid": "residual",
    "hook_resid_post": "residual",
    "hook_attn_out": "attention",
    "hook_mlp_out": "mlp",
    "attn.hook_q": "head",
    "attn.hook_k": "head",
    "attn.hook_v": "head",
    "attn.hook_z": "head",
    "mlp.hook_in": "module",
    "mlp.hook_out": "module",
    "mlp.hook_pre": "neurons",
    "mlp.hook_post": "neurons",
}
_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class SiteRef:
    """One site of a language model, and which columns of its value a name means.

    `layer` is the block's index, -1 outside the blocks. With `heads`, head h owns the `head_dim`
    columns from `slice[0] + h * stride` on: `stride` is `head_dim` unless query, key and value are
    interleaved head by head."""

    site: str
    kind: Kind
    layer: int = -1
    heads: int | None = None
    head_dim: int | None = None
    slice: tuple[int, int] | None = None
    stride: int | None = None

    def columns(self) -> Tensor:
        """Return the column of every (head, dimension), (heads, head_dim); InputError at a site
        without heads.
        """
        if self.heads is None or self.head_dim is None:
            raise InputError(
                f"site {self.site!r} has no heads; use attn.hook_q, hook_k, hook_v or hook_z"
            )
        first = self.slice[0] if self.slice else 0
        heads = first + torch.arange(self.heads) * (self.stride or self.head_dim)
        return heads[:, None] + torch.arange(self.head_dim)

    def split(self, value: Tensor) -> Tensor:
        """Return the part of a site's value (..., width) that the name means: (..., heads,
        head_dim) at head sites, else all.
        """
        return value if self.heads is None else value[..., self.columns().to(value.device)]

    def merge(self, value: Tensor, part: Tensor) -> Tensor:
        """Return the site's value with the part that the name means replaced: the inverse of
        `split`.
        """
        if self.heads is None:
            return part
        merged = value.clone()
        merged[..., self.columns().to(value.device)] = part
        return merged


def site_names(
    model: nn.Module, kinds: Iterable[Kind] | None = None, layers: Sequence[int] | None = None
) -> list[str]:
    """Return the TransformerLens names of a model, in the order in which the values are computed.

    Only those of the `kinds` and `layers` asked for; "embedding" is in no layer. Raises InputError
    when the family has none."""
    found = _require_family(model)
    wanted = set(_HOOKS.values()) | {"embedding"} if kinds is None else set(kinds)
    for kind in wanted - set(get_args(Kind)):
        raise unknown("kind of site", str(kind), get_args(Kind))
    order = [
        "hook_resid_pre",
        *(f"attn.hook_{name}" for name in "qkvz"),
        "hook_attn_out",
        *([] if is_parallel(model) else ["hook_resid_mid"]),
        "mlp.hook_pre",
        "mlp.hook_post",
        "hook_mlp_out",
        "hook_resid_post",
    ]
    depth = _depth(model, found)
    chosen = range(depth) if layers is None else layers
    for layer in chosen:
        if not 0 <= layer < depth:
            raise InputError(
                f"layer {layer} does not exist: the model has {depth} blocks, 0 to {depth - 1}"
            )
    names = ["hook_embed"] if "embedding" in wanted and layers is None else []
    return names + [
        f"blocks.{layer}.{hook}" for layer in chosen for hook in order if _HOOKS[hook] in wanted
    ]


def match_names(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Return the names that patterns (`*`, `?`) match, TransformerLens names first and then module
    paths, in the order of the network.

    Module paths count only where no TransformerLens name matches. Raises InputError, with the
    nearest names, for a pattern that matches nothing."""
    known = site_names(model) if find_family(model) is not None else []
    paths = [path for path, _ in model.named_modules() if path]
    found: set[str] = set()
    for pattern in patterns:
        names = fnmatch.filter(known, pattern) or fnmatch.filter(paths, pattern)
        if not names:
            raise unknown("site", pattern, [*known, *paths])
        found.update(names)
    return [name for name in dict.fromkeys([*known, *paths]) if name in found]


def resolve(model: nn.Module, name: str) -> SiteRef:
    """Return the site that a TransformerLens name, a module path, a parameter name or a sum `A + B`
    of two means.

    Raises InputError with the nearest names when there is none, and when the value does not exist
    in this model: a block that runs attention and MLP side by side has no residual stream between
    them."""
    name = name.strip()
    if "hook_" in name and "+" not in name:
        if (path := hook_point(model, name)) is not None:
            return _point(name, path)
        return _resolve_hook(model, name)
    resolve_site(model, name)
    found = find_family(model)
    inside = (
        re.match(rf"{re.escape(found.blocks)}\.(\d+)(?=[.:\s]|$)", name)
        if found is not None
        else None
    )
    return SiteRef(name, "module", int(inside.group(1)) if inside else -1)


def _point(name: str, path: str) -> SiteRef:
    """Return the site of a hook point; heads are an axis of its value, not columns."""
    match = _BLOCK_NAME.fullmatch(name)
    kind = _HOOKS.get(match[2], "module") if match else "module"
    kind = "embedding" if name == "hook_embed" else "module" if kind == "head" else kind
    return SiteRef(path, kind, int(match[1]) if match else -1)


def _resolve_hook(model: nn.Module, name: str) -> SiteRef:
    found = _require_family(model, name)
    if name == "hook_embed":
        return SiteRef(found.embedding, "embedding")
    match = _BLOCK_NAME.fullmatch(name)
    if match is None or match.group(2) not in _HOOKS or int(match.group(1)) >= _depth(model, found):
        raise unknown("site", name, site_names(model))
    layer, hook = int(match.group(1)), match.group(2)
    block = f"{found.blocks}.{layer}"
    kind = _HOOKS[hook]
    match hook:
        case "hook_resid_pre":
            return SiteRef(f"{block}:input", kind, layer)
        case "hook_resid_post":
            return SiteRef(block, kind, layer)
        case "hook_resid_mid":
            if is_parallel(model):
                raise InputError(
                    f"{name!r} does not exist: the blocks of this {model_type(model)} model run"
                    " attention and MLP side by side on the same residual stream; use"
                    " hook_resid_pre, hook_attn_out, hook_mlp_out or hook_resid_post"
                )
            return SiteRef(f"{block}.{found.attention} + {block}:input", kind, layer)
        case "hook_attn_out":
            return SiteRef(f"{block}.{found.attention}", kind, layer)
        case "hook_mlp_out":
            return SiteRef(f"{block}.{found.mlp}", kind, layer)
        case "mlp.hook_in":  # circuit-tracer's name for what its transcoders read
            return SiteRef(f"{block}.{found.mlp_module}:input", kind, layer)
        case "mlp.hook_out":  # and for what they write, in front of a norm that may follow
            return SiteRef(f"{block}.{found.mlp_module}", kind, layer)
        case "mlp.hook_pre":
            return SiteRef(f"{block}.{found.neurons_in}", kind, layer)
        case "mlp.hook_post":
            return SiteRef(f"{block}.{found.neurons_out}:input", kind, layer)
        case _:
            return _head_site(model, found, layer, hook[-1])


def _head_site(model: nn.Module, found: Family, layer: int, value: str) -> SiteRef:
    config: Any = model.config
    block = f"{found.blocks}.{layer}"
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if value == "z":
        return SiteRef(
            f"{block}.{found.attention_projection}:input",
            "head",
            layer,
            heads,
            width,
            (0, heads * width),
            width,
        )
    index = "qkv".index(value)
    if found.fused == "no":
        own = heads if value == "q" else int(getattr(config, "num_key_value_heads", None) or heads)
        return SiteRef(
            f"{block}.{found.qkv[index]}", "head", layer, own, width, (0, own * width), width
        )
    stride = width if found.fused == "blocks" else 3 * width
    first = index * (heads * width if found.fused == "blocks" else width)
    return SiteRef(
        f"{block}.{found.qkv[0]}",
        "head",
        layer,
        heads,
        width,
        (first, first + (heads - 1) * stride + width),
        stride,
    )


def _require_family(model: nn.Module, name: str = "") -> Family:
    found = find_family(model)
    if found is None:
        paths = [path for path, _ in model.named_modules() if path][:6]
        asked = f"site {name!r}: " if name else ""
        raise InputError(
            f"{asked}no TransformerLens names for a model of family {model_type(model)!r}"
            f" (there are for {', '.join(FAMILIES)}); module paths work with any model, here"
            f" {', '.join(paths)}, ..."
        )
    return found


def _depth(model: nn.Module, found: Family) -> int:
    blocks = model.get_submodule(found.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return len(blocks)
