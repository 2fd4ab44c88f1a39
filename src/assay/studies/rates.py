"""How fast this machine multiplies, for what dry runs say about time."""

from __future__ import annotations

import time

import torch


def measure_rate(size: int = 768, seconds: float = 0.1) -> float:
    """Return the operations per second of a float32 matrix product on this machine, one thread."""
    left = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    _ = left @ left
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        _ = left @ left
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - began)
