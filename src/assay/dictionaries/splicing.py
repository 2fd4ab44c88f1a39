"""Run a network with what dictionaries rebuild in the place of what it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from assay.core.sites import Edit, Seen, run_edited
from assay.dictionaries.base import Placed
from assay.learn.reading import Rows, require_positions, value_at, with_value
from assay.targets.names import SiteRef, resolve

Rebuild = Callable[[str, Tensor], Tensor]
Watch = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True)
class Splice:
    """Where dictionaries read and write in a network, with their sites resolved.

    Several dictionaries that write at one site (cross-layer transcoders) are summed there. Raises
    InputError, with the nearest names, for a site that the network does not have."""

    model: nn.Module
    placed: Mapping[str, Placed]
    refs: Mapping[str, SiteRef]

    def run(
        self,
        rows: Rows,
        rebuild: Rebuild,
        *,
        chosen: Mapping[str, Placed] | None = None,
        watch: Watch | None = None,
    ) -> Any:
        """Return the network's output with the values at the positions that are read replaced.

        `rebuild(name, x)` gives what the dictionary of that name writes for x (positions, d_in):
        (positions, d_out), its sites side by side. `chosen` are the dictionaries that are spliced,
        by default all; `watch(site, rebuilt, value)` is shown every replacement."""
        device = next((one.device for one in self.model.parameters()), torch.device("cpu"))
        kept = rows.kept.to(device)
        return run_edited(self.model, rows.inputs(device), self.edits(kept, rebuild, chosen, watch))

    def edits(
        self,
        kept: Bool[Tensor, "windows length"],
        rebuild: Rebuild,
        chosen: Mapping[str, Placed] | None = None,
        watch: Watch | None = None,
    ) -> dict[str, Edit]:
        """Return the edits of one forward pass, by site; see `run`."""
        placed = self.placed if chosen is None else chosen
        written: dict[str, list[Tensor]] = {}

        def compute(name: str, x: Tensor) -> None:
            parts = rebuild(name, x).chunk(len(placed[name].writes), dim=-1)
            for target, part in zip(placed[name].writes, parts, strict=True):
                written.setdefault(target, []).append(part)

        def at(site: str) -> Edit:
            reads = [name for name, one in placed.items() if self.refs[one.reads].site == site]
            targets = dict.fromkeys(
                target
                for one in placed.values()
                for target in one.writes
                if self.refs[target].site == site
            )
            # What writes elsewhere reads the value as it stands after the writing here.
            late = [name for name in reads if not set(placed[name].writes) & set(targets)]

            def edit(seen: Seen) -> Tensor:
                value = seen.value
                for name in reads:
                    if name not in late:
                        compute(name, self._read(placed[name].reads, value, kept))
                for target in targets:
                    before = self._read(target, value, kept)
                    first, *others = written.pop(target)
                    rebuilt = sum(others, first)
                    if watch is not None:
                        watch(target, rebuilt, before)
                    whole = value_at(self.refs[target], value)
                    new = whole.masked_scatter(kept[..., None], rebuilt.to(whole.dtype))
                    value = with_value(self.refs[target], value, new)
                for name in late:
                    compute(name, self._read(placed[name].reads, value, kept))
                if not targets or seen.written is seen.value:
                    return value if targets else seen.written
                return seen.written + (value - seen.value)

            return edit

        names = [name for one in placed.values() for name in (one.reads, *one.writes)]
        return {site: at(site) for site in dict.fromkeys(self.refs[name].site for name in names)}

    def _read(self, name: str, value: Tensor, kept: Tensor) -> Float[Tensor, "kept width"]:
        found = value_at(self.refs[name], value)
        require_positions(name, found, kept.shape)
        return found[kept].float()


def splice(model: nn.Module, placed: Mapping[str, Placed]) -> Splice:
    """Return where dictionaries stand in a network."""
    names = dict.fromkeys(name for one in placed.values() for name in (one.reads, *one.writes))
    return Splice(model, placed, {name: resolve(model, name) for name in names})


def logits_of(output: Any) -> Float[Tensor, "windows length vocabulary"]:
    """Return the logits of a language model's output."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def predicted(rows: Rows) -> Bool[Tensor, "windows length_less_one"]:
    """Return the positions whose next token is a token and no padding."""
    return rows.mask[:, 1:] & rows.mask[:, :-1]
