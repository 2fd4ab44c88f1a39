"""What a direction of the residual stream promotes, read through final norm and unembedding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from assay.errors import InputError
from assay.targets.families import FAMILIES, find_family, model_type

_ROWS = 256


@torch.no_grad()
def promoted_tokens(
    model: nn.Module, directions: Float[Tensor, "rows width"], count: int
) -> tuple[Int[Tensor, "rows count"], Float[Tensor, "rows count"]]:
    """Return the tokens whose logits a direction raises most, and by how much, the most first:

        logits = W_U norm(v) - W_U norm(0)

    with the model's own final norm (its centring and weights; the bias drops out), which sets the
    length of every direction to that of a whole residual stream: logits say an order and relative
    sizes, and no effect (the logit lens). Negated directions give what is lowered most.

    Raises InputError for a family whose final norm is not known, a model without an unembedding,
    and directions of another width."""
    family, head = find_family(model), getattr(model, "get_output_embeddings", lambda: None)()
    if family is None or not isinstance(head, nn.Module):
        raise InputError(
            f"promoted tokens need a final norm and an unembedding that are known"
            f" ({', '.join(FAMILIES)}); this model is of family {model_type(model)!r}"
        )
    norm = model.get_submodule(family.final_norm)
    weight: Tensor = head.weight  # type: ignore[assignment]
    width = int(weight.shape[1])
    if directions.ndim != 2 or directions.shape[1] != width:
        raise InputError(f"directions must be (rows, {width}), got shape {tuple(directions.shape)}")
    given = directions.to(weight)
    # A unit mean square, at which no epsilon of the norm counts.
    size = given.square().mean(1, keepdim=True).sqrt()
    given = given / torch.where(size > 0, size, torch.ones_like(size))
    nothing = norm(torch.zeros_like(given[:1]))
    tokens, values = [], []
    for some in given.split(_ROWS):
        best = ((norm(some) - nothing) @ weight.T).topk(min(count, len(weight)), dim=1)
        tokens.append(best.indices)
        values.append(best.values)
    return torch.cat(tokens), torch.cat(values)
