"""Max-of-K: one-layer attention-only transformers that name the largest of K tokens (arXiv
2406.11779).

The network has learned positions, one head, an untied unembedding, no normalisation, and is read at
the last position only. Parameters carry the names of TransformerLens, so that checkpoints written
there load here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from assay.errors import InputError
from assay.io import files

_ATTENTION = "blocks.0.attn."
NAMES = {
    "E": "embed.W_E",
    "P": "pos_embed.W_pos",
    "Q": _ATTENTION + "W_Q",
    "K": _ATTENTION + "W_K",
    "V": _ATTENTION + "W_V",
    "O": _ATTENTION + "W_O",
    "U": "unembed.W_U",
    "q_bias": _ATTENTION + "b_Q",
    "k_bias": _ATTENTION + "b_K",
    "v_bias": _ATTENTION + "b_V",
    "o_bias": _ATTENTION + "b_O",
    "u_bias": "unembed.b_U",
}
_BUFFERS = (_ATTENTION + "mask", _ATTENTION + "IGNORE")


@dataclass(frozen=True)
class Weights:
    """The float32 tensors of a max-of-K transformer as arrays; absent biases are zeros.

    Shapes: E (vocabulary, width), P (positions, width), Q K V (width, head), O (head, width), U
    (width, vocabulary)."""

    E: np.ndarray
    P: np.ndarray
    Q: np.ndarray
    K: np.ndarray
    V: np.ndarray
    O: np.ndarray
    U: np.ndarray
    q_bias: np.ndarray
    k_bias: np.ndarray
    v_bias: np.ndarray
    o_bias: np.ndarray
    u_bias: np.ndarray

    @property
    def vocabulary(self) -> int:
        return int(self.E.shape[0])

    @property
    def positions(self) -> int:
        return int(self.P.shape[0])

    @property
    def width(self) -> int:
        return int(self.E.shape[1])

    @property
    def head(self) -> int:
        return int(self.Q.shape[1])


class _Embedding(nn.Module):
    def __init__(self, table: Tensor):
        super().__init__()
        self.W_E = nn.Parameter(table)


class _Positions(nn.Module):
    def __init__(self, table: Tensor):
        super().__init__()
        self.W_pos = nn.Parameter(table)


class _Attention(nn.Module):
    def __init__(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor):
        super().__init__()
        self.W_Q, self.W_K, self.W_V, self.W_O = (
            nn.Parameter(matrix) for matrix in (query, key, value, output)
        )

    def forward(self, residual: Tensor) -> Tensor:
        query = residual[:, -1] @ self.W_Q
        scores = ((residual @ self.W_K) @ query[:, :, None])[..., 0] / math.sqrt(query.shape[-1])
        return (torch.softmax(scores, dim=-1)[:, None] @ (residual @ self.W_V))[:, 0] @ self.W_O


class _Block(nn.Module):
    def __init__(self, attention: _Attention):
        super().__init__()
        self.attn = attention

    def forward(self, residual: Tensor) -> Tensor:
        return residual[:, -1] + self.attn(residual)


class _Unembedding(nn.Module):
    def __init__(self, matrix: Tensor):
        super().__init__()
        self.W_U = nn.Parameter(matrix)


class MaxOfK(nn.Module):
    """A one-layer, one-head attention-only transformer; `forward` takes tokens (batch, K) and
    returns the last position's logits.
    """

    def __init__(
        self,
        vocabulary: int = 64,
        positions: int = 4,
        width: int = 32,
        head: int | None = None,
        *,
        generator: torch.Generator,
    ):
        super().__init__()
        head = width if head is None else head
        for name, size in {
            "vocabulary": vocabulary,
            "positions": positions,
            "width": width,
            "head": head,
        }.items():
            if size < 1:
                raise InputError(f"{name} must be at least 1, got {size}")

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * (0.8 / math.sqrt(width))

        self.embed = _Embedding(draw(vocabulary, width))
        self.pos_embed = _Positions(draw(positions, width))
        attention = _Attention(
            draw(width, head), draw(width, head), draw(width, head), draw(head, width)
        )
        self.blocks = nn.ModuleList([_Block(attention)])
        self.unembed = _Unembedding(draw(width, vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        residual = self.embed.W_E[tokens] + self.pos_embed.W_pos
        return self.blocks[0](residual) @ self.unembed.W_U


def weights_of(model: MaxOfK) -> Weights:
    """Return the weights of a model as arrays."""
    return from_tensors(model.state_dict(), "the model")


def save(path: Path | str, model: MaxOfK | Weights) -> Path:
    """Write the weights to a safetensors file under the names of TransformerLens."""
    weights = weights_of(model) if isinstance(model, MaxOfK) else model
    entries = {NAMES[field.name]: getattr(weights, field.name) for field in fields(weights)}
    kept = {
        name: torch.from_numpy(array)
        for name, array in entries.items()
        if ".b_" not in name or array.any() or np.signbit(array).any()  # -0.0 is another digest
    }
    return files.save_tensors(path, kept)


def load(path: Path | str) -> Weights:
    """Read the weights of a max-of-K transformer; InputError when a tensor is missing,
    misshapen, unknown, or not finite.
    """
    return from_tensors(files.load_tensors(path), str(path))


def from_tensors(tensors: Mapping[str, Tensor], where: str = "the tensors") -> Weights:
    """Check named tensors and return them as float32 arrays.

    A head axis of size one is dropped. Values that float32 cannot hold are refused: the proof would
    be of another network."""
    known = {*NAMES.values(), *_BUFFERS}
    for name in tensors:
        if name not in known:
            why = (
                "normalisation layers"
                if ".ln" in name or name.startswith("ln")
                else "what it computes"
            )
            raise InputError(
                f"{where}: unknown tensor {name!r}; a proof would not cover {why} (known:"
                f" {', '.join(NAMES.values())})"
            )
    missing = [
        name for key, name in NAMES.items() if not key.endswith("_bias") and name not in tensors
    ]
    if missing:
        raise InputError(f"{where}: missing tensor{'s' * (len(missing) > 1)} {', '.join(missing)}")
    found = {
        key: _array(tensors[name], name, where) for key, name in NAMES.items() if name in tensors
    }
    for key in ("Q", "K", "V", "O"):
        found[key] = _without_head(found[key], 3, NAMES[key], where)
    for key in ("q_bias", "k_bias", "v_bias"):
        if key in found:
            found[key] = _without_head(found[key], 2, NAMES[key], where)
    for key in ("E", "P", "Q"):
        if found[key].ndim != 2 or 0 in found[key].shape:
            raise InputError(
                f"{where}: {NAMES[key]} must be a matrix, got shape {found[key].shape}"
            )
    (vocabulary, width), head = found["E"].shape, found["Q"].shape[1]
    if vocabulary < 2 or len(found["P"]) < 2:
        raise InputError(
            f"{where}: vocabulary {vocabulary}, positions {len(found['P'])}; the largest of K"
            " tokens is a question where both are at least 2"
        )
    shapes: dict[str, tuple[int, ...]] = {
        "P": (found["P"].shape[0], width),
        **dict.fromkeys("QKV", (width, head)),
        "O": (head, width),
        "U": (width, vocabulary),
        **dict.fromkeys(("q_bias", "k_bias", "v_bias"), (head,)),
        "o_bias": (width,),
        "u_bias": (vocabulary,),
    }
    for key, shape in shapes.items():
        array = found.setdefault(key, np.zeros(shape, np.float32))
        if array.shape != shape:
            raise InputError(
                f"{where}: {NAMES[key]} must have shape {shape} (embed.W_E sets the sizes), got"
                f" {array.shape}"
            )
    return Weights(**found)


def _array(tensor: Tensor, name: str, where: str) -> np.ndarray:
    if not tensor.is_floating_point():
        raise InputError(f"{where}: {name} must be floating point, got {tensor.dtype}")
    files.require_finite(tensor, f"{where}: {name}")
    narrow = tensor.detach().to(torch.float32)
    if not torch.equal(narrow.to(tensor.dtype), tensor):
        raise InputError(
            f"{where}: {name} ({tensor.dtype}) does not fit float32; cast the weights and prove"
            " that network"
        )
    # A copy: training the model further must not change what is being proved.
    return np.array(narrow.cpu().numpy(), order="C", copy=True)


def _without_head(array: np.ndarray, axes: int, name: str, where: str) -> np.ndarray:
    if array.ndim != axes:
        return array
    if array.shape[0] != 1:
        raise InputError(
            f"{where}: {name} has {array.shape[0]} heads; the proofs are about one head"
        )
    return array[0]
