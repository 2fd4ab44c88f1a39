"""Kinds of prompts: those of one length that differ from their patch at the same positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch

from assay.dictionaries import DictionarySet
from assay.io.prompts import Pairs
from assay.targets.language import LanguageModel

_FEWEST = 4  # two pairs choose a circuit, and two measure it


@dataclass(frozen=True)
class PromptKind:
    """Prompts of `tokens` tokens that differ from their patch at `positions`, and the indices of
    their pairs.
    """

    tokens: int
    positions: tuple[int, ...]
    pairs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the kind's circuit, such as 5-at-1."""
        return f"{self.tokens}-at-{'-'.join(map(str, self.positions))}"

    def halves(self, pairs: Pairs, most: int, seed: int) -> tuple[Pairs, Pairs]:
        """Return at most `most` of the kind's pairs, drawn at random, as two halves: those that
        choose a circuit and those that measure it.
        """
        index = torch.tensor(self.pairs)
        generator = torch.Generator().manual_seed(seed)
        index = index[torch.randperm(len(index), generator=generator)][:most]
        first, second = index[: len(index) // 2], index[len(index) // 2 :]
        return pairs.take(first.sort().values), pairs.take(second.sort().values)


def frequent_kinds(pairs: Pairs, count: int) -> list[PromptKind]:
    """Return the `count` most frequent kinds, by length and position; those of too few pairs for
    two halves are left out.
    """
    differ = (pairs.clean != pairs.patch) & pairs.mask.bool()
    places = [tuple(row.nonzero().flatten().tolist()) for row in differ]
    kinds = list(zip(pairs.lengths.tolist(), places, strict=True))
    return [
        PromptKind(*kind, tuple(place for place, one in enumerate(kinds) if one == kind))
        for kind, size in sorted(Counter(kinds).most_common(count))
        if size >= _FEWEST
    ]


def of_residual(model: LanguageModel, dictionaries: DictionarySet) -> Collection[str]:
    """Return the names of the dictionaries that circuits are found in: those of the residual
    stream, all of them where there is none.
    """
    found = [
        name
        for name in dictionaries
        if all(model.site(site).kind == "residual" for site in dictionaries[name].writes)
    ]
    return found or list(dictionaries)
