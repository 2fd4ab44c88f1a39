"""What a file of another tool says of a dictionary: its formula, its tensors, and where it stands.

The readers of the formats, one file each, return these records; `assay.dictionaries` builds from
them. Nothing in a file is trusted: every field of a configuration and every tensor is asked for by
name, and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from assay.errors import InputError, shown
from assay.io.files import load_tensors, read_json, require_finite

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_LAYER = "{layer}"


@dataclass(frozen=True)
class Weights:
    """The formula of a dictionary by its name, its settings, and its tensors in Assay's layout:
    `W_enc` (d_in, size), `W_dec` (size, d_out), `W_skip` (d_in, columns).

    `norm` says how values are normalised before and restored after: "none", "layer_norm" or
    "constant_norm_rescale"; `scale` what they were divided by in training, which is not yet in the
    weights."""

    architecture: str
    tensors: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    norm: str = "none"
    scale: float = 1.0


@dataclass(frozen=True)
class Entry:
    """A dictionary in a file: the sites that it reads and writes, and how its tensors are read."""

    reads: str
    writes: tuple[str, ...]
    source: Path
    load: Callable[[], Weights]


@dataclass(frozen=True)
class Given:
    """What the user says of files that do not say it: the sites, in which `{layer}` stands for the
    number of the layer, and the scale of the values, one or by the site that is read (1 where it is
    in the weights already).
    """

    reads: str | None = None
    writes: str | None = None
    scale: float | Mapping[str, float] | None = None

    def scale_at(self, site: str) -> float | None:
        """Return the scale of a site's values, None where none is given."""
        return self.scale.get(site) if isinstance(self.scale, Mapping) else self.scale

    def sites(
        self,
        source: Path,
        layer: int | None,
        reads: str | None,
        writes: str | None,
    ) -> tuple[str, str]:
        """Return where a dictionary reads and writes: as given, else as the file says.

        Raises InputError when neither says it."""
        found: list[str] = []
        for name, given, stated in (("reads", self.reads, reads), ("writes", self.writes, writes)):
            site = stated if given is None else given
            if site is None and name == "writes":
                site = found[0]  # an autoencoder writes where it reads
            if site is None:
                raise InputError(
                    f"{source} does not say at which site its dictionary {name}; give it with"
                    f" {name}=, for example {name}='blocks.3.hook_resid_post'"
                )
            if _LAYER in site:
                if layer is None:
                    raise InputError(
                        f"{source} does not say its layer; give {name}= without {_LAYER}"
                    )
                site = site.replace(_LAYER, str(layer))
            if not site.isprintable():
                raise InputError(f"{source}: {shown(site)} is no name of a site")
            found.append(site)
        return found[0], found[1]


class Fields:
    """The entries of a configuration, asked for by name and type."""

    def __init__(self, path: Path, data: Any, within: str = ""):
        if not isinstance(data, dict):
            raise InputError(
                f"{path}: {within or 'the file'} must be an object of names and values, got"
                f" {type(data).__name__}"
            )
        self.path, self.data, self.within = path, data, within

    @classmethod
    def of_json(cls, path: Path) -> Fields:
        """Read a JSON file."""
        return cls(path, read_json(path))

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def part(self, key: str) -> Fields:
        """Return the object under a key; InputError when it is missing."""
        if key not in self:
            raise self._missing(key)
        return Fields(self.path, self.data[key], f"{self.within}{key}")

    def require(self, key: str, kind: type[T]) -> T:
        """Return an entry of a type; InputError, with its name, when it is missing or another."""
        if key not in self:
            raise self._missing(key)
        value = self.data[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(
                f"{self.path}: {self._name(key)} must be {kind.__name__}, got {brief(value)}"
            )
        if isinstance(value, int) and kind is int and value < 0:
            raise InputError(f"{self.path}: {self._name(key)} must not be negative, got {value}")
        return value

    def get(self, key: str, kind: type[T], default: T) -> T:
        """Return an entry, or the default where it is missing or null."""
        return self.require(key, kind) if key in self else default

    def maybe(self, key: str, kind: type[T]) -> T | None:
        """Return an entry, None where it is missing or null."""
        return self.require(key, kind) if key in self else None

    def choose(self, key: str, known: tuple[str, ...], default: str | None = None) -> str:
        """Return an entry that is one of the names known; InputError, with those, otherwise."""
        value = self.require(key, str) if default is None else self.get(key, str, default)
        if value not in known:
            raise InputError(
                f"{self.path}: {self._name(key)} {shown(value)} is not supported; supported are"
                f" {', '.join(known)}"
            )
        return value

    def _name(self, key: str) -> str:
        return f"{self.within}.{key}" if self.within else key

    def _missing(self, key: str) -> InputError:
        return InputError(f"{self.path}: the key {self._name(key)!r} is missing")


class Tensors:
    """The tensors of a file, taken by name with the shape that is expected."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]):
        self.path, self._left, self._names = path, dict(tensors), sorted(tensors)

    @classmethod
    def of_file(cls, path: Path) -> Tensors:
        """Read a safetensors or npz file."""
        return cls(path, load_tensors(path, finite=False))

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, *shape: int | None) -> torch.Tensor:
        """Return a tensor; None stands for any size above zero.

        Raises InputError, with the file and the name, when it is missing, of another shape, not of
        floating-point numbers, or not finite."""
        if key not in self._left:
            raise InputError(
                f"{self.path}: the tensor {key!r} is missing; there are"
                f" {', '.join(self._names)[:300] or 'none'}"
            )
        tensor = self._left.pop(key)
        what = f"{self.path}: tensor {key!r}"
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in _FLOATS:
            raise InputError(f"{what} is of type {name}; supported are {', '.join(_FLOATS)}")
        fits = len(tensor.shape) == len(shape) and all(
            found > 0 and wanted in (None, found)
            for found, wanted in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise InputError(f"{what} has shape {tuple(tensor.shape)}, expected ({wanted})")
        require_finite(tensor, what)
        return tensor

    def take_integers(self, key: str) -> torch.Tensor:
        """Return a tensor of at most a thousand integers; InputError for another."""
        tensor = self._left.pop(key)
        if tensor.is_floating_point() or tensor.is_complex() or tensor.numel() > 1000:
            raise InputError(
                f"{self.path}: tensor {key!r} must hold integers, got {tensor.numel()} of"
                f" {tensor.dtype}"
            )
        return tensor

    def maybe(self, key: str, *shape: int | None) -> torch.Tensor | None:
        """Return a tensor as `take` does, None where there is none of that name."""
        return self.take(key, *shape) if key in self else None

    def drop(self, *keys: str) -> None:
        """Leave tensors out that say nothing of the formula."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self, formula: str) -> None:
        """Raise InputError when tensors are left that the formula does not have."""
        if self._left:
            raise InputError(
                f"{self.path}: the tensor {sorted(self._left)[0]!r} is none of a {formula}"
                " dictionary, which would be computed without it"
            )


def brief(value: Any) -> str:
    """Return a value for a message: a container by its type, as YAML can nest one exponentially."""
    plain = value is None or isinstance(value, bool | int | float | str)
    return shown(value) if plain else f"a {type(value).__name__}"


def with_layer(site: str, layer: int) -> str:
    """Return a site's name with the number of its layer replaced: the first number between dots."""
    return re.sub(r"(?<=\.)(\d+|\{[a-z_]*\})(?=\.)", str(layer), site, count=1)
