"""A guard around a network at run time: one forward pass, one verdict per input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from assay.core.target import evaluating
from assay.core.versions import versions
from assay.errors import AssayError, InputError
from assay.guard.guard import REASONS, Guard
from assay.guard.reading import reading_of
from assay.io.files import hash_of as hash_of

_EVENTS = 8  # events without support that are named per input


class RejectedError(AssayError):
    """A guarded network was asked to raise on rejection, and rejected; `served` holds the rest."""

    def __init__(self, message: str, served: Served):
        super().__init__(message)
        self.served = served


@dataclass(frozen=True)
class Served:
    """The network's output (None where it failed), which inputs were accepted, a reason and the
    first events without support for every input, and what went wrong, if anything.
    """

    output: Any
    accepted: tuple[bool, ...]
    reasons: tuple[str, ...]
    events: tuple[tuple[str, ...], ...]
    p: tuple[float, ...]
    error: str | None = None

    @property
    def all_accepted(self) -> bool:
        """Whether there are inputs and all of them are accepted."""
        return bool(self.accepted) and all(self.accepted)


class Guarded:
    """A network behind a guard: `guarded(x)` or `guarded(input_ids=..., attention_mask=...)`.

    It returns a `Served` whatever happens: an exception, in the network or in the guard, is a
    rejection, with `error` set. With `raises` a rejection raises `RejectedError` instead, and
    nothing else is ever raised. Raises InputError at once, before anything is served, for a guard
    that was fitted on another network (by the digest of its tensors) or without a reading.

    A network that is replaced, or whose modules or tensors are changed in place, after that is
    noticed at the next call, and its inputs are rejected; writes through `.data` alone leave no
    trace there."""

    def __init__(self, model: nn.Module, guard: Guard, *, raises: bool = False):
        if guard.model_hash and guard.model_hash != hash_of(model):
            raise InputError(
                "this guard was fitted on another network (the digest of the weights differs); fit"
                " one for this network"
            )
        self.model, self.guard, self.raises = model, guard, raises
        self._seen, self._kinds = versions(model), _kinds(model)
        self.reading = reading_of(dict(guard.reading), "this guard")
        if self.reading.names != guard.names:
            raise InputError("the guard's reading names other features than the guard")

    def __call__(self, *args: Any, **kwargs: Any) -> Served:
        """Run the network once and judge every input."""
        try:
            if args and kwargs:
                raise InputError("give all inputs by position, or all by keyword")
            served = self._serve(kwargs if kwargs else args[0] if len(args) == 1 else args)
        except Exception as error:  # nothing may be raised, nor accepted, in the served path
            served = _failed(args, kwargs, error)
        if self.raises and not served.all_accepted:
            raise RejectedError(_first_reason(served), served)
        return served

    def _serve(self, inputs: Any) -> Served:
        self._require_same()
        with evaluating(self.model):
            data, output = self.reading.run(self.model, inputs)
        verdicts = self.guard(data)
        accepted = verdicts.accepted.tolist()
        events = tuple(
            () if accepted[place] else tuple(self.guard.unsupported(verdicts, place)[:_EVENTS])
            for place in range(len(data))
        )
        reasons = tuple(REASONS[why] for why in verdicts.why.tolist())
        return Served(output, tuple(accepted), reasons, events, tuple(verdicts.p.tolist()))

    def _require_same(self) -> None:
        """Raise InputError when the network is no longer the one that the guard was fitted on."""
        if _kinds(self.model) != self._kinds:
            raise InputError("the network was changed: its modules are not those that were guarded")
        now = versions(self.model)
        if now == self._seen:
            return
        if self.guard.model_hash and hash_of(self.model) != self.guard.model_hash:
            raise InputError("the network was changed after the guard was put around it")
        self._seen = now


def _kinds(model: nn.Module) -> list[tuple[str, type]]:
    """Return the names and classes of modules: an activation without tensors is a part too."""
    return [(name, type(module)) for name, module in model.named_modules()]


def _failed(args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> Served:
    """Return a rejection of every input, as many as there seem to be."""
    sizes = [
        leaf.shape[0]
        for leaf in tree_flatten((args, dict(kwargs)))[0]
        if isinstance(leaf, Tensor) and leaf.ndim
    ]
    count = sizes[0] if sizes else 1
    try:
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    except Exception:  # an exception of the network's own may fail to say what it is
        message = type(error).__name__
    return Served(
        None,
        (False,) * count,
        ("the guard or the network failed",) * count,
        ((),) * count,
        (0.0,) * count,
        message,
    )


def _first_reason(served: Served) -> str:
    place = next((at for at, good in enumerate(served.accepted) if not good), None)
    if place is None:
        return "rejected: there is no input"
    events = "; ".join(served.events[place][:3])
    return f"input {place} is rejected: {served.error or served.reasons[place]}" + (
        f" ({events})" if events else ""
    )


def memory(guard: Guard) -> int:
    """Return the bytes that a guard holds while it serves."""
    own = guard.memory
    return guard.size() + (0 if own is None else own.numel() * own.element_size())
