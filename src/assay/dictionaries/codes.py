"""The features of a training step, sparse, with derivatives: one rule per architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from assay.dictionaries import screen
from assay.dictionaries.base import Dictionary
from assay.dictionaries.batchtopk import BatchTopK
from assay.dictionaries.gated import Gated
from assay.dictionaries.jumprelu import JumpReLU
from assay.dictionaries.linear import Linear
from assay.dictionaries.matryoshka import Matryoshka
from assay.dictionaries.settings import Training
from assay.dictionaries.sparse import (
    Active,
    Everything,
    active_at,
    active_where,
    decode,
    largest,
    pattern_of,
    take_before,
)
from assay.dictionaries.topk import TopK
from assay.errors import InputError


@dataclass(frozen=True)
class Codes:
    """Features of some positions as values on a pattern.

    `penalty` is the sum over positions of what the architecture is charged for its features,
    `others` are further vectors that it shall rebuild the same values with; `smallest` the sum over
    parts of the batch of the smallest feature that was chosen."""

    active: Active | Everything
    values: Float[Tensor, "*active"]
    penalty: Tensor | None = None
    others: tuple[Float[Tensor, "positions d_out"], ...] = ()
    smallest: Tensor | None = None


Rule = Callable[[Linear, Tensor, Sequence[int], Training], Codes]


def codes_of(
    dictionary: Dictionary,
    x: Float[Tensor, "positions d_in"],
    parts: Sequence[int],
    training: Training,
) -> Codes:
    """Return the features that a dictionary has in training; `parts` are the numbers of positions
    of the parts in which features are chosen over several positions together.

    Raises InputError for an architecture that is not trained."""
    rule = require_rule(dictionary)
    assert isinstance(dictionary, Linear)
    return rule(dictionary, x, parts, training)


def require_rule(dictionary: Dictionary) -> Rule:
    """Return the rule of an architecture; InputError where it has none."""
    if dictionary.architecture not in RULES:
        raise InputError(
            f"a dictionary of architecture {dictionary.architecture!r} cannot be trained; those"
            f" that can are {', '.join(RULES)}"
        )
    return RULES[dictionary.architecture]


def rebuild(dictionary: Dictionary, codes: Codes, x: Tensor) -> Float[Tensor, "positions d_out"]:
    """Return what a dictionary rebuilds from its features of x."""
    return decode(codes.values, dictionary.W_dec, codes.active) + dictionary.rest(x)


def _relu(dictionary: Linear, x: Tensor, parts: Sequence[int], training: Training) -> Codes:
    before = _before(dictionary, x)
    active = pattern_of(before > 0)
    values = torch.relu(_at(dictionary, x, before, active))
    return Codes(active, values, _norms(dictionary, active, values))


def _topk(dictionary: Linear, x: Tensor, parts: Sequence[int], training: Training) -> Codes:
    assert isinstance(dictionary, TopK)
    active, known = _largest(dictionary, x)
    return Codes(active, torch.relu(take(dictionary, x, known, active)))


def _batchtopk(dictionary: Linear, x: Tensor, parts: Sequence[int], training: Training) -> Codes:
    assert isinstance(dictionary, BatchTopK)
    with torch.no_grad():
        before = _before(dictionary, x)
        sizes = dictionary.sizes(before)
        chosen = []
        smallest = before.new_zeros(())
        for part in sizes.split(list(parts)):
            kept = min(max(round(dictionary.k * len(part)), 1), part.numel())
            limit = _kth_largest(part, kept, float(dictionary.threshold)).clamp(min=0)
            chosen.append((part >= limit) & (part > 0))
            smallest += limit
        active = active_where(torch.cat(chosen))
    values = torch.relu(_at(dictionary, x, before, active))
    codes = Codes(active, values, smallest=smallest)
    if not isinstance(dictionary, Matryoshka):
        return codes
    rebuilt, first, others = dictionary.rest(x), 0, []
    for last in dictionary.nested[:-1]:
        inside = (active.features >= first) & (active.features < last)
        rebuilt = rebuilt + decode(values[inside], dictionary.W_dec, active.chosen(inside))
        others.append(rebuilt.expand(len(x), -1))
        first = last
    return Codes(active, values, others=tuple(others), smallest=smallest)


def _jumprelu(dictionary: Linear, x: Tensor, parts: Sequence[int], training: Training) -> Codes:
    assert isinstance(dictionary, JumpReLU)
    half = training.bandwidth / 2
    with torch.no_grad():
        lowest = torch.minimum(dictionary.threshold.clamp(min=0), dictionary.threshold - half)
        before = _before(dictionary, x)
        active = pattern_of(before > lowest)
    taken = _at(dictionary, x, before, active)
    threshold = active.of_feature(dictionary.threshold)
    with torch.no_grad():
        near = ((taken - threshold).abs() < half).to(taken) / training.bandwidth
        open_ = (taken > threshold.clamp(min=0)).to(taken)
    moved = threshold - threshold.detach()  # zero in value, one in derivative
    values = torch.relu(taken) * open_ - threshold.detach() * near * moved
    if training.penalty == "l0":
        penalty = (open_ - near * moved).sum() / dictionary.d_out
    else:
        sizes = values * active.of_feature(dictionary.W_dec.norm(dim=1))
        penalty = torch.tanh(sizes).sum() / dictionary.d_out
    return Codes(active, values, penalty)


def _gated(dictionary: Linear, x: Tensor, parts: Sequence[int], training: Training) -> Codes:
    assert isinstance(dictionary, Gated)
    before = _before(dictionary, x)
    active = pattern_of(before > 0)
    taken = _at(dictionary, x, before, active)
    gates = torch.relu(taken)
    projected = taken - active.of_feature(dictionary.b_enc)
    strength = projected * active.of_feature(dictionary.r_mag.exp()) + active.of_feature(
        dictionary.b_mag
    )
    values = torch.relu(strength) * (taken > 0)
    # The gates learn from what they would rebuild alone; the decoder does not learn from it.
    alone = decode(gates, dictionary.W_dec.detach(), active) + dictionary.rest(x).detach()
    # Decoder rows have length one, as r_mag would undo a charge for their length.
    penalty = gates.sum() / dictionary.d_out**0.5
    return Codes(active, values, penalty, (alone,))


RULES: dict[str, Rule] = {
    "relu": _relu,
    "topk": _topk,
    "batchtopk": _batchtopk,
    "matryoshka": _batchtopk,
    "jumprelu": _jumprelu,
    "gated": _gated,
}
"""How each architecture is trained; adding one adds a line."""


def take(
    dictionary: Linear, x: Tensor, known: Tensor | None, active: Active | Everything
) -> Tensor:
    """Return the features before their activation function on a pattern, with derivatives; `known`
    are their values where the pattern is sparse.
    """
    centre = dictionary.b_dec if dictionary.subtract else None
    return take_before(x, centre, dictionary.W_enc, dictionary.b_enc, known, active)


def _at(dictionary: Linear, x: Tensor, before: Tensor, active: Active | Everything) -> Tensor:
    known = active.values_of(before) if isinstance(active, Active) else None
    return take(dictionary, x, known, active)


@torch.no_grad()
def _before(dictionary: Linear, x: Tensor) -> Float[Tensor, "positions size"]:
    """Return all features before their activation function, outside the graph."""
    return torch.addmm(dictionary.b_enc, dictionary.centred(x), dictionary.W_enc)


@torch.no_grad()
def _largest(dictionary: TopK, x: Tensor) -> tuple[Active, Float[Tensor, " active"]]:
    """Return the features that a position chooses and their values, outside the graph."""
    centred = dictionary.centred(x)
    if not dictionary.by_norm and screen.pays(centred, dictionary.size):
        found = screen.largest(centred, dictionary.W_enc, dictionary.b_enc, dictionary.k)
        if found is not None:
            return found
    before = torch.addmm(dictionary.b_enc, centred, dictionary.W_enc)
    sizes = before * dictionary.W_dec.norm(dim=1) if dictionary.by_norm else before
    active = active_at(largest(sizes, dictionary.k), dictionary.size)
    return active, active.values_of(before)


def _norms(dictionary: Linear, active: Active | Everything, values: Tensor) -> Tensor:
    """Return the sum of features times the norms of their decoder rows, per square root of the
    width: a number near 1 for vectors of unit variance per coordinate.
    """
    weights = active.of_feature(dictionary.W_dec.norm(dim=1))
    return (values * weights).sum() / dictionary.d_out**0.5


def _kth_largest(sizes: Tensor, k: int, guess: float) -> Tensor:
    """Return the kth largest entry, looked for among those above a guess first."""
    flat = sizes.reshape(-1)
    likely = flat[flat > 0.8 * guess] if guess > 0 else flat
    if len(likely) < k:
        likely = flat
    return likely.kthvalue(len(likely) - k + 1).values
