"""Lower bounds of the margins of a one-layer attention model, from the features of a crosscoder
over its residual states: scores are an exact quadratic form of the codes, values are linear.

The network is that of `assay.targets.max_of_k`: `r_p = E[t_p] + P[p]`, scores `s_p = (r_K Q + b_Q)
. (r_p K + b_K) / sqrt(h)` of the last position K, attention `a = softmax(s)`, logits `U^T (r_K +
sum_p a_p ((r_p V + b_V) O) + b_O) + b_U`. Features with codes z write d_{f,p} into position p, so
that with the biases as a feature of code one, at rhat

    s_p = sum_{f,g} z_f z_g S_p[f, g],   S_p[f, g] = (d_{f,K} Q) . (d_{g,p} K) / sqrt(h),
    v_p = sum_f z_f (U_y - U_k) . (d_{f,p} V O),

exactly, from tables that are made once. With A = Q K^T / sqrt(h) and r = rhat + eps, a score's lead
over another moves by

    eps_K . A (rhat_q - rhat_p) + (rhat_K A + b) . (eps_q - eps_p) + eps_K . A (eps_q - eps_p),

and the last term is at most `||A||_F ||eps_K|| ||eps_q - eps_p||`. With D_qp at least `s_q - s_p`,
`a_p >= 1 / (1 + sum_{q != p} exp(D_qp))`, and what attention adds to a margin is at least

    min_p v_p + sum_p a_p (v_p - min_p v_p).

Codes and decoders are advice, and sound whatever they are. Sheet: crosscoder_and_guard, part A."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.errors import InputError, unknown
from assay.mechanisms.crosscoder import Crosscoder, read_codes
from assay.proofs.crosscoder.arithmetic import Arithmetic, Array, Number, arithmetic, pairs
from assay.proofs.crosscoder.certificates import least, rivals
from assay.proofs.crosscoder.problem import Features, margins_of
from assay.proofs.max_of_k import operations
from assay.targets.max_of_k import Weights

STRATEGIES: Mapping[str, str] = {
    "exact": "scores by their tables, the error to first order as it is",
    "compact": "scores by their tables, knowing of the error at every position its norm alone",
}


@dataclass(frozen=True)
class AttentionProblem:
    """A network, sequences of tokens, features and a level.

    Features have one layer per position and one for the last state, which no bound reads. Raises
    InputError where shapes or tokens do not fit."""

    weights: Weights
    tokens: Int[Array, "points positions"]
    features: Features
    level: str = "real"

    def __post_init__(self) -> None:
        w, shape = self.weights, np.shape(self.tokens)
        if len(shape) != 2 or not shape[0] or shape[1] != w.positions:
            raise InputError(f"tokens must be (points, {w.positions}), got {shape}")
        if self.tokens.min() < 0 or self.tokens.max() >= w.vocabulary:
            raise InputError(f"tokens must lie in 0..{w.vocabulary - 1}")
        wanted, given = (w.positions + 1, w.width), self.features.bias.shape
        if given != wanted or len(self.features.codes) != shape[0]:
            raise InputError(
                f"the features are of {len(self.features.codes)} points and (layers, width)"
                f" {given}; there are {shape[0]} points, and the network needs {wanted}"
            )
        arithmetic(self.level)

    @cached_property
    def ar(self) -> Arithmetic:
        return arithmetic(self.level)

    @property
    def labels(self) -> Int[Array, " points"]:
        """The largest token of every sequence."""
        labels: Array = self.tokens.max(1)
        return labels

    def take(self, index: Array) -> AttentionProblem:
        """Return the problem at some of the points."""
        features = replace(self.features, codes=self.features.codes[index])
        return replace(self, tokens=self.tokens[index], features=features)


def attention_sites(positions: int) -> tuple[str, ...]:
    """Return what the layers of a crosscoder of such a model are called."""
    return (*(f"position {index}" for index in range(positions)), "last")


@torch.no_grad()
def attention_states(
    weights: Weights, tokens: Int[Array, "points positions"]
) -> Float[Tensor, "points layers width"]:
    """Return the residual states that a crosscoder reads: those of all positions before attention,
    and that of the last position after it.
    """
    w = _wide(weights)
    before = w.E[tokens] + w.P
    found = np.concatenate([before, _last(w, before)[:, None]], 1)
    return torch.from_numpy(found).float()


@torch.no_grad()
def features_of(
    found: Crosscoder, weights: Weights, tokens: Int[Array, "points positions"]
) -> Features:
    """Return a crosscoder over `attention_sites` as advice, with its own encoder's codes."""
    sites = attention_sites(weights.positions)
    if found.sites != sites:
        raise InputError(
            f"the crosscoder must read {', '.join(map(repr, sites))}, got"
            f" {', '.join(map(repr, found.sites))}"
        )
    codes = read_codes(found, attention_states(weights, tokens))
    entries = (found.W_dec, found.b_dec, codes)
    return Features(*(entry.detach().double().numpy() for entry in entries))


def attention_margins(problem: AttentionProblem, strategy: str = "exact") -> Array:
    """Return a lower bound of every point's margin: tables of size^2 entries per position once,
    then O(K (L0^2 + L0 width) + outputs K L0) a point. Raises InputError for an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    ar, f, compact = problem.ar, problem.features, strategy == "compact"
    w = _wide(problem.weights)
    K = w.positions
    codes = np.concatenate([f.codes, np.ones((len(f.codes), 1))], 1)
    atoms = [np.concatenate([f.decoder[:, p], f.bias[p : p + 1]]) for p in range(K)]
    errors = _errors(problem, w, codes, atoms)
    sizes = [ar.exact(ar.high(ar.norm(error))[:, None]) for error in errors]
    shares = _least_shares(problem, w, codes, atoms, errors, sizes, compact)
    U = ar.exact(w.U)
    out = ar.matmul(ar.exact(w.O), U)
    back = ar.transpose(ar.matmul(ar.exact(w.V), out))  # (outputs, width)
    values = [ar.matmul(_plus(ar, atom, w.V, w.v_bias), out) for atom in atoms]
    direct = ar.matmul(ar.exact(atoms[-1]), U)
    fixed = ar.matmul(ar.exact(w.o_bias[None]), U) + ar.exact(w.u_bias[None])
    labels, found = problem.labels, np.empty(len(codes))
    for label in np.unique(labels).tolist():
        rows = np.flatnonzero(labels == label)

        def margins(
            table: Number, through: Number, p: int, rows: Array = rows, label: int = label
        ) -> Number:
            lead = ar.transpose(rivals(ar.transpose(table), label))
            away = rivals(through, label)
            found = ar.combine(codes[rows], lead)
            if compact:
                return found - sizes[p][rows] * ar.norm(away)[None]
            return found + ar.matmul(errors[p][rows], ar.transpose(away))

        least_values = [ar.low(margins(values[p], back, p)) for p in range(K)]
        smallest = ar.exact(np.minimum.reduce(least_values))
        total = margins(direct, ar.transpose(U), K - 1) + smallest
        total = total + ar.transpose(rivals(ar.transpose(fixed), label))
        for share, value in zip(shares, least_values, strict=True):
            total = total + ar.exact(share[rows][:, None]) * (ar.exact(value) - smallest)
        found[rows] = least(ar.low(total), label)
    return found


def _least_shares(
    problem: AttentionProblem,
    w: Weights,
    codes: Array,
    atoms: list[Array],
    errors: list[Number],
    sizes: list[Number],
    compact: bool,
) -> list[Array]:
    """Return a lower bound of the attention to every position, (points,) each."""
    ar, K = problem.ar, len(atoms)
    root = ar.norm(ar.exact(np.ones((1, w.head))))[:, None]
    query = _plus(ar, atoms[-1], w.Q, w.q_bias) / root
    keys = [_plus(ar, atom, w.K, w.k_bias) for atom in atoms]
    scores = [pairs(ar, codes, ar.matmul(query, ar.transpose(key))) for key in keys]
    read = ar.exact(w.Q.T) / root
    of_query = [ar.combine(codes, ar.matmul(key, read)) for key in keys]  # Q k_p / sqrt(h)
    of_key = ar.combine(codes, ar.matmul(query, ar.exact(w.K.T)))  # K q / sqrt(h)
    steep = ar.norm(ar.norm(ar.matmul(ar.transpose(read), ar.exact(w.K.T)))[None])[None]
    shares = []
    for p in range(K):
        above = np.zeros((len(codes), 0))
        for q in range(K):
            if q == p:
                continue
            ways = {K - 1: of_query[q] - of_query[p]}
            for place, way in ((q, of_key), (p, -of_key)):
                ways[place] = ways[place] + way if place in ways else way
            if compact:
                moved = sum_of([ar.norm(way)[:, None] * sizes[i] for i, way in ways.items()])
                apart = sizes[q] + sizes[p]
            else:
                moved = sum_of([(way * errors[i]).sum(1)[:, None] for i, way in ways.items()])
                apart = ar.exact(ar.high(ar.norm(errors[q] - errors[p]))[:, None])
            lead = (scores[q] - scores[p])[:, None] + moved + sizes[K - 1] * apart * steep
            above = np.concatenate([above, ar.high(lead)], 1)
        one = ar.exact(np.ones(len(codes)))
        shares.append(ar.low(one / (one + ar.exp(ar.exact(above)).sum(1)) if K > 1 else one))
    return shares


def sum_of(terms: list[Number]) -> Number:
    """Return the sum of at least one number."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _plus(ar: Arithmetic, atoms: Array, matrix: Array, bias: Array) -> Number:
    """Return `atoms matrix`, with the bias added to the last atom, which is that of the biases."""
    beside = np.concatenate([np.zeros((len(atoms) - 1, len(bias))), bias[None]])
    return ar.matmul(ar.exact(atoms), ar.exact(matrix)) + ar.exact(beside)


def _errors(
    problem: AttentionProblem, w: Weights, codes: Array, atoms: list[Array]
) -> list[Number]:
    """Return `r_p - rhat_p` at every position, (points, width) each."""
    ar = problem.ar
    return [
        ar.exact(w.E[problem.tokens[:, p]])
        + ar.exact(w.P[p : p + 1])
        - ar.combine(codes, ar.exact(atom))
        for p, atom in enumerate(atoms)
    ]


def true_margins(problem: AttentionProblem) -> Array:
    """Return the network's own margin of the largest token at every point, in float64."""
    return margins_of(_logits(_wide(problem.weights), problem.tokens), problem.labels)


def claimed_margins(problem: AttentionProblem) -> Array:
    """Return the margins of the unembedded last layer: a CLAIM of the crosscoder, never a bound."""
    f, w = problem.features, _wide(problem.weights)
    logits = (f.codes @ f.decoder[:, -1] + f.bias[-1]) @ w.U + w.u_bias
    return margins_of(logits, problem.labels)


def proof_operations(problem: AttentionProblem, strategy: str) -> int:
    """Return the operations of the verifier of a strategy."""
    plain = _counting(problem)
    return operations.count(lambda: attention_margins(plain, strategy))


def evaluation_operations(problem: AttentionProblem) -> int:
    """Return the operations of running the network on every point and comparing its logits."""
    plain = _counting(problem)
    return operations.count(lambda: _logits(_wide(plain.weights), plain.tokens).max(1))


def _last(w: Weights, before: Array) -> Array:
    """Return the residual state of the last position after attention."""
    query = before[:, -1] @ w.Q + w.q_bias
    keys = before @ w.K + w.k_bias
    scores = (keys * query[:, None]).sum(2) / np.sqrt(w.head)
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares = shares / shares.sum(1, keepdims=True)
    mixed = (shares[:, :, None] * (before @ w.V + w.v_bias)).sum(1)
    last: Array = before[:, -1] + mixed @ w.O + w.o_bias
    return last


def _logits(w: Weights, tokens: Array) -> Array:
    logits: Array = _last(w, w.E[tokens] + w.P) @ w.U + w.u_bias
    return logits


def _wide(weights: Weights) -> Weights:
    """Return the weights as float64 arrays, which hold float32 numbers exactly."""
    return replace(
        weights,
        **{
            entry.name: getattr(weights, entry.name).astype(np.float64) for entry in fields(weights)
        },
    )


def _counting(problem: AttentionProblem) -> AttentionProblem:
    """Return the problem at level float64 on arrays that count what is done to them."""
    weights = operations.counting_fields(problem.weights)
    features = operations.counting_fields(problem.features)
    return AttentionProblem(weights, problem.tokens, features, "float64")
