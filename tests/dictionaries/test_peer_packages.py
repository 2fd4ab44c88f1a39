"""Files go to and from the real sae_lens and circuit-tracer packages, each in an environment that
the test makes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from format_files import D, M, draw
from peers import environment, kept_environments, run_script
from safetensors.torch import load_file, save_file
from torch import Tensor

from assay.dictionaries import Placed, make
from assay.dictionaries.load import load_dictionaries
from assay.dictionaries.save import save_circuit_tracer, save_dictionaries

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
X = draw(64, D, seed=3).float()
SITE, OUT = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"
MORE = {"topk": {"k": 3}, "batchtopk": {"k": 3}, "matryoshka": {"k": 3, "nested": [4, M]}}


def run(python: Path, script: str, folder: Path) -> dict[str, Tensor]:
    """Run a script in a peer's environment and return what it computed."""
    save_file({"x": X}, folder / "x.safetensors")
    run_script(python, script, folder)
    return load_file(folder / "results.safetensors")


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def random_dictionary(kind: str, seed: int = 0, **shape):
    """Return a dictionary in float32 with every tensor drawn at random."""
    dictionary = make(kind, {"d_in": D, "size": M, **MORE.get(kind, {}), **shape})
    for place, (key, tensor) in enumerate(sorted(dictionary.state_dict().items())):
        drawn = draw(*tensor.shape, seed=100 * seed + place)
        tensor.copy_(drawn.abs() if key == "threshold" else drawn)
    return dictionary


@pytest.fixture(scope="module")
def environments(tmp_path_factory) -> Path:
    return kept_environments(tmp_path_factory)


SAELENS = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class

folder = Path(sys.argv[1])
x = load_file(folder / "x.safetensors")["x"]
results = {}

def note(name, sae):
    with torch.no_grad():
        results[name + "/codes"] = sae.encode(x).contiguous()
        results[name + "/out"] = sae(x).contiguous()

def draw(sae):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(sae.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn.abs() if name == "threshold" else drawn)
    return sae

for path in sorted((folder / "ours").iterdir()):
    note("ours/" + path.name, SAE.load_from_disk(path))

hooks = {"hook_name": "blocks.1.hook_resid_post", "hook_name_out": "blocks.1.hook_mlp_out"}
for name in ("standard", "gated", "topk", "jumprelu", "transcoder", "skip_transcoder",
             "jumprelu_transcoder", "jumprelu_skip_transcoder"):
    for norm in ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"):
        if norm != "none" and name.endswith("transcoder"):
            continue
        kind, config = get_sae_class(name)
        more = {"k": 3} if name == "topk" else {}
        if name.endswith("transcoder"):
            more |= {"d_out": 5, "apply_b_dec_to_input": False}
        made = config(d_in=5, d_sae=9, normalize_activations=norm, **more)
        for key, value in hooks.items():
            made.metadata[key] = value
        sae = draw(kind(made))
        sae.save_model(folder / "theirs" / (name + " " + norm))
        if norm == "expected_average_only_in":
            sae.fold_activation_norm_scaling_factor(0.25)
        note("theirs/" + name + " " + norm, sae)
for name in ("standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka_batchtopk"):
    kind, config = get_sae_training_class(name)
    more = {"k": 3} if "topk" in name else {}
    if name.startswith("matryoshka"):
        more["matryoshka_widths"] = [4, 9]
    made = config(d_in=5, d_sae=9, **more)
    made.metadata["hook_name"] = hooks["hook_name"]
    sae = kind(made)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for key, parameter in sorted(sae.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.7)
    sae.save_inference_model(folder / "theirs" / ("trained " + name))
    note("theirs/trained " + name, SAE.load_from_disk(folder / "theirs" / ("trained " + name)))
save_file(results, folder / "results.safetensors")
"""


def test_sae_lens_and_back(tmp_path: Path, environments: Path):
    python = environment("sae_lens", environments)
    kinds = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated")
    mine: dict[str, Placed] = {
        kind: Placed(random_dictionary(kind), SITE, (SITE,)) for kind in kinds
    }
    mine["topk by norm"] = Placed(random_dictionary("topk", by_norm=True), SITE, (SITE,))
    mine["batchtopk by norm"] = Placed(random_dictionary("batchtopk", by_norm=True), SITE, (SITE,))
    mine["double"] = Placed(random_dictionary("relu").double(), SITE, (SITE,))
    mine["without subtraction"] = Placed(random_dictionary("relu", subtract=False), SITE, (SITE,))
    for kind in ("relu", "jumprelu", "batchtopk"):
        for skip in (0, 2, 3):
            dictionary = random_dictionary(kind, d_out=3, skip=skip)
            mine[f"{kind} transcoder {skip}"] = Placed(dictionary, SITE, (OUT,))
    normed = {"inner": "topk", "config": random_dictionary("topk").config()}
    for norm in ("layer_norm", "constant_norm_rescale"):
        dictionary = make("normalised", {"norm": norm, **normed})
        dictionary.inner.load_state_dict(random_dictionary("topk").state_dict())
        mine[norm] = Placed(dictionary, SITE, (SITE,))
    save_dictionaries(tmp_path / "ours", mine, {"model_name": "gpt2"})
    results = run(python, SAELENS, tmp_path)
    for name, placed in mine.items():
        x = X.to(placed.dictionary.W_dec)
        folder = f"ours/{name.replace(' ', '_')}"
        assert_equal(results[f"{folder}/out"], placed.dictionary(x))
        codes = placed.dictionary.encode(x)
        assert 0 < (codes > 0).sum() < codes.numel()
        if name.endswith("by norm"):
            codes = codes * placed.dictionary.W_dec.norm(dim=1)
        if name in ("layer_norm", "constant_norm_rescale"):
            size = x.std(-1) if name == "layer_norm" else x.norm(dim=-1) / D**0.5
            codes = codes / size[:, None]
        assert_equal(results[f"{folder}/codes"], codes)
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert len(names) == 4 * 4 + 4 + 6
    for name in names:
        given = {"scale": 4.0} if name.endswith("expected_average_only_in") else {}
        (placed,) = load_dictionaries(tmp_path / "theirs" / name, **given).values()
        assert placed.reads == SITE
        assert placed.writes == (OUT if "transcoder" in name else SITE,)
        out = results[f"theirs/{name}/out"]
        assert out.isfinite().all()
        assert_equal(placed.dictionary(X), out)
        if not name.endswith(("layer_norm", "rescale")):
            assert_equal(placed.dictionary.encode(X), results[f"theirs/{name}/codes"])


CIRCUIT_TRACER = """
import sys
from pathlib import Path
import torch
import yaml
from safetensors.torch import load_file, save_file
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.utils.hf_utils import load_transcoders

folder = Path(sys.argv[1])
x = load_file(folder / "x.safetensors")["x"]
stacked = torch.stack([x, 2 * x, -x])
results = {}

def note(name, transcoders, crossing):
    with torch.no_grad():
        codes = transcoders.encode(stacked)
        out = transcoders(stacked) if crossing else transcoders.decode(codes, stacked)
        results[name + "/codes"], results[name + "/out"] = codes.contiguous(), out.contiguous()

def draw(module):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn.abs() if "threshold" in name else drawn)
    return module

for path in sorted((folder / "ours").iterdir()):
    config = yaml.safe_load((path / "config.yaml").read_text())
    crossing = config["model_kind"] == "cross_layer_transcoder"
    for lazy in (False, True):
        if crossing:
            made = load_clt(str(path), config["feature_input_hook"], config["feature_output_hook"],
                            dtype=torch.float32, lazy_decoder=lazy, lazy_encoder=lazy)
        else:
            config["transcoders"] = [str(path / f"layer_{i}.safetensors") for i in range(3)]
            made = load_transcoders(config, None, torch.float32, lazy, lazy)
        note("ours/" + path.name + f"/{lazy}", made, crossing)
for threshold in (False, True):
    for skip in (False, True):
        layers = {}
        for i in range(3):
            function = JumpReLU(torch.zeros(9), 0.1) if threshold else torch.nn.functional.relu
            layers[i] = draw(SingleLayerTranscoder(5, 9, function, i, skip_connection=skip,
                                                   dtype=torch.float32))
        made = TranscoderSet(layers, "mlp.hook_in", "hook_mlp_out")
        name = f"set {threshold} {skip}"
        made.to_safetensors(str(folder / "theirs" / name))
        note("theirs/" + name, made, False)
    made = draw(CrossLayerTranscoder(3, 9, 5, "jump_relu" if threshold else "relu",
                                     lazy_decoder=False, dtype=torch.float32))
    name = f"crossing {threshold}"
    made.to_safetensors(str(folder / "theirs" / name))
    note("theirs/" + name, made, True)
save_file(results, folder / "results.safetensors")
"""


def computed(dictionaries, crossing: bool) -> tuple[Tensor, Tensor]:
    """Return the features and what is rebuilt of three layers, the shares of a site summed."""
    inputs = [X, 2 * X, -X]
    codes = [placed.dictionary.encode(x) for placed, x in zip(dictionaries, inputs, strict=True)]
    out = [placed.dictionary(x) for placed, x in zip(dictionaries, inputs, strict=True)]
    if crossing:
        shares = [rebuilt.split(D, -1) for rebuilt in out]
        out = [sum(shares[layer][site - layer] for layer in range(site + 1)) for site in range(3)]
    return torch.stack(codes), torch.stack(out)


def test_circuit_tracer_and_back(tmp_path: Path, environments: Path):
    python = environment("circuit-tracer", environments)
    sets: dict[str, dict[str, Placed]] = {}
    for kind in ("relu", "jumprelu", "batchtopk"):
        for form in ("set", "skip", "crossing"):
            sets[f"{kind} {form}"] = {}
            for layer in range(3):
                last = 3 if form == "crossing" else layer + 1
                width = (last - layer) * D
                dictionary = random_dictionary(
                    kind, layer, d_out=width, skip=D if form == "skip" else 0
                )
                dictionary.b_dec.data[D:] = 0
                writes = tuple(f"blocks.{later}.hook_mlp_out" for later in range(layer, last))
                placed = Placed(dictionary, f"blocks.{layer}.hook_resid_mid", writes)
                sets[f"{kind} {form}"][str(layer)] = placed
    for name, mine in sets.items():
        save_circuit_tracer(tmp_path / "ours" / name, mine, model_name="gpt2", scan="me/mine")
    results = run(python, CIRCUIT_TRACER, tmp_path)
    for name, mine in sets.items():
        codes, out = computed(mine.values(), name.endswith("crossing"))
        assert 0 < (codes > 0).sum() < codes.numel()
        for lazy in (False, True):
            assert_equal(results[f"ours/{name}/{lazy}/codes"], codes)
            assert_equal(results[f"ours/{name}/{lazy}/out"], out)
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert len(names) == 6
    for name in names:
        kind = "cross_layer_transcoder" if name.startswith("crossing") else "transcoder_set"
        (tmp_path / "theirs" / name / "config.yaml").write_text(
            f"model_name: gpt2\nmodel_kind: {kind}\n"
            "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
        )
        loaded = load_dictionaries(tmp_path / "theirs" / name)
        assert [placed.reads for placed in loaded.values()] == [
            f"blocks.{layer}.mlp.hook_in" for layer in range(3)
        ]
        codes, out = computed(loaded.values(), name.startswith("crossing"))
        assert_equal(results[f"theirs/{name}/codes"], codes)
        assert_equal(results[f"theirs/{name}/out"], out)
