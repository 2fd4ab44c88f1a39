"""Edge attribution patching between heads and MLPs, at the clean run or along a path of inputs
(EAP and EAP-IG).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils._pytree import tree_flatten

from assay.attribution.scores import Gap, require_scores
from assay.core.target import Batch, Target
from assay.edges.graph import EdgeGraph
from assay.edges.source_run import SourceRun, bytes_per_step, read_sources
from assay.edges.wiring import wire
from assay.errors import InputError, unknown
from assay.io.circuits import Circuit
from assay.memory import rows_within

Method = Literal["eap", "eap-ig"]


@dataclass(frozen=True)
class EdgeScores:
    """Scores of every edge: `values` (examples, sources, receivers) in float64, zero where there is
    no edge.

    Sign: an estimate of the indirect effect m(clean, edge := patch) - m(clean). `gap` compares the
    sum over the edges that leave `input` with m(patch) - m(clean): along the whole path of inputs
    they are equal."""

    graph: EdgeGraph
    values: Float[Tensor, "examples sources receivers"]
    baseline: Float[Tensor, " examples"]
    patched: Float[Tensor, " examples"]
    method: str
    gap: Gap | None = None
    exact: bool = False
    cpu_seconds: float = 0.0
    estimand: str = field(default="single edge", init=False)
    sign: str = field(default="indirect effect", init=False)

    def mean(self) -> Float[Tensor, "sources receivers"]:
        """Return the mean over examples."""
        return self.values.mean(0)

    def table(self) -> pl.DataFrame:
        """Return one row an edge: edge, source, receiver, mean score, standard deviation over
        examples, n, mean |score|.
        """
        receivers, sources = self.graph.mask.T.nonzero(as_tuple=True)
        flat = self.values[:, sources, receivers].cpu()
        return pl.DataFrame(
            {
                "edge": self.graph.names(),
                "source": [self.graph.sources[place] for place in sources.tolist()],
                "receiver": [self.graph.receivers[place] for place in receivers.tolist()],
                "score": flat.mean(0).numpy(),
                "sd": flat.std(0, correction=1 if len(flat) > 1 else 0).numpy(),
                "n": [len(flat)] * flat.shape[1],
                "size": flat.abs().mean(0).numpy(),
            }
        )

    to_polars = table

    def top(self, count: int = 20) -> pl.DataFrame:
        """Return the edges with the largest |mean score|."""
        return self.table().sort(pl.col("score").abs(), descending=True).head(count)

    def keep_top(self, share: float) -> Bool[Tensor, "sources receivers"]:
        """Return the share of all edges with the largest |mean score|."""
        if not 0 <= share <= 1:
            raise InputError(f"share must be between 0 and 1, got {share}")
        sizes = self.mean().abs().cpu().masked_fill(~self.graph.mask, -1.0).flatten()
        keep = torch.zeros_like(sizes, dtype=torch.bool)
        keep[sizes.argsort(descending=True, stable=True)[: round(share * self.graph.edges)]] = True
        return keep.reshape(self.graph.mask.shape)

    def to_circuit(
        self,
        keep: Bool[Tensor, "sources receivers"] | None = None,
        nodes: Mapping[str, float] | None = None,
    ) -> Circuit:
        """Return the contents of a circuit file: the mean scores, and which edges are in the
        circuit (none by default).
        """
        return self.graph.to_circuit(
            self.mean(), torch.zeros_like(self.graph.mask) if keep is None else keep, nodes
        )

    def _repr_html_(self) -> str:
        gap = "" if self.gap is None else f", completeness gap {self.gap.relative:.1%}"
        head = (
            f"<p><b>{self.graph.edges} edges</b>: {self.method}, {self.sign} of a"
            f" {self.estimand}{gap}</p>"
        )
        return head + self.top(20).select("edge", "score", "sd", "n")._repr_html_()


def edges(
    target: Target,
    clean: Batch,
    patch: Batch,
    *,
    method: Method = "eap-ig",
    steps: int = 5,
    budget: int | None = None,
) -> EdgeScores:
    """Score every edge u -> d between heads and MLPs by `<dm/d(input of d), du>`, du = (u's output
    in the patch run) - (in the clean one).

    "eap" takes the gradient at the clean run (arXiv 2310.10348); "eap-ig" its mean over the inputs
    `patch + k/steps (clean - patch)`, k = 1..steps (arXiv 2403.17806), all steps side by side as
    far as the memory `budget` in bytes goes. The gradient is taken at q, k and v of every head and
    pulled back through the head's own projection and the norm in front of it, so that one forward
    and one backward of the unchanged model serve all edges. Sums run in float64, per example.

    Raises InputError for a model whose heads are not known, batches that do not fit each other, and
    scores that are not finite."""
    if method not in get_args(Method):
        raise unknown("method of edges", str(method), get_args(Method))
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    began = time.process_time()
    wiring = wire(target.model)
    count = steps if method == "eap-ig" else 1
    require_pair(clean, patch)
    patched, theirs = read_sources(target, patch, wiring)
    chunk = rows_within(
        bytes_per_step(target.model, theirs, wiring), budget, device=target.device, most=count
    )
    run = SourceRun(target, clean, wiring, theirs)
    # From the clean end on: the first chunk then holds the clean run, whose outputs every later one
    # needs.
    for alphas in (torch.arange(count, 0, -1) / count).split(chunk):
        run.add(alphas)
    values = run.scores / count
    require_scores({"edges": values})
    change = patched.double() - run.baseline
    missing = (values[:, 0].sum(-1) - change).abs().mean()
    scale = float(change.abs().mean())
    relative = (
        float(missing) / scale if scale > 0 else (0.0 if float(missing) == 0 else float("inf"))
    )
    name = "EAP" if method == "eap" else f"EAP-IG, {steps} steps"
    return EdgeScores(
        graph=wiring.graph,
        values=values,
        baseline=run.baseline,
        patched=patched.double(),
        method=name,
        gap=Gap(relative, float(missing), count),
        cpu_seconds=time.process_time() - began,
    )


def require_pair(clean: Batch, patch: Batch) -> None:
    """Raise InputError when clean and patch differ in examples, positions or padding."""

    def shapes(batch: Batch) -> list[tuple[int, ...]]:
        return [
            tuple(leaf.shape) for leaf in tree_flatten(batch.inputs)[0] if isinstance(leaf, Tensor)
        ]

    if shapes(clean) != shapes(patch):
        raise InputError(
            f"clean and patch must have the same examples and positions; got shapes {shapes(clean)}"
            f" and {shapes(patch)}"
        )
    if isinstance(clean.inputs, Mapping) and isinstance(patch.inputs, Mapping):
        ours, theirs = clean.inputs.get("attention_mask"), patch.inputs.get("attention_mask")
        if (
            isinstance(ours, Tensor)
            and isinstance(theirs, Tensor)
            and not torch.equal(ours, theirs)
        ):
            raise InputError(
                "clean and patch prompts must be of equal length, example by example: their"
                " attention masks differ"
            )
