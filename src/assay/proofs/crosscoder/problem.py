"""What a proof is about: a residual ReLU network of one block, labelled points, and a crosscoder's
codes there, which nobody has to trust."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int

from assay.errors import InputError
from assay.mechanisms.crosscoder import Crosscoder, read_codes, residual_states
from assay.proofs.crosscoder.arithmetic import Arithmetic, Array, Number, arithmetic
from assay.targets.residual_relu import ResidualReLU


@dataclass(frozen=True)
class Network:
    """The weights of one block as float64 arrays that hold float32 numbers: `r_0 = E x + b_e`,
    `r_1 = r_0 + W_out relu(W_in r_0 + b_in) + b_out`, logits `U r_1 + b_u`.
    """

    E: Float[Array, "width inputs"]
    b_e: Float[Array, " width"]
    W_in: Float[Array, "hidden width"]
    b_in: Float[Array, " hidden"]
    W_out: Float[Array, "width hidden"]
    b_out: Float[Array, " width"]
    U: Float[Array, "outputs width"]
    b_u: Float[Array, " outputs"]

    @staticmethod
    def of(model: ResidualReLU) -> Network:
        """Return the weights of a network; InputError for more than one block, and for weights
        that are not float32 numbers.
        """
        if len(model.blocks) != 1:
            raise InputError(
                f"these proofs are about one block, and the network has {len(model.blocks)}"
            )
        arrays = [_float32(name, entry) for name, entry in model.state_dict().items()]
        return Network(*arrays)


@dataclass(frozen=True)
class Points:
    """Inputs (points, inputs) and the right output of each, (points,); `pairs` says that they are
    all pairs of tokens, in order.
    """

    inputs: Float[Array, "points inputs"]
    labels: Int[Array, " points"]
    pairs: bool = False

    def __post_init__(self) -> None:
        if self.inputs.ndim != 2 or self.labels.shape != self.inputs.shape[:1]:
            raise InputError(
                f"points need inputs (points, inputs) and one label each, got shapes"
                f" {self.inputs.shape} and {self.labels.shape}"
            )
        if not len(self.labels) or not np.isfinite(self.inputs).all():
            raise InputError("points must be at least one, of finite numbers")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Features:
    """Untrusted advice: decoders of all layers, biases, and the codes of every point; any finite
    numbers are sound.
    """

    decoder: Float[Array, "size layers width"]
    bias: Float[Array, "layers width"]
    codes: Float[Array, "points size"]

    def __post_init__(self) -> None:
        for entry in fields(self):
            array = getattr(self, entry.name)
            if not np.isfinite(array).all():
                raise InputError(f"features: {entry.name} holds NaN or infinite values")
        size = self.decoder.shape[0]
        shapes = self.decoder.ndim == 3 and self.decoder.shape[1:] == self.bias.shape
        if not shapes or not size or len(self.bias) < 2 or self.codes.shape[1:] != (size,):
            raise InputError(
                "features: decoder (size, layers, width) of at least one feature, bias (layers,"
                " width), of at least two layers, and codes (points, size) are needed, got"
                f" {self.decoder.shape}, {self.bias.shape} and {self.codes.shape}"
            )
        if (self.codes < 0).any():
            raise InputError("features: codes must not be negative")


@dataclass(frozen=True)
class Problem:
    """A network, points, features, and a level; tables are made when first asked for.

    Raises InputError where the shapes of the three do not fit one another."""

    network: Network
    points: Points
    features: Features
    level: str = "real"

    def __post_init__(self) -> None:
        n = self.network
        outputs, width = n.U.shape
        if self.points.inputs.shape[1] != n.E.shape[1]:
            raise InputError(
                f"points have {self.points.inputs.shape[1]} inputs, the network {n.E.shape[1]}"
            )
        if self.points.labels.min() < 0 or self.points.labels.max() >= outputs:
            raise InputError(f"labels must lie in 0..{outputs - 1}")
        if self.features.bias.shape[1] != width or len(self.features.codes) != len(self.points):
            raise InputError(
                f"the features are of {len(self.features.codes)} points and width"
                f" {self.features.bias.shape[1]}; there are {len(self.points)} points, and the"
                f" network has width {width}"
            )
        arithmetic(self.level)

    @cached_property
    def ar(self) -> Arithmetic:
        return arithmetic(self.level)

    def at(self, level: str) -> Problem:
        """Return the problem at another level."""
        return replace(self, level=level)

    def take(self, index: Array) -> Problem:
        """Return the problem at some of the points."""
        points = Points(self.points.inputs[index], self.points.labels[index])
        features = replace(self.features, codes=self.features.codes[index])
        return replace(self, points=points, features=features)

    @cached_property
    def tables(self) -> Tables:
        return make_tables(self)

    @cached_property
    def error(self) -> Number:
        """`eps_0 = r_0 - rhat_0`, (points, width)."""
        ar, n, f = self.ar, self.network, self.features
        state = ar.matmul(ar.exact(self.points.inputs), ar.exact(n.E.T)) + ar.exact(n.b_e)
        rebuilt = ar.combine(f.codes, ar.exact(f.decoder[:, 0])) + ar.exact(f.bias[0])
        return state - rebuilt

    @cached_property
    def error_norm(self) -> Array:
        """An upper bound of `||eps_0||`, (points,)."""
        return self.ar.high(self.ar.norm(self.error))


@dataclass(frozen=True)
class Tables:
    """What a proof computes once, whatever the points.

    pre (size, hidden), pre_bias (hidden,): what features and biases add to a neuron's input.
    alone (size, outputs), alone_bias (outputs,): the logits of a feature that passes the block
    alone, `U (d_{f,0} + W_out relu(pre_f))`. inner (outputs, hidden): U W_out. through (outputs,
    width): `U + inner W_in / 2`, what an error at layer 0 does if every neuron passes on half of
    it. reach (hidden,): an upper bound of ||W_in[n]||."""

    pre: Number
    pre_bias: Number
    alone: Number
    alone_bias: Number
    inner: Number
    through: Number
    reach: Array


def make_tables(problem: Problem) -> Tables:
    """Return the tables of a problem at its level: O(size hidden width)."""
    ar, n, f = problem.ar, problem.network, problem.features
    decoder, bias = f.decoder[:, 0], f.bias[0]
    W_in, W_out_T, U_T = ar.exact(n.W_in.T), ar.exact(n.W_out.T), ar.exact(n.U.T)
    pre = ar.matmul(ar.exact(decoder), W_in)
    pre_bias = ar.matmul(ar.exact(bias[None]), W_in) + ar.exact(n.b_in)
    inner_T = ar.matmul(W_out_T, U_T)
    alone = ar.matmul(ar.exact(decoder), U_T) + ar.matmul(ar.relu(pre), inner_T)
    inner = ar.transpose(inner_T)
    written = ar.exact(bias[None]) + ar.exact(n.b_out[None])
    alone_bias = ar.matmul(written, U_T) + ar.matmul(ar.relu(pre_bias), inner_T)
    return Tables(
        pre,
        pre_bias[0],
        alone,
        (alone_bias + ar.exact(n.b_u))[0],
        inner,
        ar.exact(n.U) + ar.matmul(inner, ar.exact(n.W_in)) * half(ar),
        ar.high(ar.norm(ar.exact(n.W_in))),
    )


def half(ar: Arithmetic) -> Number:
    """Return one half, to be multiplied with any matrix."""
    return ar.exact(np.full((1, 1), 0.5))


@torch.no_grad()
def features_of(found: Crosscoder, model: ResidualReLU, points: Points) -> Features:
    """Return a crosscoder as advice, with the codes of its own encoder at the points.

    Raises InputError for a crosscoder of other layers than "embed" and "blocks.0"."""
    if found.sites != ("embed", "blocks.0"):
        raise InputError(
            "the crosscoder must read the sites 'embed' and 'blocks.0', got"
            f" {', '.join(map(repr, found.sites))}"
        )
    found.require_network(model)
    inputs = torch.from_numpy(np.asarray(points.inputs)).to(next(model.parameters()))
    codes = read_codes(found, residual_states(model, inputs, found.sites))
    entries = (found.W_dec, found.b_dec, codes)
    return Features(*(entry.detach().float().numpy().astype(np.float64) for entry in entries))


def true_margins(problem: Problem) -> Array:
    """Return the network's own margin of the right output at every point, in float64."""
    n, x = problem.network, problem.points.inputs
    state = x @ n.E.T + n.b_e
    state = state + np.maximum(state @ n.W_in.T + n.b_in, 0) @ n.W_out.T + n.b_out
    return margins_of(state @ n.U.T + n.b_u, problem.points.labels)


def claimed_margins(problem: Problem) -> Array:
    """Return the margins of the unembedded `rhat_1`: a CLAIM of the crosscoder, never a bound."""
    f, n = problem.features, problem.network
    logits = (f.codes @ f.decoder[:, 1] + f.bias[1]) @ n.U.T + n.b_u
    return margins_of(logits, problem.points.labels)


def margins_of(logits: Array, labels: Array) -> Array:
    """Return the right logit minus the largest other one."""
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    return logits[rows, labels] - others.max(1)


def _float32(name: str, entry: torch.Tensor) -> Array:
    array = entry.detach().cpu().double().numpy()
    if not np.isfinite(array).all() or (array.astype(np.float32) != array).any():
        raise InputError(f"{name} must hold finite float32 numbers")
    return array
