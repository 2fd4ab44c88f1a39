"""Where the training of a crosscoder may start: at codes that an explanation proposes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from assay.errors import InputError
from assay.mechanisms.crosscoder.coder import Crosscoder

_QUIET = -0.5  # the encoder's bias of a feature that no proposed code describes


@torch.no_grad()
def start_at_codes(
    found: Crosscoder,
    states: Float[Tensor, "rows layers width"],
    codes: Float[Tensor, "rows some"],
    scales: Float[Tensor, " layers"],
    *,
    ridge: float = 1e-6,
) -> None:
    """Set the first features of a crosscoder, in scaled coordinates, to what proposed codes say.

    The encoder is the ridge regression of the codes on the states; the decoder that of the states
    on what this encoder then finds, so that the codes are the encoder's own from the start. The
    other features begin silent. Raises InputError for more codes than features, and other rows."""
    rows, some = codes.shape
    if some > found.size or rows != len(states):
        raise InputError(
            f"codes have shape {tuple(codes.shape)}; at most {found.size} features at"
            f" {len(states)} rows are accepted"
        )
    flat = (states * scales[:, None]).flatten(1).double()
    read = _regress(flat, codes.double(), ridge)
    found.W_enc.mul_(0.1)
    found.W_dec.mul_(0.1)
    found.b_enc.fill_(_QUIET)
    layers, width = len(found.sites), found.width
    found.W_enc[:, :, :some] = read[:-1].reshape(layers, width, some).to(found.W_enc)
    found.b_enc[:some] = read[-1].to(found.b_enc)
    own = torch.relu(flat @ read[:-1] + read[-1])
    written = _regress(own, flat, ridge)
    found.W_dec[:some] = written[:-1].reshape(some, layers, width).to(found.W_dec)
    found.b_dec.copy_(written[-1].reshape(layers, width).to(found.b_dec))


def _regress(inputs: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """Return the coefficients of a ridge regression, that of the constant last."""
    ones = torch.ones(len(inputs), 1, dtype=inputs.dtype)
    known = torch.cat([inputs, ones], 1)
    square = known.T @ known
    square.diagonal().add_(ridge * len(inputs))
    return torch.linalg.solve(square, known.T @ wanted)
