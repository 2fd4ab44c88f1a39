"""ONNX files (the `vnn` extra): one file with its weights inside, as plain steps on arrays.

Files are untrusted: sizes and shapes are checked, weights that are NaN or infinite and data kept
outside the file are refused, and whatever else is wrong is one clear line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from assay.errors import InputError, shown
from assay.io.files import existing
from assay.memory import require_memory

OLDEST = 7
"""The first operator set in which shapes broadcast as in NumPy."""

MOST = 1 << 28
"""Entries that one tensor may have."""

KINDS = {"FLOAT": np.float32, "DOUBLE": np.float64, "INT64": np.int64, "INT32": np.int32}
"""Types of tensors that are read."""


@dataclass(frozen=True)
class Step:
    """One node of the file. Names of inputs that are left out are empty."""

    operation: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    version: int

    @property
    def words(self) -> str:
        """How messages name it."""
        return f"operation {self.operation} (node {shown(self.name or self.outputs[0], 60)})"


@dataclass(frozen=True)
class OnnxFile:
    """What a file computes: steps in order on named tensors; the one input has a shape, and is of
    a floating-point type.
    """

    path: Path
    steps: tuple[Step, ...]
    constants: Mapping[str, np.ndarray]
    input: str
    shape: tuple[int, ...]
    dtype: np.dtype
    output: str


def read_onnx(path: Path | str) -> OnnxFile:
    """Read a network of one input and one output from an ONNX file.

    Raises InputError where the package is not installed, the file is missing or damaged, holds
    weights that are NaN, infinite or outside of the file, or has an input without fixed sizes (a
    free batch size is one)."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise InputError(
            "ONNX files need the package onnx: pip install 'assay-interp[vnn]'"
        ) from error
    path = existing(path)
    require_memory(4 * path.stat().st_size, f"the network of {path}")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise InputError(f"{path} is damaged, or no ONNX file: it cannot be parsed") from error
    graph = model.graph
    if not graph.node:
        raise InputError(f"{path} is damaged, or no ONNX file: it has no operations")
    versions = {o.version for o in model.opset_import if o.domain in ("", "ai.onnx")}
    newest = onnx.defs.onnx_opset_version()
    if len(versions) != 1 or not OLDEST <= min(versions) <= newest:
        listed = " and ".join(map(str, sorted(versions))) or "none"
        raise InputError(
            f"{path}: operator set {listed} is not read, only one of {OLDEST} to {newest};"
            " export it again"
        )
    (version,) = versions
    if graph.sparse_initializer:
        raise InputError(f"{path}: sparse weights are not read; export it with dense ones")
    if model.functions:
        raise InputError(f"{path}: functions of its own are not read; export it with them inlined")
    constants = dict[str, np.ndarray]()
    for tensor in graph.initializer:
        if tensor.name in constants:
            raise InputError(f"{path}: the weights {shown(tensor.name, 60)} stand twice")
        constants[tensor.name] = _array(tensor, f"{path}: weights {shown(tensor.name, 60)}")
    given = [entry for entry in graph.input if entry.name not in constants]
    if len(given) != 1 or len(graph.output) != 1:
        raise InputError(
            f"{path}: a network of one input and one output is needed, this has {len(given)} and"
            f" {len(graph.output)}"
        )
    shape, dtype = _input(given[0], path)
    steps = tuple(_step(node, version, path) for node in graph.node)
    _require_order(steps, {*constants, given[0].name}, graph.output[0].name, path)
    _require_valid(model, path)
    return OnnxFile(path, steps, constants, given[0].name, shape, dtype, graph.output[0].name)


def _input(entry: Any, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    from onnx import TensorProto

    kind = entry.type.tensor_type
    names = {value: name for name, value in TensorProto.DataType.items()}
    name = names.get(kind.elem_type, str(kind.elem_type))
    if name not in ("FLOAT", "DOUBLE"):
        raise InputError(f"{path}: the input must be of type FLOAT or DOUBLE, it is {name}")
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    if sizes and sizes[0] is None:  # a free batch size
        sizes[0] = 1
    if any(size is None or size < 1 for size in sizes) or not kind.HasField("shape"):
        raise InputError(
            f"{path}: the input needs fixed sizes, the first one aside; it has {sizes}"
        )
    shape = tuple(int(size) for size in sizes if size is not None)
    if math.prod(shape) > MOST:
        raise InputError(f"{path}: the input has {math.prod(shape)} entries, more than {MOST}")
    return shape, np.dtype(KINDS[name])


def _step(node: Any, version: int, path: Path) -> Step:
    where = f"{path}: node {shown(node.name or ', '.join(node.output), 60)}"
    if node.domain not in ("", "ai.onnx"):
        raise InputError(
            f"{where}: operation {shown(node.op_type, 60)} of {shown(node.domain, 60)} is not known"
        )
    attributes = {a.name: _attribute(a, where) for a in node.attribute}
    return Step(node.op_type, node.name, tuple(node.input), tuple(node.output), attributes, version)


def _attribute(attribute: Any, where: str) -> Any:
    from onnx import AttributeProto

    match attribute.type:
        case AttributeProto.FLOAT | AttributeProto.INT:
            value = attribute.f if attribute.type == AttributeProto.FLOAT else attribute.i
        case AttributeProto.FLOATS:
            value = list(attribute.floats)
        case AttributeProto.INTS:
            value = list(attribute.ints)
        case AttributeProto.STRING:
            return attribute.s.decode("utf-8", "replace")
        case AttributeProto.TENSOR:
            return _array(attribute.t, f"{where}: attribute {shown(attribute.name, 60)}")
        case _:
            raise InputError(f"{where}: attribute {shown(attribute.name, 60)} is of no known type")
    if not np.isfinite(value).all():
        raise InputError(f"{where}: attribute {shown(attribute.name, 60)} is NaN or infinite")
    return value


def _array(tensor: Any, what: str) -> np.ndarray:
    from onnx import TensorProto, numpy_helper

    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise InputError(f"{what} are kept outside of the file; export it with its data inside")
    names = {value: name for name, value in TensorProto.DataType.items()}
    kind = names.get(tensor.data_type, str(tensor.data_type))
    if kind not in KINDS:
        raise InputError(f"{what} are of type {kind}; known: {', '.join(KINDS)}")
    if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > MOST:
        raise InputError(f"{what} have no possible shape: {shown(list(tensor.dims), 60)}")
    try:
        found = np.array(numpy_helper.to_array(tensor))
    except (ValueError, TypeError) as error:
        raise InputError(f"{what} are damaged: their numbers do not fit their shape") from error
    if found.shape != tuple(tensor.dims) or not np.isfinite(found).all():
        raise InputError(f"{what} hold NaN or infinite values")
    return found


def _require_valid(model: Any, path: Path) -> None:
    """Refuse what breaks the rules of the operations: attributes, types and shapes."""
    import onnx

    try:
        # The output may be declared without its shape, which the checker asks for.
        known = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        onnx.checker.check_model(known)
    except Exception as error:  # of several libraries
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = shown(lines[0] if lines else type(error).__name__, 240)
        raise InputError(f"{path} is no valid ONNX network: {reason}") from error


def _require_order(steps: tuple[Step, ...], known: set[str], output: str, path: Path) -> None:
    """Refuse names that are used before they are made, or made twice."""
    for step in steps:
        missing = [name for name in step.inputs if name and name not in known]
        if missing or not step.outputs:
            what = shown(missing[0], 60) if missing else "nothing, and makes nothing"
            raise InputError(f"{path}: {step.words} reads {what}, which no earlier node makes")
        for name in step.outputs:
            if name in known:
                raise InputError(f"{path}: {shown(name, 60)} is made twice")
        known |= {name for name in step.outputs if name}
    if output not in known:
        raise InputError(f"{path}: no node makes the output {shown(output, 60)}")
