"""Claims about networks that features prove: how many points are answered right."""

import re
from fractions import Fraction
from typing import Any

import numpy as np

from assay_check.crosscoder.attention import Attention, right_points_of_attention
from assay_check.crosscoder.bilinear import Bilinear, right_points_of_bilinear
from assay_check.crosscoder.groups import right_points_of_groups
from assay_check.crosscoder.margins import Advice, right_points
from assay_check.crosscoder.model import MOST, Model, float32
from assay_check.crosscoder.propagation import right_points_of_propagation
from assay_check.envelope import Envelope, Task, Verdict
from assay_check.reading import need, tensors

BILINEAR = ("quadratic", "quadratic-compact")
ATTENTION = ("attention", "attention-compact")
PROPAGATION = ("balls", "intervals", "slopes")
RULES = ("linear", "compact", "exact", "groups", *PROPAGATION, *BILINEAR, *ATTENTION)
POINTS = {
    "pairs": "all ordered pairs of tokens",
    "listed": "points that the advice lists, with its labels, each as often as it stands there,",
    "sequences": "all sequences of tokens",
}


def check(envelope: Envelope, weights: bytes | None) -> Verdict:
    """Recompute a claim about a network from its weights, with advice that is sound whatever it
    says.
    """
    need(envelope.rule in RULES, f"unknown rule {envelope.rule!r}; known: {sorted(RULES)}")
    model = _network(envelope.rule, envelope.needs(weights))
    need(
        envelope.options == {} == envelope.assumptions,
        f"the rules take no options and assume nothing, got {envelope.options!r} and"
        f" {envelope.assumptions!r}",
    )
    kind = _kind(envelope.own["points"], envelope.rule)
    count = str(envelope.claim.get("count"))
    need(re.fullmatch("[0-9]{1,12}", count), "claim.count must be a decimal string")
    if envelope.level != "real":
        return _verdict(envelope, False, f"the rules hold at level real, not {envelope.level}")
    if envelope.model != model.entry:
        return _verdict(envelope, False, "the certificate is about other weights")
    if isinstance(model, Attention):
        total = len(model.tokens)
        of_positions = _read_positions(envelope, model)
    else:
        advice, inputs, labels = _read(envelope, kind, model.entry)
        total = len(labels)
    claim = {"count": count, "total": str(total), "bound": str(Fraction(int(count), total))}
    if int(count) > total or envelope.claim != claim:
        reason = f"the total is {total}, and the bound must be count / total"
        return _verdict(envelope, False, reason)
    if isinstance(model, Attention):
        right = right_points_of_attention(model, envelope.rule, of_positions)
    elif isinstance(model, Bilinear):
        right = right_points_of_bilinear(model, envelope.rule, advice, inputs, labels)
    elif envelope.rule == "groups":
        right = right_points_of_groups(model, advice, inputs, labels)
    elif envelope.rule in PROPAGATION:
        right = right_points_of_propagation(model, envelope.rule, advice, inputs, labels)
    else:
        right = right_points(model, envelope.rule, advice, inputs, labels)
    found = sum(right)
    reason = f"{found} of {total} points are proved right, {count} are claimed"
    return _verdict(envelope, found >= int(count), reason, Fraction(found, total))


def _network(rule: str, weights: bytes) -> Model | Bilinear | Attention:
    if rule in BILINEAR:
        return Bilinear(weights)
    return Attention(weights) if rule in ATTENTION else Model(weights)


def _kind(entry: Any, rule: str) -> str:
    known = isinstance(entry, dict) and entry.keys() == {"kind"} and isinstance(entry["kind"], str)
    need(known and entry["kind"] in POINTS, f"points.kind must be one of {sorted(POINTS)}")
    need(
        (entry["kind"] == "sequences") == (rule in ATTENTION),
        f"the rule {rule!r} is not about points of the kind {entry['kind']!r}",
    )
    return str(entry["kind"])


def _read_positions(envelope: Envelope, model: Attention) -> dict[str, np.ndarray]:
    """Return the advice about an attention model; InputError for shapes that do not fit."""
    name, data = envelope.advice()
    found = tensors(data, name)
    need(
        found.keys() == {"decoder", "bias", "codes"} and found["decoder"].ndim == 3,
        f"{name}: the tensors must be bias, codes and decoder, of features at positions",
    )
    size, positions, width = len(found["decoder"]), model.positions, model.entry["width"]
    return _arrays(
        found,
        {
            "decoder": (size, positions, width),
            "bias": (positions, width),
            "codes": (len(model.tokens), size),
        },
        name,
    )


def _read(
    envelope: Envelope, kind: str, entry: dict[str, Any]
) -> tuple[Advice, np.ndarray, list[int]]:
    """Return the advice, the inputs and the labels; InputError for shapes that do not fit."""
    name, data = envelope.advice()
    found = tensors(data, name)
    wanted = {"decoder", "bias", "codes"}
    wanted |= {"group"} if envelope.rule in ("linear", "compact", "groups") else set()
    wanted |= {"negative"} if envelope.rule in ("linear", "compact") else set()
    wanted |= {"decoder_after", "bias_after"} if envelope.rule == "balls" else set()
    wanted |= {"inputs", "labels"} if kind == "listed" else set()
    need(found.keys() == wanted, f"{name}: the tensors must be {sorted(wanted)}")
    width, hidden, outputs = (entry[key] for key in ("width", "hidden", "outputs"))
    if kind == "pairs":
        need(
            entry["inputs"] == 2 * outputs and outputs**3 <= MOST,
            f"pairs of {outputs} tokens need {2 * outputs} inputs",
        )
        inputs, labels = _pairs(outputs)
    else:
        inputs = float32(found["inputs"], f"{name}: inputs")
        need(
            inputs.ndim == 2 and inputs.shape[1] == entry["inputs"] and len(inputs),
            f"{name}: inputs must be (points, {entry['inputs']})",
        )
        labels = _integers(found["labels"], (len(inputs),), outputs, f"{name}: labels")
    points = len(inputs)
    need(found["decoder"].ndim == 2, f"{name}: decoder must be a matrix")
    size = len(found["decoder"])
    shapes = {"decoder": (size, width), "bias": (width,), "codes": (points, size)}
    if envelope.rule == "balls":
        shapes |= {"decoder_after": (size, width), "bias_after": (width,)}
    arrays = _arrays(found, shapes, name)
    if envelope.rule == "groups":
        group = _integers(found["group"], (points,), points, f"{name}: group")
        need(
            len(set(zip(group, labels, strict=True))) == len(set(group)),
            f"{name}: every group must hold points of one label",
        )
        arrays["group"] = np.array(group)
    elif envelope.rule in ("linear", "compact"):
        sides = found["negative"]
        need(
            sides.dtype == np.uint8 and sides.ndim == 2 and sides.shape[1] == hidden
            and len(sides) and (sides <= 1).all(),
            f"{name}: negative must be (groups, {hidden}) zeros and ones of uint8",
        )  # fmt: skip
        arrays["negative"] = sides
        group = _integers(found["group"], (points,), len(sides), f"{name}: group")
        arrays["group"] = np.array(group)
    return Advice(arrays), inputs, labels


def _arrays(
    found: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], name: str
) -> dict[str, np.ndarray]:
    """Return float32 arrays of these shapes; InputError for others, and for codes below zero."""
    arrays = {}
    for key, shape in shapes.items():
        array = float32(found[key], f"{name}: {key}")
        need(
            array.shape == shape and 0 < array.size <= MOST,
            f"{name}: {key} must have shape {shape}, got {array.shape}",
        )
        arrays[key] = array
    need((arrays["codes"] >= 0).all(), f"{name}: codes must not be negative")
    return arrays


def _pairs(tokens: int) -> tuple[np.ndarray, list[int]]:
    first, second = (grid.ravel() for grid in np.indices((tokens, tokens)))
    eye = np.eye(tokens, dtype=np.float32)
    labels = np.maximum(first, second).tolist()
    return np.concatenate([eye[first], eye[second]], axis=1), labels


def _integers(array: np.ndarray, shape: tuple[int, ...], below: int, what: str) -> list[int]:
    good = array.dtype == np.int32 and array.shape == shape
    need(
        good and (array >= 0).all() and (array < below).all(),
        f"{what} must be {shape} int32 numbers in 0..{below - 1}",
    )
    found: list[int] = array.tolist()
    return found


def _verdict(envelope: Envelope, accepted: bool, reason: str, bound: Any = None) -> Verdict:
    measure = f"the share of {POINTS[envelope.own['points']['kind']]} that is answered right"
    return Verdict(accepted, reason, measure, envelope.level, (), bound)


CROSSCODER = Task(frozenset({"points"}), check)
