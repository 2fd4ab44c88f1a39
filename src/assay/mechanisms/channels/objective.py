"""Train a bilinear network whose channels are sparse and whose attributions are right:
cross-entropy, Hoyer and delta losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as f

from assay.mechanisms.channels.ablation import ablate_channels
from assay.mechanisms.channels.attribution import attribute_channels, hoyer, step_rows
from assay.mechanisms.channels.clean import Clean, run_clean
from assay.mechanisms.channels.training import Training
from assay.mechanisms.channels.weights import read_weights
from assay.targets.bilinear import BilinearNetwork
from assay.targets.data import Data


def make_optimizer(model: BilinearNetwork, config: Training) -> torch.optim.Optimizer:
    """Return Adam with decoupled weight decay over all parameters."""
    return torch.optim.AdamW(
        model.parameters(), lr=config.rate, weight_decay=config.weight_decay, fused=True
    )


def make_objective(
    model: BilinearNetwork, data: Data, config: Training, generator: torch.Generator
) -> Callable[[int], tuple[Tensor, Mapping[str, Tensor]]]:
    """Return the objective for `assay.learn.fit`: step -> (loss, quantities to log), drawing
    batches with `generator`.

    The quantities of `monitor` are computed only on the steps that are logged: every `log_every`
    steps and the last."""

    def objective(step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        index = torch.randint(len(data.train_y), (config.batch,), generator=generator)
        x = data.train_x[index]
        if config.noise:
            x = x + config.noise * torch.randn(x.shape, generator=generator)
        # Unvalidated: checking would read the batch back to the host on every step.
        clean = run_clean(read_weights(model, check=False), x, data.train_y[index], check=False)
        losses = channel_losses(clean, config.tau)
        loss = losses["losses/cross_entropy"] + config.lam_delta * losses["losses/delta"]
        if config.lam_sparse:
            loss = (
                loss
                + config.lam_sparse * _ramp(step / config.steps, config) * losses["losses/sparsity"]
            )
        logged = step % config.log_every == 0 or step + 1 == config.steps
        terms = {name: term.detach() for name, term in losses.items()}
        return loss, {**terms, **monitor(model, data, config.monitored)} if logged else terms

    return objective


def channel_losses(clean: Clean, tau: float) -> dict[str, Tensor]:
    """Return the three terms of the loss on a clean pass with the logit functional, each a mean.

    Sparsity is one minus the mean, over blocks, of the mean Hoyer sparsity of each example's
    attributions; examples whose attributions are all zero have none and are left out. Delta is the
    mean of `relu(delta - tau)^2` over everything."""
    sparsity, defined = hoyer(attribute_channels(clean))
    share = (sparsity.sum(0) / defined.sum(0).clamp(min=1)).mean()
    steps = torch.stack(step_rows(clean))
    return {
        "losses/cross_entropy": f.cross_entropy(clean.logits, clean.labels),
        "losses/sparsity": 1 - share,
        "losses/delta": (steps - tau).relu().square().mean(),
    }


@torch.no_grad()
def monitor(model: BilinearNetwork, data: Data, examples: int = 64) -> dict[str, Tensor]:
    """Return accuracy, Hoyer by block, quantiles of delta, and how well attributions agree with
    exact ablation, on training inputs without noise: the test part is read once, after training.
    """
    weights = read_weights(model, check=False)
    accuracy = (model(data.train_x).argmax(-1) == data.train_y).double().mean()
    clean = run_clean(weights, data.train_x[:examples], data.train_y[:examples], check=False)
    attribution = attribute_channels(clean)
    sparsity, defined = hoyer(attribution)
    by_block = sparsity.sum(0) / defined.sum(0).clamp(min=1)
    deltas = torch.stack(step_rows(clean)).flatten().double()
    effects = ablate_channels(clean).effects
    return {
        "metrics/accuracy": accuracy,
        **{f"sparsity/hoyer_{block}": value for block, value in enumerate(by_block)},
        **{f"details/delta_q{round(100 * q)}": deltas.quantile(q) for q in (0.5, 0.9, 0.99)},
        "metrics/agreement": _correlation(attribution, effects),
    }


def _correlation(first: Float[Tensor, "*any"], second: Float[Tensor, "*any"]) -> Tensor:
    first, second = (
        values.double().flatten() - values.double().mean() for values in (first, second)
    )
    size = first.norm() * second.norm()
    return (first @ second) / size.clamp(min=torch.finfo(size.dtype).tiny)


def _ramp(done: float, config: Training) -> float:
    if config.ramp_end == config.ramp_begin:
        return float(done >= config.ramp_begin)
    return min(max((done - config.ramp_begin) / (config.ramp_end - config.ramp_begin), 0.0), 1.0)
