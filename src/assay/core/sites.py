"""One hook layer over plain torch modules: read a site, replace it, resume a forward pass from it.

A site is a string. `path` is the output of a module (its first element when it is a tuple),
`path:input` its first input, a parameter's name the parameter itself, and `A + B` the sum of the
values at A and B, with changes written at A (the middle of a pre-norm residual block is `attention
+ block:input`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from assay.errors import InputError, unknown


@dataclass(frozen=True)
class Seen:
    """What an edit sees at a site: the current value, the tensor that its result replaces, and the
    module's inputs; `earlier` holds what was seen in the same forward pass at the sites that the
    gate groups here read.
    """

    value: Tensor
    written: Tensor
    inputs: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    earlier: Mapping[str, Seen] = field(default_factory=dict)

    @property
    def input(self) -> Tensor:
        """The module's first tensor input."""
        return _first(self.inputs, self.kwargs)

    def read(self, site: str) -> Seen:
        """Return what was seen earlier at a site that a gate group reads.

        Raises InputError when the site does not come before this one in the forward pass."""
        if site not in self.earlier:
            raise InputError(f"site {site!r} is not reached before the site that reads it")
        return self.earlier[site]

    def detach(self) -> Seen:
        """Return the same values outside the autograd graph; the module's inputs stay."""
        return replace(self, value=self.value.detach(), written=self.written.detach())


Edit = Callable[[Seen], Tensor]


@dataclass(frozen=True)
class Place:
    """One resolved summand of a site."""

    path: str
    kind: str  # "output", "input" or "parameter"


@dataclass(frozen=True)
class Record:
    """The module outputs of one forward pass, with the order in which the modules ran."""

    output: Any
    outputs: Mapping[str, Any]
    spans: Mapping[str, tuple[int, int]]

    def done_before(self, model: nn.Module, sites: Iterable[str]) -> list[str]:
        """Return the outermost modules that had finished when the first of the sites began."""
        begin = min(
            (self._begin(model, place) for site in sites for place in resolve_site(model, site)),
            default=0,
        )
        done: list[str] = []
        for path, (_, end) in sorted(self.spans.items(), key=lambda entry: entry[1][0]):
            inside = any(path.startswith(outer + ".") for outer in done[-1:])
            if end < begin and not inside:
                done.append(path)
        return done

    def size_from(self, model: nn.Module, sites: Iterable[str]) -> int:
        """Return the bytes of the module outputs that a run resumed at the sites computes again."""
        skipped = self.done_before(model, sites)
        kept = (
            out
            for path, out in self.outputs.items()
            if not any((path + ".").startswith(done + ".") for done in skipped)
        )
        return sum(leaf.numel() * leaf.element_size() for out in kept for leaf in _tensors(out))

    def _begin(self, model: nn.Module, place: Place) -> int:
        if place.kind == "parameter":
            wanted = model.get_parameter(place.path)
            owners = [
                path
                for path, module in model.named_modules()
                if any(p is wanted for p in module.parameters(False))
            ]
            # An owner that ran more than once has no span: nothing is known to come before it.
            known = all(path in self.spans for path in owners)
            return min((self.spans[path][0] for path in owners), default=0) if known else 0
        if place.path not in self.spans:
            raise InputError(
                f"module {place.path!r} ran more than once, or not at all, in one forward pass: it"
                " cannot be a site"
            )
        return self.spans[place.path][0]


def resolve_site(model: nn.Module, site: str) -> tuple[Place, ...]:
    """Return the summands of a site; InputError with the nearest names when one does not exist."""
    places = []
    for term in (part.strip() for part in site.split("+")):
        path, _, suffix = term.partition(":")
        if path and suffix in ("", "input") and _find(model, path) is not None:
            places.append(Place(path, suffix or "output"))
        elif _is_parameter(model, term):
            places.append(Place(term, "parameter"))
        else:
            known = [
                *(name for name, _ in model.named_modules() if name),
                *(name for name, _ in model.named_parameters()),
            ]
            raise unknown("site", term, known)
    return tuple(places)


def _find(model: nn.Module, path: str) -> nn.Module | None:
    # As get_submodule, several times faster: a run looks up every site.
    module: nn.Module | None = model
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def _is_parameter(model: nn.Module, path: str) -> bool:
    try:
        return model.get_parameter(path) is not None
    except AttributeError:
        return False


def run_edited(
    model: nn.Module,
    inputs: Any,
    edits: Mapping[str, Edit] | None = None,
    *,
    record: Record | None = None,
    resume: Iterable[str] = (),
) -> Any:
    """Run the model with edits at sites; with `record` and `resume`, modules that finished before
    those sites are not computed again.

    `inputs` is one tensor, a tuple of positional arguments or a mapping of keyword arguments.
    """
    edits = dict(edits or {})
    resume = tuple(resume)
    parameters: dict[str, Tensor] = {}
    with ExitStack() as stack:
        counts: dict[str, int] = {}
        for site, edit in edits.items():
            places = resolve_site(model, site)
            if places[0].kind == "parameter":
                value = model.get_parameter(places[0].path)
                parameters[places[0].path] = edit(Seen(value, value))
            else:
                _install(stack, model, site, places, edit, counts)
        if record is not None and resume:
            stack.enter_context(_skipped(model, record, record.done_before(model, resume)))
        if parameters:
            return _call(
                lambda *args, **kwargs: torch.func.functional_call(model, parameters, args, kwargs),
                inputs,
            )
        return _call(model, inputs)


def record_outputs(model: nn.Module, inputs: Any) -> Record:
    """Run the model once without gradients and keep every module's output, unless it runs twice
    or is changed in place.
    """
    spans: dict[str, tuple[int, int]] = {}
    outputs: dict[str, Any] = {}
    versions: dict[str, list[int]] = {}
    calls: dict[str, int] = {}
    clock = iter(range(1 << 62))

    def begin(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any) -> None:
            calls[path] = calls.get(path, 0) + 1
            spans[path] = (next(clock), -1)

        return note

    def end(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            spans[path] = (spans[path][0], next(clock))
            outputs[path] = out
            versions[path] = [leaf._version for leaf in _tensors(out)]

        return note

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path:
                stack.callback(module.register_forward_pre_hook(begin(path)).remove)
                stack.callback(module.register_forward_hook(end(path)).remove)
        with torch.no_grad():
            output = _call(model, inputs)
    for path, count in calls.items():
        changed = path in outputs and versions[path] != [
            leaf._version for leaf in _tensors(outputs[path])
        ]
        if count > 1:
            del spans[path]
        if count > 1 or changed:
            outputs.pop(path, None)
    return Record(output, outputs, spans)


def read_sites(model: nn.Module, inputs: Any, sites: Iterable[str]) -> dict[str, Seen]:
    """Run the model once without gradients and return what each site sees; a model that writes in
    place into what it has put out runs again, for copies of what was there before.
    """
    wanted = list(sites)
    found, changed = _read(model, inputs, wanted, copied=frozenset())
    if changed:
        found, _ = _read(model, inputs, wanted, copied=changed)
    missing = [site for site in wanted if site not in found]
    if missing:
        raise InputError(f"site {missing[0]!r} was not reached in the forward pass")
    return found


def _read(
    model: nn.Module, inputs: Any, sites: list[str], copied: Collection[str]
) -> tuple[dict[str, Seen], set[str]]:
    """Return what each site sees, and the sites whose values were written to afterwards."""
    found: dict[str, Seen] = {}
    versions: dict[str, tuple[int, int]] = {}

    def keep(site: str) -> Edit:
        def edit(seen: Seen) -> Tensor:
            kept = seen
            if site in copied:
                kept = replace(seen, value=seen.value.clone(), written=seen.written.clone())
            found[site], versions[site] = kept, _versions(kept)
            return seen.written

        return edit

    with torch.no_grad():
        run_edited(model, inputs, {site: keep(site) for site in sites})
    return found, {site for site, seen in found.items() if versions[site] != _versions(seen)}


def _versions(seen: Seen) -> tuple[int, int]:
    tensors = (seen.value, seen.written)
    value, written = (0 if one.is_inference() else one._version for one in tensors)
    return value, written


def _install(
    stack: ExitStack,
    model: nn.Module,
    site: str,
    places: tuple[Place, ...],
    edit: Edit,
    counts: dict[str, int],
) -> None:
    others: dict[Place, Tensor] = {}

    def see(written: Tensor, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        counts[site] = counts.get(site, 0) + 1
        if counts[site] > 1:
            raise InputError(
                f"site {site!r} is reached more than once in one forward pass: gates there would be"
                " applied twice"
            )
        value = written
        for place in places[1:]:
            if place not in others:
                raise InputError(
                    f"site {site!r}: {place.path!r} is not computed before {places[0].path!r}"
                )
            value = value + others[place]
        return edit(Seen(value, written, inputs, kwargs))

    for place in places[1:]:
        _listen(stack, model, place, _keeper(others, place))
    _listen(stack, model, places[0], see)


def _keeper(
    others: dict[Place, Tensor], place: Place
) -> Callable[[Tensor, tuple[Any, ...], Mapping[str, Any]], None]:
    def keep(value: Tensor, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        others[place] = value

    return keep


def _listen(
    stack: ExitStack,
    model: nn.Module,
    place: Place,
    act: Callable[[Tensor, tuple[Any, ...], Mapping[str, Any]], Any],
) -> None:
    if place.kind == "parameter":
        raise InputError(f"parameter {place.path!r} cannot be a summand of a site")
    module = _find(model, place.path)
    assert module is not None
    if place.kind == "input":

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = act(_first(args, kwargs), args, kwargs)
            return None if new is None else _replace_first(args, kwargs, new)

        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    else:

        def after(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
        ) -> Any:
            value = out if isinstance(out, Tensor) else out[0]
            new = act(value, args, kwargs)
            if new is None:
                return None
            return new if isinstance(out, Tensor) else (new, *out[1:])

        stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)


@contextmanager
def _skipped(model: nn.Module, record: Record, paths: Iterable[str]) -> Iterator[None]:
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for path in paths:
            if path in record.outputs:
                module = model.get_submodule(path)
                replaced.append((module, module.__dict__.get("forward")))
                # Wrappers may hand an assigned attribute on to what they wrap.
                module.__dict__["forward"] = _constant(record.outputs[path])
        yield
    finally:
        for module, before in replaced:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _call(function: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, tuple) else function(inputs)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise InputError("a module without a tensor input cannot be an input site")


def _replace_first(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for position, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:position], new, *args[position + 1 :]), dict(kwargs)
    name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: new}


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
