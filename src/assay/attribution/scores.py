"""The scores of an attribution: per example, in float64, with what they estimate written into
the type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import polars as pl
import torch
from torch import Tensor

from assay.charts.tables import notebook_html, text_table
from assay.core.mechanisms import Mechanisms
from assay.core.values import at, columns, data, mean, unravel
from assay.errors import AssayError, InputError

Estimand = Literal["single removal", "share of joint removal", "size of single removal"]


@dataclass(frozen=True)
class Gap:
    """The completeness gap of a path integral: how far the scores of one path are from the change
    of the metric along it.

    `relative` is mean |sum of scores - change| / mean |change| over examples, after `nodes`
    evaluations of the path."""

    relative: float
    absolute: float
    nodes: int


@dataclass(frozen=True)
class Scores:
    """Scores of every part: `values[group]` is (examples, *axes), an estimate of F(ones) - F(gate
    at 0) with the sign of a removal.

    Values of large groups are sparse tensors that hold the active entries (`assay.core.values`).
    The estimand says whether a score stands for the removal of one part, for its share of the joint
    removal, or for the size of its removal without the sign; `convention` names how gradients pass
    the site, or by which rules they pass the whole network where those are not its derivatives
    (`backward`), and `reference` what a gate of zero puts there."""

    mechanisms: Mechanisms
    values: Mapping[str, Tensor]
    baseline: Tensor
    method: str
    estimand: Estimand
    exact: bool = False
    gaps: Mapping[str, Gap] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    backward: str | None = None

    auditor: ClassVar[Callable[..., Any] | None] = None
    """What `audit` calls: the audit stands above the scores and puts itself here on import."""

    @property
    def convention(self) -> str:
        return self.backward or self.mechanisms.convention

    @property
    def reference(self) -> str:
        return self.mechanisms.reference

    @property
    def sources(self) -> dict[str, str]:
        """Where the parts of each group come from, in words."""
        return {name: group.source for name, group in self.mechanisms.groups.items()}

    @property
    def unsigned(self) -> bool:
        """Whether the scores say how large an effect is and not which way it goes."""
        return self.estimand == "size of single removal"

    @property
    def signs(self) -> dict[str, str]:
        """What the metric is and which way it is right, and what the sign of a score says."""
        target = self.mechanisms.target
        right = "higher" if target.higher_is_right else "lower"
        name = getattr(target.metric, "name", getattr(target.metric, "__name__", "the metric"))
        formula = getattr(target.metric, "formula", "") or f"{right} is right"
        meaning = {
            "single removal": "F(all gates at one) - F(one gate at zero): positive where removing"
            " the part lowers the metric",
            "size of single removal": "|F(all gates at one) - F(one gate at zero)|: the size of the"
            " change, without its sign",
            "share of joint removal": "the part's share of F(all gates at one) - F(all gates of the"
            " path at zero): positive where its removal together with the others lowers the metric",
        }[self.estimand]
        return {"metric": f"{name}: {formula}", "score": f"A score is {meaning}."}

    def mean(self) -> dict[str, Tensor]:
        """Return the mean over examples by group, accumulated in float64."""
        return {name: mean(values) for name, values in self.values.items()}

    def table(self, *, nonzero: bool = True) -> pl.DataFrame:
        """Return one row a part: group, part, index, mean score, standard deviation over
        examples, n, mean |score|.
        """
        frames = []
        for name, values in self.values.items():
            flat, keep = columns(values, nonzero=nonzero)
            places = unravel(keep, tuple(values.shape[1:])).tolist()
            frames.append(
                pl.DataFrame(
                    {
                        "group": [name] * len(keep),
                        "part": [self.mechanisms.describe(name, tuple(place)) for place in places],
                        "index": [list(map(int, place)) for place in places],
                        "score": flat.mean(0).tolist(),
                        "sd": flat.std(0, correction=1 if len(flat) > 1 else 0).tolist(),
                        "n": [len(flat)] * len(keep),
                        "size": flat.abs().mean(0).tolist(),
                    },
                    schema={
                        "group": pl.String,
                        "part": pl.String,
                        "index": pl.List(pl.Int64),
                        "score": pl.Float64,
                        "sd": pl.Float64,
                        "n": pl.Int64,
                        "size": pl.Float64,
                    },
                )
            )
        return pl.concat(frames) if frames else pl.DataFrame()

    to_polars = table

    def top(self, count: int = 20) -> pl.DataFrame:
        """Return the parts with the largest mean |score|."""
        return self.table().sort("size", descending=True).head(count)

    def at(self, name: str, index: Tensor) -> Tensor:
        """Return the scores at rows of part indices (rows, examples, axes): (rows, examples)."""
        return at(self.values[name], index)

    def audit(self, exact: int = 64, **options: Any) -> Any:
        """Ablate a random sample of parts exactly and say how far to trust these scores: an
        `assay.Audit`, see `assay.audit.audit`.
        """
        if Scores.auditor is None:
            raise AssayError("scores are audited by the room assay.audit: import it first")
        return Scores.auditor(self, exact=exact, **options)

    def indirect_effect(self) -> dict[str, Tensor]:
        """Return m(clean, do(a := reference)) - m(clean) for every part, (examples, *axes) by
        group: the scores with the opposite sign.

        A score stands for a removal, F(ones) - F(gate at 0), which is the negative of the effect of
        patching in the reference.
        """
        return {name: -values for name, values in self.values.items()}

    def __repr__(self) -> str:
        return f"{self.mechanisms.kind}: {self._head()}\n{text_table(self._shown())}"

    def _repr_html_(self) -> str:
        return f"<p><b>{self.mechanisms.kind}</b>: {self._head()}</p>" + notebook_html(
            self._shown()
        )

    def _head(self) -> str:
        return f"{self.method}, {self.estimand}, reference {self.reference}"

    def _shown(self) -> pl.DataFrame:
        top = self.top(20)
        return top.select("part", "score", "sd", "n") if top.width else top


def require_scores(values: Mapping[str, Tensor]) -> None:
    """Raise InputError when a score is NaN or infinite."""
    for name, entry in values.items():
        bad = int((~torch.isfinite(data(entry))).sum())
        if bad:
            raise InputError(
                f"{bad} scores of {name!r} are NaN or infinite: the model's activations or"
                " gradients are not finite there"
            )
