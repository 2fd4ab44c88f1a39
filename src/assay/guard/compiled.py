"""Admitted explanations as arrays, for scoring many inputs at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from assay.guard.admission import Laboratory
from assay.guard.explanations import Explanation, Forest


@dataclass(frozen=True)
class Compiled:
    """What admitted explanations say of bins, given the root (one row where there is none).

    `single` (roots, features, bins) and `pairs` (edges, bins, bins) say which events are supported,
    `log` (roots, features, bins) and `ratio` (edges, bins, bins) are the log probabilities of bins
    and the terms log p(v_i, v_j) / p(v_i) p(v_j); `counted` marks the edges whose term is in the
    likelihood. `root` (roots,) says which root values are supported, `root_log` their log
    probabilities."""

    edges: Int[Tensor, "edges 2"]
    single: Bool[Tensor, "roots features bins"]
    pairs: Bool[Tensor, "edges bins bins"]
    log: Float[Tensor, "roots features bins"]
    ratio: Float[Tensor, "edges bins bins"]
    counted: Bool[Tensor, " edges"]
    root: Bool[Tensor, " roots"]
    root_log: Float[Tensor, " roots"]

    def explained(
        self, bins: Int[Tensor, "inputs features"], roots: Int[Tensor, " inputs"]
    ) -> Bool[Tensor, "inputs features"]:
        """Return which features are explained: some statement's event there is supported. A root
        value without support leaves all unexplained."""
        found = self.single.flatten()[self._single(bins, roots)]
        if len(self.edges):
            supported = self.pairs.flatten()[self._pairs(bins)]
            incidence = torch.zeros(len(self.edges), bins.shape[1])
            incidence.scatter_(1, self.edges, 1.0)
            found |= supported.float() @ incidence > 0
        return found & self.root[roots][:, None]

    def likelihood(
        self, bins: Int[Tensor, "inputs features"], roots: Int[Tensor, " inputs"]
    ) -> tuple[Float[Tensor, " inputs"], Float[Tensor, " inputs"]]:
        """Return -log P of the bins and the root, and the dependence score."""
        plain = self.log.flatten()[self._single(bins, roots)].sum(1) + self.root_log[roots]
        if not len(self.edges):
            return -plain, torch.zeros_like(plain)
        terms = self.ratio.flatten()[self._pairs(bins)]
        # In float64, rounded once: a product's sum depends on the number of its rows.
        counted = (terms.double() @ self.counted.double()).float()
        return -plain - counted, -terms.sum(1)

    def _single(self, bins: Tensor, roots: Tensor) -> Tensor:
        _, features, size = self.log.shape
        return (roots[:, None] * features + torch.arange(features)) * size + bins

    def _pairs(self, bins: Tensor) -> Tensor:
        size = self.ratio.shape[-1]
        first, second = bins[:, self.edges[:, 0]], bins[:, self.edges[:, 1]]
        return (torch.arange(len(self.edges)) * size + first) * size + second


def compile_explanations(laboratory: Laboratory, admitted: Sequence[Explanation]) -> Compiled:
    """Return the arrays of admitted explanations; with none, nothing is supported."""
    tables = laboratory.tables
    n, size = tables.single.shape
    roots = max(tables.roots, 1)
    margins = tables.marginals()
    log = margins.log().expand(roots, n, size).clone()
    single = torch.zeros(roots, n, size, dtype=torch.bool)
    edges = [one for one in admitted if one.form == "edge"]
    forest = Forest(n + 1)  # the root is the last node
    given = tables.given_root().log() if tables.roots else log
    for one in admitted:
        feature = one.features[0]
        if one.form == "root":
            single[:, feature] |= laboratory.support(one)
            log[:, feature] = given[:, feature]
            forest.join(feature, n)
        elif one.form != "edge":
            single[:, feature] |= laboratory.support(one)
    pairs = torch.zeros(len(edges), size, size, dtype=torch.bool)
    ratio = torch.zeros(len(edges), size, size, dtype=torch.float64)
    counted = torch.zeros(len(edges), dtype=torch.bool)
    for place, one in enumerate(edges):
        first, second = one.features
        pairs[place] = laboratory.support(one)
        apart = margins[first][:, None] * margins[second]
        ratio[place] = (tables.joint(first, second) / apart).log()
        counted[place] = forest.join(first, second)
    supported, root_log = torch.ones(1, dtype=torch.bool), torch.zeros(1)
    if tables.roots:
        supported = tables.root >= laboratory.needed
        root_log = ((tables.root.double() + 1 / roots) / (tables.total + 1)).log()
    index = torch.tensor([one.features for one in edges], dtype=torch.long).reshape(-1, 2)
    return Compiled(
        index, single, pairs, log.float(), ratio.float(), counted, supported, root_log.float()
    )
