"""A residual network of ReLU blocks with biases, and the task of the largest of two tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from assay.errors import InputError
from assay.io.files import load_tensors, save_tensors
from assay.targets.toys import draw_linear


class ResidualReLU(nn.Module):
    """`r_0 = E x + b`, then `r_{l+1} = r_l + W_out relu(W_in r_l + b_in) + b_out` in every block,
    read out as `U r_L + b_U`.

    The residual states are the values at the sites "embed", "blocks.0", "blocks.1", ..."""

    def __init__(
        self,
        inputs: int,
        width: int,
        hidden: int,
        outputs: int,
        blocks: int = 1,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if min(inputs, width, hidden, outputs, blocks) < 1:
            raise InputError(
                "inputs, width, hidden, outputs and blocks must be at least 1, got"
                f" {inputs}, {width}, {hidden}, {outputs} and {blocks}"
            )
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.embed = draw_linear(inputs, width, generator)
        self.blocks = nn.ModuleList(_Block(width, hidden, generator) for _ in range(blocks))
        self.unembed = draw_linear(width, outputs, generator)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of the residual states, in the order of the network."""
        return ("embed", *(f"blocks.{index}" for index in range(len(self.blocks))))

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        stream = self.embed(x)
        for block in self.blocks:
            stream = block(stream)
        found: Tensor = self.unembed(stream)
        return found


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, generator: torch.Generator):
        super().__init__()
        self.mlp_in = draw_linear(width, hidden, generator)
        self.mlp_out = draw_linear(hidden, width, generator)
        with torch.no_grad():
            self.mlp_out.weight.mul_(0.5)

    def forward(self, stream: Tensor) -> Tensor:
        found: Tensor = stream + self.mlp_out(torch.relu(self.mlp_in(stream)))
        return found


def pairs_of_tokens(
    vocabulary: int,
) -> tuple[Float[Tensor, "pairs two_vocabularies"], Int[Tensor, " pairs"]]:
    """Return all ordered pairs (a, b) of tokens as two one-hot vectors side by side, and the larger
    token of each; the pair (a, b) is in row `a * vocabulary + b`.
    """
    tokens = torch.cartesian_prod(torch.arange(vocabulary), torch.arange(vocabulary))
    inputs = nn.functional.one_hot(tokens, vocabulary).flatten(1).float()
    return inputs, tokens.max(1).values


def save(path: Path | str, model: ResidualReLU) -> Path:
    """Write the weights as safetensors, float32, under the names of the modules."""
    return save_tensors(path, {name: entry.float() for name, entry in model.state_dict().items()})


def load(path: Path | str) -> ResidualReLU:
    """Read what `save` wrote, or a file with the same names; InputError for missing or unknown
    tensors and other shapes.
    """
    return from_tensors(load_tensors(path), str(path))


def from_tensors(tensors: Mapping[str, Tensor], where: str = "tensors") -> ResidualReLU:
    """Build the network that a state dict belongs to; InputError as `load` raises it."""
    blocks = sum(name.endswith(".mlp_in.weight") for name in tensors)
    first = tensors.get("blocks.0.mlp_in.weight")
    embed, unembed = tensors.get("embed.weight"), tensors.get("unembed.weight")
    if first is None or embed is None or unembed is None:
        raise InputError(
            f"{where}: a residual ReLU network needs embed.weight, blocks.0.mlp_in.weight and"
            " unembed.weight"
        )
    if any(entry.ndim != 2 for entry in (first, embed, unembed)):
        raise InputError(f"{where}: the weights must be matrices")
    model = ResidualReLU(embed.shape[1], embed.shape[0], first.shape[0], unembed.shape[0], blocks)
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where} is no residual ReLU network: {reason[:300]}") from error
    return model.eval()
