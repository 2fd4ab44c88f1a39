"""A dictionary: a few active features that rebuild a vector, and where in a network it stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from assay.errors import InputError


class Dictionary(nn.Module, ABC):
    """Features of a vector, `f = encode(x)`, and what they rebuild, `f W_dec + rest(x)`.

    Every architecture holds the decoder `W_dec` (size, d_out) and its bias `b_dec` (d_out,), and is
    rebuilt from `config()` and its state dict. `encode` is made of plain tensor operations, so that
    functional transforms pass through it. Sheet: features."""

    architecture: ClassVar[str]
    W_dec: Tensor
    b_dec: Tensor

    @abstractmethod
    def encode(self, x: Float[Tensor, "*positions d_in"]) -> Float[Tensor, "*positions size"]:
        """Return the features of vectors; inactive ones are exactly zero."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the arguments, JSON alone, that make a dictionary of this shape."""

    @property
    @abstractmethod
    def d_in(self) -> int:
        """The width of the vectors that are read."""

    @property
    def d_out(self) -> int:
        return int(self.W_dec.shape[1])

    @property
    def size(self) -> int:
        """The number of features."""
        return int(self.W_dec.shape[0])

    def rest(self, x: Float[Tensor, "*positions d_in"]) -> Float[Tensor, "*#positions d_out"]:
        """Return what is rebuilt without features: the bias, and the skip connection of those that
        have one.
        """
        return self.b_dec

    def decode(self, codes: Float[Tensor, "*positions size"], x: Tensor) -> Tensor:
        """Return `codes W_dec + rest(x)`, the vectors that are rebuilt from features of `x`."""
        return codes @ self.W_dec + self.rest(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), x)


@dataclass(frozen=True)
class Placed:
    """A dictionary at its place: it reads the value at `reads` and rebuilds those at `writes`.

    An autoencoder reads where it writes; a transcoder reads what goes into an MLP and writes what
    comes out; a cross-layer transcoder writes at several sites, and its decoder (size, d_out) has
    the decoders of its sites side by side in `d_out`. Names are those of `targets.names`: of
    TransformerLens, or module paths.

    Raises InputError without a site, and where the decoder does not divide over the sites."""

    dictionary: Dictionary
    reads: str
    writes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.writes:
            raise InputError("a dictionary must write at one site at least")
        if self.dictionary.d_out % len(self.writes):
            raise InputError(
                f"a decoder of width {self.dictionary.d_out} does not divide over"
                f" {len(self.writes)} sites"
            )

    @property
    def width(self) -> int:
        """The width of the value at each site that is written."""
        return self.dictionary.d_out // len(self.writes)


DictionarySet = Mapping[str, Placed]
"""Dictionaries by a name of their own, for an autoencoder that of its site."""
