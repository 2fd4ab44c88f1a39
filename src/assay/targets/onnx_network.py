"""Networks of ONNX files as plain functions of torch tensors.

Each operation follows the ONNX operators (https://onnx.ai/onnx/operators) of the operator sets from
7 on, in evaluation; an operation that has no bounds is refused by name and node."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as f

from assay.errors import InputError, shown, unknown
from assay.io.onnx_files import MOST, OnnxFile, Step, read_onnx
from assay.memory import require_memory

AXES = 8
"""Axes that a tensor may have."""

Rule = Callable[[Step, list[Any]], Tensor]
OPERATIONS: dict[str, Rule] = {}


class OnnxNetwork:
    """The function of an ONNX file, in the precision of its argument: float32 weights are exact in
    float64.

    shape: of the input; outputs: entries of the value; entries: of all steps together; dtype: in
    which the file computes. Raises InputError for an operation that is not known, one that reads
    what does not fit, and a value that is NaN or infinite at an input of zeros."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        for step in file.steps:
            if step.operation not in OPERATIONS:
                known = unknown("operation", step.operation, OPERATIONS)
                raise InputError(f"{file.path}: {step.words} has no bounds: {known}")
            if len(step.outputs) != 1:
                raise InputError(f"{file.path}: {step.words} has {len(step.outputs)} outputs")
            held = file.constants.get(step.inputs[-1]) if step.inputs else None
            if step.operation == "BatchNormalization" and (held is None or (held < 0).any()):
                raise InputError(f"{file.path}: {step.words} has no constant variance >= 0")
        self._held = {name: torch.from_numpy(x) for name, x in file.constants.items()}
        kinds = {x.dtype for x in self._held.values() if x.is_floating_point()}
        self.dtype = torch.from_numpy(file.dtype.type(0)[None]).dtype
        if kinds - {self.dtype}:
            raise InputError(f"{file.path}: input and weights have different precisions")
        self.shape = file.shape
        self.entries = math.prod(self.shape)
        self._measure()
        value = self(torch.zeros(self.shape, dtype=self.dtype))
        if not value.is_floating_point():
            raise InputError(f"{file.path}: the output is of type {value.dtype}, no float")
        if not value.isfinite().all():
            raise InputError(f"{file.path}: the output is NaN or infinite at an input of zeros")
        self.outputs = value.numel()

    def _measure(self) -> None:
        """Count the entries of all steps, on tensors without contents; refuse what is too large."""
        sizes = list[int]()
        self._run(torch.zeros(self.shape, dtype=self.dtype, device="meta"), sizes)
        self.entries += sum(sizes)
        require_memory(8 * self.entries, f"a run of {self.file.path}")

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, [])

    def _run(self, x: Tensor, sizes: list[int]) -> Tensor:
        values: dict[str, Any] = {self.file.input: x}

        def like(found: Tensor) -> Tensor:
            if not found.is_floating_point():
                return found
            return found.to(x.device, x.dtype) if x.is_meta else found.to(x.dtype)

        def read(name: str) -> Tensor | None:
            if not name:
                return None
            if name not in values:
                held = self._held[name]
                values[name] = like(held)
            return values[name]

        for step in self.file.steps:
            given = [read(name) for name in step.inputs]
            try:
                found = OPERATIONS[step.operation](step, given)
            except InputError as error:
                raise InputError(f"{self.file.path}: {step.words} {error}") from error
            except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
                if isinstance(error, RuntimeError) and "memory" in str(error):
                    raise
                reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
                raise InputError(
                    f"{self.file.path}: {step.words} does not fit what it reads ({reason})"
                ) from error
            if found.numel() > MOST or found.ndim > AXES:
                raise InputError(
                    f"{self.file.path}: {step.words} makes more than {MOST} entries or {AXES} axes"
                )
            sizes.append(found.numel())
            values[step.outputs[0]] = like(found)
        return read(self.file.output)  # type: ignore[return-value]


def load_onnx(path: Path | str) -> OnnxNetwork:
    """Return the network of an ONNX file; raises InputError as `read_onnx` and `OnnxNetwork` do."""
    return OnnxNetwork(read_onnx(path))


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(found: Rule) -> Rule:
        OPERATIONS.update(dict.fromkeys(names, found))
        return found

    return register


def _plain(function: Callable[..., Tensor]) -> Rule:
    return lambda step, xs: function(*xs)


def _single(x: float) -> float:
    """Return a default as the files hold such numbers: in float32."""
    return float(np.float32(x))


_NAMED: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "MatMul": torch.matmul,
    "Neg": torch.neg,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Exp": torch.exp,
    "Erf": torch.erf,
    "Abs": torch.abs,
}
OPERATIONS.update({name: _plain(function) for name, function in _NAMED.items()})


@_rule("Identity", "Dropout")
def _identity(step: Step, xs: list[Any]) -> Tensor:
    if len(xs) > 2 and xs[2] is not None and bool(xs[2]):
        raise InputError("is in training mode; export the network in evaluation")
    found: Tensor = xs[0]
    return found


@_rule("Constant")
def _constant(step: Step, xs: list[Any]) -> Tensor:
    names = ("value", "value_float", "value_floats", "value_int", "value_ints")
    given = [step.attributes[name] for name in names if name in step.attributes]
    if len(given) != 1:
        raise InputError("has no value")
    found = torch.as_tensor(given[0])
    return found.float() if "value_float" in " ".join(step.attributes) else found


@_rule("LeakyRelu")
def _leaky_relu(step: Step, xs: list[Any]) -> Tensor:
    return f.leaky_relu(xs[0], step.attributes.get("alpha", _single(0.01)))


@_rule("Flatten")
def _flatten(step: Step, xs: list[Any]) -> Tensor:
    sizes, axis = list(xs[0].shape), step.attributes.get("axis", 1)
    if not -len(sizes) <= axis <= len(sizes):
        raise InputError(f"has the axis {axis}, of {len(sizes)}")
    found: Tensor = xs[0].reshape(math.prod(sizes[:axis]), math.prod(sizes[axis:]))
    return found


@_rule("Reshape")
def _reshape(step: Step, xs: list[Any]) -> Tensor:
    target = _integers(xs[1])
    if not step.attributes.get("allowzero", 0):
        target = [xs[0].shape[i] if size == 0 else size for i, size in enumerate(target)]
    found: Tensor = xs[0].reshape(target)
    return found


@_rule("Transpose")
def _transpose(step: Step, xs: list[Any]) -> Tensor:
    axes = step.attributes.get("perm", list(range(xs[0].ndim))[::-1])
    found: Tensor = xs[0].permute(axes)
    return found


@_rule("Squeeze", "Unsqueeze")
def _squeeze(step: Step, xs: list[Any]) -> Tensor:
    axes = step.attributes.get("axes")
    if len(xs) > 1 and xs[1] is not None:  # an input from operator set 13 on
        axes = _integers(xs[1])
    sizes = list(xs[0].shape)
    if step.operation == "Squeeze":
        if axes is None:
            axes = [axis for axis, size in enumerate(sizes) if size == 1]
        axes = {_axis(axis, len(sizes)) for axis in axes}
        if any(sizes[axis] != 1 for axis in axes):
            raise InputError(f"removes axes {sorted(axes)} of the shape {sizes}")
        return xs[0].reshape([size for i, size in enumerate(sizes) if i not in axes])
    if not axes:
        raise InputError("has no axes")
    count = len(sizes) + len(axes)
    wanted = {_axis(axis, count) for axis in axes}
    if len(wanted) != len(axes):
        raise InputError(f"has an axis twice: {axes}")
    rest = iter(sizes)
    return xs[0].reshape([1 if i in wanted else next(rest) for i in range(count)])


@_rule("Concat")
def _concat(step: Step, xs: list[Any]) -> Tensor:
    return torch.cat(xs, step.attributes["axis"])


@_rule("Gemm")
def _gemm(step: Step, xs: list[Any]) -> Tensor:
    given = step.attributes
    a = xs[0].T if given.get("transA", 0) else xs[0]
    b = xs[1].T if given.get("transB", 0) else xs[1]
    c = xs[2] if len(xs) > 2 else None
    alpha, beta = given.get("alpha", 1.0), given.get("beta", 1.0)
    if a.ndim != 2 or b.ndim != 2:
        raise InputError("needs matrices")
    if c is not None and c.shape == b.shape[1:] and alpha == beta == 1:
        return torch.addmm(c, a, b)
    found = a @ b
    found = found if alpha == 1 else found * alpha
    if c is None:
        return found
    total = found + (c if beta == 1 else c * beta)
    if total.shape != found.shape:
        raise InputError(f"adds the shape {list(c.shape)} to {list(found.shape)}")
    return total


@_rule("Conv")
def _conv(step: Step, xs: list[Any]) -> Tensor:
    given, weight = step.attributes, xs[1]
    axes = weight.ndim - 2
    if given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise InputError(f"pads by {shown(given['auto_pad'], 60)}; export it with explicit pads")
    if axes not in (1, 2, 3) or xs[0].ndim != weight.ndim:
        raise InputError(f"has {axes} axes; 1, 2 and 3 are known")
    sizes = list(weight.shape[2:])
    if given.get("kernel_shape", sizes) != sizes:
        raise InputError(f"has a kernel of {sizes}, said to be {given['kernel_shape']}")
    pads = given.get("pads", [0] * (2 * axes))
    if given.get("auto_pad") == "VALID":
        pads = [0] * (2 * axes)
    if len(pads) != 2 * axes or min(pads) < 0:
        raise InputError(f"has no possible pads: {pads}")
    x = xs[0]
    begin, end = pads[:axes], pads[axes:]
    padded = [size + a + b for size, a, b in zip(x.shape[2:], begin, end, strict=True)]
    if math.prod((*x.shape[:2], *padded)) > MOST:
        raise InputError(f"pads to more than {MOST} entries")
    if begin != end:  # torch pads both sides alike; from the last axis on
        x = f.pad(x, [p for pair in zip(begin[::-1], end[::-1], strict=True) for p in pair])
        begin = [0] * axes
    convolve: Any = (f.conv1d, f.conv2d, f.conv3d)[axes - 1]
    found: Tensor = convolve(
        x,
        weight,
        xs[2] if len(xs) > 2 else None,
        given.get("strides", [1] * axes),
        begin,
        given.get("dilations", [1] * axes),
        given.get("group", 1),
    )
    return found


@_rule("BatchNormalization")
def _batch_norm(step: Step, xs: list[Any]) -> Tensor:
    given = step.attributes
    if given.get("training_mode", 0) or given.get("spatial", 1) != 1:
        raise InputError("is in training mode, or not spatial; export the network in evaluation")
    x, scale, bias, mean, variance = xs
    epsilon = given.get("epsilon", _single(1e-5))
    return f.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


@_rule("Softmax")
def _softmax(step: Step, xs: list[Any]) -> Tensor:
    axis = _axis(step.attributes.get("axis", 1 if step.version < 13 else -1), xs[0].ndim)
    if step.version >= 13:
        return torch.softmax(xs[0], axis)
    sizes = xs[0].shape  # over all axes from this one on
    flat = xs[0].reshape(math.prod(sizes[:axis]), math.prod(sizes[axis:]))
    return torch.softmax(flat, -1).reshape(sizes)


def _axis(axis: int, count: int) -> int:
    if not -count <= axis < count:
        raise InputError(f"has the axis {axis}, of {count}")
    return axis % count


def _integers(x: Any) -> list[int]:
    """Return a list of sizes or axes, which must be constant."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.ndim != 1:
        raise InputError("needs a constant list of whole numbers")
    return [int(n) for n in x.tolist()]
