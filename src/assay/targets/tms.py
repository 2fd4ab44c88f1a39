"""Features in superposition as two weight matrices: the network of arXiv 2209.10652 with its
decoder written out, and identity layers between the two if wanted."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.errors import InputError
from assay.targets.toys import Autoencoder, draw_linear, load_autoencoder


class TMS(nn.Module):
    """`relu(W^T I ... I W x + b)`: `linear1` (features -> hidden), fixed identities
    `hidden_layers.i`, `linear2` (hidden -> features, with the only bias).

    The encoder and the decoder are matrices of their own, equal up to transposition when they come
    from a tied autoencoder."""

    def __init__(self, features: int, hidden: int, identities: int = 0):
        super().__init__()
        if min(features, hidden) < 1 or identities < 0:
            raise InputError(
                f"features and hidden must be at least 1 and identities at least 0, got {features},"
                f" {hidden} and {identities}"
            )
        generator = torch.Generator().manual_seed(0)
        self.linear1 = draw_linear(features, hidden, generator, bias=False)
        self.hidden_layers = nn.ModuleList(
            draw_linear(hidden, hidden, generator, bias=False) for _ in range(identities)
        )
        self.linear2 = draw_linear(hidden, features, generator)
        with torch.no_grad():
            for layer in self.hidden_layers:
                nn.init.eye_(layer.get_parameter("weight"))

    def forward(self, x: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows features"]:
        hidden = self.linear1(x)
        for layer in self.hidden_layers:
            hidden = layer(hidden)
        return torch.relu(self.linear2(hidden))

    @property
    def encoder(self) -> Float[Tensor, "hidden features"]:
        """W: column j is the direction of feature j."""
        return self.linear1.weight.detach()


def untie(model: Autoencoder, identities: int = 0) -> TMS:
    """Return the network of a tied autoencoder with its decoder as a matrix of its own."""
    hidden, features = model.W.shape
    found = TMS(features, hidden, identities).to(model.W.dtype)
    with torch.no_grad():
        found.linear1.weight.copy_(model.W)
        found.linear2.weight.copy_(model.W.T)
        found.linear2.bias.copy_(model.b)
    return found


def load_tms(path: Path | str, identities: int = 0) -> TMS:
    """Read `W (hidden, features)` and `b (features,)` from safetensors; InputError as for
    `load_autoencoder`.
    """
    return untie(load_autoencoder(path), identities)


def pentagon(features: int = 5) -> Autoencoder:
    """Return the regular polygon of `features` directions in two dimensions, the known answer for
    five, with the radius and bias that minimise the expected error of one active feature.

    With `w_j = r (cos 2 pi j / n, sin 2 pi j / n)`, bias b < 0 and x uniform on [0, 1] the error is
    `int_0^1 sum_k (relu(r^2 cos(2 pi k / n) x + b) - [k = 0] x)^2 dx`, a piecewise rational
    function of r^2 and b in closed form; its minimum is found by Newton steps."""
    if features < 3:
        raise InputError(f"a polygon needs at least 3 features, got {features}")
    angles = 2 * torch.pi * torch.arange(features, dtype=torch.float64) / features
    found = torch.tensor([1.2, -0.2], dtype=torch.float64)
    for _ in range(60):
        leaf = found.requires_grad_()
        (gradient,) = torch.autograd.grad(
            _polygon_error(leaf, angles.cos()), leaf, create_graph=True
        )
        rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in gradient]
        step, found = torch.linalg.solve(torch.stack(rows), gradient.detach()), leaf.detach()
        found = found - step
        if float(step.abs().max()) < 1e-13:
            break
    model = Autoencoder(features, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.W.copy_(found[0].sqrt() * torch.stack([angles.cos(), angles.sin()]))
        model.b.fill_(float(found[1]))
    return model


def _polygon_error(found: Tensor, cosines: Tensor) -> Tensor:
    square, bias = found
    slopes = square * cosines
    wanted = (cosines == 1).to(cosines.dtype)
    # relu(s x + b) with b < 0 is on from -b / s to 1 where s + b > 0, nowhere else.
    on = slopes + bias > 0
    begin = torch.where(on, -bias / torch.where(on, slopes, torch.ones_like(slopes)), 1.0)
    inside = _square_integral(slopes - wanted, bias, begin, torch.ones_like(begin))
    return (inside + wanted * begin**3 / 3).sum()


def _square_integral(slope: Tensor, level: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    def up_to(x: Tensor) -> Tensor:
        return slope.square() * x**3 / 3 + slope * level * x.square() + level.square() * x

    return up_to(end) - up_to(begin)
