"""Labels of features from a stream of texts: where each is most active, how strongly, how often."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from assay.dictionaries.base import Dictionary, DictionarySet
from assay.errors import InputError, unknown
from assay.learn.reading import Reader, Rows, chunks


@dataclass(frozen=True)
class Context:
    """Where a feature is active: the tokens around one position, the place of that position among
    them, and the activation there.
    """

    tokens: tuple[int, ...]
    place: int
    activation: float


@dataclass(frozen=True)
class FeatureLabel:
    """One feature on `positions` positions: the number of those where it is `active`, its strongest
    contexts (one a window, the strongest first), and how many activations |f| fall into each of
    equal bins from 0 to `top`. `reason` says why there are none.
    """

    name: str
    feature: int
    positions: int
    active: int
    contexts: tuple[Context, ...]
    top: float
    counts: tuple[int, ...]

    @property
    def reason(self) -> str:
        return "" if self.active else f"never active on {self.positions:,} positions"


@torch.no_grad()
def label_features(
    model: nn.Module,
    texts: Rows | Iterable[Rows],
    placed: DictionarySet,
    wanted: Mapping[str, Sequence[int]],
    *,
    contexts: int = 8,
    around: int = 8,
    bins: int = 32,
) -> list[FeatureLabel]:
    """Return a label for every wanted feature, by dictionary and in the order given.

    Texts are windows of tokens, all at once or a stream of them. One pass over them keeps for each
    feature its `contexts` strongest windows, with `around` tokens on either side, and `bins` counts
    whose range doubles when an activation exceeds it, so that memory does not grow with the text.

    Raises InputError for a dictionary or feature that is not there, an activation that is NaN or
    infinite, which is named, and a stream without windows."""
    held = {}
    for name, features in wanted.items():
        if name not in placed:
            raise unknown("dictionary", name, placed)
        size = placed[name].dictionary.size
        for feature in features:
            if not 0 <= feature < size:
                raise InputError(f"{name!r} has {size} features, and there is none {feature}")
        held[name] = _Held(len(features), contexts, around, bins)
    if not held:
        return []
    reader = Reader(model, list(dict.fromkeys(placed[name].reads for name in held)))
    positions = 0
    for rows in [texts] if isinstance(texts, Rows) else texts:
        for index in chunks(rows):
            some = rows.take(index)
            values = reader(some)
            positions += int(some.kept.sum())
            for name, features in wanted.items():
                one = placed[name]
                codes = _codes(name, one.dictionary, values[one.reads], features)
                held[name].add(some, codes.cpu())
    if not positions:
        raise InputError("the texts hold no window to label features with")
    return [
        label
        for name, features in wanted.items()
        for label in held[name].labels(name, features, positions)
    ]


def _codes(
    name: str, dictionary: Dictionary, x: Float[Tensor, "kept width"], features: Sequence[int]
) -> Float[Tensor, "kept features"]:
    codes = dictionary.encode(x.to(dictionary.W_dec))[:, list(features)].float()
    bad = ~codes.isfinite()
    if bool(bad.any()):
        feature = features[int(bad.any(0).nonzero()[0])]
        whose = "the dictionary's own" if bool(x.isfinite().all()) else "the model's"
        raise InputError(
            f"feature {feature} of {name!r} is NaN or infinite on the texts; the numbers are"
            f" {whose}"
        )
    return codes


class _Held:
    """What is kept of some features of one dictionary while texts go by."""

    def __init__(self, features: int, contexts: int, around: int, bins: int):
        self.contexts, self.around, self.bins = contexts, around, bins
        self.best = torch.zeros(contexts, features)
        self.tokens = torch.full((contexts, features, 2 * around + 1), -1, dtype=torch.long)
        self.active = torch.zeros(features, dtype=torch.long)
        self.power = torch.full((features,), -60, dtype=torch.long)
        self.counts = torch.zeros(features, bins, dtype=torch.long)

    def add(self, rows: Rows, codes: Float[Tensor, "kept features"]) -> None:
        size = codes.abs()
        self.active += (size > 0).sum(0)
        self._count(size)
        whole = codes.new_zeros(*rows.ids.shape, codes.shape[1])
        whole[rows.kept] = codes
        place = whole.abs().argmax(1)
        value = whole.gather(1, place[:, None])[:, 0]
        tokens = self._around(rows, place)
        best, tokens = torch.cat([self.best, value]), torch.cat([self.tokens, tokens])
        order = best.abs().argsort(dim=0, descending=True, stable=True)[: self.contexts]
        self.best = best.gather(0, order)
        self.tokens = tokens.gather(0, order[..., None].expand(-1, -1, tokens.shape[-1]))

    def _around(
        self, rows: Rows, place: Int[Tensor, "windows features"]
    ) -> Int[Tensor, "windows features around"]:
        ids = torch.where(rows.mask, rows.ids, -1).cpu()
        padded = functional.pad(ids, (self.around, self.around), value=-1)
        reach = torch.arange(2 * self.around + 1)
        index = place[..., None] + reach
        return padded[:, None].expand(-1, index.shape[1], -1).gather(2, index)

    def _count(self, size: Float[Tensor, "kept features"]) -> None:
        """Add activations to the bins of [0, 2^power), after doubling ranges that are too small."""
        largest = size.amax(0)
        needed = torch.frexp(largest).exponent.long()  # largest < 2^needed
        grow = torch.where(largest > 0, (needed - self.power).clamp_min(0), 0)
        if bool(grow.any()):
            place = torch.arange(self.bins)[None] >> grow.clamp_max(62)[:, None]
            self.counts = torch.zeros_like(self.counts).scatter_add_(1, place, self.counts)
            self.power += grow
        share = size.double() / torch.pow(2.0, self.power.double())
        place = (share * self.bins).long().clamp_max(self.bins - 1)
        self.counts.scatter_add_(1, place.T, (size > 0).long().T)

    def labels(self, name: str, features: Sequence[int], positions: int) -> list[FeatureLabel]:
        found = []
        for column, feature in enumerate(features):
            contexts = []
            for value, tokens in zip(self.best[:, column], self.tokens[:, column], strict=True):
                if value == 0:
                    continue
                before = int((tokens[: self.around] >= 0).sum())
                text = tuple(token for token in tokens.tolist() if token >= 0)
                contexts.append(Context(text, before, float(value)))
            alive = bool(self.active[column])
            found.append(
                FeatureLabel(
                    name,
                    feature,
                    positions,
                    int(self.active[column]),
                    tuple(contexts),
                    2.0 ** int(self.power[column]) if alive else 0.0,
                    tuple(self.counts[column].tolist()),
                )
            )
        return found
