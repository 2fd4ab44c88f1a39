"""The attribution graph of one prompt beside circuit-tracer: a random GPT-2 small (12 layers, width
768) with transcoders of 16,384 features at every layer, on the same weights, each in a process of
its own, one thread.

Seconds of circuit-tracer are those of its `attribute` alone, with model and transcoders loaded;
ours are those of `prompt_graph`, transcoders read from their files in them. Peak memory is that of
the whole process, loading included, less what it takes to import the packages. The largest
difference of edges, over the largest edge into the same target, shows that both made the same
graph, in float32.

circuit-tracer runs in an environment of its own, made on first use below the cache folder (or
`--peer PYTHON`). Run with `python benchmarks/prompt_graph.py [--tokens 12] [--crossing]`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peers.environment import peer_python
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

PEER = "circuit-tracer==0.5.0"
LAYERS, WIDTH, HEADS, FEATURES, VOCABULARY = 12, 768, 12, 16_384, 50_257


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--active", type=int, default=32, help="features of a position and layer")
    parser.add_argument("--batch", type=int, default=512, help="batch_size of circuit-tracer")
    parser.add_argument("--crossing", action="store_true", help="a cross-layer transcoder")
    parser.add_argument("--peer", type=Path, help="a Python that has circuit_tracer")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.ours is not None:
        run_ours(given.ours)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder, given)
        ours = run([sys.executable, __file__, "--ours", str(folder)], folder, os.environ)
        print(
            f"assay: {ours['seconds']:.1f} s, peak memory {ours['peak'] / 1e9:.2f} GB;"
            f" {ours['features']:,} active features",
            flush=True,
        )
        try:
            python = given.peer or peer_python(PEER)
            script = Path(__file__).parent / "peers" / "circuit_tracer_graph.py"
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            environment.pop("PYTHONPATH", None)
            theirs = run([str(python), str(script), str(folder)], folder, environment)
        except (OSError, subprocess.SubprocessError) as error:
            detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
            print(f"circuit-tracer did not run ({' '.join(detail)}): no ratios")
            return
        print(f"circuit-tracer: {theirs['seconds']:.1f} s, peak {theirs['peak'] / 1e9:.2f} GB")
        print(
            f"time {theirs['seconds'] / ours['seconds']:.2f}x (must reach 1),"
            f" memory {theirs['peak'] / ours['peak']:.2f}x (must be above 1);"
            f" edges differ by {difference(folder):.1e} at most"
        )


def make(folder: Path, given: argparse.Namespace) -> None:
    """Write a model, transcoders whose thresholds leave so many features active, and a prompt."""
    torch.manual_seed(0)
    config = GPT2Config(bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():  # so that layers matter to one another
        parameter.mul_(4.0 if parameter.ndim > 1 and "wte" not in name else 1.0)
    model.save_pretrained(folder / "model")
    ids = torch.randint(1, VOCABULARY, (given.tokens,))
    ids[0] = 0
    save_file({"ids": ids}, folder / "ids.safetensors")
    sets = folder / "transcoders"
    sets.mkdir()
    # Inputs behind the norm have about unit size: a feature is normal with deviation one.
    normal = torch.distributions.Normal(0.0, 1.0)
    threshold = float(normal.icdf(torch.tensor(1 - given.active / FEATURES)))
    for layer in range(LAYERS):
        last = LAYERS - layer if given.crossing else 1
        W_enc = torch.randn(FEATURES, WIDTH) / WIDTH**0.5
        W_dec = torch.randn(FEATURES, last, WIDTH) / (last * WIDTH) ** 0.5
        zeros, bar = torch.zeros(FEATURES), torch.full((FEATURES,), threshold)
        if given.crossing:
            encoder = {
                "W_enc": W_enc,
                "b_enc": zeros,
                "b_dec": torch.zeros(WIDTH),
                "threshold": bar,
            }
            named = {f"{key}_{layer}": tensor for key, tensor in encoder.items()}
            save_file(named, sets / f"W_enc_{layer}.safetensors")
            save_file({f"W_dec_{layer}": W_dec}, sets / f"W_dec_{layer}.safetensors")
        else:
            tensors = {"W_enc": W_enc, "W_dec": W_dec[:, 0].clone(), "b_enc": zeros}
            tensors |= {"b_dec": torch.zeros(WIDTH), "activation_function.threshold": bar}
            save_file(tensors, sets / f"layer_{layer}.safetensors")
    about = {
        "model_name": "gpt2",
        "model_kind": "cross_layer_transcoder" if given.crossing else "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": "random/random",
        "batch": given.batch,
    }
    (sets / "config.yaml").write_text(json.dumps(about))


def run_ours(folder: Path) -> None:
    import assay
    from assay.dictionaries.load import load_dictionaries
    from assay.edges.prompt import prompt_graph

    before = peak_memory()
    target = assay.load(folder / "model")
    ids = load_file(folder / "ids.safetensors")["ids"]
    dictionaries = load_dictionaries(folder / "transcoders", stream=True)
    began = time.process_time()
    graph = prompt_graph(target, dictionaries, ids)
    seconds = time.process_time() - began
    peak = peak_memory() - before
    save_file({"edges": graph.edges, "features": graph.features}, folder / "ours.safetensors")
    print(json.dumps({"seconds": seconds, "peak": peak, "features": graph.active}))


def run(command: list[str], folder: Path, environment: Any) -> dict[str, float]:
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=folder, env=environment
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def difference(folder: Path) -> float:
    """Return the largest difference of edges, over the largest edge into the same target."""
    ours, theirs = (load_file(folder / f"{name}.safetensors") for name in ("ours", "theirs"))
    assert torch.equal(ours["features"], theirs["features"])
    edges, count = ours["edges"], len(ours["features"])
    rows = torch.cat([torch.arange(count), torch.arange(len(edges) - count) + edges.shape[1]])
    expected = theirs["edges"][rows, : edges.shape[1]]
    return float(((edges - expected).abs() / expected.abs().amax(1, keepdim=True)).max())


def peak_memory() -> int:
    """Return the most bytes that this process has held; getrusage counts its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
