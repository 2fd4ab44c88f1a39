"""Scales and norms moved into the weights: another dictionary that computes the same."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor

from assay.dictionaries.base import Dictionary
from assay.dictionaries.batchtopk import BatchTopK
from assay.dictionaries.gated import Gated
from assay.dictionaries.identity import Identity
from assay.dictionaries.jumprelu import JumpReLU
from assay.dictionaries.linear import Linear
from assay.dictionaries.topk import TopK
from assay.errors import InputError

D = TypeVar("D", bound=Dictionary)


@torch.no_grad()
def fold_scale(dictionary: D, scale: float, written: float | Tensor | None = None) -> D:
    """Return the dictionary, for values as they are, of one that was trained on `x / scale`.

    `D'(x) = written * D(x / scale)`, and the features of x are those of `x / scale`. `written` is
    the scale of what is rebuilt, one number or one per column (d_out,), by default `scale`.
    Raises InputError for scales that are not above zero and finite, for two scales where the bias
    that is rebuilt is also subtracted, and for scales per column where features are chosen by the
    norms of their decoder rows."""
    out = scale if written is None else written
    scales = out if isinstance(out, Tensor) else torch.tensor(out, dtype=torch.float64)
    if not (scale > 0 and math.isfinite(scale)):
        raise InputError(f"scale must be above 0 and finite, got {scale}")
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise InputError("written must hold scales that are above 0 and finite")
    if scales.ndim and scales.shape != (dictionary.d_out,):
        raise InputError(
            f"written must be one number or have shape ({dictionary.d_out},), got"
            f" {tuple(scales.shape)}"
        )
    subtracts = isinstance(dictionary, Identity) or getattr(dictionary, "subtract", False)
    if subtracts and bool((scales != scale).any()):
        raise InputError("an autoencoder is rebuilt at the scale at which it reads")
    folded = copy.deepcopy(dictionary)
    if isinstance(folded, Identity):
        return folded
    if not isinstance(folded, Linear):
        raise InputError(
            f"a scale cannot be folded into a dictionary of architecture {dictionary.architecture}"
        )
    if isinstance(folded, TopK | BatchTopK) and folded.by_norm and scales.ndim:
        raise InputError("written must be one number where features are chosen by_norm")
    _multiply(folded.W_enc, 1 / scale)
    _multiply(folded.W_dec, scales)
    _multiply(folded.b_dec, scales)
    if folded.W_skip is not None:
        columns = scales[: folded.W_skip.shape[1]] if scales.ndim else scales
        _multiply(folded.W_skip, columns / scale)
    if isinstance(folded, BatchTopK) and folded.by_norm:
        _multiply(folded.threshold, scales)
    return folded


@torch.no_grad()
def fold_norms(dictionary: D) -> D:
    """Return the dictionary whose decoder rows have length one and which rebuilds the same: each
    feature is multiplied by the norm of its row.

    Features that were chosen `by_norm` are then chosen by their values. Raises InputError where
    features are chosen by their values already and the norms differ, as others would be chosen."""
    folded = copy.deepcopy(dictionary)
    if not isinstance(folded, Linear):
        raise InputError(
            f"norms cannot be folded into a dictionary of architecture {dictionary.architecture}"
        )
    norms = folded.W_dec.double().norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    if isinstance(folded, TopK | BatchTopK):
        if not folded.by_norm and bool(norms.max() > norms.min() * 1.0001):
            raise InputError(
                "the decoder's norms differ, and folding them would change which features are the"
                " largest"
            )
        if isinstance(folded, BatchTopK) and not folded.by_norm:
            _multiply(folded.threshold, norms.mean())
        folded.by_norm = False
    _multiply(folded.W_enc, norms)
    _multiply(folded.b_enc, norms)
    _multiply(folded.W_dec, 1 / norms[:, None])
    if isinstance(folded, JumpReLU):
        _multiply(folded.threshold, norms)
    if isinstance(folded, Gated):
        _multiply(folded.b_mag, norms)
    return folded


@torch.no_grad()
def as_jumprelu(dictionary: BatchTopK) -> JumpReLU:
    """Return the JumpReLU dictionary with the features that a BatchTopK one has after training."""
    made = JumpReLU(
        dictionary.d_in,
        dictionary.size,
        dictionary.d_out,
        subtract=dictionary.subtract,
        skip=0 if dictionary.W_skip is None else dictionary.W_skip.shape[1],
    ).to(dictionary.W_enc)
    state = dictionary.state_dict()
    thresholds = dictionary.threshold.double().expand(dictionary.size)
    if dictionary.by_norm:
        norms = dictionary.W_dec.double().norm(dim=1)
        never = torch.finfo(dictionary.W_enc.dtype).max
        thresholds = torch.where(norms > 0, thresholds / norms, never)
    made.load_state_dict({**state, "threshold": thresholds.to(dictionary.W_enc)})
    return made


def _multiply(tensor: Tensor, factor: Tensor | float) -> None:
    """Multiply a tensor in place, in float64."""
    tensor.copy_(tensor.double() * factor)
