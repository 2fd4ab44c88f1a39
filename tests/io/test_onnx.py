"""Networks of ONNX files: each operation beside ONNX's own evaluator, and damaged files."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_networks import helper, layered, onnx, saved

from assay.bounds.trace import trace
from assay.errors import InputError
from assay.targets.onnx_network import OPERATIONS, load_onnx

ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
DRAW = np.random.default_rng(0)
W = DRAW.normal(size=(4, 3)).astype(np.float32)
V = DRAW.normal(size=3).astype(np.float32)
K = DRAW.normal(size=(4, 1, 2, 2)).astype(np.float32)
P = np.abs(V) + 1
INTS = np.array


def one(operation: str, *inputs: str, **attributes: Any) -> list[Any]:
    return [helper.make_node(operation, ["x", *inputs], ["y"], **attributes)]


Given = tuple[list[Any], dict[str, np.ndarray], tuple[int, ...], int]
CASES: dict[str, Given] = {
    name.lower(): (one(name), {}, (2, 3), 17)
    for name in ("Relu", "Sigmoid", "Tanh", "Identity", "Exp", "Erf", "Abs", "Neg", "Dropout")
} | {name.lower(): (one(name, "p"), {"p": P}, (2, 3), 17) for name in ("Add", "Sub", "Mul", "Div")}
CASES |= {
    "matmul": (one("MatMul", "w"), {"w": W}, (2, 4), 17),
    "gemm": (one("Gemm", "w", "v"), {"w": W, "v": V}, (2, 4), 17),
    "gemm scaled": (
        one("Gemm", "w", "v", alpha=0.5, beta=2.0, transA=1, transB=1),
        {"w": W.T.copy(), "v": V},
        (4, 2),
        17,
    ),
    "flatten": (one("Flatten", axis=2), {}, (1, 2, 3, 2), 17),
    "reshape": (one("Reshape", "s"), {"s": INTS([0, -1, 2])}, (2, 3, 4), 17),
    "transpose": (one("Transpose", perm=[2, 0, 1]), {}, (2, 3, 4), 17),
    "transpose all": (one("Transpose"), {}, (2, 3, 4), 17),
    "squeeze": (one("Squeeze", "s"), {"s": INTS([0, -1])}, (1, 3, 1), 17),
    "squeeze all": (one("Squeeze"), {}, (1, 3, 1), 17),
    "squeeze 11": (one("Squeeze", axes=[1]), {}, (2, 1, 3), 11),
    "unsqueeze": (one("Unsqueeze", "s"), {"s": INTS([0, -1])}, (2, 3), 17),
    "unsqueeze 11": (one("Unsqueeze", axes=[1, 2]), {}, (2, 3), 11),
    "leakyrelu": (one("LeakyRelu"), {}, (2, 3), 17),
    "leakyrelu steep": (one("LeakyRelu", alpha=0.2), {}, (2, 3), 17),
    "softmax": (one("Softmax", axis=-1), {}, (2, 3, 2), 17),
    "softmax 11": (one("Softmax", axis=1), {}, (2, 3), 11),
    "concat": (one("Concat", "v", axis=0), {"v": V}, (3,), 17),
    "conv": (
        one("Conv", "k", "b", strides=[1, 2], pads=[1, 1, 1, 1], group=2),
        {"k": K, "b": np.ones(4, np.float32)},
        (1, 2, 4, 5),
        17,
    ),
    "conv uneven": (one("Conv", "k", pads=[0, 1, 2, 0], group=2), {"k": K}, (1, 2, 4, 5), 17),
    "batchnormalization": (
        one("BatchNormalization", "s", "b", "m", "p", epsilon=0.1),
        {"s": V, "b": V[::-1].copy(), "m": V + 1, "p": P},
        (1, 3, 2, 2),
        17,
    ),
    "constant": (
        [
            helper.make_node("Constant", [], ["c"], value_float=0.5),
            helper.make_node("Mul", ["x", "c"], ["y"]),
        ],
        {},
        (2, 3),
        17,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_agree_with_the_onnx_evaluator_and_have_bounds(
    tmp_path: Path, case: str
) -> None:
    nodes, weights, shape, version = CASES[case]
    path = saved(tmp_path / "n.onnx", nodes, weights, shape, version=version)
    network = load_onnx(path)
    x = DRAW.normal(size=shape).astype(np.float32)
    (wanted,) = ReferenceEvaluator(str(path)).run(None, {"x": x})
    found = network(torch.from_numpy(x))
    assert found.dtype == torch.float32
    assert tuple(found.shape) == wanted.shape
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-6, atol=2e-6)
    wide = torch.from_numpy(x).double()
    np.testing.assert_allclose(network(wide).numpy(), wanted, rtol=2e-5, atol=2e-5)
    trace(network, wide, regions=[(wide - 0.1, wide + 0.1)])


def test_every_operation_has_a_case() -> None:
    assert {name.split()[0] for name in CASES} == {name.lower() for name in OPERATIONS}


def test_a_wrong_weight_is_seen(tmp_path: Path) -> None:
    path, weights = layered(tmp_path / "n.onnx", (3, 5, 2))
    x = torch.from_numpy(DRAW.normal(size=(1, 3)).astype(np.float32))
    plain = torch.relu(x @ torch.from_numpy(weights["w0"]) + torch.from_numpy(weights["b0"]))
    plain = plain @ torch.from_numpy(weights["w1"]) + torch.from_numpy(weights["b1"])
    assert torch.equal(load_onnx(path)(x), plain)  # a free batch size is one
    model = onnx.load(path)
    wrong = np.array(weights["b1"])
    wrong[0] = np.nextafter(wrong[0], np.float32(9))
    model.graph.initializer[3].CopyFrom(onnx.numpy_helper.from_array(wrong, "b1"))
    path.write_bytes(model.SerializeToString())
    assert not torch.equal(load_onnx(path)(x), plain)


def test_operations_without_bounds_are_refused_by_name_and_node(tmp_path: Path) -> None:
    node = helper.make_node("Sin", ["x"], ["y"], name="wave")
    path = saved(tmp_path / "n.onnx", [node], {}, (2, 3))
    with pytest.raises(InputError, match=r"operation Sin \(node 'wave'\) has no bounds"):
        load_onnx(path)


def test_files_that_are_not_what_they_should_be_are_refused_in_one_line(tmp_path: Path) -> None:
    good, _ = layered(tmp_path / "good.onnx", (3, 4, 2))
    data = good.read_bytes()
    path = tmp_path / "bad.onnx"

    def refused(said: str) -> None:
        with pytest.raises(InputError) as error:
            load_onnx(path)
        assert said in str(error.value)
        assert "\n" not in str(error.value)

    for bad in (b"", b"hello", data[: len(data) // 2]):
        path.write_bytes(bad)
        refused("is damaged, or no ONNX file")

    def changed(change: Any) -> None:
        model = onnx.load_model_from_string(data)
        change(model)
        path.write_bytes(model.SerializeToString())

    def outside(model: Any) -> None:
        tensor = model.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "../secret"

    changed(outside)
    refused("are kept outside of the file")

    def poisoned(model: Any) -> None:
        tensor = model.graph.initializer[0]
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.full((3, 4), np.nan, np.float32), "w0"))

    changed(poisoned)
    refused("hold NaN or infinite values")
    changed(lambda model: model.graph.initializer[0].dims.append(7))
    refused("their numbers do not fit their shape")
    changed(lambda model: model.graph.initializer[0].dims.append(1 << 40))
    refused("have no possible shape")
    changed(lambda model: model.graph.initializer.add().CopyFrom(model.graph.initializer[0]))
    refused("stand twice")
    changed(lambda model: model.graph.node[0].input.__setitem__(1, "nothing"))
    refused("which no earlier node makes")
    changed(lambda model: setattr(model.graph.output[0], "name", "elsewhere"))
    refused("no node makes the output")
    changed(lambda model: setattr(model.opset_import[0], "version", 3))
    refused("operator set 3 is not read")
    changed(lambda model: setattr(model.graph.node[0], "domain", "com.own"))
    refused("of 'com.own' is not known")
    changed(lambda model: model.graph.input.add().CopyFrom(model.graph.input[0]))
    refused("a network of one input and one output is needed")
    sizes = onnx.load_model_from_string(data).graph.input[0].type.tensor_type.shape
    assert sizes.dim[0].dim_param == "batch"
    changed(lambda m: m.graph.input[0].type.tensor_type.shape.dim[1].Clear())
    refused("the input needs fixed sizes")
    changed(lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 9))
    refused("is no valid ONNX network")
    changed(lambda m: m.graph.node[0].attribute.add(name="axis", type=2, i=1))
    refused("Unrecognized attribute: axis for operator MatMul")
    changed(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 999))
    refused("it is 999")
    changed(lambda m: m.opset_import.add(domain="ai.onnx", version=9))
    refused("operator set 9 and 17 is not read")
    changed(lambda m: m.functions.add(name="Relu"))
    refused("functions of its own are not read")


@pytest.mark.parametrize(
    ("nodes", "weights", "shape", "said"),
    [
        (
            one("Conv", "k", pads=[10**9, 10**9], strides=[10**9]),
            {"k": np.ones((1, 1, 2), np.float32)},
            (1, 1, 3),
            "pads to more than",
        ),
        (
            one("Conv", "k", kernel_shape=[3]),
            {"k": np.ones((1, 1, 2), np.float32)},
            (1, 1, 3),
            r"has a kernel of \[2\], said to be \[3\]",
        ),
        (
            one("Gemm", "w", "c"),
            {"w": W[:, :1], "c": np.ones((2, 2), np.float32)},
            (2, 4),
            r"adds the shape \[2, 2\] to \[2, 1\]",
        ),
        (
            one("Unsqueeze", "s"),
            {"s": INTS(range(1, 9))},
            (2,),
            "makes more than .* 8 axes",
        ),
        (
            one("Add", "c"),
            {"c": np.ones((20_000, 1, 1), np.float32)},
            (1, 20_000, 1),
            "makes more than 268435456 entries",
        ),
        (
            [
                helper.make_node("Relu", ["x"], ["z"]),
                helper.make_node("Div", ["n", "n"], ["m"]),
                helper.make_node("Mul", ["x", "m"], ["y"]),
            ],
            {"n": INTS([3, 2])},
            (2,),
            "is no valid ONNX network: .*inconsistent type",
        ),
        (
            [
                helper.make_node("Relu", ["x"], ["z"]),
                helper.make_node("Relu", ["n"], ["y"]),
            ],
            {"n": INTS([3, 2])},
            (2,),
            "is no valid ONNX network",
        ),
    ],
)
def test_what_breaks_a_rule_or_the_memory_is_refused_before_it_runs(
    tmp_path: Path, nodes: list[Any], weights: dict[str, Any], shape: tuple[int, ...], said: str
) -> None:
    path = saved(tmp_path / "n.onnx", nodes, weights, shape)
    with pytest.raises(InputError, match=said):
        load_onnx(path)


def test_an_old_softmax_is_over_all_axes_from_its_own_on(tmp_path: Path) -> None:
    """As the operators say up to set 12; ONNX's own evaluator takes one axis there."""
    path = saved(tmp_path / "n.onnx", one("Softmax", axis=1), {}, (2, 3, 2), version=11)
    x = torch.from_numpy(DRAW.normal(size=(2, 3, 2)))
    wanted = torch.exp(x) / torch.exp(x).sum((1, 2), keepdim=True)
    torch.testing.assert_close(load_onnx(path)(x), wanted)


def test_the_entries_of_all_steps_are_counted_before_they_are_made(tmp_path: Path) -> None:
    path, _ = layered(tmp_path / "n.onnx", (3, 4, 2))
    assert load_onnx(path).entries == 3 + 3 * 4 + 2 * 2


def test_numbers_that_a_file_leaves_out_are_those_of_float32(tmp_path: Path) -> None:
    path = saved(tmp_path / "n.onnx", [helper.make_node("LeakyRelu", ["x"], ["y"])], {}, (1,))
    slope = -float(load_onnx(path)(torch.tensor([-1.0], dtype=torch.float64)))
    assert slope == float(np.float32(0.01)) != 0.01


def test_without_the_package_the_line_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = layered(tmp_path / "n.onnx", (3, 4, 2))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"pip install 'assay-interp\[vnn\]'"):
        load_onnx(path)
