"""The supernodes of a circuit: suggested, or as the user grouped its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import polars as pl

from assay.audit import Refined
from assay.dictionaries import DictionarySet
from assay.edges import PartEdges, suggest_supernodes
from assay.errors import InputError, shown
from assay.io.runs import Run
from assay.io.supernodes import Supernode, read_supernodes
from assay.studies.features.config import Config
from assay.studies.features.kinds import frequent_kinds, of_residual
from assay.studies.pairs import read_all
from assay.targets.language import LanguageModel


class Found(Protocol):
    """A circuit, and the edges that leave its parts."""

    refined: Refined

    def outward(self) -> PartEdges: ...


def require_supernodes(
    config: Config, run: Run, model: LanguageModel, dictionaries: DictionarySet
) -> None:
    """Refuse a file of supernodes that no circuit of the run could have, before any is found.

    Raises InputError for a circuit that the run does not find, and for features that are not there.
    """
    given = config.circuit
    if given.supernodes is None:
        return
    pairs = read_all(config.data.pairs or run.checked("pairs.jsonl"), model)
    kinds = {kind.name: kind for kind in frequent_kinds(pairs, given.lengths)}
    chosen = of_residual(model, dictionaries)
    for circuit, groups in read_supernodes(given.supernodes).items():
        if circuit not in kinds:
            raise InputError(
                f"{given.supernodes} groups the circuit {shown(circuit)}, and this run finds"
                f" {', '.join(kinds) or 'none'}"
            )
        tokens = kinds[circuit].tokens
        for one in groups:
            for group, index in one.nodes:
                if group not in chosen:
                    why = f"it has features of {', '.join(chosen)}"
                else:
                    sizes = tokens, dictionaries[group].dictionary.size
                    inside = len(index) == 2 and all(
                        0 <= place < size for place, size in zip(index, sizes, strict=True)
                    )
                    if inside:
                        continue
                    why = "{} positions and {} features are there".format(*sizes)
                raise _no_part(given.supernodes, one.name, group, index, circuit, why)


def supernodes_of(config: Config, finder: Found, circuit: str) -> list[Supernode]:
    """Return the supernodes of one circuit: those of the file that the config names, else those
    that are suggested.

    Raises InputError for a part in the file that is not in the circuit."""
    given = config.circuit
    if given.supernodes is None:
        return suggest_supernodes(finder.outward(), coactivation=given.alike, effect=given.alike)
    found = read_supernodes(given.supernodes).get(circuit, [])
    known = set(finder.refined.nodes)
    for one in found:
        for group, index in one.nodes:
            if (group, index) not in known:
                why = f"its {len(known)} parts are others"
                raise _no_part(given.supernodes, one.name, group, index, circuit, why)
    return found


def _no_part(
    path: str, name: str, group: str, index: Sequence[int], circuit: str, why: str
) -> InputError:
    part = shown(f"{group}{list(index)}")
    return InputError(
        f"the supernode {shown(name)} of {path} holds {part}, which is no part of the circuit"
        f" {circuit}: {why}"
    )


def with_supernodes(parts: pl.DataFrame, groups: Sequence[Supernode]) -> pl.DataFrame:
    """Return the parts (group, index) with the name of their supernode, "" for none."""
    names = {node: one.name for one in groups for node in one.nodes}
    keys = zip(parts["group"].to_list(), parts["index"].to_list(), strict=True)
    found = [names.get((group, tuple(index)), "") for group, index in keys]
    return parts.with_columns(pl.Series("supernode", found, dtype=pl.String))
