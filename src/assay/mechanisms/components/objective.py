"""The objective of a decomposition, as data: recon terms (routing x mask source x coefficient),
faithfulness and importance minimality (arXiv 2506.20790)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as f

from assay.errors import InputError, unknown
from assay.mechanisms.components.decomposition import Decomposition, Reading, read_clean
from assay.mechanisms.components.masks import Mask, make_mask, run_masked
from assay.mechanisms.components.minimality import (
    LpMinimality,
    Minimality,
    Reduce,
    RunningMeans,
)
from assay.mechanisms.components.sources import (
    Fresh,
    Merged,
    Monitor,
    Persistent,
    Source,
    Sources,
    Stochastic,
)
from assay.mechanisms.components.squash import lower, upper

Routing = Literal["all", "layerwise", "subset"]
Divergence = Literal["mse", "kl"]
Form = Literal["sum", "relative"]
Routes = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Recon:
    """`coefficient` times the mean divergence of the masked network's output from the clean one's.

    Routing "all" masks every site at every position, "layerwise" one site at a time (the mean over
    sites), "subset" at every position k sites out of n, k uniform on 1..n."""

    source: Source = Stochastic()
    routing: Routing = "all"
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if self.routing not in get_args(Routing):
            raise unknown("routing", str(self.routing), get_args(Routing))
        if not self.coefficient >= 0:
            raise InputError(f"coefficient must be at least 0, got {self.coefficient}")

    @property
    def name(self) -> str:
        return f"{type(self.source).__name__.lower()}_{self.routing}"


@dataclass(frozen=True)
class Faithfulness:
    """What is left of the matrices: `sum_s |W_s - V_s U_s|^2 / sum_s numel(W_s)` ("sum"), or
    `sum_s |W_s - V_s U_s|^2 / |W_s|^2` ("relative").

    The first dilutes with the number of sites; the second does not."""

    coefficient: float = 1.0
    form: Form = "relative"

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise unknown("form of faithfulness", str(self.form), get_args(Form))
        if not self.coefficient >= 0:
            raise InputError(f"coefficient must be at least 0, got {self.coefficient}")

    def __call__(self, model: nn.Module, found: Decomposition) -> Float[Tensor, ""]:
        """Return the loss without its coefficient."""
        squares, sizes = [], []
        for site in found.sites:
            matrix = site.matrix(model).detach()
            v, u = found.factors(site.name)
            squares.append((matrix - v @ u).square().sum())
            sizes.append(matrix.square().sum() if self.form == "relative" else matrix.numel())
        if self.form == "relative":
            return torch.stack([one / size for one, size in zip(squares, sizes, strict=True)]).sum()
        return torch.stack(squares).sum() / sum(sizes)


@dataclass(frozen=True)
class Objective:
    """The whole objective; monitors are refused as recon terms."""

    recon: tuple[Recon, ...] = (Recon(), Recon(routing="layerwise"))
    minimality: Minimality = field(default_factory=LpMinimality)
    faithfulness: Faithfulness | None = None
    divergence: Divergence = "mse"

    def __post_init__(self) -> None:
        if not self.recon:
            raise InputError("recon is empty; an objective needs at least one recon term")
        if self.divergence not in get_args(Divergence):
            raise unknown("divergence", str(self.divergence), get_args(Divergence))
        for term in self.recon:
            if isinstance(term.source, Monitor):
                raise InputError(
                    f"masks {term.source.masks!r} are watched and never trained on; give another"
                    " source"
                )


@dataclass(frozen=True)
class Rows:
    """A batch: the model's inputs, and how many positions each row stands for (one, if None)."""

    inputs: Any
    weights: Float[Tensor, "*positions"] | None = None
    count: int | None = None

    def positions(self, output: Tensor) -> int:
        """Return the number of positions of an output (*positions, outputs)."""
        return output[..., 0].numel() if self.count is None else self.count


def skip_zeros(x: Float[Tensor, "rows features"]) -> Rows:
    """Return the rows that are not all zero, and one zero row that stands for all others.

    Exact where a zero row reaches every site as zero: no mask changes it, and its importances are
    the same in all of them. `zeros_are_inert` says whether that is so."""
    active = (x != 0).any(-1)
    kept = x[active]
    if len(kept) == len(x):
        return Rows(x)
    weights = torch.ones(len(kept) + 1, dtype=x.dtype, device=x.device)
    weights[-1] = len(x) - len(kept)
    return Rows(torch.cat([kept, x.new_zeros(1, x.shape[1])]), weights, len(x))


def zeros_are_inert(model: nn.Module, found: Decomposition, features: int) -> bool:
    """Return whether an all-zero input reaches every site as zero, so that no mask can change what
    the network does with it.
    """
    weight = next(model.parameters())
    zero = torch.zeros(1, features, dtype=weight.dtype, device=weight.device)
    reading = read_clean(model, zero, found.sites)
    return all(
        not site.lookup and not reading.inputs[site.name].any() for site in found.sites
    )


def diverge(
    output: Float[Tensor, "*positions outputs"],
    clean: Float[Tensor, "*positions outputs"],
    kind: Divergence,
) -> Float[Tensor, "*positions"]:
    """Return every position's divergence: the mean squared error over outputs, or
    KL(clean || output).
    """
    if kind == "mse":
        return (output - clean).square().mean(-1)
    expected = clean.log_softmax(-1)
    return (expected.exp() * (expected - output.log_softmax(-1))).sum(-1)


@dataclass(frozen=True)
class Scene:
    """What the terms of one step share: the clean run and the importances."""

    model: nn.Module
    found: Decomposition
    rows: Rows
    reading: Reading
    importance: Mapping[str, Tensor]
    divergence: Divergence
    generator: torch.Generator

    def detached(self) -> Scene:
        """Return the scene with importances that take no gradient: what an ascent sees."""
        own = {name: entry.detach() for name, entry in self.importance.items()}
        return Scene(
            self.model, self.found, self.rows, self.reading, own, self.divergence, self.generator
        )

    def loss(self, sources: Mapping[str, Tensor], routes: Routes) -> Float[Tensor, ""]:
        """Return the mean divergence under sources (..., C + 1) of the routed sites."""
        masks = {
            name: make_mask(
                self.importance[name], sources[name][..., :-1], sources[name][..., -1], routed
            )
            for name, routed in routes.items()
        }
        return self.masked(masks)

    def masked(self, masks: Mapping[str, Mask]) -> Float[Tensor, ""]:
        """Return the mean divergence under masks."""
        output = run_masked(self.model, self.rows.inputs, self.found, masks)
        each = diverge(output, self.reading.output, self.divergence)
        weights = self.rows.weights
        total = each.sum() if weights is None else (each * weights).sum()
        return total / self.rows.positions(output)

    def uniform(self) -> dict[str, Tensor]:
        """Draw sources uniform on [0, 1], for every position and site."""
        return {name: self._rand(*g.shape[:-1], g.shape[-1] + 1, like=g)
                for name, g in self.importance.items()}

    def routes(self, routing: Routing) -> Iterator[Routes]:
        """Return the routing of every forward pass of a term."""
        names = list(self.importance)
        if routing == "all":
            yield dict.fromkeys(names)
        elif routing == "layerwise":
            yield from ({name: None} for name in names)
        else:
            first = self.importance[names[0]]
            shape = first.shape[:-1]
            order = self._rand(*shape, len(names), like=first).argsort(-1).argsort(-1)
            many = torch.randint(
                1, len(names) + 1, shape, generator=self.generator, device=self.generator.device
            ).to(first.device)
            chosen = order < many.unsqueeze(-1)
            yield {name: chosen[..., index] for index, name in enumerate(names)}

    def _rand(self, *shape: int, like: Tensor) -> Tensor:
        drawn = torch.rand(
            shape, generator=self.generator, dtype=like.dtype, device=self.generator.device
        )
        return drawn.to(like.device)


def adversarial(scene: Scene, source: Fresh, routes: Routes) -> dict[str, Tensor]:
    """Return the sources that projected gradient ascent finds, one per component shared over the
    batch.
    """
    scene = scene.detached()
    sources = {
        name: scene._rand(g.shape[-1] + 1, like=g) for name, g in scene.importance.items()
        if name in routes
    }
    for _ in range(source.steps):
        leaves = {name: entry.requires_grad_() for name, entry in sources.items()}
        with torch.enable_grad():
            loss = scene.loss(leaves, routes)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        sources = {
            name: (leaf.detach() + source.rate * gradient.sign()).clamp_(0, 1)
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }
    return sources


class Problem(nn.Module):
    """A decomposition in training: its parameters, and the state of adversaries and running means,
    so that one checkpoint holds all of it."""

    def __init__(
        self,
        model: nn.Module,
        found: Decomposition,
        objective: Objective,
        generator: torch.Generator,
        *,
        reduce: Reduce | None = None,
    ) -> None:
        super().__init__()
        self.found, self.objective, self.generator = found, objective, generator
        self.reduce = reduce
        self._model = (model,)  # in a tuple: its parameters are not trained and not saved
        self.adversaries = nn.ModuleDict()
        for index, term in enumerate(objective.recon):
            plan = term.source.adversary if isinstance(term.source, Merged) else term.source
            if isinstance(plan, Persistent):
                self.adversaries[str(index)] = Sources(found.sites, plan, generator)
        half_life = objective.minimality.half_life
        self.means = None if half_life is None else RunningMeans(found.sites, half_life)

    def forward(self, rows: Rows, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch at a share `done` of training, and its terms without their
        coefficients.
        """
        model = self._model[0]
        reading = read_clean(model, rows.inputs, self.found.sites)
        logits = self.found.logits(reading)
        importance = {name: lower(z) for name, z in logits.items()}
        scene = Scene(
            model, self.found, rows, reading, importance, self.objective.divergence, self.generator
        )
        terms: dict[str, Tensor] = {}
        total: Tensor = torch.zeros(())
        for index, term in enumerate(self.objective.recon):
            value = self._recon(scene, term, index)
            total = total + term.coefficient * value
            terms[term.name if term.name not in terms else f"{term.name}_{index}"] = value
        world = 1
        penalty = self.objective.minimality(
            {name: upper(z) for name, z in logits.items()},
            count=rows.positions(reading.output) * world,
            done=done,
            weights=None if rows.weights is None else rows.weights.flatten(),
            reduce=self.reduce,
            state=self.means,
        )
        terms["minimality"] = penalty
        total = total + penalty
        if self.objective.faithfulness is not None:
            terms["faithfulness"] = self.objective.faithfulness(model, self.found)
            total = total + self.objective.faithfulness.coefficient * terms["faithfulness"]
        return total, terms

    def finish(self) -> None:
        """Let the persistent adversaries ascend along the main backward pass's gradients."""
        for adversary in self.adversaries.values():
            assert isinstance(adversary, Sources)
            adversary.finish()

    def _recon(self, scene: Scene, term: Recon, index: int) -> Tensor:
        return torch.stack(
            [self._pass(scene, term.source, index, routes) for routes in scene.routes(term.routing)]
        ).mean()

    def _pass(self, scene: Scene, source: Source, index: int, routes: Routes) -> Tensor:
        match source:
            case Stochastic():
                return scene.loss(scene.uniform(), routes)
            case Fresh():
                return scene.loss(adversarial(scene, source, routes), routes)
            case _:
                raise NotImplementedError
