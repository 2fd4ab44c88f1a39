"""Modified backward passes: relevance patching and frozen patterns, with the forward pass
unchanged to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from assay.attribution.gradient import gate_gradient
from assay.attribution.method import Estimate, Method
from assay.attribution.transformer.norms import is_norm, read_norm
from assay.core.mechanisms import Mechanisms
from assay.core.sites import Seen
from assay.errors import unknown
from assay.targets import families

Rules = Literal["relp", "frozen"]
SOFTMAX = (torch.nn.functional.softmax, torch.softmax, Tensor.softmax)


@dataclass(frozen=True)
class RelP(Method):
    """First order with a modified backward pass: relevance patching (arXiv 2508.21258), or the
    direct linear effects.

    "relp": norms keep their scale (LN rule), an activation function f passes f(x) / x on (identity
    rule), a product of two values halves what it passes to each (half rule), attention patterns are
    constants (AH rule), linear maps are themselves (0 rule). "frozen": norms keep their scale and
    attention patterns are constants; all else is the gradient.

    `products` are the modules whose input is a product of two values, by default the
    down-projections of gated MLPs."""

    rules: Rules = "relp"
    products: Sequence[str] | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return "RelP" if self.rules == "relp" else "gradient, frozen"

    @property
    def backward(self) -> str:  # type: ignore[override]
        return self.rules

    def estimate(self, mechanisms: Mechanisms) -> Estimate:
        with modified_backward(mechanisms.target.model, self.rules, self.products):
            return Estimate(*gate_gradient(mechanisms))


@contextmanager
def modified_backward(
    model: nn.Module, rules: Rules, products: Sequence[str] | None = None
) -> Iterator[None]:
    """Change what gradients pass through a model's norms, attention patterns, activations and
    products; see `RelP`.

    Softmax counts as an attention pattern wherever a submodule takes it; the activations are
    modules that map zero to zero."""
    if rules not in get_args(Rules):
        raise unknown("backward rule", str(rules), get_args(Rules))
    inside = [0]
    with ExitStack() as stack:

        def hook(module: nn.Module, function: Callable[..., Any]) -> None:
            stack.callback(module.register_forward_hook(function, with_kwargs=True).remove)

        for path, module in model.named_modules():
            if is_norm(module):
                hook(module, _keep_scale)
            elif rules == "relp" and _is_activation(module):
                hook(module, _pass_ratio)
            if path:
                stack.callback(
                    module.register_forward_pre_hook(
                        lambda *_: inside.__setitem__(0, inside[0] + 1)
                    ).remove
                )
                stack.callback(
                    module.register_forward_hook(
                        lambda *_: inside.__setitem__(0, inside[0] - 1)
                    ).remove
                )
        if rules == "relp":
            for path in gated_products(model) if products is None else products:
                stack.callback(model.get_submodule(path).register_forward_pre_hook(_halve).remove)
        stack.enter_context(_ConstantPatterns(inside))
        yield


def gated_products(model: nn.Module) -> list[str]:
    """Return the down-projections of gated MLPs, in families where they are known."""
    found = families.find_family(model)
    if found is None or not found.neurons_in.endswith("gate_proj"):
        return []
    blocks: Any = model.get_submodule(found.blocks)
    return [f"{found.blocks}.{layer}.{found.neurons_out}" for layer in range(len(blocks))]


class _ConstantPatterns(TorchFunctionMode):
    def __init__(self, inside: list[int]):
        super().__init__()
        self.inside = inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.detach() if func in SOFTMAX and self.inside[0] else out


def _keep_scale(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> Tensor:
    value = Seen(out, out, args, kwargs).input
    normed = read_norm(module, value)
    inner = value - value.mean(-1, keepdim=True) if normed.centred else value
    return _straight(out, (normed.gain * normed.scale).detach() * inner)


def _pass_ratio(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> Tensor:
    tracked = Seen(out, out, args, kwargs).input
    value = tracked.detach()
    small = torch.full_like(value, torch.finfo(value.dtype).eps ** 0.25)
    with torch.no_grad():  # at zero the ratio is its limit, the slope there
        ratio = torch.where(
            value == 0, module.forward(small) / small, out / torch.where(value == 0, small, value)
        )
    return _straight(out, ratio * tracked)


def _halve(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_straight(args[0], args[0] / 2), *args[1:])


def _straight(value: Tensor, path: Tensor) -> Tensor:
    """Return `value` to the bit, with the derivatives of `path`."""
    return value.detach() + (path - path.detach())


def _is_activation(module: nn.Module) -> bool:
    known = type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations")
    if (
        not known
        or next(module.parameters(), None) is not None
        or next(module.children(), None) is not None
    ):
        return False
    with torch.no_grad():
        return not bool(module.forward(torch.zeros(1, 1)).any())
