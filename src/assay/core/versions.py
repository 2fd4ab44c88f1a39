"""What tells that weights were replaced or written to since they were looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from assay.errors import InputError

Held = nn.Module | Tensor


def versions(held: Held) -> list[tuple[object, ...]]:
    """Return what changes when a parameter or a saved buffer of a module, or a tensor, is replaced
    or written to; writes through `.data` alone leave no trace.
    """
    return [
        (
            *(id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape),
            None if tensor.is_inference() else tensor._version,
        )
        for tensor in _tensors(held)
    ]


class Unchanged:
    """The versions of weights, by the words for them, as they were when this was made."""

    def __init__(self, held: Mapping[str, Held]) -> None:
        self._held = dict(held)
        self._seen = {words: versions(one) for words, one in self._held.items()}

    def require(self, what: str) -> None:
        """Raise InputError when weights were changed since."""
        for words, one in self._held.items():
            if versions(one) != self._seen[words]:
                raise InputError(
                    f"{words} changed after the {what} were bound to a batch, and what was read"
                    " there is not theirs any more: bind them again"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy holds copies of the weights.
        return Unchanged, (self._held,)


def _tensors(held: Held) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
        return
    for module in held.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter
        # Buffers that are not saved may be caches, which a forward pass writes to.
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer
