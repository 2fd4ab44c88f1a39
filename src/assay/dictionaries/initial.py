"""The state in which a dictionary begins its training."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from assay.dictionaries.linear import Linear
from assay.errors import InputError


@torch.no_grad()
def initialise(
    dictionary: Linear,
    generator: torch.Generator,
    *,
    centre: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    """Draw the decoder's rows uniformly from directions of length one, and make the encoder its
    transpose.

    Where a transcoder's widths differ, the encoder's columns are drawn apart, of length one too;
    a skip connection begins at zero. `centre` (d_out,) is where `b_dec` begins, the mean of what is
    rebuilt; `threshold` where the thresholds begin. The same generator draws the same dictionary in
    every precision. Raises InputError for a centre of another width, and for a threshold where the
    architecture has none."""
    rows = _directions(dictionary.size, dictionary.d_out, generator)
    same = dictionary.d_in == dictionary.d_out
    columns = rows if same else _directions(dictionary.size, dictionary.d_in, generator)
    if centre is not None and centre.shape != (dictionary.d_out,):
        raise InputError(f"centre must have shape ({dictionary.d_out},), got {tuple(centre.shape)}")
    thresholds = getattr(dictionary, "threshold", None)
    if threshold is not None and thresholds is None:
        raise InputError(f"a {dictionary.architecture} dictionary has no threshold to begin with")
    for tensor in (*dictionary.parameters(), *dictionary.buffers()):
        tensor.zero_()
    dictionary.W_dec.copy_(rows)
    dictionary.W_enc.copy_(columns.T)
    if centre is not None:
        dictionary.b_dec.copy_(centre)
    if thresholds is not None and threshold is not None:
        thresholds.fill_(threshold)


@torch.no_grad()
def scale_encoder(dictionary: Linear, x: Float[Tensor, "positions width"]) -> float:
    """Multiply the encoder by the number with which the dictionary rebuilds x best, and return it.

    Several of the directions drawn are near every input, so that what they rebuild together is too
    large. While the encoder's bias and thresholds are zero the features grow in proportion with the
    encoder; with xhat = f W_dec the number is <xhat, x - b_dec> / ||xhat||^2 (least squares over
    all positions and coordinates). The encoder stays as it is where nothing is active."""
    rebuilt = dictionary.encode_training(x) @ dictionary.W_dec
    size = float(rebuilt.square().sum())
    best = float((rebuilt * (x - dictionary.b_dec)).sum()) / size if size > 0 else 1.0
    dictionary.W_enc.mul_(best)
    return best


def _directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(
        count, width, generator=generator, dtype=torch.float64, device=generator.device
    )
    return drawn / drawn.norm(dim=1, keepdim=True)
