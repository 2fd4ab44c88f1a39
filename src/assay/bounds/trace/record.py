"""The ATen operations that a function runs, recorded once and checked against the function."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from assay.errors import AssayError, InputError
from assay.io.files import digest_of_tensors

Function = Callable[..., Tensor]
NO_RULE = "has no bound"


@dataclass(frozen=True)
class Program:
    """A recorded function: its operations, with every constant copied, and where each of its inputs
    may lie.

    `function` is what was recorded; the program is checked against it, and never replaces it where
    a value is reported."""

    module: GraphModule
    function: Function
    examples: tuple[Tensor, ...]

    @property
    def digest(self) -> str:
        """The SHA-256 of the recorded operations and their constants."""
        nodes = [node for node in self.module.graph.nodes if node.op == "get_attr"]
        held = {str(node.target): getattr(self.module, str(node.target)) for node in nodes}
        text = f"{self.module.code}{digest_of_tensors(held)}"
        return hashlib.sha256(text.encode()).hexdigest()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run the recorded operations."""
        with torch.no_grad():
            found: Tensor = self.module(*inputs)
        return found


def record(function: Function, *examples: Tensor) -> Program:
    """Record `function(*examples)` as a graph of ATen operations (torch.fx), with its constants
    copied.

    Raises `InputError` for a function that draws random numbers (named, with its module), returns
    no tensor, or cannot be recorded."""
    with torch.no_grad():
        value = function(*examples)
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            raise InputError(
                f"trace: the function must return a tensor, got {type(value).__name__}"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = make_fx(function)(*examples)
        except Exception as error:
            raise InputError(
                f"trace: the function cannot be recorded ({_first_line(error)}); give an explicit"
                " attention_mask and load models with attn_implementation='eager'"
            ) from error
    for node in module.graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if random and "attention" not in str(node.target):  # fused attention has no rule anyway
            raise refusal(
                function, examples, node.target, "draws random numbers; call eval() on the model"
            )
    module = _with_copies(module)
    return Program(module, function, tuple(example.detach().clone() for example in examples))


def check(program: Program, regions: Sequence[tuple[Tensor, Tensor]], points: int = 4) -> None:
    """Compare the program with its function bit for bit at the ends and at random points of the
    regions; raises `InputError` naming the first operation that differs.

    A trace holds one path through the function: a function that takes another one elsewhere is
    found here, as far as points can tell."""
    generator = torch.Generator().manual_seed(0)
    for point in range(points + 2):
        inputs = []
        for low, high in regions:
            share = torch.rand(low.shape, generator=generator, dtype=torch.float64).to(low)
            share = share if point > 1 else torch.full_like(low, float(point))
            inputs.append(torch.clamp(low + share * (high - low), low, high))
        with torch.no_grad():
            wanted = program.function(*inputs)
        if wanted.isnan().any():
            raise InputError("trace: the function's value is NaN at a point of the region")
        if not torch.equal(program(*inputs), wanted):
            raise InputError(
                "trace: the function takes another path at other points of the region, from"
                f" {_first_difference(program, inputs)} on; such a function has no bound"
            )


def refusal(
    function: Function, examples: Sequence[Tensor], target: Any, reason: str = NO_RULE
) -> InputError:
    """Return the error for an operation, with the module that ran it."""
    where = _module_of(function, examples, target)
    if reason == NO_RULE:
        return InputError(f"operation {target} {where}has no bound")
    return InputError(f"operation {target} {where}{reason}")


class _Watch(TorchDispatchMode):
    def __init__(self, target: Any, stack: list[nn.Module]) -> None:
        super().__init__()
        self.target, self.stack, self.found = target, stack, list[nn.Module]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.target and not self.found:
            self.found = list(self.stack)
        return func(*args, **(kwargs or {}))


def _module_of(function: Function, examples: Sequence[Tensor], target: Any) -> str:
    """Run the function once more and return, in words, the modules inside which an operation runs
    first.
    """
    stack: list[nn.Module] = []
    hooks = [
        register_module_forward_pre_hook(lambda module, args: stack.append(module)),
        register_module_forward_hook(lambda *_: _leave(stack), always_call=True),
    ]
    try:
        with torch.no_grad(), _Watch(target, stack) as watch:
            function(*examples)
    finally:
        for hook in hooks:
            hook.remove()
    if not watch.found:
        return ""
    root, last = watch.found[0], watch.found[-1]
    name = next((name for name, module in root.named_modules() if module is last), "")
    return f"in module {name or 'model'!r} ({type(last).__name__}) "


def _leave(stack: list[nn.Module]) -> None:
    stack.pop()


def _with_copies(module: GraphModule) -> GraphModule:
    """Give the module constants of its own: they share storage with the model's parameters, which
    training changes.
    """
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(module, node.target)
            if isinstance(value, Tensor):
                delattr(module, node.target)
                module.register_buffer(node.target, value.detach().clone())
    return module


def _first_difference(program: Program, inputs: Sequence[Tensor]) -> str:
    """Name the first operation of a new recording at these inputs that is another one."""
    try:
        with torch.no_grad():
            again = make_fx(program.function)(*inputs)
    except Exception as error:
        return f"an operation that cannot be recorded ({_first_line(error)})"
    ours, theirs = list(program.module.graph.nodes), list(again.graph.nodes)
    for one, other in zip(ours, theirs, strict=False):
        if one.target != other.target and one.op == "call_function":
            return f"{one.target} (there {other.target})"
    for one, other in zip(ours, theirs, strict=False):
        if one.op == "get_attr" and not torch.equal(
            getattr(program.module, one.target), getattr(again, other.target)
        ):
            return f"the constant {one.target}"
    return "an unknown operation"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def require_value(found: Any, wanted: Tensor, dtypes: Iterable[torch.dtype]) -> None:
    """Raise `AssayError` unless bounds at a point agree with the function's value there, up to the
    rounding of the coarsest of the dtypes that it computes in.
    """
    scale = float(wanted.abs().max()) + 1.0
    unit = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    tolerance = 64 * max(unit, torch.finfo(wanted.dtype).eps) ** 0.75 * scale
    gap = max(
        abs(float(a) - float(b))
        for a, b in zip(found.reshape(-1).tolist(), wanted.reshape(-1).tolist(), strict=True)
    )
    if not gap <= tolerance:
        raise AssayError(f"trace: the bounds at a point are off the value by {gap:.3g}")
