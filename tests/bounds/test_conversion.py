"""A graph is of the network as it was when it was converted, and only of networks that compute what
their class says.
"""

from __future__ import annotations

from collections.abc import Callable

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from assay.bounds import Bounds, ball, bilinear_graph, bound, certified_accuracy, graph_of
from assay.errors import AssayError, InputError
from assay.targets.bilinear import BilinearBlock, BilinearNetwork


def bilinear(**how: object) -> BilinearNetwork:
    settings: dict = {"width": 4, "hidden": 5, "blocks": 2, **how}
    model = BilinearNetwork(16, 3, generator=networks.generator(0), **settings)
    return model.requires_grad_(False)


def dense() -> nn.Module:
    model = nn.Sequential(
        networks.mlp([16, 6]), nn.LayerNorm(6), nn.GELU(), networks.mlp([6, 3], 1), nn.RMSNorm(3)
    )
    return model.requires_grad_(False)


def with_position() -> BilinearNetwork:
    model = bilinear(image=(4, 4), patch=2, norm=True)
    model.position.copy_(networks.normal(3, *model.position.shape))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dense": dense,
    "bilinear": bilinear,
    "normed": lambda: bilinear(norm=True),
    "gated": lambda: bilinear(gate="gelu"),
    "patches": with_position,
}


def step(model: nn.Module) -> None:
    """Change every parameter in place, as an optimiser does."""
    gen = networks.generator(7)
    with torch.no_grad():
        for parameter in model.parameters():
            change = torch.randn(parameter.shape, generator=gen, dtype=torch.float64)
            parameter.mul_(1.5).add_(change.to(parameter.dtype))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["interval", "crown"])
def test_bounds_are_of_the_network_that_was_converted(
    name: str, dtype: torch.dtype, method: str
) -> None:
    model = MODELS[name]().to(dtype)
    x = torch.randn(4, 16, generator=networks.generator(1))
    graph, region = graph_of(model, (16,)), ball(x, 1e-3)
    points = networks.points(region.lo, region.hi, 50, 2).flatten(0, 1)
    before: Bounds = bound(graph, region, method=method)
    wide = MODELS[name]().to(dtype).double()
    assert before.contain(wide(points).unflatten(0, (50, 4)))
    step(model)
    after = bound(graph, region, method=method)
    np.testing.assert_array_equal(before.lower, after.lower)
    np.testing.assert_array_equal(before.upper, after.upper)
    other = bound(graph_of(model, (16,)), region, method=method)
    assert not np.allclose(before.lower, other.lower)
    assert other.contain(model.double()(points).unflatten(0, (50, 4)))


def test_a_graph_of_bare_weights_is_of_those_weights_too() -> None:
    model = bilinear().double()
    blocks = [(b.left.weight, b.right.weight, b.down.weight) for b in model.blocks]
    graph = bilinear_graph(model.embed.weight, blocks, model.head.weight)
    region = ball(np.zeros((1, 16)), 0.5)
    before = bound(graph, region)
    step(model)
    np.testing.assert_array_equal(before.lower, bound(graph, region).lower)


class Doubled(BilinearNetwork):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(BilinearNetwork):
    pass


class OtherBlock(BilinearBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def changed(change: Callable[[BilinearNetwork], object], **how: object) -> BilinearNetwork:
    model = bilinear(**how)
    change(model)
    return model


def tripled(layer: nn.Linear) -> nn.Linear:
    other = Tripled(layer.in_features, layer.out_features, bias=False)
    other.load_state_dict(layer.state_dict())
    return other.requires_grad_(False)


def put(where: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[BilinearNetwork], None]:
    """Return what replaces the module at a path by what `make` makes of it."""

    def change(model: BilinearNetwork) -> None:
        parent, _, name = where.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(where)))

    return change


def biased(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    other = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        other.weight.copy_(layer.weight)
        other.bias.copy_(networks.normal(9, layer.out_features) + 1)
    return other.requires_grad_(False)


def gained(norm: nn.Module) -> nn.Module:
    other = nn.LayerNorm(4)
    with torch.no_grad():
        other.weight.copy_(networks.normal(8, 4) + 2)
        other.bias.copy_(networks.normal(7, 4))
    return other.requires_grad_(False)


# Networks that are not what their attributes say: bounded right, or refused by name.
IMPOSTORS: dict[str, Callable[[], nn.Module]] = {
    "subclass with another forward": lambda: Doubled(16, 3, width=4, hidden=5, blocks=1),
    "subclass": lambda: Renamed(16, 3, width=4, hidden=5, blocks=1),
    "forward put on the object": lambda: changed(
        lambda m: setattr(m, "forward", lambda x: 2 * BilinearNetwork.forward(m, x))
    ),
    "forward put on a block": lambda: changed(
        lambda m: setattr(m.blocks[1], "forward", lambda x: x)
    ),
    "norm replaced by LayerNorm": lambda: changed(put("blocks.0.norm", gained), norm=True),
    "norm put in": lambda: changed(put("blocks.1.norm", gained)),
    "norm with another eps": lambda: changed(
        lambda m: setattr(m.blocks[0].norm, "eps", 0.5), norm=True
    ),
    "norm taken out": lambda: changed(put("blocks.0.norm", lambda n: nn.Identity()), norm=True),
    "norm with its default eps": lambda: changed(
        put("blocks.0.norm", lambda n: nn.RMSNorm(4)), norm=True
    ),
    "norm without weight": lambda: changed(
        put("blocks.0.norm", lambda n: nn.RMSNorm(4, elementwise_affine=False)), norm=True
    ),
    "norm by a sequence": lambda: changed(
        put("blocks.0.norm", lambda n: nn.Sequential(n, nn.ReLU(inplace=True)))
    ),
    "biased head": lambda: changed(put("head", biased)),
    "biased embedding": lambda: changed(put("embed", biased)),
    **{
        f"biased {name}": lambda name=name: changed(put(f"blocks.1.{name}", biased))
        for name in ("left", "right", "down")
    },
    **{
        f"{name} of a subclass": lambda name=name: changed(put(name, tripled))
        for name in ("embed", "head", "blocks.0.left", "blocks.0.right", "blocks.0.down")
    },
    "head with a second layer": lambda: changed(put("head", lambda h: nn.Sequential(h, nn.ReLU()))),
    "in place before the right side": lambda: changed(
        put("blocks.0.left", lambda left: nn.Sequential(nn.ReLU(inplace=True), left))
    ),
    "gate named on the network alone": lambda: changed(lambda m: setattr(m, "gate", "relu")),
    "gate named on one block": lambda: changed(lambda m: setattr(m.blocks[0], "gate", "gelu")),
    "gate taken off one block": lambda: changed(
        lambda m: setattr(m.blocks[1], "gate", None), gate="relu"
    ),
    "normed said otherwise": lambda: changed(lambda m: setattr(m, "normed", False), norm=True),
    "width said otherwise": lambda: changed(lambda m: setattr(m, "width", 3)),
    "width of patches said otherwise": lambda: changed(
        lambda m: setattr(m, "width", 3), image=(4, 4), patch=2
    ),
    "a block less": lambda: changed(lambda m: m.blocks.__delitem__(0)),
    "a block of a subclass": lambda: changed(
        lambda m: m.blocks.append(OtherBlock(4, 5).requires_grad_(False))
    ),
    "a position less": lambda: changed(
        lambda m: setattr(m, "position", None), image=(4, 4), patch=2
    ),
    "positions said otherwise": lambda: changed(
        lambda m: setattr(m, "positions", 1), image=(4, 4), patch=2
    ),
    "positions of whole images": lambda: changed(lambda m: setattr(m, "positions", 4)),
    "another patch": lambda: changed(lambda m: setattr(m, "patch", 4), image=(4, 4), patch=2),
    "weights that are no parameter": lambda: changed(lambda m: loosened(m.head)),
    "weights of integers": lambda: changed(lambda m: loosened(m.head, torch.int64)),
    "weights of bfloat16": lambda: changed(lambda m: loosened(m.head, torch.bfloat16)),
    "hooked block": lambda: changed(lambda m: m.blocks[0].register_forward_hook(lambda *_: None)),
    "cut put on the object": lambda: changed(
        lambda m: setattr(m, "cut", lambda x: 2 * BilinearNetwork.cut(m, x))
    ),
    **{
        f"call put on {name or 'the object'}": lambda name=name: changed(
            lambda m: setattr(m.get_submodule(name), "_call_impl", lambda x: 7 * x[..., :3])
        )
        for name in ("", "head", "blocks.0.norm", "blocks.1.down")
    },
    "a block twice": lambda: changed(lambda m: setattr(m.blocks, "1", m.blocks[0])),
    "one matrix on both sides": lambda: changed(
        lambda m: setattr(m.blocks[0], "right", m.blocks[0].left)
    ),
}


def loosened(layer: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.weight = (weight * 4).to(dtype)  # type: ignore[assignment]


@pytest.mark.parametrize("name", IMPOSTORS)
def test_a_network_that_is_not_what_it_seems_is_refused_or_bounded_right(name: str) -> None:
    model = IMPOSTORS[name]().requires_grad_(False)
    x = torch.randn(6, 16, generator=networks.generator(4))
    try:
        graph = graph_of(model, (16,))
    except InputError:
        return
    value = model(x).double().numpy()
    for level, room in (("real", 1e-4), ("float32", 0.0)):
        try:
            found = bound(graph, ball(x, 0.0), level=level)
        except AssayError as error:
            assert level == "float32"
            assert "LayerNorm" in str(error) or "float32" in str(error)  # noqa: PT017
            continue
        assert np.all(found.lower - room <= value)
        assert np.all(value <= found.upper + room)
        assert np.max(found.width) < 1e-2


def test_some_impostors_are_bounded_right_and_subclasses_are_refused() -> None:
    for name in ("biased head", "norm replaced by LayerNorm", "gate named on one block"):
        graph_of(IMPOSTORS[name](), (16,))
    for name in IMPOSTORS:
        if any(word in name for word in ("subclass", " put on ", "in place", "hook")):
            with pytest.raises(InputError, match=r"module|hooks"):
                graph_of(IMPOSTORS[name](), (16,))


def layers_twice() -> dict[str, nn.Sequential]:
    """Sequences in which one module stands at several places."""
    act, norm, layer = nn.GELU(), nn.RMSNorm(4, eps=1e-3), networks.mlp([4, 4], 3)[0]
    first, last = networks.mlp([5, 4], 1)[0], networks.mlp([4, 3], 2)[0]
    block = nn.Sequential(layer, act)
    return {
        "activation": nn.Sequential(first, act, layer, act, last),
        "layer": nn.Sequential(first, layer, nn.ReLU(), layer, last),
        "norm": nn.Sequential(first, norm, layer, norm, last),
        "block": nn.Sequential(first, block, block, last),
        "in both": nn.Sequential(first, block, nn.Sequential(block, layer), act, last),
        "side by side": nn.Sequential(first, layer, layer, layer, last),
    }


@pytest.mark.parametrize("name", layers_twice())
@pytest.mark.parametrize("method", ["interval", "crown"])
def test_a_module_counts_as_often_as_it_stands_in_a_sequence(name: str, method: str) -> None:
    model = layers_twice()[name].requires_grad_(False)
    x = torch.randn(6, 5, generator=networks.generator(4))
    for level, room in (("real", 1e-4), ("float32", 0.0)):
        found = bound(graph_of(model, (5,)), ball(x, 0.0), level=level, method=method)
        value = model(x).double().numpy()
        assert np.all(found.lower - room <= value)
        assert np.all(value <= found.upper + room)
        assert np.max(found.width) < 1e-2


def test_global_hooks_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(InputError, match="global forward hooks"):
            graph_of(bilinear(), (16,))
    finally:
        handle.remove()
    graph_of(bilinear(), (16,))


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1, 3.0, 1e4])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("method", ["interval", "crown"])
def test_the_epsilon_of_a_norm_counts_once(
    eps: float, kind: type[nn.LayerNorm] | type[nn.RMSNorm], method: str
) -> None:
    """Small or large against the variance of what the norm reads."""
    model = kind(5, eps=eps).double().requires_grad_(False)
    for size in (1e-2, 1.0, 30.0):
        x = size * torch.randn(6, 5, generator=networks.generator(3), dtype=torch.float64)
        found, value = bound(graph_of(model, (5,)), ball(x, 0.0), method=method), model(x).numpy()
        assert np.all(found.lower <= value + 1e-9)
        assert np.all(value - 1e-9 <= found.upper)
        assert np.max(found.width) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_eps_of_a_norm_is_that_of_its_precision(dtype: torch.dtype) -> None:
    model = nn.Sequential(networks.mlp([16, 4]), nn.RMSNorm(4)).requires_grad_(False)
    model[0][0].weight.mul_(1e-5)  # so small that eps decides
    model[0][0].bias.zero_()
    model = model.to(dtype)
    x = torch.randn(3, 16, generator=networks.generator(5))
    graph = graph_of(model, (16,))
    found = bound(graph, ball(x, 0.0))
    value = model(x.to(dtype)).double().numpy()
    assert np.allclose(found.lower, value, rtol=1e-3)
    assert np.allclose(found.upper, value, rtol=1e-3)
    if dtype == torch.float64:
        with pytest.raises(AssayError, match="another one in float32"):
            bound(graph_of(model.double(), (16,)), ball(x, 0.0), level="float32")
    with pytest.raises(InputError, match="set eps"):
        graph_of(nn.RMSNorm(4, elementwise_affine=False), (4,))


@pytest.mark.parametrize("eps", [float("nan"), float("inf"), -1e-6, [1e-6], "small"])
def test_strange_eps_are_refused(eps: object) -> None:
    from assay.bounds import Graph

    for norm in ("rms_norm", "layer_norm"):
        graph = Graph()
        with pytest.raises(InputError, match="norm eps"):
            getattr(graph, norm)(graph.input(3), eps=eps)


@pytest.mark.parametrize("radius", [-1.0, float("nan"), [0.1, 0.1], "far", 1j])
def test_a_certified_accuracy_needs_one_radius(radius: object) -> None:
    with pytest.raises(InputError, match="radius"):
        certified_accuracy(dense(), np.zeros((2, 16)), [0, 1], radius)  # type: ignore[arg-type]
