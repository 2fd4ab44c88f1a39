"""Trainings small enough to be worked out by hand: steps, rates, logs, the choice among copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.io.runs import Run
from assay.learn import fit, toys
from assay.targets.toys import Autoencoder, draw_sparse


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))


def train(
    steps: int,
    run: Run | None = None,
    stop: int = 10**9,
    schedule: Callable[[float], float] = lambda done: 1.0,
    momentum: float = 0.0,
    **options: int,
) -> Two:
    """Descend `a + b` with rates 1/8 and 1/2: what a step subtracts is its rate, exactly."""
    model = Two()
    groups = [{"params": [model.a], "lr": 0.125}, {"params": [model.b], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=momentum)

    def objective(step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        if step == stop:
            raise KeyboardInterrupt
        return model.a + model.b, {"metrics/step": torch.tensor(float(step))}

    generator = torch.Generator().manual_seed(0)
    fit(
        model,
        objective,
        optimizer,
        steps=steps,
        generator=generator,
        schedule=schedule,
        run=run,
        **options,
    )
    return model


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_every_rate_is_its_first_one_times_the_schedule(steps: int) -> None:
    def schedule(done: float) -> float:
        return 2.0 ** -round(done * steps)

    model, total = train(steps, schedule=schedule), sum(2.0**-n for n in range(steps))
    assert model.a.item() == -0.125 * total
    assert model.b.item() == -0.5 * total


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 8, 9])
@pytest.mark.parametrize("log_every", [1, 2])
def test_an_interrupted_training_logs_every_step_once(
    stop: int, log_every: int, tmp_path: Path
) -> None:
    """Interrupted before, at and behind a checkpoint: no line is there twice, and none is lost."""
    options: dict[str, Any] = {"log_every": log_every, "save_every": 4, "momentum": 0.5}

    def schedule(done: float) -> float:
        return 1 - done

    whole = train(10, Run(tmp_path / "whole"), schedule=schedule, **options)
    with pytest.raises(KeyboardInterrupt):
        train(10, Run(tmp_path / "run"), stop, schedule=schedule, **options)
    model = train(10, Run(tmp_path / "run"), schedule=schedule, **options)
    assert model.a.item() == whole.a.item()
    lines = Run(tmp_path / "run").metrics()
    assert lines["step"].to_list() == [n for n in range(10) if n % log_every == 0 or n == 9]
    assert lines.equals(Run(tmp_path / "whole").metrics())


@pytest.mark.parametrize("best", [0, 1, 3])
def test_the_best_of_several_copies_is_kept(best: int) -> None:
    copies = Autoencoder(3, 3, torch.Generator().manual_seed(0), (4,))
    with torch.no_grad():
        copies.W.copy_(torch.eye(3) * (1 + torch.arange(1, 5))[:, None, None])
        copies.W[best] = torch.eye(3)
    x = draw_sparse(64, 3, 0.5, torch.Generator().manual_seed(1))
    model, loss = toys._best(copies, x)
    assert loss == 0
    assert torch.equal(model(x), x)
