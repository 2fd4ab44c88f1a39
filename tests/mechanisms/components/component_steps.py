"""Three training steps of a small network, in torch: the fixture that the JAX step is compared
with. `python component_steps.py` writes it anew."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from component_networks import Mixed
from torch import Tensor

from assay.io.files import save_tensors
from assay.learn.loop import cosine
from assay.mechanisms.components import (
    Faithfulness,
    LpMinimality,
    Objective,
    Persistent,
    Problem,
    Recon,
    Rows,
    SmoothL0,
    Training,
    decomposition,
)
from assay.mechanisms.components.training import make_optimizer

FIXTURE = Path(__file__).parent / "fixtures" / "steps.safetensors"
STEPS, COMPONENTS = 3, 6
LP = LpMinimality(0.05, beta=0.2, p=0.4, p_start=2.0)
SMOOTH = SmoothL0(0.05, frequency=0.02, references=40.0, gamma=0.1)
RECON = (Recon(routing="subset"), Recon(Persistent(0.1, 2), coefficient=0.5))
TRAINING = Training(steps=STEPS, rate=1e-2, importance_rate=3e-3)


def objective(form: LpMinimality | SmoothL0) -> Objective:
    return Objective(RECON, form, Faithfulness(0.2), "kl")


def compute_steps() -> dict[str, Tensor]:
    """Return parameters, inputs, draws, and what torch makes of them, under flat names."""
    out: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(7, (8, 3), generator=generator)
    out["tokens"] = tokens
    for label, form in (("lp", LP), ("smooth", SMOOTH)):
        model = Mixed()
        found = decomposition(
            model,
            ["embed", "up", "out"],
            COMPONENTS,
            importance="shared",
            hidden=8,
            generator=torch.Generator().manual_seed(1),
        )
        if label == "lp":
            for site in found.sites:
                out[f"matrix/{site.name}"] = site.matrix(model).detach().clone()
            out["bias/up"], out["bias/out"] = model.up.bias.detach(), model.out.bias.detach()
            out |= {f"begin/{key}": entry for key, entry in named(found).items()}
        drawing = torch.Generator().manual_seed(2)
        problem = Problem(model, found, objective(form), torch.Generator().manual_seed(2))
        for site in found.sites:
            out[f"source/{site.name}"] = torch.rand(COMPONENTS + 1, generator=drawing)
        optimizer = make_optimizer(found, TRAINING)
        rates = [group["lr"] for group in optimizer.param_groups]
        schedule = partial(cosine, floor=0.1)
        for step in range(STEPS):
            order = torch.rand((8, 3, 3), generator=drawing).argsort(-1).argsort(-1)
            many = 1 + (torch.rand((8, 3), generator=drawing) * 3).floor()
            for index, site in enumerate(found.sites):
                out[f"{step}/route/{site.name}"] = (order < many[..., None])[..., index]
                drawn = torch.rand((8, 3, COMPONENTS + 1), generator=drawing)
                out[f"{step}/drawn/{site.name}"] = drawn
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step / STEPS)
            optimizer.zero_grad()
            loss, terms = problem(Rows(tokens), step / STEPS)
            loss.backward()
            optimizer.step()
            problem.finish()
            out[f"{label}/{step}/total"] = loss.detach()
            out |= {f"{label}/{step}/{key}": term.detach() for key, term in terms.items()}
        out |= {f"{label}/end/{key}": entry for key, entry in named(found).items()}
        sources = problem.adversaries["persistent_all"]
        for index, site in enumerate(found.sites):
            out[f"{label}/end/source/{site.name}"] = sources.get_buffer(f"source_{index}")
    above = torch.rand(64, 5, generator=generator) * (torch.rand(64, 5, generator=generator) < 0.5)
    out["above"] = above
    for label, form in (("lp", LP), ("smooth", SMOOTH)):
        for done in (0.0, 0.5, 1.0):
            out[f"{label}/minimality at {done}"] = form({"site": above}, count=64, done=done)
    z = torch.randn(200, generator=generator)
    out["z"] = z
    return {key: entry.detach().clone().contiguous() for key, entry in out.items()}


def named(found) -> dict[str, Tensor]:
    """Return the parameters of a decomposition by their role and site."""
    names = [site.name for site in found.sites]
    own = found.importance
    lists = {"V": found.V, "U": found.U, "w1": own.w1, "b1": own.b1, "w2": own.w2, "b2": own.b2}
    return {
        f"{role}/{name}": entry.detach().clone()
        for role, entries in lists.items()
        for name, entry in zip(names, entries, strict=True)
    }


if __name__ == "__main__":
    FIXTURE.parent.mkdir(exist_ok=True)
    save_tensors(FIXTURE, compute_steps())
