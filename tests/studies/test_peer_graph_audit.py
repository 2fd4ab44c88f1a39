"""The audit of a graph that the real circuit-tracer made, in an environment of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from cases import random_dictionary
from peers import environment, kept_environments, lens_weights, run_script
from safetensors.torch import save_file

from assay import cli
from assay.dictionaries import Placed
from assay.dictionaries.save import save_circuit_tracer
from assay.io.attribution_graphs import FEATURE, read_graph
from assay.targets.agreement import build_model, build_tokenizer
from assay.targets.language import save_language_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LAYERS, WIDTH, HEADS = 4, 32, 4

SCRIPT = """
import sys
from pathlib import Path
import torch
import yaml
from safetensors.torch import load_file
from transformer_lens import HookedTransformerConfig
from transformers import AutoTokenizer
from circuit_tracer import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import (
    TransformerLensReplacementModel,
)
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.utils.create_graph_files import create_graph_files
from circuit_tracer.utils.hf_utils import load_transcoders

folder = Path(sys.argv[1])
state = load_file(folder / "lens.safetensors")
tokenizer = AutoTokenizer.from_pretrained(folder / "older")
config = HookedTransformerConfig(
    n_layers=4, d_model=32, n_ctx=32, d_head=8, n_heads=4, d_mlp=128,
    d_vocab=state["embed.W_E"].shape[0], act_fn="gelu_new", normalization_type="LN", eps=1e-5,
    dtype=torch.float32, device="cpu", tokenizer_name=str(folder / "older"),
)
for name in ("set", "crossing"):
    path = folder / name
    about = yaml.safe_load((path / "config.yaml").read_text())
    hooks = about["feature_input_hook"], about["feature_output_hook"]
    if about["model_kind"] == "cross_layer_transcoder":
        made = load_clt(str(path), *hooks, dtype=torch.float32, lazy_decoder=False)
    else:
        about["transcoders"] = [str(path / f"layer_{i}.safetensors") for i in range(4)]
        made = load_transcoders(about, None, torch.float32, False, False)
    model = TransformerLensReplacementModel.from_config(config, made)
    model.tokenizer = tokenizer
    plain = {key: key.replace(".old_mlp", "").replace(".old_unembed", "")
             for key in model.state_dict() if not key.startswith("transcoders.")}
    weights = {key: state[known] for key, known in plain.items() if known in state}
    assert set(state) <= set(plain.values())
    model.load_state_dict(weights, strict=False)
    ids = torch.tensor([3, 20, 5, 31, 9, 40])
    graph = attribute(ids, model, batch_size=16, verbose=False)
    create_graph_files(graph, name, folder / "graphs", scan="me/mine", node_threshold=0.95)
"""


def transcoders(crossing: bool) -> dict[str, Placed]:
    found = {}
    for layer in range(LAYERS):
        last = LAYERS if crossing else layer + 1
        made = random_dictionary(WIDTH, 64, layer, "jumprelu", d_out=WIDTH * (last - layer), skip=0)
        made.b_dec.data[WIDTH:] = 0
        made.W_dec.data *= 3
        # Silent: a feature of layer 0 below the number of layers shares its id with an error there.
        made.b_enc.data[:LAYERS] = -100
        writes = tuple(f"blocks.{later}.hook_mlp_out" for later in range(layer, last))
        found[str(layer)] = Placed(made, f"blocks.{layer}.mlp.hook_in", writes)
    return found


def test_the_audit_says_how_much_of_a_graph_holds(
    tmp_path: Path, tmp_path_factory, monkeypatch, capsys
):
    python = environment("circuit-tracer", kept_environments(tmp_path_factory))
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), layers=LAYERS, width=WIDTH, heads=HEADS, context=32, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_language_model(tmp_path / "model", model, tokenizer)
    # The peer's transformers is of an older line, with another name for the class.
    older = tmp_path / "older"
    older.mkdir()
    (older / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    (older / "tokenizer.json").write_text((tmp_path / "model" / "tokenizer.json").read_text())
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": ".", "unk_token": "<unk>"}
    (older / "tokenizer_config.json").write_text(json.dumps(stated))
    save_file(lens_weights(model), tmp_path / "lens.safetensors")
    for name in ("set", "crossing"):
        dictionaries = transcoders(name == "crossing")
        save_circuit_tracer(tmp_path / name, dictionaries, model_name="gpt2", scan="me/mine")
    run_script(python, SCRIPT, tmp_path)
    for name in ("set", "crossing"):
        path = tmp_path / "graphs" / f"{name}.json"
        words = ["audit", path, "--target", tmp_path / "model", "--dictionaries", tmp_path / name]
        monkeypatch.setattr(sys, "argv", ["assay", *map(str, words), "--json"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        assert not stopped.value.code, printed.err
        found = json.loads(printed.out)
        assert found["of_nodes"]["listed"] == found["of_edges"]["listed"] == 50
        assert found["of_nodes"]["measured"] == len(found["nodes"])
        assert found["largest_activation_difference"] < 1e-4
        # What was frozen moves the edges, and transcoders that nobody trained the totals.
        assert found["of_edges"]["agreement"]["pearson"] > 0.7
        assert found["of_edges"]["right_sign"] >= 40
        assert 0 < found["of_nodes"]["hold"] < 50
        assert "of the top 50 nodes hold exactly" in found["verdict_nodes"]
        graph = read_graph(path)
        assert sum(node.type == FEATURE for node in graph.nodes) > 30
