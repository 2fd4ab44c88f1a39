"""Claims about what free gates can do in a traced network: that the damage of a metric stays below
a number, or that an answer stays, over every combination of gates in a region.

The certificate holds the graph itself. Every leaf is bounded again by rules that share no code with
the prover, from slopes that need no trust; the leaves cover the region by construction; the value
of the untouched network is recomputed. What ties the graph to a network are its constants: those
that are said to be weights must be tensors of the weights file, where one is given."""

import hashlib
import json
from fractions import Fraction
from typing import Any

import numpy as np

from assay_check.envelope import Envelope, Task, Verdict
from assay_check.gates.arithmetic import Array, rounds_to_nearest
from assay_check.gates.claims import (
    KINDS,
    LOWER,
    MOVING,
    OVER,
    UNSAFE,
    Example,
    read_example,
    read_number,
    recompute,
    rounded,
    supports,
    unknown_operations,
)
from assay_check.gates.graph import read_names
from assay_check.reading import InputError, need, tensors

RULE = "linear bounds on the leaves of a tree"
CONSTANT = "constant."
SUMS = "matrix products of float64 sum conventionally (any order, fused multiply-add allowed)"

__all__ = ["GATES", "constants_digest", "graphs_digest", "recompute", "rounded"]


def constants_digest(held: dict[str, Array]) -> str:
    """Return the SHA-256 of the constants of all graphs, names, types and shapes included."""
    found = hashlib.sha256()
    for name in sorted(held):
        if name.startswith(CONSTANT):
            x = held[name]
            found.update(f"{name} {x.dtype.str} {x.shape}\n".encode())
            found.update(np.ascontiguousarray(x).tobytes())
    return found.hexdigest()


def graphs_digest(examples: dict[str, Any]) -> str:
    """Return the SHA-256 of the operations of all graphs."""
    graphs = {name: entry["graph"] for name, entry in examples.items()}
    text = json.dumps(graphs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check(envelope: Envelope, weights: bytes | None) -> Verdict:
    """Recompute the claims of a certificate of gates."""
    need(envelope.rule == RULE, f"unknown rule {envelope.rule!r}; known: {RULE!r}")
    about, entries = envelope.own["about"], envelope.own["examples"]
    need(
        isinstance(about, dict) and about.keys() == {"claim", "metric", "left_out"},
        "about must have claim, metric and left_out",
    )
    kind = about["claim"]
    need(isinstance(kind, str) and kind in KINDS, f"unknown claim {kind!r}; known: {KINDS}")
    need(isinstance(about["metric"], str), "the metric must be a name")
    need(type(about["left_out"]) is int, "left_out must be a number of examples")
    need(isinstance(entries, dict) and entries, "examples must be an object that is not empty")
    need(envelope.claim.keys() == entries.keys(), "every example needs one claim, and no other")
    held = tensors(envelope.advice()[1], "the advice")
    claimed = {name: read_number(text, name) for name, text in envelope.claim.items()}
    examples = [read_example(name, entry, held, kind) for name, entry in entries.items()]
    return _verdict(envelope, examples, claimed, held, weights)


def _verdict(
    envelope: Envelope,
    examples: list[Example],
    claimed: dict[str, Fraction],
    held: dict[str, Array],
    weights: bytes | None,
) -> Verdict:
    kind = envelope.own["about"]["claim"]
    measure = _measure(envelope.own["about"], examples)
    model = envelope.model
    need(
        isinstance(model, dict) and model.keys() == {"graph", "constants", "weights"},
        "model must have graph, constants and weights",
    )
    names = read_names(model["weights"], "model.weights")
    need(all(name in held for name in names), "model.weights names tensors that are not held")
    assumptions = (SUMS, _tie(held, names, weights is not None))
    bound: Fraction | None = None
    if envelope.level != "real":
        reason = {
            "float32": "bounded, not checkable: the checker has no rules for level float32",
            "float64": "level float64 is a search in unproved arithmetic, not a proof",
        }[envelope.level]
    elif model["graph"] != graphs_digest(envelope.own["examples"]):
        reason = "the operations are not those that the certificate was written with"
    elif model["constants"] != constants_digest(held):
        reason = "the constants are not those that the certificate was written with"
    elif weights is not None and (foreign := _foreign(held, names, weights)):
        reason = f"the certificate is about other weights: {foreign[0]} is no tensor of the file"
    elif missing := unknown_operations(examples):
        listed = ", ".join(f"{name} ({count})" for name, count in missing.items())
        reason = f"bounded, not checkable: the checker has no rule for {listed}"
    elif not rounds_to_nearest():
        raise InputError("float64 does not round to nearest here: nothing can be checked")
    else:
        accepted, reason, bound = _recomputed(kind, examples, claimed)
        return Verdict(accepted, reason, measure, envelope.level, assumptions, bound)
    return Verdict(False, reason, measure, envelope.level, assumptions)


def _recomputed(
    kind: str, examples: list[Example], claimed: dict[str, Fraction]
) -> tuple[bool, str, Fraction | None]:
    worst: float | None = None
    pick = min if kind in LOWER else max
    positive = 0
    for example in examples:
        with np.errstate(all="ignore"):
            found = recompute(example, kind)
        wanted = claimed[example.name]
        if not supports(kind, found, wanted):
            shown = f"{found:.6g}" if np.isfinite(found) else "no bound"
            return (
                False,
                f"example {example.name}: {float(wanted):.6g} is claimed, and the leaves prove"
                f" {shown}",
                None,
            )
        positive += found > 0
        worst = found if worst is None else pick(worst, found)
    assert worst is not None
    count = len(examples)
    if kind == UNSAFE:
        worst_case = f"{worst:.6g}"
        said = "no output is unsafe" if positive == count else "unsafe outputs are not excluded"
        reason = f"{said}: on each of {count} boxes they stay at least {worst_case} apart"
        return positive == count, reason, Fraction(worst)
    if kind != "same-answer":
        return (
            True,
            f"the damage is at most {worst:.6g} on each of {count} examples",
            Fraction(worst),
        )
    reason = f"the answer stays on {positive} of {count} examples; the least margin is at least"
    return True, f"{reason} {worst:.6g}", Fraction(worst)


def _measure(about: dict[str, Any], examples: list[Example]) -> str:
    """Say what is claimed, over which region, from the region itself."""
    where = _region(examples)
    left = f"; {about['left_out']} more have no claim" if about["left_out"] else ""
    name = ascii(about["metric"][:60])
    if about["claim"] == "same-answer":
        return f"the least margin of the untouched network's answer ({name}) {where}{left}"
    if about["claim"] == UNSAFE:
        return f"how far the output stays from the unsafe set ({name}) {where}{left}"
    if about["claim"] == OVER:
        return f"how much worse the metric ({name}) is than ungated on that input, {where}{left}"
    signs = {example.sign for example in examples}
    falls = "falls below" if signs == {1.0} else "rises above" if signs == {-1.0} else "moves off"
    return f"how far the metric ({name}) {falls} that of the untouched network, {where}{left}"


def _region(examples: list[Example]) -> str:
    """Say what moves, and how far."""

    def ends(counts: list[int]) -> str:
        return str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]}-{counts[-1]}"

    parts = []
    for kind in MOVING:
        boxes = [
            box
            for example in examples
            for box, k in zip(example.region, example.kinds, strict=True)
            if k == kind
        ]
        if not boxes:
            continue
        moving, every = (sorted(e.free(kind)[i] for e in examples) for i in (0, 1))
        if kind == "gates":
            low = min(float(box.lo.min()) for box in boxes)
            high = max(float(box.hi.max()) for box in boxes)
            what = (
                f"{ends(moving)} gates of groups of {ends(every)} move, within [{low:g}, {high:g}]"
            )
        else:
            widest = max(float((box.hi - box.lo).max()) for box in boxes)
            what = f"{ends(moving)} of {ends(every)} numbers of {kind} move, by up to {widest:g}"
        parts.append(what)
    return f"over every point of the region: {'; '.join(parts)}; on {len(examples)} examples"


def _tie(held: dict[str, Array], names: list[str], given: bool) -> str:
    """Say what ties the graph to a network."""
    numbers = {
        name: x.size
        for name, x in held.items()
        if name.startswith(CONSTANT) and x.dtype == np.float64
    }
    weights = sum(numbers.get(name, 0) for name in names)
    share = f"{weights} of the {sum(numbers.values())} numbers among its constants"
    if not given:
        return f"the graph is the network's: no weights were given to compare {share} with"
    return (
        f"the graph is the network's: {share} are tensors of the weights file; inputs, masks and"
        " the order of the operations are the certificate's own"
    )


def _foreign(held: dict[str, Array], names: list[str], weights: bytes) -> list[str]:
    """Return the constants that are said to be weights and are no tensor of the file."""
    known = set()
    for x in tensors(weights, "the weights file").values():
        if x.dtype.kind == "f":
            for form in (x, x.T):
                known.add(_content(form))
    return [name for name in names if _content(held[name]) not in known]


def _content(x: Array) -> tuple[int, bytes]:
    flat = np.ascontiguousarray(x, np.float64)
    return flat.size, hashlib.sha256(flat.tobytes()).digest()


GATES = Task(frozenset({"about", "examples"}), check)
