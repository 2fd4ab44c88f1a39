"""Training of dictionaries against SAELens, in CPU seconds on one core: TopK dictionaries of the
same size, from the same data, with the same optimiser, and the variance that both explain.

1. The training step alone: 768 inputs, 6144 features, k = 32, 4096 positions, from the same first
   weights, on vectors of superposed sparse features.
2. With activation passes: the same dictionary at a middle site of a random GPT-2 of width 768 and
   4 layers, from token ids on.
3. Several sites: six sites of a GPT-2 of 2 layers and width 64, 512 features each, against the
   runner of SAELens that shares one forward pass between sites.

The buffer in which SAELens mixes positions holds two batches, its smallest that mixes; ours holds
everything.

SAELens runs in an environment of its own, made on first use below the cache folder (or
`--peer PYTHON`). Run with `python benchmarks/dictionary_training.py [--parts step passes sites]`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from assay.dictionaries import Placed
from assay.dictionaries.initial import initialise
from assay.dictionaries.problem import Problem
from assay.dictionaries.revival import normalise
from assay.dictionaries.settings import Training
from assay.dictionaries.topk import TopK
from assay.dictionaries.training import train
from assay.learn.reading import Reader, rows_of

PEER = "sae-lens==6.54.12"
TORCH = f"torch=={torch.__version__.partition('+')[0]}"
TARGETS = {"step": 4.0, "passes": 1.7, "sites": 1.3}

STEP = {"width": 768, "features": 6144, "k": 32, "batch": 4096, "steps": 8, "rate": 3e-4}
PASSES = {
    "layers": 4,
    "width": 768,
    "heads": 12,
    "vocabulary": 1000,
    "length": 64,
    "windows": 384,
    "features": 6144,
    "k": 32,
    "batch": 4096,
    "steps": 6,
    "rate": 3e-4,
    "sites": ["blocks.1.hook_resid_post"],
    "prompts": 64,
    "buffer": 128,
}
SITES = {
    "layers": 2,
    "width": 64,
    "heads": 4,
    "vocabulary": 1000,
    "length": 64,
    "windows": 2048,
    "features": 512,
    "k": 16,
    "batch": 4096,
    "steps": 60,
    "rate": 1e-3,
    "prompts": 64,
    "buffer": 128,
    "sites": [
        f"blocks.{i}.hook_{h}" for i in (0, 1) for h in ("attn_out", "mlp_out", "resid_post")
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--peer", type=Path, help="a Python that has sae_lens")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    try:
        python = given.peer or peer_python()
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        print(f"{PEER} could not be installed ({' '.join(detail)}): ours alone, no ratios")
        python = None
    for part in given.parts:
        with tempfile.TemporaryDirectory() as temporary:
            compare(part, Path(temporary), python)


def compare(part: str, folder: Path, python: Path | None) -> None:
    sizes = {"step": STEP, "passes": PASSES, "sites": SITES}[part]
    ours = train_steps(folder, sizes) if part == "step" else train_sites(folder, sizes)
    what = {"step": "training step", "passes": "with activation passes", "sites": "several sites"}
    print(f"{what[part]}: assay {ours['seconds']:.2f} s, explained {ours['explained']:.3f}")
    if python is None:
        return
    for sparse in (False, True):
        kind = "sparse" if sparse else "dense"
        try:
            theirs = run_peer(python, part, folder, {**sizes, "sparse": sparse})
        except subprocess.SubprocessError as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            reason = [line for line in said if "Error" in line] or said
            print(f"  SAELens ({kind}) did not run: {reason[-1]}")
            continue
        print(
            f"  SAELens ({kind} activations) {theirs['seconds']:.2f} s, explained"
            f" {theirs['explained']:.3f}: ratio {theirs['seconds'] / ours['seconds']:.2f}"
            f" (must reach {TARGETS[part]})",
            flush=True,
        )


def train_steps(folder: Path, sizes: Mapping[str, Any]) -> dict[str, float]:
    """Time the step of our training: loss, gradients, update, and decoder rows of length one."""
    generator = torch.Generator().manual_seed(0)
    width, batch, steps = sizes["width"], sizes["batch"], sizes["steps"]
    x = draw_superposed(batch * (steps + 1), width, sizes["features"], generator)
    dictionary = TopK(width, sizes["features"], k=sizes["k"])
    initialise(dictionary, generator, centre=x.mean(0))
    start = {key: value.contiguous() for key, value in dictionary.state_dict().items()}
    save_file({**{k: v.clone() for k, v in start.items()}, "x": x}, folder / "step.safetensors")
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=width, n_head=12, vocab_size=2))
    name = "blocks.0.hook_resid_post"
    placed = {name: Placed(dictionary, name, (name,))}
    training = Training(steps=steps, batch=batch, rate=sizes["rate"])
    problem = Problem(model, placed, {name: 1.0}, training)
    optimizer = torch.optim.Adam(problem.parameters(), lr=sizes["rate"], fused=True)
    spent = []
    for step in range(steps):
        values = {name: x[step * batch : (step + 1) * batch]}
        began = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss, _ = problem.local(values, step)
        loss.backward()
        optimizer.step()
        normalise(dictionary)
        spent.append(time.process_time() - began)
    return {
        "seconds": sorted(spent)[len(spent) // 2],
        "explained": explained(dictionary, x[-batch:]),
    }


def train_sites(folder: Path, sizes: Mapping[str, Any]) -> dict[str, float]:
    """Train on token ids, from nothing to dictionaries for values as they are."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=sizes["layers"],
        n_embd=sizes["width"],
        n_head=sizes["heads"],
        n_positions=sizes["length"],
        vocab_size=sizes["vocabulary"],
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # so that sites differ, as in a trained network
        parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    shape = (sizes["windows"], sizes["length"])
    # Few tokens are frequent, as in a text.
    odds = 1 / torch.arange(1, sizes["vocabulary"] + 1)
    ids = torch.multinomial(odds, shape[0] * shape[1], True, generator=generator).reshape(shape)
    held = torch.multinomial(odds, 64 * shape[1], True, generator=generator).reshape(64, -1)
    save_file({"train": ids, "held": held}, folder / "tokens.safetensors")
    names = sizes["sites"]
    placed = {
        name: Placed(TopK(sizes["width"], sizes["features"], k=sizes["k"]), name, (name,))
        for name in names
    }
    training = Training(steps=sizes["steps"], batch=sizes["batch"], rate=sizes["rate"])
    began = time.process_time()
    trained = train(model, rows_of(ids), placed, training)
    seconds = time.process_time() - began
    values = Reader(model, names)(rows_of(held))
    shares = [explained(trained[name].dictionary, values[name]) for name in names]
    return {"seconds": seconds, "explained": sum(shares) / len(shares)}


def draw_superposed(count: int, width: int, features: int, generator: torch.Generator) -> Tensor:
    """Return vectors of unit variance per coordinate: a few of many directions, and noise."""
    directions = torch.randn(features, width, generator=generator) / width**0.5
    index = torch.randint(features, (count, 24), generator=generator)
    weights = torch.rand(count, 24, generator=generator) + 0.5
    x = torch.nn.functional.embedding_bag(index, directions, per_sample_weights=weights, mode="sum")
    x += 0.02 * torch.randn(count, width, generator=generator)
    return (x - x.mean(0)) / x.std()


@torch.no_grad()
def explained(dictionary: Any, x: Tensor) -> float:
    error = x - dictionary(x)
    return 1 - float(error.square().sum() / (x - x.mean(0)).square().sum())


def run_peer(python: Path, part: str, folder: Path, sizes: Mapping[str, Any]) -> dict[str, float]:
    script = Path(__file__).parent / "peers" / "sae_lens_training.py"
    (folder / "sizes.json").write_text(json.dumps(sizes))
    task = "step" if part == "step" else "sites"
    done = subprocess.run(
        [str(python), str(script), task, str(folder), str(folder / "sizes.json")],
        check=True,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": ""},
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def peer_python() -> Path:
    """Return the interpreter of an environment with SAELens, made on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / "assay" / "peers" / f"{PEER.replace('==', '-')}-python{version}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "complete").is_file():
        print(f"installing {PEER} into {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, TORCH, PEER], check=True, capture_output=True, text=True)
        (folder / "complete").touch()
    return python


def keep_memory() -> None:
    # As the command does: large buffers are kept between steps. The peer's script does the same.
    if sys.platform == "linux":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, (1 << 31) - 1)


if __name__ == "__main__":
    main()
