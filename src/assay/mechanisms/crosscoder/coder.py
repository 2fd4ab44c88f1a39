"""The unbound kind: one dictionary over the residual states of several layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from assay.core.kind import Kind, Reference
from assay.core.target import Batch, Target
from assay.errors import InputError, unknown
from assay.io.files import hash_of
from assay.memory import require_memory

if TYPE_CHECKING:
    from assay.mechanisms.crosscoder.gates import CrosscoderMechanisms

Activation = Literal["relu", "jumprelu", "batch_topk"]
States = Float[Tensor, "*rows layers width"]
_BANDWIDTH = 0.1  # around a threshold: where its pseudo-derivative is not zero


class Crosscoder(nn.Module, Kind):
    """Features of several residual states at once (Lindsey et al. 2024, Sparse Crosscoders).

    `z = act(sum_l r_l W_enc[l] + b_enc) >= 0` and `rhat_l = sum_f z_f W_dec[f, l] + b_dec[l]`, with
    W_enc (layers, width, size), W_dec (size, layers, width), and the states r_l of the named sites.
    Activations: "relu"; "jumprelu", which keeps what exceeds a threshold per feature, trained by
    the rectangle pseudo-derivative (arXiv 2407.14435); "batch_topk", which in training keeps the
    `k` largest entries per row over the whole batch (arXiv 2412.06410) and afterwards whatever
    exceeds the one threshold that training measured. `model_hash` is the digest of the network that
    it was trained on, or empty. Sheet: crosscoder_and_guard."""

    name = "crosscoder"
    threshold: Tensor

    def __init__(
        self,
        sites: Sequence[str],
        width: int,
        size: int,
        activation: Activation = "relu",
        *,
        k: int = 8,
        model_hash: str = "",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not sites or len(set(sites)) < len(sites):
            raise InputError(f"sites must be different names, at least one, got {list(sites)}")
        if activation not in get_args(Activation):
            raise unknown("activation of a crosscoder", activation, get_args(Activation))
        if min(width, size, k) < 1:
            raise InputError(f"width, size and k must be at least 1, got {width}, {size} and {k}")
        entries = size * len(sites) * width
        require_memory(8 * entries, f"a crosscoder of {size:,} features")
        self.sites, self.activation, self.k = tuple(sites), activation, k
        self.model_hash = model_hash
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        drawn = torch.randn(size, len(sites), width, generator=generator)
        drawn = drawn / drawn.flatten(1).norm(dim=1)[:, None, None]
        self.W_dec = nn.Parameter(drawn)
        self.W_enc = nn.Parameter(drawn.permute(1, 2, 0).clone())
        self.b_enc = nn.Parameter(torch.zeros(size))
        self.b_dec = nn.Parameter(torch.zeros(len(sites), width))
        if activation == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(size))
        else:
            self.register_buffer("threshold", torch.zeros(1))

    @property
    def size(self) -> int:
        """The number of features."""
        return int(self.W_dec.shape[0])

    @property
    def width(self) -> int:
        return int(self.W_dec.shape[2])

    def before(self, states: States) -> Float[Tensor, "*rows size"]:
        """Return the features before their activation function."""
        return torch.einsum("...ld,ldf->...f", states, self.W_enc) + self.b_enc

    def encode(self, states: States) -> Float[Tensor, "*rows size"]:
        """Return the features of residual states, none below zero."""
        before = self.before(states)
        kept = torch.relu(before)
        if self.activation == "relu":
            return kept
        if self.activation == "batch_topk" and self.training:
            rows = before.flatten(0, -2).shape[0]
            least = kept.flatten().topk(min(self.k * rows, kept.numel())).values[-1]
            return kept * (kept >= least.detach())
        above = (before > self.threshold).to(kept)
        if self.activation == "jumprelu" and self.training:
            near = (0.5 + (before.detach() - self.threshold) / _BANDWIDTH).clamp(0, 1)
            above = above + (near - near.detach())
        return kept * above

    def decode(self, codes: Float[Tensor, "*rows size"]) -> States:
        """Return the residual states that codes rebuild."""
        return torch.einsum("...f,fld->...ld", codes, self.W_dec) + self.b_dec

    def forward(self, states: States) -> States:
        return self.decode(self.encode(states))

    def norms(self) -> Float[Tensor, "size layers"]:
        """Return the norm of every feature's decoder at every layer."""
        return self.W_dec.detach().norm(dim=2)

    def first_layers(self, share: float) -> Tensor:
        """Return, for every feature, the first layer at which its decoder's norm reaches a share of
        its largest.
        """
        norms = self.norms()
        return (norms >= share * norms.amax(1, keepdim=True)).int().argmax(1)

    def require_network(self, model: nn.Module, where: str = "the crosscoder") -> None:
        """Raise InputError for another network than the one whose digest the crosscoder knows."""
        if self.model_hash and hash_of(model) != self.model_hash:
            raise InputError(
                f"{where} was trained on another network (the digest of the weights differs); load"
                " the one that it belongs to"
            )

    def bind(
        self, target: Target, batch: Batch, reference: Reference | None = None
    ) -> CrosscoderMechanisms:
        """Return the features as gates on a batch, each acting where it first appears; see
        `assay.crosscoder` for the other rules.

        The base is the biases. Raises InputError for a reference, and where the crosscoder does not
        fit the target."""
        from assay.mechanisms.crosscoder.bind import crosscoder

        self.refuse_reference(reference)
        return crosscoder(target, batch, self)
