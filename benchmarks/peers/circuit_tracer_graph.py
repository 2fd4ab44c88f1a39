"""circuit-tracer's side of `benchmarks/prompt_graph.py`, run in an environment that has it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from circuit_tracer import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import (
    TransformerLensReplacementModel,
)
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.utils.hf_utils import load_transcoders
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformers import GPT2LMHeadModel


class Tokenizer:
    """As much of a tokenizer as `attribute` asks for."""

    all_special_ids, bos_token_id, eos_token_id, pad_token_id = (0,), 0, 0, 0
    vocab_size, padding_side, name_or_path = 50_257, "right", "none"

    def decode(self, tokens, **_):
        return str(tokens)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    before = peak_memory()
    path = folder / "transcoders"
    about = json.loads((path / "config.yaml").read_text())
    hooks = about["feature_input_hook"], about["feature_output_hook"]
    # Decoders are read from their files when they are needed, as its loader does by default.
    if about["model_kind"] == "cross_layer_transcoder":
        made = load_clt(str(path), *hooks, dtype=torch.float32, lazy_decoder=True)
    else:
        about["transcoders"] = [str(path / f"layer_{i}.safetensors") for i in range(12)]
        made = load_transcoders(about, None, torch.float32, False, True)
    config = HookedTransformerConfig(
        n_layers=12,
        d_model=768,
        n_ctx=1024,
        d_head=64,
        n_heads=12,
        d_mlp=3072,
        d_vocab=50_257,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=1e-5,
        device="cpu",
    )
    model = TransformerLensReplacementModel.from_config(config, made)
    given = GPT2LMHeadModel.from_pretrained(folder / "model").requires_grad_(False)
    state = convert_gpt2_weights(given, config)
    bare = {}
    for key in model.state_dict():
        bare[key.replace(".old_mlp", "").replace(".old_unembed", "")] = key
    assert set(state) <= set(bare)
    model.load_state_dict({bare[name]: tensor for name, tensor in state.items()}, strict=False)
    del given, state
    model.tokenizer = Tokenizer()
    ids = load_file(folder / "ids.safetensors")["ids"]
    began = time.process_time()
    graph = attribute(ids, model, batch_size=about["batch"])
    seconds = time.process_time() - began
    peak = peak_memory() - before
    features = graph.active_features[graph.selected_features].contiguous()
    found = {"edges": graph.adjacency_matrix.contiguous(), "features": features}
    save_file(found, folder / "theirs.safetensors")
    print(json.dumps({"seconds": seconds, "peak": peak}))


def peak_memory() -> int:
    """Return the most bytes that this process has held; getrusage counts its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
