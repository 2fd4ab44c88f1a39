"""Networks of TransformerLens as targets, known by what they offer."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


def is_lens(model: Any) -> bool:
    """Whether a module offers what a `HookedTransformer` or a bridge of TransformerLens does."""
    return (
        isinstance(model, nn.Module)
        and isinstance(getattr(model, "hook_dict", None), Mapping)
        and hasattr(getattr(model, "cfg", None), "n_ctx")
        and hasattr(model, "run_with_hooks")
    )


class Lensed(nn.Module):
    """A network of TransformerLens that takes the inputs of a Hugging Face model; its modules keep
    their paths, and its hook points their names.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        for name, child in inner.named_children():
            self.add_module(name, child)
        self.__dict__["inner"] = inner.eval()  # no module of its own: paths stay those of `inner`
        cfg: Any = inner.cfg
        self.config = SimpleNamespace(
            model_type=type(inner).__name__,
            max_position_embeddings=int(cfg.n_ctx),
            vocab_size=int(cfg.d_vocab),
        )

    @property
    def hook_dict(self) -> Mapping[str, nn.Module]:
        found: Mapping[str, nn.Module] = self.__dict__["inner"].hook_dict
        return found

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.__dict__["inner"].W_E)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        # Padding behind a text is not seen by a causal network, and a mask would move positions.
        mask = attention_mask
        if mask is not None and bool((mask[:, :-1] >= mask[:, 1:]).all()):
            mask = None
        more = {} if mask is None else {"attention_mask": mask}
        logits: Tensor = self.__dict__["inner"](input_ids, return_type="logits", **more)
        return logits


def hook_point(model: nn.Module, name: str) -> str | None:
    """Return the path of the module that is a hook point of a name, None where there is none."""
    points = getattr(model, "hook_dict", None)
    wanted = points.get(name) if isinstance(points, Mapping) else None
    if wanted is None:
        return None
    return next((path for path, module in model.named_modules() if module is wanted), None)
