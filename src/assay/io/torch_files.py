"""The state dictionaries that PyTorch writes, read with `weights_only` and no more bytes than the
file holds.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from assay.errors import InputError
from assay.io.files import existing
from assay.memory import require_memory

if TYPE_CHECKING:
    import torch


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a torch file by name.

    Raises InputError for a file that is damaged, larger than the memory, or holds anything that
    only unpickling could restore."""
    import torch

    path = existing(path)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        require_memory(2 * unpacked, f"loading {path}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds objects that only unpickling could restore, which may run any code;"
            " where you trust the file, load it in Python and save its state_dict() alone with"
            " torch.save or safetensors"
        ) from error
    except Exception as error:  # a damaged file can make the readers raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no file of torch.save: {reason}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, not tensors by name")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{path}: the entry {str(name)[:80]!r} is a {type(tensor).__name__}, not a tensor"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise InputError(f"{path}: the tensor {name[:80]!r} is sparse or holds no values")
        # A tensor may repeat its storage, and then be larger than any file.
        if tensor.numel() * tensor.element_size() > unpacked:
            raise InputError(
                f"{path}: the tensor {name[:80]!r} of shape {tuple(tensor.shape)} is larger than"
                " the file"
            )
    return state
