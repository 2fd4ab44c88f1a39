"""Graphs from traces: every family, every activation; what they refuse, and that they stay."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import cases
import node_models
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from assay.bounds import graph_of
from assay.bounds.operations import Affine
from assay.bounds.rounding import Interval
from assay.bounds.search.sweep import bound_rows, sweep
from assay.bounds.trace import Traced, trace
from assay.bounds.trace.traced import evaluate
from assay.core.mechanisms import Mechanisms
from assay.errors import AssayError, InputError
from assay.targets.toys import MLP

SITES = ("blocks.0.attn.hook_z", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post")


def traced(mechanisms: Mechanisms) -> Traced:
    ones = mechanisms.ones()
    regions = [(torch.zeros_like(one), one) for one in ones.values()]
    names = list(ones)
    return trace(
        lambda *gates: mechanisms.values(dict(zip(names, gates, strict=True))),
        *ones.values(),
        regions=regions,
    )


def boxes(found: Traced, low: float, samples: int = 1) -> list[Interval]:
    return [
        Interval(np.full((samples, *shape), low), np.ones((samples, *shape)))
        for shape in found.shapes
    ]


def lowest(found: Traced, low: float, level: str = "real") -> tuple[float, Interval]:
    at = found.at(level)
    with np.errstate(all="ignore"):
        known = sweep(at, boxes(found, low))
        return float(bound_rows(at, known, np.ones((1, 1, 1)))[0, 0]), known.values[-1]


@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen2", "gemma2")),
        pytest.param("gpt_neox parallel", marks=pytest.mark.slow),
    ],
)
def test_families_trace_and_are_exact_on_an_empty_box(family: str) -> None:
    found = traced(cases.bound_nodes(family=family, sites=SITES).take(slice(0, 1)))
    value = float(found(*found.program.examples))
    with np.errstate(all="ignore"):
        nested = [evaluate(found.at("real"), boxes(found, low)) for low in (1.0, 0.9, 0.0)]
    tolerance = 1e-4  # intervals of a few roundings, through three layers with norms
    assert nested[0].lo.item() - tolerance < value < nested[0].hi.item() + tolerance
    assert nested[0].hi.item() - nested[0].lo.item() < tolerance
    for inner, outer in itertools.pairwise(nested):
        assert outer.lo <= inner.lo
        assert inner.hi <= outer.hi
    if family != "gpt2":  # the linear bounds of every family take a minute
        return
    generator = torch.Generator().manual_seed(1)
    bound, whole = lowest(found, 0.95, "float64")
    for _ in range(5):
        point = [
            0.95 + 0.05 * torch.rand(shape, generator=generator, dtype=torch.float64)
            for shape in found.shapes
        ]
        assert bound <= float(found(*point)) <= float(whole.hi.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_trace_is_the_model_bit_for_bit(dtype: torch.dtype) -> None:
    mechanisms = cases.bound_nodes(dtype=dtype, sites=SITES).take(slice(0, 1))
    found = traced(mechanisms)  # compares at six points
    assert found.program.module is not None
    names, generator = list(mechanisms.groups), torch.Generator().manual_seed(5)
    gates = [torch.rand(shape, generator=generator) for shape in found.shapes]
    gates = [gate.to(e.dtype) for gate, e in zip(gates, found.program.examples, strict=True)]
    wanted = mechanisms.values(dict(zip(names, gates, strict=True)))
    assert torch.equal(found.program(*gates), wanted)


def _functions() -> dict[str, Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    convolution = nn.Conv1d(1, 2, 3).double()
    norm = nn.BatchNorm1d(5).double().eval()
    norm.running_mean.copy_(w[0])
    norm.running_var.copy_(w[1] ** 2)
    return {
        "relu": lambda x: torch.relu(x @ w).sum(-1),
        "abs, clamp": lambda x: ((x @ w).abs() + (x @ w).clamp(-0.5, 0.5)).sum(-1),
        "maximum": lambda x: torch.maximum(x @ w, 0.3 * x).amax(-1),
        "minimum": lambda x: torch.minimum(x @ w, x).mean(-1),
        "max": lambda x: (x @ w).max(-1).values,
        "gelu": lambda x: f.gelu(x @ w).sum(-1),
        "gelu, tanh": lambda x: f.gelu(x @ w, approximate="tanh").sum(-1),
        "silu, sigmoid": lambda x: (f.silu(x @ w) * torch.sigmoid(x)).sum(-1),
        "erf, exp": lambda x: (torch.erf(x @ w) + (0.3 * x).exp()).sum(-1),
        "log, rsqrt": lambda x: ((x * x + 1).log() + (x * x + 1).rsqrt()).sum(-1),
        "division": lambda x: (x / ((x @ w) ** 2 + 1)).sum(-1),
        "softmax": lambda x: ((x @ w).softmax(-1) * x).sum(-1),
        "log softmax": lambda x: (x @ w).log_softmax(-1)[..., 1],
        "logsumexp": lambda x: torch.logsumexp(x @ w, -1),
        "layer norm": lambda x: (f.layer_norm(x, (5,)) ** 2 @ w)[..., 0],
        "rms norm": lambda x: (f.rms_norm(x, (5,), eps=1e-3) @ w)[..., 0],
        "convolution": lambda x: convolution(x[:, None]).flatten(1).sum(-1),
        "batch norm": lambda x: (norm(x) @ w)[..., 0],
        "cube": lambda x: ((x @ w) ** 3 + x**4).sum(-1),
        "rotation": lambda x: (
            x * torch.arange(5).double().cos() + torch.cat([-x[:, 2:], x[:, :2]], -1)
        ).sum(-1),
        "cross-entropy": lambda x: f.cross_entropy(x @ w, torch.tensor([2]), reduction="none"),
        "sum of weights": lambda x: (x * w.sum(0) + w[0].mean()).sum(-1),
        "matrix product": lambda x: (x[:, :, None] @ (x @ w)[:, None, :]).flatten(1).sum(-1),
    }


def test_a_large_bias_does_not_round_the_weights_of_a_convolution() -> None:
    layer = nn.Conv1d(1, 1, 2)
    layer.bias.data[:] = 2.0**30
    weight, bias = layer.weight.data.double(), layer.bias.data.double()
    x = torch.zeros(1, 1, 4, dtype=torch.float64)
    graph = trace(lambda x: f.conv1d(x, weight, bias), x).at("real").graph
    (map_,) = [node.operation for node in graph.nodes if isinstance(node.operation, Affine)]
    assert set(map_.weight.reshape(-1).tolist()) == {0.0, *weight.reshape(-1).tolist()}


def test_values_that_are_no_bound_are_refused() -> None:
    wide = (torch.tensor([-1e300]).double(), torch.tensor([1e300]).double())
    with pytest.raises(InputError, match="the function's value is NaN at a point"):
        trace(lambda x: x.exp() - x.exp(), torch.zeros(1).double(), regions=[wide])
    with pytest.raises(InputError, match="gives masked scores"):
        trace(lambda x: x + torch.tensor([0.0, -1e38]).double(), torch.zeros(2).double())
    with pytest.raises(InputError, match="depends on none of its inputs"):
        trace(lambda x: torch.tensor([0.1, 0.2]).double().exp(), torch.zeros(2).double())


@pytest.mark.parametrize("name", _functions())
@pytest.mark.parametrize("level", ["float64", "real"])
def test_every_function_lies_within_its_bounds(name: str, level: str) -> None:
    function = _functions()[name]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        low, high = x - 0.2, x + 0.3
        found = trace(function, x, regions=[(low, high)])
        at = found.at(level)
        with np.errstate(all="ignore"):
            known = sweep(at, [Interval(low.numpy()[None], high.numpy()[None])])
            both = bound_rows(at, known, np.array([[[1.0], [-1.0]]]))[0]
        reached = []
        for index in range(200):
            share = torch.rand(x.shape, generator=generator, dtype=torch.float64)
            share = share.round() if index % 2 else share
            reached.append(float(function(low + share * (high - low))))
    rounding = 1e-9
    assert both[0] - rounding <= min(reached)
    assert max(reached) <= -both[1] + rounding
    assert -both[1] - both[0] < 60 * (max(reached) - min(reached)) + 1e-6


def test_training_afterwards_changes_no_bound() -> None:
    model = MLP([3, 5, 2], torch.Generator().manual_seed(0), torch.tanh).double()
    x = torch.ones(1, 3, dtype=torch.float64)
    found = trace(lambda x: model(x)[:, 0], x)
    box = [Interval(np.zeros((1, 1, 3)), np.ones((1, 1, 3)))]
    before = evaluate(found.at("real"), box)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    again = trace(lambda x: model(x)[:, 0], x)
    assert evaluate(found.at("real"), box).lo == before.lo
    assert evaluate(again.at("real"), box).lo != before.lo
    found._levels.clear()
    assert evaluate(found.at("real"), box).lo == before.lo


def test_a_sequential_network_is_bounded_as_by_its_own_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))
    model = model.double()
    x = torch.zeros(1, 4, dtype=torch.float64)
    found = trace(lambda x: model(x)[:, 0], x)
    box = Interval(np.full((1, 4), -0.1), np.full((1, 4), 0.1))
    from assay.bounds import bound

    usual = float(bound(graph_of(model, (4,)), box).lower.item())
    with np.errstate(all="ignore"):
        known = sweep(found.at("real"), [Interval(box.lo[None], box.hi[None])])
        mine = float(bound_rows(found.at("real"), known, np.ones((1, 1, 1)))[0, 0])
    assert mine == pytest.approx(usual, abs=1e-9)


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_an_operation_without_a_rule_is_refused_with_its_module() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), Odd()))
    with pytest.raises(InputError, match=r"bessel_j0.*module '1\.1' \(Odd\) has no bound"):
        trace(lambda x: model(x)[:, 0], torch.ones(1, 3))


@pytest.mark.parametrize("weights", [[[1.0, 0.0, 1.0]], [[0.1, 0.2, 0.7]]])
def test_what_depends_on_no_input_may_be_summed_and_divided_by(weights: list[list[float]]) -> None:
    weight = torch.tensor(weights)

    def function(x: Tensor) -> Tensor:
        return (x * weight).sum(-1) / (2 * weight).sum(-1).clamp(min=0.5) + weight.exp().mean(-1)

    found = trace(function, torch.ones(1, 3), regions=[(torch.zeros(1, 3), torch.ones(1, 3))])
    low, _ = lowest(found, 0.0)
    assert low == pytest.approx(float(weight.double().exp().mean()), rel=1e-6)
    assert low <= float(weight.double().exp().mean())


def test_random_dropout_is_refused_with_its_module() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    with pytest.raises(InputError, match=r"module '1' \(Dropout\) draws random numbers.*eval"):
        trace(lambda x: model(x)[:, 0], torch.ones(1, 3))


def test_a_function_with_two_paths_is_refused_with_the_operation() -> None:
    def function(x: Tensor) -> Tensor:
        return x.sum(-1).exp() if bool(x[0, 0] > 0.9) else x.sum(-1).tanh()

    ones = torch.ones(1, 3)
    with pytest.raises(InputError, match=r"cannot be recorded|another path.*aten\.exp"):
        trace(function, ones, regions=[(torch.zeros(1, 3), ones)])

    def hidden(x: Tensor) -> Tensor:
        return x.sum(-1).exp() if x.detach().numpy()[0, 0] > 0.9 else x.sum(-1).tanh()

    with pytest.raises(InputError, match=r"cannot be recorded|another path.*aten\.exp"):
        trace(hidden, ones, regions=[(torch.zeros(1, 3), ones)])

    state = {"calls": 0}

    def drifting(x: Tensor) -> Tensor:
        state["calls"] += 1
        return x.sum(-1).exp() if state["calls"] < 3 else x.sum(-1).tanh()

    with pytest.raises(InputError, match=r"another path.*aten\.exp\.default"):
        trace(drifting, ones)


def test_fused_attention_and_data_dependent_choices_are_refused() -> None:
    q = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="attn_implementation='eager'"):
        trace(lambda x: f.scaled_dot_product_attention(x * q, q, q).flatten(1).sum(-1), q)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    for choice, says in {
        lambda x: x.topk(2).values.sum(-1): r"aten\.sum.*reads a comparison, or a choice",
        lambda x: x.scatter(1, x.topk(2).indices, x).sum(-1): r"aten\.scatter.*has no bound",
        lambda x: torch.zeros_like(x).scatter(1, *x.topk(2)[::-1]).sum(-1): "numbers that are no",
        lambda x: x.relu().topk(2, largest=False)[0].sum(-1): "chooses the smallest",
        lambda x: torch.where(x > 1.5, x, 0 * x).sum(-1): r"aten\.where.*reads a comparison",
        lambda x: x[x > 1.5].sum()[None]: "cannot be recorded|reads a comparison",
    }.items():
        with pytest.raises(InputError, match=says):
            trace(choice, x)
    with pytest.raises(InputError, match="none of its inputs"):
        trace(lambda x: torch.ones(1), torch.ones(1, 3))


def test_level_float32_says_what_it_does_not_cover() -> None:
    norm = nn.LayerNorm(3)
    found = trace(lambda x: norm(x)[:, 0], torch.tensor([[1.0, 2.0, 4.0]]))
    with pytest.raises(AssayError, match="float32: LayerNorm is not covered"):
        evaluate(found.at("float32"), [Interval.exactly(np.array([[[1.0, 2.0, 4.0]]]))])
    wide = trace(lambda x: x.double().sum(-1), torch.ones(1, 3))
    with pytest.raises(AssayError, match="float64 too; use level"):
        wide.at("float32")
    plain = trace(lambda x: torch.tanh(x * 0.3).sum(-1), torch.ones(1, 3))
    value = evaluate(plain.at("float32"), [Interval.exactly(np.ones((1, 1, 3)))])
    run = float(plain(torch.ones(1, 3)))
    assert value.lo.item() <= run <= value.hi.item()


def test_models_from_disk_are_those_of_the_cases() -> None:
    assert {"gpt2", "llama", "qwen2", "gemma2", "gpt_neox parallel"} <= set(node_models.FAMILIES)
