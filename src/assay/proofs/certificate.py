"""Certificates: the envelope of every claim, with the untrusted advice to check it.

A certificate is a JSON file `NAME.json` and, where the claim takes advice, a safetensors file
beside it, `NAME.advice.safetensors`:

    format       "assay-certificate/1"
    task         what the claim is about, such as "max-of-k"; it decides the fields of its own
    model        what the claim says of its model: a digest and sizes
    strategy     name of the search that found the advice (a label: nothing follows from it)
    rule         how the claim is checked
    level        "real" (the network in real arithmetic), "float32" (as executed in float32, in any
                 order of summation) or "float64" (a search without proof: a checker refuses it)
    options      the options of the rule
    assumptions  what the level takes for granted, such as {"exp_ulp": u} at level float32: the
                 exponential errs by at most u units in the last place
    claim        the numbers that are claimed: exact, as decimal strings
    advice       {"file": name or null, "sha256": digest of that file or null}

and beside them the fields that only the task needs. A checker believes the weights and nothing
else: it recomputes the claim, and accepts if and only if what it finds supports it. Digests only
tell files apart. The tasks describe their own fields, rules and claims:
`assay.proofs.max_of_k.certificate`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from assay.errors import InputError
from assay.io import files
from assay.io.ours import require_ours

FORMAT = "assay-certificate/1"
ADVICE = ".advice.safetensors"
MARK = {"advice": FORMAT}  # in the header of an advice file: it may be overwritten


def weights_digest(weights: Any, names: Mapping[str, str]) -> str:
    """Return the SHA-256 of float32 weights, the arrays of a dataclass whose fields have `names`
    in a model file: the name, the shape and the bytes of each, in order.
    """
    digest = hashlib.sha256()
    for entry in fields(weights):
        array = np.ascontiguousarray(getattr(weights, entry.name), dtype="<f4")
        digest.update(f"{names[entry.name]}\n{'x'.join(map(str, array.shape))}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Certificate:
    """A claim about a model and the advice to check it with.

    `advice` holds arrays by name, `own` the fields that only the task has."""

    task: str
    model: Mapping[str, Any]
    strategy: str
    rule: str
    level: str
    claim: Mapping[str, str]
    advice: Mapping[str, np.ndarray] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    assumptions: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)

    def entry(self, advice: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON object, given what it says of its advice file; InputError where a field
        of the task has the name of one that all certificates have.
        """
        common = {
            "format": FORMAT,
            "task": self.task,
            "model": self.model,
            "strategy": self.strategy,
            "rule": self.rule,
            "level": self.level,
            "options": self.options,
            "assumptions": self.assumptions,
            "claim": self.claim,
            "advice": advice,
        }
        taken = sorted(common.keys() & self.own.keys())
        if taken:
            raise InputError(f"task {self.task!r}: its own fields {taken} are those of all tasks")
        return common | dict(self.own)


def advice_path(path: Path) -> Path:
    """Return where the advice of a certificate goes."""
    return path.with_suffix(ADVICE)


def check_destination(path: Path | str, inputs: Iterable[Path | str] = ()) -> Path:
    """Return the path of a certificate to be; raises InputError, before any work, for another
    suffix than `.json`, and where a file would be overwritten that is an input or no certificate of
    ours.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise InputError(f"a certificate is a .json file, got {path.name!r}")
    for target in (path, advice_path(path)):
        if any(_same(target, Path(given)) for given in inputs):
            raise InputError(f"{target} is an input and would be overwritten; choose another name")
    require_ours(advice_path(path), MARK)
    return require_ours(path, {"format": FORMAT})


def write(path: Path | str, certificate: Certificate, inputs: Iterable[Path | str] = ()) -> Path:
    """Write a certificate to `path` (JSON) and its advice beside it (safetensors); return the path.

    Raises InputError as `check_destination` does.
    """
    path = check_destination(path, inputs)
    stored: dict[str, Any] = {"file": None, "sha256": None}
    if certificate.advice:
        arrays = {
            name: torch.from_numpy(np.array(array, order="C"))
            for name, array in certificate.advice.items()
        }
        advice = files.save_tensors(advice_path(path), arrays, MARK)
        digest = hashlib.sha256(advice.read_bytes()).hexdigest()
        stored = {"file": advice.name, "sha256": digest}
    return files.write_json(path, certificate.entry(stored))


def _same(target: Path, given: Path) -> bool:
    if target.exists() and given.exists():
        return target.samefile(given)
    return os.path.realpath(target) == os.path.realpath(given)
