"""Dictionaries that are objects of other packages, known by what they offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from assay.dictionaries.base import Dictionary, DictionarySet, Placed
from assay.dictionaries.load import build, name_of
from assay.errors import InputError
from assay.io.saelens import of_object

_ROWS = 8


def as_dictionaries(given: Any) -> DictionarySet:
    """Return a set in which objects of SAELens stand as dictionaries at the sites that their
    configuration names; sets of our own stay as they are.

    `given` is a mapping, one object, or several. Raises InputError for an object whose architecture
    is not supported, and for one that does not compute what its configuration says."""
    if is_sae(given):
        given = [given]
    if isinstance(given, Sequence) and given and all(is_sae(one) for one in given):
        placed = [_placed(one) for one in given]
        found = {name_of(one.reads, one.writes): one for one in placed}
        if len(found) < len(placed):
            raise InputError("two of the objects stand at one site; give them names in a mapping")
        return found
    if isinstance(given, dict) and any(is_sae(one) for one in given.values()):
        return {name: _placed(one) if is_sae(one) else one for name, one in given.items()}
    known: DictionarySet = given
    return known


def is_sae(given: Any) -> bool:
    """Whether an object offers what an `SAE` of SAELens does."""
    return (
        isinstance(given, nn.Module)
        and not isinstance(given, Dictionary)
        and hasattr(getattr(given, "cfg", None), "to_dict")
        and all(hasattr(given, name) for name in ("encode", "W_dec", "b_dec"))
        and hasattr(given, "process_state_dict_for_saving")
    )


@torch.no_grad()
def _placed(sae: Any) -> Placed:
    entry = of_object(sae)
    dictionary = build(entry.load())
    weight = dictionary.W_dec
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, dictionary.d_in, generator=generator).to(weight)
    if sae.cfg.to_dict().get("reshape_activations", "none") == "none":
        ours, theirs = dictionary(x), sae.to(weight.device)(x)
        size = float(theirs.abs().max())
        if not torch.allclose(ours, theirs.to(ours), rtol=1e-3, atol=1e-3 * max(size, 1e-6)):
            raise InputError(
                f"{entry.source} does not compute what its configuration says; save it, and load"
                " its folder"
            )
    return Placed(dictionary, entry.reads, entry.writes)
