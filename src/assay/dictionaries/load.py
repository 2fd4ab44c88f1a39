"""Dictionaries from the files of SAELens, Gemma Scope, dictionary_learning and circuit-tracer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from assay.dictionaries import make
from assay.dictionaries.base import Dictionary, DictionarySet, Placed
from assay.dictionaries.fold import fold_scale
from assay.errors import InputError
from assay.io import circuit_tracer, dictionary_learning, gemma_scope, saelens
from assay.io.weights import Entry, Given, Weights
from assay.progress import progress

_MOST_FOLDERS = 10_000
_DEEPEST = 8


@dataclass(frozen=True)
class _Format:
    """A format, the files by which a folder of it is known, and its reader."""

    name: str
    files: tuple[str, ...]
    read: Callable[[Path, Given], list[Entry]]

    def matches(self, folder: Path) -> bool:
        return all((folder / file).is_file() for file in self.files)


FORMATS = (
    _Format("SAELens", (saelens.CONFIG, saelens.WEIGHTS), saelens.read_saelens),
    _Format(
        "dictionary_learning",
        (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),
        dictionary_learning.read_dictionary_learning,
    ),
    _Format("circuit-tracer", (circuit_tracer.CONFIG,), circuit_tracer.read_circuit_tracer),
    _Format("Gemma Scope", (gemma_scope.FIRST,), gemma_scope.read_gemma_scope),
    _Format(
        "Gemma Scope 2",
        (gemma_scope.SECOND, gemma_scope.CONFIG),
        gemma_scope.read_gemma_scope_2,
    ),
    _Format(
        "Gemma Scope 2, cross-layer",
        ("params_layer_0.safetensors",),
        gemma_scope.read_gemma_scope_2_layers,
    ),
)
"""The formats that are read, each known by its files."""


def load_dictionaries(
    path: Path | str,
    *,
    reads: str | None = None,
    writes: str | None = None,
    scale: float | Mapping[str, float] | None = None,
    stream: bool = False,
) -> DictionarySet:
    """Load the dictionaries of a folder, or of the folders in it, by name.

    The format is known by its files: `FORMATS`. An autoencoder is named after its site, a
    transcoder `READS -> WRITES`. `reads` and `writes` say the sites of files that do not say them,
    with `{layer}` for the number of the layer. `scale`, one number or one by site, is what values
    were divided by in training where a file says that they were, 1 where that is in the weights
    already. With `stream` only one dictionary is in memory at a time: each is read again when it
    is asked for.

    Every file is checked before this returns. Raises InputError, with the file and the key, for
    files that are damaged, of another format, or of dictionaries that are not supported."""
    given = Given(reads, writes, scale)
    found: dict[str, Entry] = {}
    for entry in _entries(Path(path), given):
        name = name_of(entry.reads, entry.writes)
        if name in found:
            raise InputError(
                f"{entry.source} and {found[name].source} hold dictionaries of the same site,"
                f" {name}; give the folder of one of them"
            )
        found[name] = entry
    streamed = Streamed(found)
    loaded = {}
    for name in progress(list(found), "dictionaries"):
        placed = streamed[name]
        if not stream:
            loaded[name] = placed
    return streamed if stream else loaded


def name_of(reads: str, writes: tuple[str, ...]) -> str:
    """Return the name of a dictionary in a set, from its sites."""
    if writes == (reads,):
        return reads
    last = f" .. {writes[-1]}" if len(writes) > 1 else ""
    return f"{reads} -> {writes[0]}{last}"


class Streamed(Mapping[str, Placed]):
    """Dictionaries that are read from their files each time that they are asked for."""

    def __init__(self, entries: Mapping[str, Entry]):
        self._entries = entries

    def __getitem__(self, name: str) -> Placed:
        entry = self._entries[name]
        # A transform of torch.func that asks for it would wrap what is read from the file.
        with torch._C._DisableFuncTorch():
            return Placed(build(entry.load()), entry.reads, entry.writes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def build(weights: Weights) -> Dictionary:
    """Return the dictionary of a formula and its tensors, whose storage it takes over."""
    tensors = {
        key: tensor.to(weights.tensors["W_dec"].dtype).contiguous()
        for key, tensor in weights.tensors.items()
    }
    d_in, size = tensors["W_enc"].shape
    skip = tensors.get("W_skip")
    config = {
        "d_in": d_in,
        "size": size,
        "d_out": tensors["W_dec"].shape[1],
        "skip": 0 if skip is None else skip.shape[1],
        **weights.settings,
    }
    with torch.device("meta"):
        made = make(weights.architecture, config)
    made.load_state_dict(tensors, assign=True)
    if weights.scale != 1:
        return fold_scale(made, weights.scale)
    if weights.norm == "none":
        return made
    with torch.device("meta"):
        inner = {"norm": weights.norm, "inner": weights.architecture, "config": config}
        normalised = make("normalised", inner)
    normalised.load_state_dict(
        {f"inner.{key}": value for key, value in tensors.items()}, assign=True
    )
    return normalised


def _entries(path: Path, given: Given) -> list[Entry]:
    if path.is_file():
        raise InputError(f"{path} is a file; give the folder that holds it")
    if not path.is_dir():
        raise InputError(f"no folder {str(path)!r}")
    entries = [entry for known, folder in _known(path) for entry in known.read(folder, given)]
    if not entries:
        raise InputError(
            f"{path} holds no dictionaries of a format that is known: "
            + "; ".join(f"{known.name} ({', '.join(known.files)})" for known in FORMATS)
        )
    return entries


def _known(path: Path) -> list[tuple[_Format, Path]]:
    """Return the folders of a known format from a folder on, in the order of their names.

    Links to folders are not followed, and folders of a known format not searched."""
    found: list[tuple[_Format, Path]] = []
    level, seen = [path], 0
    for _ in range(_DEEPEST):
        inner: list[Path] = []
        for folder in level:
            known = next((known for known in FORMATS if known.matches(folder)), None)
            if known is not None:
                found.append((known, folder))
                continue
            inner += [
                child
                for child in sorted(folder.iterdir())
                if child.is_dir() and not child.is_symlink() and not child.name.startswith(".")
            ]
        seen += len(inner)
        if seen > _MOST_FOLDERS:
            raise InputError(f"{path} holds more than {_MOST_FOLDERS} folders; give one of them")
        level = inner
    return found
