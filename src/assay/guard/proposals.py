"""Mechanistic explanations: what gates predict of "B fires given that A does", before any table is
looked at.

Swapping A's value in from another input (its gate at zero, the reference the other input's run) is
do(A). If A makes B fire, P(B | A fires) is the share of runs in which B fires when a firing value
of A was swapped in. If A and B merely share a parent C, it is the mixture
`sum_c P(c) P(A | do c) P(B | do c) / sum_c P(c) P(A | do c)` over C firing or not. A prediction is
admitted when its interval meets that of a fresh split and it saves bits there; where A and B only
co-occur, do(A) leaves B as it was, and the prediction misses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from assay.errors import InputError, unknown
from assay.guard.explanations import Explanation, Forest, Refused, require_forest
from assay.guard.tables import interval
from assay.io.circuits import Circuit, edge_ends, read_circuit
from assay.io.files import read_json

LEVEL = 0.95


@dataclass(frozen=True)
class Proposal:
    """`cause` and `effect` fire together: because the one makes the other fire, or, with `parent`,
    because that makes both fire."""

    cause: str
    effect: str
    parent: str | None = None


@dataclass(frozen=True)
class Swapped:
    """Runs in which a feature's value was swapped in from another input: whether it fires there
    (runs,), and which features fire in the run (runs, features).
    """

    brought: Bool[Tensor, " runs"]
    fires: Bool[Tensor, "runs features"]


Swap = Callable[[str], Swapped]
"""What happens when the named feature's value is swapped in from another input."""


@dataclass(frozen=True)
class Prediction:
    """What gates predict of P(effect fires | cause fires), with its 95 % interval, and the number
    of runs that it comes from. It was made without the table of the two.
    """

    proposal: Proposal
    value: float
    low: float
    high: float
    runs: int


def read_proposals(
    path: Path | str, names: Sequence[str], *, nodes: Mapping[str, str] | None = None
) -> list[Proposal]:
    """Read proposals: a JSON object `{"proposals": [{"cause", "effect", "parent"?}, ...]}`, or the
    JSON of a circuit, whose nodes stand for features by `nodes` (node by feature).

    Raises InputError for another form, unknown features, and edges that close a cycle."""
    data = read_json(path)
    if isinstance(data, dict) and "edges" in data:
        found = from_circuit(read_circuit(path), nodes or {})
        if not found:
            raise InputError(f"{path}: no edge of the circuit joins two features of this guard")
        return checked(found, names)
    entries = data.get("proposals") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: an object with a list 'proposals' expected, or a circuit's JSON")
    return checked([_proposal(entry, f"{path}: proposal {at}") for at, entry in enumerate(entries)],
                   names)  # fmt: skip


def _proposal(entry: Any, where: str) -> Proposal:
    if not isinstance(entry, dict) or not {"cause", "effect"} <= entry.keys():
        raise InputError(f"{where}: an object with 'cause' and 'effect' expected")
    if strange := sorted(entry.keys() - {"cause", "effect", "parent"}):
        raise unknown(f"entry of {where}", strange[0], ("cause", "effect", "parent"))
    for key, value in entry.items():
        if not isinstance(value, str) and not (key == "parent" and value is None):
            raise InputError(f"{where}: {key} must be the name of a feature")
    return Proposal(entry["cause"], entry["effect"], entry.get("parent"))


def from_circuit(circuit: Circuit, nodes: Mapping[str, str]) -> list[Proposal]:
    """Return the proposals that a circuit makes: for every edge in it, each feature of the sender
    fires each feature of the receiver. `nodes` names the node of every feature; edges are taken by
    their |score|, largest first, and those that would close a cycle are left out.
    """
    homes: dict[str, list[str]] = {}
    for feature, node in nodes.items():
        homes.setdefault(node, []).append(feature)
    chosen = [(name, scored) for name, scored in circuit.edges.items() if scored.in_graph]
    chosen.sort(key=lambda entry: -abs(entry[1].score or 0.0))
    found: list[Proposal] = []
    places = {name: place for place, name in enumerate(nodes)}
    forest = Forest(len(places))
    for name, _ in chosen:
        source, receiver, _ = edge_ends(name)
        for cause, effect in itertools.product(homes.get(source, ()), homes.get(receiver, ())):
            if forest.join(places[cause], places[effect]):
                found.append(Proposal(cause, effect))
    return found


def checked(proposals: Iterable[Proposal], names: Sequence[str]) -> list[Proposal]:
    """Return proposals about features that exist and whose edges form a forest.

    Raises InputError, with the nearest names, for an unknown feature, for a feature that is to
    explain itself, and for edges that close a cycle."""
    found = list(proposals)
    for one in found:
        for name in (one.cause, one.effect, *([] if one.parent is None else [one.parent])):
            if name not in names:
                raise unknown("feature", name, names)
        if len({one.cause, one.effect, one.parent}) < 3:
            raise InputError(f"a proposal needs distinct features, got {one.cause!r} twice")
    places = {name: place for place, name in enumerate(names)}
    require_forest([(places[one.cause], places[one.effect]) for one in found], names)
    return found


def predict(proposal: Proposal, swap: Swap, names: Sequence[str]) -> Prediction:
    """Predict, from runs with swapped values alone, how often the effect fires given the cause.

    Raises InputError where no run brings in what the prediction is about."""
    places = {name: place for place, name in enumerate(names)}
    cause, effect = places[proposal.cause], places[proposal.effect]
    if proposal.parent is None:
        found = swap(proposal.cause)
        fired = found.fires[found.brought, effect]
        if not len(fired):
            raise InputError(f"{proposal.cause!r} fires in no input: nothing can be predicted")
        low, high = interval(int(fired.sum()), len(fired), LEVEL)
        return Prediction(proposal, float(fired.double().mean()), low, high, len(fired))
    found = swap(proposal.parent)
    states = [found.brought, ~found.brought]
    if not all(bool(state.any()) for state in states):
        raise InputError(f"{proposal.parent!r} fires in all inputs or in none")
    shares = [float(state.double().mean()) for state in states]
    level = 1 - (1 - LEVEL) / 4  # four intervals hold together
    counts = [
        (int(found.fires[state, which].sum()), int(state.sum()))
        for which in (cause, effect)
        for state in states
    ]
    if not counts[0][0] + counts[1][0]:
        raise InputError(f"{proposal.cause!r} fires in no run: nothing can be predicted")
    value = _mixture(shares, [k / n for k, n in counts])
    ends = [interval(k, n, level) for k, n in counts]
    corners = [_mixture(shares, list(corner)) for corner in itertools.product(*ends)]
    return Prediction(proposal, value, min(corners), max(corners), len(found.brought))


def _mixture(shares: Sequence[float], rates: Sequence[float]) -> float:
    """Return sum_c P(c) a_c b_c / sum_c P(c) a_c, with rates a, a', b, b'."""
    weights = [share * rate for share, rate in zip(shares, rates[:2], strict=True)]
    total = sum(weights)
    return sum(w * b for w, b in zip(weights, rates[2:], strict=True)) / total if total else 0.0


def judge(
    prediction: Prediction,
    marginal: float,
    fresh: Bool[Tensor, "inputs features"],
    names: Sequence[str],
) -> Explanation | Refused:
    """Admit a prediction if its interval meets that of the fresh split (which features fire), and
    it saves bits there over `marginal`, the effect's own rate; refuse it, with the reason,
    otherwise.

    The prediction has no fitted number, so that its length is that of two names, `2 log2 n` bits.
    """
    places = {name: place for place, name in enumerate(names)}
    pair = places[prediction.proposal.cause], places[prediction.proposal.effect]
    effects = fresh[fresh[:, pair[0]], pair[1]]
    fired, total = int(effects.sum()), len(effects)
    observed = fired / total if total else math.nan
    low, high = interval(fired, total, LEVEL)
    bits = _saved(prediction, marginal, fired, total) - 2 * math.log2(max(len(names), 2))
    found = Explanation(
        "edge", pair, "mechanistic", bits, 0, prediction.value, observed if total else None
    )
    words = f"gates predict {prediction.value:.2f} [{prediction.low:.2f}, {prediction.high:.2f}]"
    if total == 0:
        return Refused(found, f"{words}, and the cause fires nowhere in the fresh split")
    seen = f"the fresh split shows {observed:.2f} [{low:.2f}, {high:.2f}] ({fired} of {total})"
    if prediction.low > high or low > prediction.high:
        together = observed > marginal and abs(prediction.value - marginal) < abs(
            observed - prediction.value
        )
        tail = "; they only co-occur" if together else ""
        return Refused(found, f"{words}, and {seen}{tail}")
    if bits <= 0:
        return Refused(found, f"{words}, {seen}, and it saves nothing ({bits:.0f} bits)")
    return found


def _saved(prediction: Prediction, marginal: float, fired: int, total: int) -> float:
    """Return the bits that coding the effects by the prediction saves over their own rate."""
    edge = 1 / (prediction.runs + 2)  # no rate is certain after finitely many runs
    q = min(max(prediction.value, edge), 1 - edge)
    p = min(max(marginal, edge), 1 - edge)
    return fired * math.log2(q / p) + (total - fired) * math.log2((1 - q) / (1 - p))
