"""A clock for trainings that are looked at on the way, for `dictionary_training.py` and the script
that it runs in SAELens's environment."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Clock:
    """Counts the CPU seconds of a training of dictionaries, without those of the looks at it: the
    mean share of variance that they explain on held-out values, and the share of features that are
    active at none of them.
    """

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self.held = held
        self.trace: list[tuple[float, float]] = []
        """The seconds and the share explained at every look."""
        self.began = time.process_time()

    @torch.no_grad()
    def look(self, dictionaries: Mapping[str, tuple[Any, float]]) -> dict[str, Any]:
        """Return what dictionaries of values over a scale explain, and the seconds until now."""
        now = time.process_time()
        shares, dead = [], []
        for name, (dictionary, scale) in dictionaries.items():
            x = self.held[name] / scale
            codes = dictionary.encode(x)
            shares.append(explained(x, dictionary(x)))
            dead.append(1 - float((codes > 0).any(0).double().mean()))
        seconds, share = now - self.began, sum(shares) / len(shares)
        self.trace.append((seconds, share))
        self.began += time.process_time() - now
        return {
            "seconds": seconds,
            "explained": share,
            "dead": sum(dead) / len(dead),
            "trace": self.trace,
        }


def explained(x: Tensor, rebuilt: Tensor) -> float:
    """Return the share of the variance of x that is explained by what is rebuilt."""
    return 1 - float((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum())
