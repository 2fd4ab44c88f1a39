"""Exact patching and attribution patching of heads, MLPs and residual streams against
TransformerLens, in CPU seconds.

A random GPT-2 of 4 layers, width 128 and 4 heads, 8 pairs of 16 tokens that differ everywhere: 384
(head, MLP, residual) x position nodes. Both sides load the same weights, in one run, on one thread;
TransformerLens runs in an environment of its own, made on first use below the cache folder, which
shares torch and transformers with this one. Run with `python benchmarks/patching.py [--layers 4
--width 128 --heads 4 --batch 8 --positions 16 --vocabulary 512]`."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from assay.attribution import Exact, Gradient, Scores
from assay.core.target import Batch, target
from assay.mechanisms.nodes import Nodes, nodes
from assay.targets.language import load_language_model
from assay.targets.metrics import logit_difference

PEER = "transformer-lens==3.9.0"
NEEDS = [
    "einops",
    "fancy-einsum",
    "better-abc",
    "typeguard<5",
    "beartype",
    "jaxtyping",
    "rich",
    "tqdm",
]
NEEDS += ["datasets", "accelerate", "sentencepiece", "pandas"]
SITES = ("attn.hook_z", "hook_mlp_out", "hook_resid_pre")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {
        "layers": 4,
        "width": 128,
        "heads": 4,
        "batch": 8,
        "positions": 16,
        "vocabulary": 512,
        "repeats": 3,
    }
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    with tempfile.TemporaryDirectory() as temporary:
        folder, data = make(given, Path(temporary))
        ours, exact, scores = run_ours(folder, data, given)
        try:
            seconds, found = run_peer(folder, Path(temporary), given)
            peer = "TransformerLens 3.9"
        except (OSError, subprocess.SubprocessError) as error:
            detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
            print(
                f"TransformerLens could not be installed or run ({' '.join(detail)}); a loop with"
                " plain hooks stands in for it"
            )
            seconds, found = run_plain(folder, data, given)
            peer = "plain hooks"
        again = run_ours(folder, data, given)[
            0
        ]  # before and after: neither side has the machine's quiet minutes alone
    report(
        given,
        peer,
        seconds,
        found,
        {name: min(spent, again[name]) for name, spent in ours.items()},
        exact,
        scores,
    )


def make(given: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Save a random model, with weights large enough for effects of the order of one, and random
    pairs.
    """
    generator = torch.Generator().manual_seed(0)
    config = GPT2Config(
        n_layer=given.layers,
        n_embd=given.width,
        n_head=given.heads,
        n_positions=given.positions,
        vocab_size=given.vocabulary,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        scale = 0.6 / given.width**0.5 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale + (
            parameter.data if parameter.ndim == 1 else 0
        )
    model.save_pretrained(folder / "model")
    shape = (given.batch, given.positions)
    clean = torch.randint(given.vocabulary, shape, generator=generator)
    patch = (
        clean + torch.randint(1, given.vocabulary, shape, generator=generator)
    ) % given.vocabulary
    answers = torch.stack(
        [torch.randperm(given.vocabulary, generator=generator)[:2] for _ in range(given.batch)]
    )
    data = {"clean": clean, "patch": patch, "answers": answers}
    save_file(data, folder / "data.safetensors")
    return folder / "model", data


def run_ours(
    folder: Path, data: dict[str, Tensor], given: argparse.Namespace
) -> tuple[dict[str, float], Scores, Scores]:
    bind = binder(folder, data)
    Exact().scores(bind())
    seconds = {}
    seconds["exact"], exact = timed(lambda: Exact().scores(bind()), 5 * given.repeats)
    seconds["atp"], scores = timed(lambda: Gradient().scores(bind()), 10 * given.repeats)
    bound = bind()
    assert bound.patching == "suffix only", bound.patching
    return seconds, exact, scores


def binder(folder: Path, data: dict[str, Tensor]) -> Callable[[], Nodes]:
    model = load_language_model(folder).model
    labels = {
        "answers": data["answers"],
        "last": torch.full((len(data["answers"]),), data["clean"].shape[1] - 1),
    }
    clean, patch = (Batch({"input_ids": data[side]}, labels) for side in ("clean", "patch"))
    bound_to = target(model, logit_difference)
    names = [f"blocks.{layer}.{site}" for layer in range(model.config.n_layer) for site in SITES]
    return lambda: nodes(bound_to, clean, patch, names)


def run_peer(
    folder: Path, temporary: Path, given: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Tensor]]:
    python = peer_python()
    script = Path(__file__).parent / "peers" / "transformer_lens_patching.py"
    command = [
        str(python),
        str(script),
        str(folder),
        str(temporary / "data.safetensors"),
        str(temporary / "peer.safetensors"),
    ]
    done = subprocess.run(
        [*command, str(given.repeats)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1]), load_file(temporary / "peer.safetensors")


def peer_python() -> Path:
    """Return the interpreter of an environment with TransformerLens, made on first use; torch
    and transformers are ours.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = (
        cache
        / "assay"
        / "peers"
        / f"{PEER.replace('==', '-')}-python{sys.version_info.major}.{sys.version_info.minor}"
    )
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ours = sysconfig.get_paths()["purelib"]
    if not (folder / "complete").is_file():
        print(f"installing {PEER} into {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        share(python, ours)
        subprocess.run([*pip, *NEEDS], check=True, capture_output=True, text=True)
        subprocess.run([*pip, "--no-deps", PEER], check=True, capture_output=True, text=True)
        (folder / "complete").touch()
    share(
        python, ours
    )  # the environment of this run, which need not be the one that installed the peer
    return python


def share(python: Path, ours: str) -> None:
    """Let an environment see the packages of another one behind its own."""
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    theirs = subprocess.run(
        [str(python), "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()
    (Path(theirs) / "shared.pth").write_text(f"{ours}\n")


@torch.no_grad()
def run_plain(
    folder: Path, data: dict[str, Tensor], given: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The same loop with plain forward hooks: one whole forward pass a node."""
    bound = binder(folder, data)()
    model: Any = bound.target.model

    def loop() -> dict[str, Tensor]:
        base = bound.values().mean()
        found = {}
        for name, spot in bound.spots.items():
            path, _, suffix = spot.ref.site.partition(":")
            module = model.get_submodule(path)
            effects = torch.zeros(spot.shape[1:])
            for index in (
                torch.cartesian_prod(*(torch.arange(size) for size in effects.shape))
                .reshape(-1, effects.ndim)
                .tolist()
            ):

                def swap(value: Tensor, spot: Any = spot, index: list[int] = index) -> Tensor:
                    value = value.clone()
                    columns = slice(None) if spot.columns is None else spot.columns[index[1]]
                    value[:, index[0], columns] = spot.base[:, index[0], columns]
                    return value

                handle = install(module, bool(suffix), swap)
                effects[tuple(index)] = bound.values().mean() - base
                handle.remove()
            found[name] = effects
        layers = model.config.n_layer
        return {
            f"exact {site}": torch.stack(
                [found[f"blocks.{layer}.{site}"] for layer in range(layers)]
            )
            for site in SITES
        }

    seconds, effects = timed(loop, 1)
    return {"exact": seconds}, effects


def install(module: nn.Module, before: bool, swap: Callable[[Tensor], Tensor]) -> Any:
    if before:
        return module.register_forward_pre_hook(lambda module, args: (swap(args[0]), *args[1:]))
    return module.register_forward_hook(
        lambda module, args, out: swap(out) if isinstance(out, Tensor) else (swap(out[0]), *out[1:])
    )


def keep_memory() -> None:
    """Keep freed memory in the process, as the `assay` command does: page faults would be a
    large part of both sides' times.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, (1 << 31) - 1)


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The least CPU seconds of some calls, which a busy machine disturbs least, and what the
    last one returned.
    """
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        found = function()
        spent.append(time.process_time() - began)
    return min(spent), found


def report(
    given: argparse.Namespace,
    peer: str,
    theirs: dict[str, float],
    found: dict[str, Tensor],
    ours: dict[str, float],
    exact: Scores,
    scores: Scores,
) -> None:
    effects = {name: values.mean(0) for name, values in exact.indirect_effect().items()}
    gaps, largest, count = {"exact": 0.0, "atp": 0.0}, 0.0, 0
    for name, values in effects.items():
        layer, site = int(name.split(".")[1]), name.split(".", 2)[2]
        gaps["exact"] = max(
            gaps["exact"], float((values - found[f"exact {site}"][layer]).abs().max())
        )
        largest, count = max(largest, float(values.abs().max())), count + values.numel()
        if f"atp {name}" in found:
            gaps["atp"] = max(
                gaps["atp"], float((found[f"atp {name}"] + scores.values[name]).abs().max())
            )
    print(
        f"{given.layers} layers, width {given.width}, {given.heads} heads, {given.batch} pairs of"
        f" {given.positions}, {count} nodes"
    )
    print(f"{'':34s}{'CPU s':>9s}{'ours':>9s}{'ratio':>8s}   largest difference")
    for name, seconds in theirs.items():
        kind = "atp" if name.startswith("atp") else "exact"
        line = f"{peer} {name}"
        print(
            f"{line:34s}{seconds:9.3f}{ours[kind]:9.3f}{seconds / ours[kind]:7.1f}x  "
            f" {gaps[kind]:.1e}"
        )
    print(f"the largest effect is {largest:.2f}; our times include the clean and the patch run")


if __name__ == "__main__":
    main()
