"""The guard: a verifier that knows nothing at first and so rejects every input.

Each admitted explanation makes events likely. An input is accepted if every feature is explained
there and the tests pass. Stated with every result: P(rejected by the tests) <= alpha for inputs
drawn like the calibration inputs; the share without support is reported apart; every accepted event
has laboratory probability >= theta with confidence 1 - delta, over all events together; an event
without evidence is never accepted. There is no bound on the acceptance of other inputs without
assumptions about them: it is measured per family of anomalies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from assay.errors import InputError
from assay.guard.bounded import Edit, Site, redundant, single_edits
from assay.guard.compiled import Compiled
from assay.guard.conformal import Ranks, combine, level
from assay.guard.explanations import Explanation, Refused
from assay.guard.observed import Observed
from assay.guard.quantise import Quantiser
from assay.guard.scores import (
    PLAIN,
    ROOTED,
    WEIGHTS,
    Mahalanobis,
    confidence,
    energy,
)
from assay.guard.settings import Settings
from assay.guard.tables import interval


@dataclass(frozen=True)
class Scorer:
    """What turns features into explained events and scores of tests.

    `classes` are the root's values, the predicted classes that have tables of their own; all others
    are one more value. None where the network's logits are not read."""

    quantiser: Quantiser
    compiled: Compiled
    distance: Mahalanobis
    root_distance: Mahalanobis | None
    classes: Int[Tensor, " classes"] | None

    @property
    def tests(self) -> tuple[str, ...]:
        """The names of the tests, in the order of the scores."""
        return PLAIN if self.classes is None else (*PLAIN, *ROOTED)

    def roots(self, data: Observed) -> Int[Tensor, " inputs"]:
        """Return the root value of every input."""
        if self.classes is None:
            return torch.zeros(len(data), dtype=torch.long)
        if data.logits is None:
            raise InputError("this guard reads the network's logits; give them")
        return root_values(data.logits, self.classes)

    def __call__(self, data: Observed) -> Read:
        """Return the events and scores of inputs."""
        roots, finite = self.roots(data), data.finite
        values = data.values.float().nan_to_num(0.0, 0.0, 0.0)
        bins = self.quantiser(values)
        likelihood, dependence = self.compiled.likelihood(bins, roots)
        found = [likelihood, dependence, self.distance(values)]
        if self.root_distance is not None:
            assert data.logits is not None
            logits = data.logits.float().nan_to_num(0.0, 0.0, 0.0)
            found += [self.root_distance(values, roots), confidence(logits), energy(logits)]
        scores = torch.stack(found)
        # An overflow is no evidence that an input is usual.
        usable = finite & torch.isfinite(scores).all(0)
        explained = self.compiled.explained(bins, roots) & usable[:, None]
        bins = bins.masked_fill(~torch.isfinite(data.values), -1)
        return Read(bins, explained, scores.masked_fill(~usable, torch.nan))


@dataclass(frozen=True)
class Read:
    """Bins of inputs (inputs, features), -1 where a value is not finite, which features are
    explained, and the score of every test, NaN for an input that is not finite.
    """

    bins: Int[Tensor, "inputs features"]
    explained: Bool[Tensor, "inputs features"]
    scores: Float[Tensor, "tests inputs"]


def root_values(logits: Tensor, classes: Tensor) -> Int[Tensor, " inputs"]:
    """Return the place of the predicted class among sorted classes, their number for another."""
    best = logits.argmax(1)
    place = torch.searchsorted(classes, best).clamp_max(len(classes) - 1)
    return torch.where(classes[place] == best, place, len(classes))


@dataclass(frozen=True)
class Verdicts:
    """What a guard says of inputs: which it accepts, the p-value of the tests together, which
    features are explained (inputs, features), their bins, and the scores of single tests.

    `why` (inputs,) is 0 for an accepted input; otherwise 1: not finite, 2: features without
    support, 3: the tests reject; 4 marks inputs that were accepted because they were memorised."""

    accepted: Bool[Tensor, " inputs"]
    p: Float[Tensor, " inputs"]
    explained: Bool[Tensor, "inputs features"]
    bins: Int[Tensor, "inputs features"]
    why: Int[Tensor, " inputs"]
    scores: Float[Tensor, "tests inputs"]

    def __len__(self) -> int:
        return len(self.accepted)

    @property
    def supported(self) -> Bool[Tensor, " inputs"]:
        """Where every feature is explained."""
        return self.explained.all(1)

    def summary(self) -> dict[str, float | int | list[float]]:
        """Return shares of inputs, with 95 % intervals for the unsupported and the accepted."""
        total = len(self)
        unsupported = int((~self.supported).sum())
        accepted = int(self.accepted.sum())
        tested = int(((self.why == 3) & self.supported).sum())
        return {
            "inputs": total,
            "accepted": accepted / max(total, 1),
            "accepted_interval": list(interval(accepted, total)),
            "unsupported": unsupported / max(total, 1),
            "unsupported_interval": list(interval(unsupported, total)),
            "rejected_by_tests": tested / max(total, 1),
        }


ROWS = 1024
"""Inputs that are scored at once: their arrays stay in the cache."""
REASONS = (
    "accepted",
    "not finite",
    "features without support",
    "rejected by the tests",
    "accepted: memorised",
)


@dataclass(frozen=True)
class Guard:
    """A fitted guard; `guard(observed)` gives its verdicts.

    `ranks` are the scores on the fresh split that test scores are ranked against, `single` those on
    the calibration split, `statistic` the sorted combination there. `model_hash` is the digest of
    the network's tensors, "" where it is not known; `reading` says what the features are, for
    `assay.guard.wrapper`. `training` holds the digests of the inputs that tables were made of,
    `memory` their features and `decisions` their classes, for the mode `single-edit`."""

    names: tuple[str, ...]
    settings: Settings
    scorer: Scorer
    ranks: Ranks | None
    single: Ranks | None
    statistic: Float[Tensor, " inputs"]
    explanations: tuple[Explanation, ...]
    refused: tuple[Refused, ...] = ()
    model_hash: str = ""
    reading: Mapping[str, object] = field(default_factory=dict)
    training: frozenset[str] = frozenset()
    figures: Mapping[str, float | int] = field(default_factory=dict)
    memory: Float[Tensor, "rows features"] | None = None
    decisions: Int[Tensor, " rows"] | None = None
    place: Site | None = None

    def __call__(self, data: Observed) -> Verdicts:
        """Return the verdicts on inputs.

        Raises InputError when the features are not those that the guard was fitted on."""
        self.require(data)
        parts = [
            self._judge(data.take(slice(start, start + ROWS)))
            for start in range(0, max(len(data), 1), ROWS)
        ]
        first = parts[0]
        if len(parts) == 1:
            return first
        stacked: dict[str, Tensor] = {
            entry.name: torch.cat(
                [getattr(one, entry.name) for one in parts], 1 if entry.name == "scores" else 0
            )
            for entry in fields(Verdicts)
        }
        return Verdicts(**stacked)

    def _judge(self, data: Observed) -> Verdicts:
        read = self.scorer(data)
        p = self.p_values(read.scores)
        finite = ~read.scores.isnan().any(0)
        explained = self._with_bounds(data, read.explained, p > self.settings.alpha)
        supported = explained.all(1)
        accepted = supported & (p > self.settings.alpha) & finite
        why = torch.where(accepted, 0, 3)
        why = torch.where(~supported, 2, why)
        why = torch.where(~finite, 1, why)
        known = self._memorised(data, accepted) & finite
        why = torch.where(known & ~accepted, 4, why)
        return Verdicts(accepted | known, p, explained, read.bins, why, read.scores)

    def _with_bounds(self, data: Observed, explained: Tensor, passed: Tensor) -> Tensor:
        """Return what is explained once activations without influence need no explanation: those
        that are inactive on the whole domain, and those of an input that passes the tests of which
        no value changes its decision.
        """
        if "prune" not in self.settings.modes or self.place is None:
            return explained
        assert data.logits is not None
        finite = data.finite
        explained = explained | ((data.values == 0) & self.place.inactive & finite[:, None])
        asked = (~explained.all(1) & passed & finite).nonzero()[:, 0]
        if len(asked):
            some = data.take(asked)
            assert some.logits is not None
            free = redundant(
                self.place, some.values, ~explained[asked], some.logits.argmax(1).tolist()
            )
            explained[asked[free]] = True
        return explained

    def _memorised(self, data: Observed, accepted: Tensor) -> Tensor:
        """Return which inputs are laboratory inputs, or single edits of one."""
        known = torch.zeros(len(data), dtype=torch.bool)
        if {"memorise", "single-edit"} & set(self.settings.modes):
            known = torch.tensor([key in self.training for key in data.keys], dtype=torch.bool)
        if "single-edit" in self.settings.modes and self.place is not None:
            asked = (~accepted & ~known & data.finite).nonzero()[:, 0]
            for edit in self.edits(data.take(asked)):
                known[asked[edit.place]] = True
        return known

    def edits(self, data: Observed) -> list[Edit]:
        """Return, for inputs that are a memorised one with one activation changed inside its
        certified interval, the edit; InputError before `attach`.
        """
        if self.place is None or self.memory is None or self.decisions is None:
            raise InputError("no place is attached: give the activations' network with attach")
        return single_edits(self.place, self.memory, self.decisions.tolist(), data.values)

    def attach(self, place: Site) -> Guard:
        """Return the guard with what bounds know of the activations that it reads, for the modes
        `single-edit` and `prune`; without it these accept nothing.

        Raises InputError when the features are not the activations of the place, and for `prune`
        without logits."""
        if place.width != len(self.names):
            raise InputError(
                f"the place has {place.width} activations and the guard reads {len(self.names)};"
                " these modes need a guard of all activations at one place"
            )
        if self.scorer.classes is None:
            raise InputError("these modes are about the decision, and this guard reads no logits")
        return replace(self, place=place)

    def require(self, data: Observed) -> None:
        """Raise InputError for other features than those that the guard was fitted on."""
        if data.names != self.names:
            strange = [name for name in data.names if name not in self.names]
            raise InputError(
                f"this guard reads {len(self.names)} features, got {len(data.names)}"
                + (f"; it does not know {strange[0]!r}" if strange else ", or another order")
            )

    def p_values(self, scores: Tensor) -> Float[Tensor, " inputs"]:
        """Return the p-value of the tests together, zero where a score is NaN."""
        if self.ranks is None:  # nothing to compare with: nothing is accepted
            return torch.zeros(scores.shape[1], dtype=torch.float64)
        found = level(self.combined(scores), self.statistic)
        return found.masked_fill(scores.isnan().any(0), 0.0)

    def combined(self, scores: Tensor) -> Float[Tensor, " inputs"]:
        """Return the combination of test scores that the p-value of the tests together is about."""
        if self.ranks is None:
            raise InputError("this guard is not calibrated")
        weights = torch.tensor([WEIGHTS[name] for name in self.scorer.tests])
        return combine(self.ranks(scores), weights)

    def single_p_values(self, verdicts: Verdicts) -> dict[str, Float[Tensor, " inputs"]]:
        """Return the conformal p-value of every test by itself."""
        if self.single is None:
            return {}
        return dict(zip(self.scorer.tests, self.single(verdicts.scores), strict=True))

    def unsupported(self, verdicts: Verdicts, place: int) -> list[str]:
        """Return the events of an input that no explanation supports, in words."""
        missing = (~verdicts.explained[place]).nonzero()[:, 0].tolist()
        return [
            f"{self.names[i]} in {self.scorer.quantiser.describe(i, int(verdicts.bins[place, i]))}"
            for i in missing
        ]

    @property
    def bits(self) -> float:
        """What all explanations together save in describing the laboratory."""
        return sum(one.bits for one in self.explanations)

    def size(self) -> int:
        """Return the bytes of the arrays that scoring reads."""
        parts: Sequence[object] = (
            self.scorer.compiled,
            self.scorer.quantiser,
            self.scorer.distance,
            self.scorer.root_distance,
            self.ranks,
            self,
        )
        tensors = [
            entry
            for part in parts
            if part is not None
            for entry in vars(part).values()
            if isinstance(entry, Tensor)
        ]
        return sum(entry.numel() * entry.element_size() for entry in tensors)
