"""Reading untrusted files with the standard library and numpy alone."""

import json
import math
from typing import Any

import numpy as np

TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "U8": "u1",
    "BOOL": "?",
}


class InputError(ValueError):
    """A file is not what it should be."""


def need(condition: Any, message: str) -> Any:
    """Raise InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


def parse(data: bytes, what: str) -> Any:
    """Parse JSON; InputError for repeated keys, NaN, infinities, and absurd numbers or depth."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len(dict(pairs)) == len(pairs), "a key appears twice")
        return dict(pairs)

    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=distinct,
            parse_constant=lambda name: need(False, f"{name} is no number"),
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON: {error}") from error


def tensors(data: bytes, what: str) -> dict[str, np.ndarray]:
    """Read safetensors; InputError unless offsets, shapes and types agree and the tensors fill
    the file exactly.
    """
    size, found, spans = int.from_bytes(data[:8], "little"), {}, []
    need(2 <= size <= len(data) - 8, f"{what} is not a safetensors file, or truncated")
    header, body = parse(data[8 : 8 + size], f"the header of {what}"), data[8 + size :]
    for name, entry in header.items() if isinstance(header, dict) else [("", header)]:
        if name == "__metadata__":
            continue
        need(
            isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"},
            f"{what}: {name!r} is malformed",
        )
        kind, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        lists = all(
            isinstance(part, list) and all(type(n) is int and n >= 0 for n in part)
            for part in (shape, span)
        )
        need(
            lists and len(span) == 2 and len(shape) < 9 and isinstance(kind, str) and kind in TYPES,
            f"{what}: {name!r} is malformed",
        )
        fits = (
            span[0] <= span[1] <= len(body)
            and span[1] - span[0] == math.prod(shape) * np.dtype(TYPES[kind]).itemsize
        )
        need(fits, f"{what}: {name!r} does not fit its offsets {span}: truncated or altered")
        try:
            array = np.frombuffer(body[span[0] : span[1]], TYPES[kind]).reshape(shape)
        except (ValueError, OverflowError) as error:  # an empty array with sides beyond any array's
            raise InputError(f"{what}: {name!r} has a shape that no array has") from error
        found[name] = (array.astype("<u4") << 16).view("<f4") if kind == "BF16" else array
        spans.append(span)
    joined = [0, *(end for _, end in sorted(spans))] == [
        *(start for start, _ in sorted(spans)),
        len(body),
    ]
    need(joined, f"{what}: the tensors overlap, leave gaps, or are followed by other bytes")
    return found
