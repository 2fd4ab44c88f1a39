"""Lower bounds of the margins of a bilinear network of one block, from the features of a
crosscoder: interactions are exact and quadratic.

The network is `r_0 = E x`, `r_1 = r_0 + D (L r_0 * R r_0)`, logits `U r_1`. With the bias as a
feature of code one, a point at rhat_0 = sum_f z_f d_f has the logits

    sum_f z_f U_k d_f + sum_{f,g} z_f z_g Q_k[f, g],
    Q_k[f, g] = sum_n (U D)_kn (L d_f)_n (R d_g)_n,

exactly: what two features do together is the table Q. For r_0 = rhat_0 + eps_0 a margin moves by

    g . eps_0 + eps_0^T M eps_0,   g = (U_y - U_k) + 2 M rhat_0,   M = M_y - M_k,

with M_k the symmetric part of `L^T diag((U D)_k) R`, so that it falls by at most `||g|| ||eps_0|| +
||M||_F ||eps_0||^2`. Codes and decoders are advice, and sound whatever they are. Sheet:
crosscoder_and_guard, part A."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float

from assay.errors import InputError, unknown
from assay.mechanisms.crosscoder import Crosscoder, read_codes, residual_states
from assay.proofs.crosscoder.arithmetic import Arithmetic, Array, Number, arithmetic, pairs
from assay.proofs.crosscoder.certificates import least
from assay.proofs.crosscoder.problem import Features, Points, half, margins_of
from assay.proofs.max_of_k import operations
from assay.targets.bilinear import BilinearNetwork

STRATEGIES: Mapping[str, str] = {
    "exact": "interactions by their table, the error to first order as it is",
    "compact": "interactions by their table, knowing of the error its norm alone",
}


@dataclass(frozen=True)
class Weights:
    """The matrices of one block as float64 arrays."""

    E: Float[Array, "width inputs"]
    L: Float[Array, "hidden width"]
    R: Float[Array, "hidden width"]
    D: Float[Array, "width hidden"]
    U: Float[Array, "outputs width"]

    @staticmethod
    def of(model: BilinearNetwork) -> Weights:
        """Return the weights of a network; InputError for more than one block or position, a gate
        and a norm.
        """
        plain = model.gate is None and not model.normed and model.positions == 1
        if len(model.blocks) != 1 or not plain:
            raise InputError(
                "these proofs are about one bilinear block without gate, norm or patches, and the"
                f" network has {len(model.blocks)} blocks, gate {model.gate}, norm {model.normed}"
                f" and {model.positions} positions"
            )
        found = {name: entry.detach().double().numpy() for name, entry in model.named_parameters()}
        block = "blocks.0."
        names = ("embed", block + "left", block + "right", block + "down", "head")
        return Weights(*(found[name + ".weight"] for name in names))


@dataclass(frozen=True)
class BilinearProblem:
    """A network, points, features, and a level; InputError where their shapes do not fit."""

    weights: Weights
    points: Points
    features: Features
    level: str = "real"

    def __post_init__(self) -> None:
        inputs, width = self.weights.E.shape[1], self.weights.E.shape[0]
        if self.points.inputs.shape[1] != inputs or self.features.bias.shape[1] != width:
            raise InputError(
                f"points have {self.points.inputs.shape[1]} inputs and features width"
                f" {self.features.bias.shape[1]}; the network has {inputs} and {width}"
            )
        if len(self.features.codes) != len(self.points):
            raise InputError(
                f"the features are of {len(self.features.codes)} points, not {len(self.points)}"
            )
        labels, outputs = self.points.labels, len(self.weights.U)
        if labels.min() < 0 or labels.max() >= outputs:
            raise InputError(f"labels must lie in 0..{outputs - 1}")
        arithmetic(self.level)

    @cached_property
    def ar(self) -> Arithmetic:
        return arithmetic(self.level)

    def take(self, index: Array) -> BilinearProblem:
        """Return the problem at some of the points."""
        points = Points(self.points.inputs[index], self.points.labels[index])
        features = replace(self.features, codes=self.features.codes[index])
        return replace(self, points=points, features=features)


@torch.no_grad()
def features_of(found: Crosscoder, model: BilinearNetwork, points: Points) -> Features:
    """Return a crosscoder over "embed" and "blocks.0" as advice, with its own encoder's codes."""
    if found.sites != ("embed", "blocks.0"):
        raise InputError(
            "the crosscoder must read the sites 'embed' and 'blocks.0', got"
            f" {', '.join(map(repr, found.sites))}"
        )
    found.require_network(model)
    inputs = torch.from_numpy(np.asarray(points.inputs)).to(next(model.parameters()))
    codes = read_codes(found, residual_states(model, inputs, found.sites))
    entries = (found.W_dec, found.b_dec, codes)
    return Features(*(entry.detach().double().numpy() for entry in entries))


def bilinear_margins(problem: BilinearProblem, strategy: str = "exact") -> Array:
    """Return a lower bound of every point's margin: tables of size^2 x outputs entries once, then
    O(outputs (L0^2 + L0 width)) a point. Raises InputError for an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    ar, w, f = problem.ar, problem.weights, problem.features
    atoms = np.concatenate([f.decoder[:, 0], f.bias[:1]])
    codes = np.concatenate([f.codes, np.ones((len(f.codes), 1))], 1)
    E_T, U = ar.exact(w.E.T), ar.exact(w.U)
    error = ar.matmul(ar.exact(problem.points.inputs), E_T) - ar.combine(codes, ar.exact(atoms))
    size = ar.exact(ar.high(ar.norm(error))[:, None])
    inner = ar.matmul(U, ar.exact(w.D))  # (outputs, hidden)
    forms = [_form(ar, inner[k : k + 1], w) for k in range(len(w.U))]
    bent = [ar.matmul(ar.exact(atoms), form) for form in forms]  # M_k d_f, (size, width)
    tables = [ar.matmul(one, ar.exact(atoms.T)) for one in bent]  # Q_k, (size, size)
    direct = ar.combine(codes, ar.matmul(ar.exact(atoms), ar.transpose(U)))
    logits = [pairs(ar, codes, table) for table in tables]
    slopes = [_double(ar.combine(codes, one)) + U[k : k + 1] for k, one in enumerate(bent)]
    found = np.empty(len(problem.points))
    for label in np.unique(problem.points.labels).tolist():
        rows = np.flatnonzero(problem.points.labels == label)
        bounds = np.zeros((len(rows), len(w.U)))
        for k in range(len(w.U)):
            if k == label:
                continue
            steep = slopes[label][rows] - slopes[k][rows]
            lead = direct[rows][:, label : label + 1] - direct[rows][:, k : k + 1]
            lead = lead + (logits[label][rows] - logits[k][rows])[:, None]
            if strategy == "exact":
                first = _rowwise(steep * error[rows])
            else:
                first = -(ar.norm(steep)[:, None] * size[rows])
            most = ar.norm(ar.norm(forms[label] - forms[k])[None])[None]
            second = size[rows] * size[rows] * most
            bounds[:, k] = ar.low(lead + first - second)[:, 0]
        found[rows] = least(bounds, label)
    return found


def true_margins(problem: BilinearProblem) -> Array:
    """Return the network's own margin of the right output at every point, in float64."""
    return margins_of(_run(problem.weights, problem.points.inputs), problem.points.labels)


def proof_operations(problem: BilinearProblem, strategy: str) -> int:
    """Return the operations of the verifier of a strategy."""
    plain = _counting(problem)
    return operations.count(lambda: bilinear_margins(plain, strategy))


def evaluation_operations(problem: BilinearProblem) -> int:
    """Return the operations of running the network on every point and comparing its logits."""
    plain = _counting(problem)
    return operations.count(lambda: _run(plain.weights, plain.points.inputs).max(1))


def _run(w: Weights, x: Array) -> Array:
    state = x @ w.E.T
    logits: Array = (state + ((state @ w.L.T) * (state @ w.R.T)) @ w.D.T) @ w.U.T
    return logits


def _form(ar: Arithmetic, row: Number, w: Weights) -> Number:
    """Return M_k, the symmetric part of `L^T diag(row) R`."""
    weighed = ar.exact(w.L.T) * row
    form = ar.matmul(weighed, ar.exact(w.R))
    return (form + ar.transpose(form)) * half(ar)


def _double(x: Number) -> Number:
    return x + x


def _rowwise(x: Number) -> Number:
    return x.sum(1)[:, None]


def _counting(problem: BilinearProblem) -> BilinearProblem:
    """Return the problem at level float64 on arrays that count what is done to them."""
    weights = operations.counting_fields(problem.weights)
    features = operations.counting_fields(problem.features)
    points = replace(problem.points, inputs=operations.counting(problem.points.inputs))
    return BilinearProblem(weights, points, features, "float64")
