"""Language models in the Hugging Face format: any causal one, from a folder or the hub, ready
for exact hooks and derivatives.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2TokenizerFast
from transformers.utils import logging as transformers_logging

from assay.errors import AssayError, InputError
from assay.io.files import require_finite, require_folder
from assay.targets import families, names

_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    AttributeError,
    ImportError,
    SafetensorError,
    EOFError,
)
_HUB_SECONDS = 6.0
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in eval mode with frozen weights, the tokenizer beside it (None if
    there is none), and its path.
    """

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    path: str

    @property
    def family(self) -> str:
        """The model type of the configuration, such as "gpt2"."""
        return families.model_type(self.model)

    @property
    def vocab_size(self) -> int:
        """The number of rows of the token embedding."""
        embedding: Any = self.model
        return int(embedding.get_input_embeddings().weight.shape[0])

    def site(self, name: str) -> names.SiteRef:
        """Return the site of a TransformerLens name, a module path or a parameter name;
        InputError with the nearest names.
        """
        return names.resolve(self.model, name)

    def site_names(self, *kinds: names.Kind, layers: list[int] | None = None) -> list[str]:
        """Return the TransformerLens names of the given kinds (all of them without any), in the
        order of computation.
        """
        return names.site_names(self.model, kinds or None, layers)

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits (batch, positions, vocabulary) of token ids (batch, positions)."""
        logits: Tensor = self.model(input_ids=ids, attention_mask=attention_mask).logits
        return logits


def load_language_model(
    path: Path | str,
    *,
    tokenizer: Path | str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    attention: str = "eager",
) -> LanguageModel:
    """Load a causal language model from a folder or by its hub name: eval mode, frozen, no
    key-value cache.

    Safetensors are preferred; older torch files are read with `weights_only`, and code beside the
    weights never runs. `dtype` None keeps the stored one. `attention` other than "eager" is faster
    but has no second and no forward derivatives.

    Raises InputError when there is no model, when weights are missing or of another shape (they
    would be random), or when they hold NaN or infinity."""
    require_folder(path)
    unreachable = _why_unreachable(path)
    try:
        with _quiet_unless_terminal():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype="auto" if dtype is None else dtype,
                attn_implementation=attention,
                weights_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                local_files_only=bool(unreachable),
            )
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: its torch files hold more than tensors and are not opened; convert them to"
            " safetensors"
        ) from error
    except _LOADING_ERRORS as error:
        reason = unreachable or _first_line(error)
        raise InputError(
            f"no causal language model could be loaded from {str(path)!r}: {reason}"
        ) from error
    lost = sorted([*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])])
    if lost:
        raise InputError(
            f"{path}: {len(lost)} weights are missing or of another shape, {', '.join(lost[:3])}"
            " among them"
        )
    for key, parameter in model.named_parameters():
        require_finite(parameter, f"{path}: weight {key!r}")
    model.config.use_cache = False
    model.eval().requires_grad_(False)
    found = _load_tokenizer(path, tokenizer, offline=bool(unreachable))
    return LanguageModel(model.to(device), found, str(path))


def save_language_model(folder: Path | str, model: Any, tokenizer: Any) -> Path:
    """Save a model and its tokenizer in the Hugging Face format; the folder appears complete or not
    at all.

    Raises InputError when the folder exists, AssayError when it cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} already exists; give another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary,
            _quiet_unless_terminal(),
        ):
            whole = Path(temporary) / folder.name
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            whole.replace(folder)
    except (OSError, SafetensorError) as error:
        raise AssayError(f"cannot write {folder}: {error}") from error
    return folder


def load_tokenizer(path: Path | str, *, offline: bool = False) -> Any:
    """Load the tokenizer of a folder or hub name, with `offline` from the cache of the hub alone;
    InputError when there is none.
    """
    require_folder(path, *_TOKENIZER_FILES)
    bare = all((Path(path) / name).is_file() for name in ("vocab.json", "merges.txt"))
    bare = bare and not any(
        (Path(path) / name).is_file()
        for name in ("tokenizer_config.json", "tokenizer.json", "config.json")
    )
    try:
        if bare:  # byte pairs as GPT-2 shipped them: nothing in the folder names the class
            return GPT2TokenizerFast.from_pretrained(str(path))
        return AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=offline
        )
    except (
        *_LOADING_ERRORS,
        Exception,
    ) as error:  # the tokenizers package raises bare Exception on malformed files
        raise InputError(
            f"no tokenizer could be loaded from {str(path)!r}: {_first_line(error)}"
        ) from error


def require_context(model: nn.Module, length: int, advice: str = "give shorter prompts") -> None:
    """Raise InputError when prompts of `length` tokens are longer than the model's context."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise InputError(
            f"prompts of {length} tokens do not fit the model's context of {limit}; {advice}"
        )


def require_eager(model: nn.Module) -> None:
    """Raise InputError when a model runs fused attention, which has no second and no
    forward-mode derivatives.
    """
    used = getattr(getattr(model, "config", None), "_attn_implementation", "eager")
    if used != "eager":
        raise InputError(
            f"attention runs as {used!r}, which has no second or forward derivatives; load the"
            " model with attention='eager' (attn_implementation='eager' in from_pretrained)"
        )


def _load_tokenizer(path: Path | str, given: Path | str | None, *, offline: bool) -> Any:
    if given is not None:
        return load_tokenizer(given, offline=bool(_why_unreachable(given)))
    try:
        return load_tokenizer(path, offline=offline)
    except InputError:
        if any((Path(path) / name).is_file() for name in _TOKENIZER_FILES):
            raise  # it is there, and damaged
        return None


def _why_unreachable(path: Path | str) -> str:
    """Return why a hub name can come from the local cache alone, "" when the hub answers or the
    path is a folder.

    transformers asks six times over half a minute before it gives up; this asks once."""
    if Path(path).is_dir():
        return ""
    answers: list[str] = []

    def ask() -> None:
        try:
            get_session().head(f"{constants.ENDPOINT}/{path}/resolve/main/config.json", timeout=5)
            answers.append("")
        except Exception as error:  # of whichever library makes the request
            answers.append(_first_line(error))

    # Looking up a name has no timeout of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_HUB_SECONDS)
    if answers and not answers[0]:
        return ""
    reason = answers[0] if answers else f"no answer in {_HUB_SECONDS:g} s"
    return (
        f"it is no folder here, it is not in the local cache, and {constants.ENDPOINT} cannot be"
        f" reached ({reason})"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Keep progress bars to terminals, and what transformers says of a model to our own errors."""
    shown, level = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    if shown and not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
