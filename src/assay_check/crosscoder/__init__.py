"""Claims about residual ReLU networks that features prove: how many points are answered right."""

import re
from fractions import Fraction
from typing import Any

import numpy as np

from assay_check.crosscoder.groups import right_points_of_groups
from assay_check.crosscoder.margins import Advice, right_points
from assay_check.crosscoder.model import MOST, Model, float32
from assay_check.envelope import Envelope, Task, Verdict
from assay_check.reading import need, tensors

RULES = ("linear", "compact", "exact", "groups")
POINTS = {"pairs": "all ordered pairs of tokens", "listed": "points that the advice lists"}


def check(envelope: Envelope, weights: bytes | None) -> Verdict:
    """Recompute a claim about a network from its weights, with advice that is sound whatever it
    says.
    """
    need(envelope.rule in RULES, f"unknown rule {envelope.rule!r}; known: {sorted(RULES)}")
    model = Model(envelope.needs(weights))
    need(
        envelope.options == {} == envelope.assumptions,
        f"the rules take no options and assume nothing, got {envelope.options!r} and"
        f" {envelope.assumptions!r}",
    )
    kind = _kind(envelope.own["points"])
    count = str(envelope.claim.get("count"))
    need(re.fullmatch("[0-9]{1,12}", count), "claim.count must be a decimal string")
    if envelope.level != "real":
        return _verdict(envelope, False, f"the rules hold at level real, not {envelope.level}")
    if envelope.model != model.entry:
        return _verdict(envelope, False, "the certificate is about other weights")
    advice, inputs, labels = _read(envelope, kind, model)
    total = len(labels)
    claim = {"count": count, "total": str(total), "bound": str(Fraction(int(count), total))}
    if int(count) > total or envelope.claim != claim:
        reason = f"the total is {total}, and the bound must be count / total"
        return _verdict(envelope, False, reason)
    if envelope.rule == "groups":
        right = right_points_of_groups(model, advice, inputs, labels)
    else:
        right = right_points(model, envelope.rule, advice, inputs, labels)
    found = sum(right)
    reason = f"{found} of {total} points are proved right, {count} are claimed"
    return _verdict(envelope, found >= int(count), reason, Fraction(found, total))


def _kind(entry: Any) -> str:
    known = isinstance(entry, dict) and entry.keys() == {"kind"} and isinstance(entry["kind"], str)
    need(known and entry["kind"] in POINTS, f"points.kind must be one of {sorted(POINTS)}")
    return str(entry["kind"])


def _read(envelope: Envelope, kind: str, model: Model) -> tuple[Advice, np.ndarray, list[int]]:
    """Return the advice, the inputs and the labels; InputError for shapes that do not fit."""
    name, data = envelope.advice()
    found = tensors(data, name)
    wanted = {"decoder", "bias", "codes"}
    wanted |= set() if envelope.rule == "exact" else {"group"}
    wanted |= {"negative"} if envelope.rule in ("linear", "compact") else set()
    wanted |= {"inputs", "labels"} if kind == "listed" else set()
    need(found.keys() == wanted, f"{name}: the tensors must be {sorted(wanted)}")
    width, hidden, outputs = (model.entry[key] for key in ("width", "hidden", "outputs"))
    if kind == "pairs":
        need(
            model.entry["inputs"] == 2 * outputs and outputs**3 <= MOST,
            f"pairs of {outputs} tokens need {2 * outputs} inputs",
        )
        inputs, labels = _pairs(outputs)
    else:
        inputs = float32(found["inputs"], f"{name}: inputs")
        need(
            inputs.ndim == 2 and inputs.shape[1] == model.entry["inputs"] and len(inputs),
            f"{name}: inputs must be (points, {model.entry['inputs']})",
        )
        labels = _integers(found["labels"], (len(inputs),), outputs, f"{name}: labels")
    points = len(inputs)
    need(found["decoder"].ndim == 2, f"{name}: decoder must be a matrix")
    size = len(found["decoder"])
    shapes = {"decoder": (size, width), "bias": (width,), "codes": (points, size)}
    arrays = {}
    for key, shape in shapes.items():
        array = float32(found[key], f"{name}: {key}")
        need(
            array.shape == shape and 0 < array.size <= MOST,
            f"{name}: {key} must have shape {shape}, got {array.shape}",
        )
        arrays[key] = array
    need((arrays["codes"] >= 0).all(), f"{name}: codes must not be negative")
    if envelope.rule == "groups":
        group = _integers(found["group"], (points,), points, f"{name}: group")
        need(
            len(set(zip(group, labels, strict=True))) == len(set(group)),
            f"{name}: every group must hold points of one label",
        )
        arrays["group"] = np.array(group)
    elif envelope.rule != "exact":
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
