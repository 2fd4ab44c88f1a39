"""Loading language models from disk: exact logits, untouched by gates that do nothing, and every
refusal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from assay.core.sites import run_edited
from assay.errors import InputError
from assay.targets import language, names

SMALL = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": SMALL,
    "gpt_neox": {**SMALL, "intermediate_size": 40},
    "llama": {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2},
    "mistral": {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2},
    "qwen2": {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2},
    "qwen3": {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 6},
    "gemma2": {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 6},
    "opt": {
        "vocab_size": 31,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
    },
}
IDS = torch.arange(1, 13).reshape(2, 6)


def save(family: str, folder: Path) -> torch.Tensor:
    config = CONFIG_MAPPING[family](
        **SETTINGS[family], bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(folder)
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize("family", SETTINGS)
def test_every_family_comes_back_and_idle_edits_change_no_bit(family: str, tmp_path: Path) -> None:
    saved = save(family, tmp_path)
    loaded = language.load_language_model(tmp_path)
    assert loaded.family == family
    assert loaded.tokenizer is None
    assert loaded.vocab_size == 31
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    torch.testing.assert_close(loaded.logits(IDS), saved, rtol=0, atol=0)
    if family == "opt":
        sites = ["model.decoder.layers.0.fc1", "model.decoder.layers.0:input"]
    else:
        sites = [loaded.site(name).site for name in loaded.site_names()]
    edited = run_edited(
        loaded.model,
        IDS,
        {site: lambda seen: seen.written + 0.0 * seen.value for site in dict.fromkeys(sites)},
    )
    assert torch.equal(edited.logits, saved)
    assert edited.past_key_values is None


def test_padding_on_the_right_changes_nothing_before_it(tmp_path: Path) -> None:
    save("gpt2", tmp_path)
    loaded = language.load_language_model(tmp_path)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    torch.testing.assert_close(loaded.logits(IDS, mask)[0, :4], loaded.logits(IDS[:1, :4])[0])


def test_dtype_is_the_callers_or_the_stored_one(tmp_path: Path) -> None:
    save("llama", tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "half"
    )
    assert (
        next(language.load_language_model(tmp_path / "half").model.parameters()).dtype
        == torch.float32
    )
    stored = language.load_language_model(tmp_path / "half", dtype=None)
    assert next(stored.model.parameters()).dtype == torch.bfloat16


def test_torch_files_load_without_running_code(tmp_path: Path) -> None:
    saved = save("gpt2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    torch.testing.assert_close(
        language.load_language_model(tmp_path).logits(IDS), saved, rtol=0, atol=0
    )
    torch.save({"transformer.wte.weight": _Evil(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="more than tensors"):
        language.load_language_model(tmp_path)
    assert not (tmp_path / "ran").exists()


class _Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    save("gpt2", tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    key = next(key for key in weights if key.endswith("h.0.mlp.c_fc.weight"))
    weights[key][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"mlp.c_fc.weight.*1 NaN"):
        language.load_language_model(tmp_path)
    lost = {name: value for name, value in weights.items() if name != key}
    save_file(lost, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing.*mlp.c_fc.weight"):
        language.load_language_model(tmp_path)
    save_file({**lost, key: weights[key][:3].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(InputError):
        language.load_language_model(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError):
        language.load_language_model(tmp_path)


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        language.load_language_model(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"config\.json"):
        language.load_language_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(InputError, match="could be loaded"):
        language.load_language_model(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        language.load_language_model(tmp_path / "config.json")
    with pytest.raises(InputError):
        language.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="no tokenizer"):
        language.load_tokenizer(tmp_path)


def test_fused_attention_is_refused_where_derivatives_need_eager(tmp_path: Path) -> None:
    save("llama", tmp_path)
    language.require_eager(language.load_language_model(tmp_path).model)
    fused = language.load_language_model(tmp_path, attention="sdpa")
    with pytest.raises(InputError, match=r"'sdpa'.*eager"):
        language.require_eager(fused.model)
    with pytest.raises(InputError):
        language.load_language_model(tmp_path, attention="no-such-attention")


def test_names_are_those_of_the_model(tmp_path: Path) -> None:
    save("gpt2", tmp_path)
    loaded = language.load_language_model(tmp_path)
    assert loaded.site("blocks.1.hook_attn_out") == names.SiteRef(
        "transformer.h.1.attn", "attention", 1
    )
    assert loaded.site_names("mlp") == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
