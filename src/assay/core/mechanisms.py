"""A mechanism kind bound to a batch: which gate groups act at which sites, and the parts there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from assay.core.norms import PlainNorms
from assay.core.parts import Gates, Group, Parts, mix
from assay.core.sites import Edit, Record, Seen, read_sites, record_outputs
from assay.core.target import Batch, Target
from assay.core.values import add, compact
from assay.core.versions import Held, Unchanged
from assay.errors import AssayError, InputError, unknown

Change = Callable[[str, Seen], Tensor]
"""What is written at a site, from its name and what is seen there."""


class Projection(NamedTuple):
    """Where a group of query or key heads lies: `slot` is "q" or "k", `attention` the path of the
    module that makes the pattern, `path` that of the projection.
    """

    slot: Literal["q", "k"]
    attention: str
    path: str


@dataclass(frozen=True)
class Mechanisms(ABC):
    """Gated parts of one target on one batch; the kinds are its subclasses.

    A kind sets `groups` and implements `parts`, computed from the *current* value so that gates at
    several sites compose. It may override `second_rule`, `ablate_rule` and
    `slope_rule` where it knows an exact rule that is cheaper than the general one.

    What is bound holds for the weights of the time: where the network, or what the parts are made
    of, was trained on since, every operation raises InputError."""

    target: Target
    batch: Batch
    bound: Unchanged | None = field(default=None, kw_only=True, repr=False, compare=False)

    kind = "mechanisms"
    reference = "zero"
    convention = "pass_through"

    def __post_init__(self) -> None:
        if self.bound is None:  # else what this one was cut or made from was bound
            held = {"the network": self.target.model, **self.held()}
            object.__setattr__(self, "bound", Unchanged(held))

    def held(self) -> Mapping[str, Held]:
        """Return the weights that the parts are computed from beside the network's, by the words
        for them; none by default.
        """
        return {}

    def require_unchanged(self) -> None:
        """Raise InputError when weights changed since the parts were bound, or the network is in
        training mode.
        """
        assert self.bound is not None
        self.bound.require(self.kind)
        if self.target.model.training:
            raise InputError("the network is in training mode; call eval() on it")

    @property
    @abstractmethod
    def groups(self) -> Mapping[str, Group]:
        """The gate groups by name, in the order of the network."""

    @abstractmethod
    def parts(self, site: str, seen: Seen) -> Mapping[str, Parts]:
        """Return the parts of every group that acts at `site`, given what is seen there now."""

    def second_rule(self) -> Mapping[str, Tensor] | None:
        """Return d2F/dgate2 for every gate, (examples, *axes) by group, or None for the general
        rule.
        """
        return None

    def ablate_rule(self, name: str, index: Tensor, budget: int | None = None) -> Tensor | None:
        """Return F(ones) - F(one gate at 0) for rows of parts of one group, or None for the general
        rule.

        `index` is (rows, examples, axes), or (rows, axes) for gates shared over the batch; the
        answer is (rows, examples)."""
        return None

    def slope_rule(
        self, name: str, index: Tensor, gate: float, budget: int | None = None
    ) -> Tensor | None:
        """Return dF/dgate of single parts, each with its own gate at one value and all others at
        one, for rows of parts as in `ablate_rule`, or None for the general rule.
        """
        return None

    def slope_in_read(
        self,
        name: str,
        index: Tensor,
        gradients: Mapping[str, Tensor],
        clean: Mapping[str, Seen],
        switches: str = "local",
    ) -> Mapping[str, Tensor] | None:
        """Return the derivatives of dF/dgate = <gradient, part> in the values that parts of one
        group are computed from, the gradients held fixed, or None for the general rule.

        `index` is (rows, axes) with the position first, `gradients` those of the metric by site,
        `clean` what the untouched network sees. The answer is (rows, examples, width) by the site
        that is read, at each part's own position. `switches` is "local", or "secant" for difference
        quotients where a part is active on one side only."""
        return None

    @property
    def feature_groups(self) -> tuple[str, ...]:
        """The groups whose parts are activations times vectors, the features on their last axis;
        none by default. See `activations`.
        """
        return ()

    def activations(self, name: str, site: str, seen: Seen, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return what some features of a feature group are given what is seen at a site,
        (examples, *positions, which), and what one unit of each writes there, (which, width).
        """
        raise InputError(f"the parts of {name!r} have no activation")

    def query_key_groups(self) -> Mapping[str, Projection]:
        """Return the groups whose parts are query or key heads of an attention pattern; none by
        default.
        """
        return {}

    def box(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest value that each gate of a group may take when the part
        does not matter: [0, 1] by default. Both broadcast to the gates' shape.
        """
        ones = self.ones([name])[name]
        return torch.zeros_like(ones), ones

    def references(self, data: Mechanisms) -> tuple[Self, dict[str, tuple[Tensor, Tensor]]]:
        """Return the least and the largest values that a gate of zero brings in over the examples
        of another object of this kind, (1 or examples, *value) by group, and these mechanisms with
        parts wherever those values differ from what is there.

        Raises InputError in a kind whose base is fixed."""
        raise InputError(f"{self.kind} have one base: a gate of zero brings in no reference")

    def with_references(self, values: Mapping[str, Tensor]) -> Self:
        """Return these mechanisms with other values that a gate of zero brings in, by group."""
        raise InputError(f"{self.kind} have one base: a gate of zero brings in no reference")

    def in_memory(self) -> Self:
        """Return the same parts, with all that they read from files in memory: a function that is
        recorded may read none.
        """
        return self

    def take(self, index: Tensor | slice) -> Self:
        """Return the mechanisms of some of the examples, with the references of all of them.

        The batches among the fields are cut. A kind that holds anything else per example overrides
        this method."""
        cut: dict[str, Any] = {
            entry.name: value.take(index)
            for entry in fields(self)
            if isinstance(value := getattr(self, entry.name), Batch)
        }
        return replace(self, **cut)

    def follow(self, batch: Batch) -> Self:
        """Return the same mechanisms on one example whose text begins like that of these and has
        another length, for continuations.

        Raises InputError in a kind that is bound to the positions of its batch."""
        raise InputError(f"{self.kind} are bound to their batch and cannot follow a longer text")

    def describe(self, group: str, index: tuple[int, ...]) -> str:
        """Return a short name of one part for tables."""
        return f"{group}[{', '.join(map(str, index))}]"

    @property
    def sites(self) -> dict[str, list[str]]:
        """The sites, each with the names of the groups that act there."""
        found: dict[str, list[str]] = {}
        for name, group in self.groups.items():
            for site in group.sites:
                found.setdefault(site, []).append(name)
        return found

    def group(self, name: str) -> Group:
        if name not in self.groups:
            raise unknown("gate group", name, self.groups)
        return self.groups[name]

    def ones(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return gates of one for the named groups (all by default)."""
        return self.full(1.0, names)

    def full(
        self, value: float, names: Iterable[str] | None = None, *, broadcast: bool = False
    ) -> dict[str, Tensor]:
        """Return gates of one value for the named groups (all by default); with `broadcast` one
        entry stands for all gates of a group per example, which takes no memory.
        """
        dtype = torch.promote_types(next(self.target.model.parameters()).dtype, torch.float32)
        chosen = self.groups if names is None else list(names)
        shapes = {name: self.group(name).shape for name in chosen}
        if broadcast:
            shapes = {
                name: (1,) * len(shape) if self.group(name).per_example else shape
                for name, shape in shapes.items()
            }
        return {
            name: torch.full(shape, value, dtype=dtype, device=self.target.device)
            for name, shape in shapes.items()
        }

    def check(self, gates: Gates) -> None:
        """Raise InputError when gates are of an unknown group or do not broadcast to their
        shape.
        """
        for name, gate in gates.items():
            shape = self.group(name).shape
            try:
                fits = torch.broadcast_shapes(gate.shape, shape) == shape
            except RuntimeError:
                fits = False
            if not fits:
                raise InputError(
                    f"gates of {name!r} have shape {tuple(gate.shape)}; they must broadcast to"
                    f" {shape}"
                )

    def touched(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the sites where the groups act, with those that must be read for it, readings
        first.
        """
        acting = self._acting(names)
        return tuple(dict.fromkeys([*self._read(acting), *acting]))

    def edits_of(self, names: Iterable[str], change: Change) -> dict[str, Edit]:
        """Return edits, for one forward pass, that put `change(site, seen)` at every site where one
        of the groups acts; what the groups read earlier in the pass is in `seen.earlier`.
        """
        self.require_unchanged()
        acting = self._acting(names)
        read = self._read(acting)
        memory: dict[str, Seen] = {}

        def edit(site: str) -> Edit:
            def act(seen: Seen) -> Tensor:
                if site in read:
                    memory[site] = seen
                if site not in acting:
                    return seen.written
                return change(site, replace(seen, earlier=memory))

            return act

        return {site: edit(site) for site in dict.fromkeys([*read, *acting])}

    def edits(self, gates: Gates) -> dict[str, Edit]:
        """Return the edits that apply the gates at every site where one of their groups acts, for
        one forward pass.
        """
        return self.edits_of(gates, lambda site, seen: mix(seen, self.parts(site, seen), gates))

    @torch.no_grad()
    def clean_parts(self) -> Iterator[tuple[str, Mapping[str, Parts]]]:
        """Yield every site with the parts of its groups on the untouched network, so that the parts
        of one site exist at a time.
        """
        self.require_unchanged()
        seen = read_sites(self.target.model, self.batch.inputs, self.touched(self.groups))
        for site in self.sites:
            yield site, self.parts(site, replace(seen[site], earlier=seen))

    def values(self, gates: Gates | None = None, *, record: Record | None = None) -> Tensor:
        """Return the metric of every example under the gates; groups that are not given stay at
        one.

        With `record` the part of the network before the first gated site is not computed again.
        """
        gates = gates or {}
        self.check(gates)
        edits = self.edits(gates)
        return self.target.values(self.batch, edits, record=record, resume=tuple(edits))

    def record(self) -> Record:
        """Run the target once on the batch and keep every module's output."""
        self.require_unchanged()
        return record_outputs(self.target.model, self.batch.inputs)

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """Return the norm of every part on the untouched network, (examples, *axes) by group (over
        sites: the root of the summed squares).
        """
        squares: dict[str, Tensor] = {}
        for _, groups in self.clean_parts():
            for name, parts in groups.items():
                square = compact(parts.norm().square())
                squares[name] = add(squares[name], square) if name in squares else square
        return {name: self.per_example(name, squares[name].sqrt()) for name in self.groups}

    def per_example(self, name: str, values: Tensor) -> Tensor:
        """Give values of a group its example axis."""
        group = self.group(name)
        return values if group.per_example else values.expand(len(self.batch), *group.axes)

    def _acting(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return the sites where one of the groups acts, with all groups that act there."""
        chosen = set(names)
        return {site: groups for site, groups in self.sites.items() if chosen & set(groups)}

    def _read(self, acting: Mapping[str, list[str]]) -> dict[str, None]:
        """Return the sites that the groups at some sites read, each once and in order."""
        groups = chain.from_iterable(acting.values())
        return dict.fromkeys(chain.from_iterable(self.group(name).reads for name in groups))


def differentiable(function: Callable[[], Tensor]) -> Tensor:
    """Call a function that takes forward-mode derivatives, with norms whose second derivatives are
    right, and turn the refusal of fused attention into advice.
    """
    try:
        with PlainNorms():
            return function()
    except (NotImplementedError, RuntimeError) as error:
        if "forward" in str(error).lower() and ("AD" in str(error) or "attention" in str(error)):
            raise InputError(
                "fused attention has no forward-mode derivative; load the model with"
                " attn_implementation='eager'"
            ) from error
        if "in-place" in str(error) or "vmap" in str(error):
            raise AssayError(
                f"the model cannot run under torch.func transforms: {str(error).splitlines()[0]}"
            ) from error
        raise
