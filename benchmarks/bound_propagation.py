"""Bound propagation on an MLP 64-256-256-10, batch 64, radius .01: widths and CPU seconds beside a
dense backward CROWN.

Run with one thread: `OMP_NUM_THREADS=1 python benchmarks/bound_propagation.py`. Seconds are the
least of several runs (process time)."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from assay.bounds import ball, bound, certified_accuracy, graph_of
from assay.targets.bilinear import BilinearNetwork

RADIUS = 0.01


def least_seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Return the least CPU seconds of some runs."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def network(seed: int) -> nn.Sequential:
    """Return the MLP with uniform weights in +-1/sqrt(fan in)."""
    gen = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for into, out in ((64, 256), (256, 256), (256, 10)):
        layer = nn.Linear(into, out)
        with torch.no_grad():
            for parameter in (layer.weight, layer.bias):
                parameter.copy_((2 * torch.rand(parameter.shape, generator=gen) - 1) / into**0.5)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)


@torch.no_grad()
def dense_crown(
    model: nn.Sequential, x: torch.Tensor, radius: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward CROWN as usually written: a full coefficient matrix per sample, for every unit of
    every layer.
    """
    layers = [m for m in model if isinstance(m, nn.Linear)]
    known: list[tuple[torch.Tensor, torch.Tensor]] = []
    for k, top in enumerate(layers):
        ends = []
        for sign in (1.0, -1.0):
            A = (sign * top.weight).expand(len(x), -1, -1)
            c = (sign * top.bias).expand(len(x), -1)
            for (lo, hi), layer in zip(known[::-1], layers[:k][::-1], strict=True):
                chord = (hi.clamp(min=0) / (hi - lo).clamp(min=1e-300)).where(
                    (lo < 0) & (hi > 0), (lo >= 0).double()
                )
                below = (hi > -lo).double()
                offset = torch.where((lo < 0) & (hi > 0), -chord * lo, 0.0)
                c = c + (A.clamp(max=0) * offset[:, None]).sum(-1)
                A = A.clamp(min=0) * below[:, None] + A.clamp(max=0) * chord[:, None]
                c, A = c + A @ layer.bias, A @ layer.weight
            ends.append((A @ x[..., None])[..., 0] - radius * A.abs().sum(-1) + c)
        known.append((ends[0], -ends[1]))
    return known[-1]


def print_propagation() -> None:
    """Print widths and seconds of both methods at every level."""
    model = network(0)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).double()
    graph, box = graph_of(model, (64,)), ball(x, RADIUS)
    model = model.double()
    lower, upper = dense_crown(model, x, RADIUS)
    naive = least_seconds(lambda: dense_crown(model, x, RADIUS))
    print(
        f"{'method':<22}{'level':<10}{'mean width':>12}{'CPU s':>10}{'dense / ours':>14}"
        f"{'max difference':>16}"
    )
    print(
        f"{'dense backward CROWN':<22}{'float64':<10}{(upper - lower).mean():>12.5f}"
        f"{naive:>10.4f}{1:>14.1f}{0:>16.1e}"
    )
    for method in ("interval", "crown"):
        for level in ("float64", "real", "float32"):
            found = bound(graph, box, method=method, level=level)
            seconds = least_seconds(
                lambda method=method, level=level: bound(graph, box, method=method, level=level)
            )
            gap = max(
                np.abs(found.lower - lower.numpy()).max(), np.abs(found.upper - upper.numpy()).max()
            )
            ratio = f"{naive / seconds:>14.1f}{gap:>16.1e}" if method == "crown" else ""
            print(f"{method:<22}{level:<10}{found.width.mean():>12.5f}{seconds:>10.4f}{ratio}")


def trained(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """Train a digits classifier for 600 steps."""
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.1)
    gen = torch.Generator().manual_seed(1)
    for _ in range(600):
        batch = torch.randint(0, len(x), (128,), generator=gen)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()
    return model.requires_grad_(False)


def print_certified() -> None:
    """Print the certified accuracy of two digits classifiers on 500 held-out images."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    models = {
        "dense ReLU 64-256-256-10": network(2).requires_grad_(True),
        "bilinear, 4 blocks": BilinearNetwork(64, 10, generator=torch.Generator().manual_seed(0)),
    }
    print(
        f"\n{'digits classifier':<26}{'accuracy':>9}{'radius':>8}{'method':>10}"
        f"{'certified (real)':>18}{'CPU s':>8}"
    )
    for name, model in models.items():
        trained(model, x[:1297], y[:1297])
        accuracy = float((model(x[1297:]).argmax(1) == y[1297:]).double().mean())
        for radius in (0.01, 0.03):
            for method in ("interval", "crown"):
                start = time.process_time()
                found = certified_accuracy(
                    model, x[1297:], y[1297:], radius, domain=(0, 1), method=method
                )
                seconds = time.process_time() - start
                print(
                    f"{name:<26}{accuracy:>9.3f}{radius:>8}{method:>10}{float(found.accuracy):>18.3f}{seconds:>8.2f}"
                )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print_propagation()
    print_certified()
