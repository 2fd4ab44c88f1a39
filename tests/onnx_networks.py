"""Small ONNX files and VNN-LIB properties, made by the tests that need them."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
helper = onnx.helper


def saved(
    path: Path,
    nodes: list[Any],
    weights: dict[str, np.ndarray],
    shape: tuple[Any, ...],
    *,
    version: int = 17,
) -> Path:
    """Write a network from `x` to `y`."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = helper.make_opsetid("", version)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def layered(path: Path, sizes: tuple[int, ...], seed: int = 0) -> tuple[Path, dict[str, Any]]:
    """Write a ReLU network of these widths, with random weights."""
    draw = np.random.default_rng(seed)
    nodes, weights, name = [], dict[str, np.ndarray](), "x"
    for place, (wide, out) in enumerate(itertools.pairwise(sizes)):
        weights[f"w{place}"] = (draw.normal(size=(wide, out)) / wide**0.5).astype(np.float32)
        weights[f"b{place}"] = (draw.normal(size=out) / 2).astype(np.float32)
        last = place == len(sizes) - 2
        nodes += [
            helper.make_node("MatMul", [name, f"w{place}"], [f"m{place}"]),
            helper.make_node("Add", [f"m{place}", f"b{place}"], ["y" if last else f"a{place}"]),
        ]
        if not last:
            nodes.append(helper.make_node("Relu", [f"a{place}"], [f"h{place}"]))
            name = f"h{place}"
    return saved(path, nodes, weights, ("batch", sizes[0])), weights


def declared(inputs: int, outputs: int, *asserts: str, ends: tuple[str, str] = ("-1", "1")) -> str:
    """Return a property over the same ends of every input."""
    lines = [f"(declare-const X_{i} Real)" for i in range(inputs)]
    lines += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    for i in range(inputs):
        lines += [f"(assert (>= X_{i} {ends[0]}))", f"(assert (<= X_{i} {ends[1]}))"]
    return "\n".join([*lines, *(f"(assert {line})" for line in asserts)])
