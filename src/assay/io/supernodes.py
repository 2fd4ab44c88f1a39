"""Supernodes in a JSON file, as a run suggests them and as a user groups parts by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.errors import InputError, shown
from assay.io.files import read_json, require_unicode, write_json

FORMAT = "assay-supernodes-1"


@dataclass(frozen=True)
class Supernode:
    """Parts (group, index) that stand for one thing, under one name."""

    name: str
    nodes: tuple[tuple[str, tuple[int, ...]], ...]


def write_supernodes(path: Path | str, circuits: Mapping[str, Sequence[Supernode]]) -> Path:
    """Write the supernodes of circuits by the circuits' names; InputError where `read_supernodes`
    would refuse them.
    """
    data = {
        "format": FORMAT,
        "circuits": {
            circuit: [
                {
                    "name": one.name,
                    "parts": [{"group": name, "index": list(index)} for name, index in one.nodes],
                }
                for one in found
            ]
            for circuit, found in circuits.items()
        },
    }
    _parse(path, data)
    return write_json(path, data)


def read_supernodes(path: Path | str) -> dict[str, list[Supernode]]:
    """Read supernodes by circuit; InputError, with the entry, for a file of another format, a part
    that is in two supernodes, two of one name, and entries of another type.
    """
    return _parse(path, read_json(path))


def _parse(path: Path | str, data: Any) -> dict[str, list[Supernode]]:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(
            f"{path} holds no supernodes: it needs 'format': {FORMAT!r}, as in the supernodes.json"
            " of a run"
        )
    require_unicode(data, str(path))
    circuits = data.get("circuits")
    if not isinstance(circuits, dict):
        raise InputError(f"{path}: 'circuits' must map circuits to lists of supernodes")
    found: dict[str, list[Supernode]] = {}
    for circuit, entries in circuits.items():
        where = f"{path}: circuit {circuit!r}"
        if not isinstance(entries, list):
            raise InputError(f"{where} must be a list of supernodes, got {shown(entries)}")
        nodes = [_one(f"{where}, supernode {place}", entry) for place, entry in enumerate(entries)]
        names = [one.name for one in nodes]
        parts = [f"{group}{list(index)}" for one in nodes for group, index in one.nodes]
        for what, many in (("name", names), ("part", parts)):
            twice = next((entry for entry in many if many.count(entry) > 1), None)
            if twice is not None:
                raise InputError(f"{where}: the {what} {shown(twice)} is there twice")
        found[circuit] = nodes
    return found


def _one(where: str, entry: Any) -> Supernode:
    name = entry.get("name") if isinstance(entry, dict) else None
    parts = entry.get("parts") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name.strip() or not isinstance(parts, list) or not parts:
        raise InputError(f"{where} needs a name and a list of parts, got {shown(entry)}")
    nodes = []
    for part in parts:
        group = part.get("group") if isinstance(part, dict) else None
        index = part.get("index") if isinstance(part, dict) else None
        whole = isinstance(index, list) and all(type(place) is int for place in index)
        if not isinstance(group, str) or not isinstance(index, list) or not whole:
            raise InputError(
                f"{where}: a part needs a group and an index of whole numbers, got {shown(part)}"
            )
        nodes.append((group, tuple(index)))
    return Supernode(name, tuple(nodes))
