"""Features that have fallen silent, moved to inputs that are badly rebuilt."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.dictionaries.base import Dictionary
from assay.dictionaries.linear import Linear
from assay.dictionaries.problem import Problem
from assay.learn.processes import from_first


@torch.no_grad()
def revive(problem: Problem, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
    """Move every dead feature to an input of the last batch, and return how many there were.

    Inputs are drawn with probability proportional to their squared error (Bricken et al. 2023).
    The feature writes the direction of the error and reads it too; that of a transcoder reads the
    direction of the input from its mean. Its encoder has the mean norm of the encoders of living
    features, its bias and thresholds are theirs in the mean, and its optimiser state is forgotten.
    """
    moved = 0
    for place, one in problem.placed.items():
        if place not in problem.seen:
            continue
        dictionary = one.dictionary
        assert isinstance(dictionary, Linear)
        silent = problem.silent(place)
        dead = (silent >= problem.training_.between_revivals).nonzero()[:, 0]
        if not len(dead) or len(dead) == dictionary.size:
            continue
        # Of the first part of the batch alone, so that one process and several choose alike.
        x, error = problem.seen[place]
        # One number for each feature, whatever the process's share is, keeps generators in step.
        bounds = error.square().sum(1).double().cumsum(0).cpu()
        places = torch.rand(len(dead), generator=generator, dtype=torch.float64) * bounds[-1]
        drawn = torch.searchsorted(bounds, places, right=True).clamp(max=len(bounds) - 1)
        drawn = drawn.to(x.device)
        write = _unit(error[drawn])
        reads_itself = one.writes == (one.reads,)
        read = write if reads_itself else _unit(x[drawn] - x.mean(0))
        write, read = from_first(write), from_first(read)
        alive = torch.ones(dictionary.size, dtype=torch.bool, device=x.device)
        alive[dead] = False
        norm = dictionary.W_enc[:, alive].norm(dim=0).mean()
        dictionary.W_dec[dead] = write * dictionary.W_dec[alive].norm(dim=1).mean()
        dictionary.W_enc[:, dead] = (read * norm).T
        rest = [
            vector
            for name, vector in dictionary.named_parameters()
            if vector.ndim == 1 and name != "b_dec"
        ]
        for vector in rest:
            vector[dead] = vector[alive].mean()
        dictionary.b_enc[dead] = 0.0
        for parameter in (dictionary.W_dec, *rest):
            _forget(optimizer, parameter, dead, 0)
        _forget(optimizer, dictionary.W_enc, dead, 1)
        silent[dead] = 0
        moved += len(dead)
    return moved


@torch.no_grad()
def normalise(dictionary: Dictionary) -> None:
    """Scale the decoder's rows to length one, in place."""
    dictionary.W_dec.div_(dictionary.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _forget(
    optimizer: torch.optim.Optimizer, parameter: Tensor, index: Tensor, dimension: int
) -> None:
    for entry in optimizer.state.get(parameter, {}).values():
        if isinstance(entry, Tensor) and entry.shape == parameter.shape:
            entry.index_fill_(dimension, index, 0.0)
