"""A decomposition in training: the loss of a batch with its terms, and the state that a step
carries to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from assay.mechanisms.components.decomposition import Decomposition, read_clean
from assay.mechanisms.components.minimality import Reduce, RunningMeans
from assay.mechanisms.components.objective import Objective, Recon
from assay.mechanisms.components.scene import Routes, Rows, Scene
from assay.mechanisms.components.sites import read_uses
from assay.mechanisms.components.sources import Fresh, Merged, Persistent, Sources, Stochastic
from assay.mechanisms.components.squash import lower, upper


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Build graphs in which the network's own parameters take no gradient, and so cost none."""
    taking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in taking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)


class Problem(nn.Module):
    """The objective of a decomposition of one network, with the sources of persistent adversaries
    and the running means of frequencies, so that one checkpoint holds all of it.

    Of `world` processes each gives its share of the batch (`Rows.share`), and `reduce` sums a
    tensor over them (see `assay.learn.processes`): the sum of their gradients is that of one
    process with the whole batch. Terms that are logged, and the value of the loss, are those of
    the whole batch."""

    def __init__(
        self,
        model: nn.Module,
        found: Decomposition,
        objective: Objective,
        generator: torch.Generator,
        *,
        reduce: Reduce | None = None,
        world: int = 1,
    ) -> None:
        super().__init__()
        self.found, self.objective, self.generator = found, objective, generator
        self.reduce, self.world = reduce, world
        self._frozen = (model,)  # in a tuple: its parameters are neither trained nor saved
        self._checked = False  # that the sites are products with their matrices
        self.adversaries = nn.ModuleDict()
        for name, term in zip(objective.names, objective.recon, strict=True):
            plan = term.source.adversary if isinstance(term.source, Merged) else term.source
            if isinstance(plan, Persistent):
                self.adversaries[name] = Sources(found.sites, plan, generator)
                if reduce is not None:  # every process starts from the same sources
                    for key, entry in self.adversaries[name].named_buffers():
                        if key.startswith("source"):
                            entry.copy_(reduce(entry) / world)
        half_life = objective.minimality.half_life
        self.means = None if half_life is None else RunningMeans(found.sites, half_life)

    @property
    def model(self) -> nn.Module:
        """The frozen network."""
        return self._frozen[0]

    def forward(self, rows: Rows, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch at a share `done` of training, and its terms without their
        coefficients (the minimality with its own).
        """
        if not self._checked:
            read_uses(self.model, rows.inputs, self.found.sites)
            self._checked = True
        with frozen(self.model):
            return self._losses(rows, done)

    def _losses(self, rows: Rows, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        reading = read_clean(self.model, rows.inputs, self.found.sites)
        logits = self.found.logits(reading)
        scene = Scene(
            self.model,
            self.found,
            rows,
            reading,
            {name: lower(z) for name, z in logits.items()},
            self.objective.divergence,
            self.generator,
        )
        terms: dict[str, Tensor] = {}
        losses = []
        for name, term in zip(self.objective.names, self.objective.recon, strict=True):
            passes = [self._pass(scene, name, term, way) for way in scene.routes(term.routing)]
            own = torch.stack(passes).mean()
            terms[name] = own if self.reduce is None else _as_whole(own, self.reduce)
            losses.append(term.coefficient * terms[name])
        terms["minimality"] = self.objective.minimality(
            {name: upper(z) for name, z in logits.items()},
            count=rows.positions(reading.output),
            done=done,
            weights=None if rows.weights is None else rows.weights.flatten(),
            reduce=self.reduce,
            state=self.means,
        )
        losses.append(terms["minimality"])
        faithfulness = self.objective.faithfulness
        if faithfulness is not None:
            terms["faithfulness"] = faithfulness(self.model, self.found)
            share = _share(terms["faithfulness"], self.world)
            losses.append(faithfulness.coefficient * share)
        return torch.stack(losses).sum(), terms

    def finish(self) -> None:
        """Let the persistent adversaries ascend along the gradients of the main backward pass."""
        for adversary in self.adversaries.values():
            assert isinstance(adversary, Sources)
            adversary.finish(self.reduce)

    def _pass(self, scene: Scene, name: str, term: Recon, routes: Routes) -> Tensor:
        match term.source:
            case Stochastic():
                return scene.loss(scene.drawn(term.source.sampling), routes)
            case Fresh():
                return scene.loss(scene.attacked(term.source, routes, self.reduce), routes)
            case Persistent():
                return scene.loss(self._persistent(scene, name), routes)
            case Merged():
                ours, drawn = self._persistent(scene, name), scene.drawn()
                chosen = scene.chosen(term.source.share)
                mixed = {key: torch.where(chosen[key], ours[key], drawn[key]) for key in drawn}
                return scene.loss(mixed, routes)
            case _:
                raise AssertionError(f"{term.source} is not trained on")

    def _persistent(self, scene: Scene, name: str) -> dict[str, Tensor]:
        """Return a persistent adversary's sources as leaves of the main graph, after its warm
        ascents over all sites.
        """
        adversary = self.adversaries[name]
        assert isinstance(adversary, Sources)
        if not adversary.pending:
            detached = scene.detached()
            everywhere: Routes = dict.fromkeys(scene.importance)
            for _ in range(adversary.plan.warm):
                leaves = adversary.leaves()
                loss = detached.loss(leaves, everywhere)
                gradients = torch.autograd.grad(loss, list(leaves.values()))
                adversary.ascend(dict(zip(leaves, gradients, strict=True)), self.reduce)
            adversary.pending = adversary.leaves()
        return adversary.pending


def _as_whole(own: Tensor, reduce: Reduce) -> Tensor:
    """Return the sum over processes, with the gradient of this one's share."""
    return own + (reduce(own.detach()) - own.detach())


def _share(term: Tensor, world: int) -> Tensor:
    """Return a term that all processes have alike, with the gradient of one of `world` shares."""
    return term if world == 1 else term.detach() + (term - term.detach()) / world
