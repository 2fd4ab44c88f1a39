"""Training of dictionaries against SAELens, in CPU seconds on one core: TopK dictionaries of the
same size, from the same first weights and data, with the same optimiser and nothing revived on
either side, and the variance that both explain.

1. The training step alone: 768 inputs, 6144 features, k = 32, 4096 positions, from the same first
   weights, on vectors of superposed sparse features. The steps of all alternate, so that a machine
   that does other work too slows all of them; ours once more without screening, as on a processor
   that does not multiply bfloat16 matrices, and the encoder's product in float32 alone, the floor
   of such a step.
2. With activation passes: the same dictionary at a middle site of a random GPT-2 of width 768 and
   4 layers, from token ids on.
3. Several sites: six sites of a GPT-2 of 2 layers and width 64, 512 features each, against the
   runner of SAELens that shares one forward pass between sites. Both train at each of three
   learning rates. The seconds are those to the first time at which the mean variance explained at
   held-out positions, which both see alike, reaches what both reach: the smaller of the two best
   final ones. Each side's rate is the one that gets there first. Evaluation is not counted.

The buffer in which SAELens mixes positions holds two batches, its smallest that mixes; ours holds
everything. Both divide the values of 2 and 3 by the scale of their site, ours by the root of the
mean variance per coordinate, SAELens by the root of the mean norm's square per coordinate
(`expected_average_only_in`), measured on one batch.

SAELens runs in an environment of its own, made on first use below the cache folder (or
`--peer PYTHON`). Run with `python benchmarks/dictionary_training.py [--parts step passes sites]`.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peers.environment import peer_python
from peers.looks import Clock, explained
from peers.trainer import peer_command, peer_environment, stepping
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from assay.dictionaries import Placed, screen
from assay.dictionaries.initial import initialise, scale_encoder
from assay.dictionaries.optimizer import Adam
from assay.dictionaries.problem import Problem, measure
from assay.dictionaries.revival import normalise
from assay.dictionaries.settings import Training
from assay.dictionaries.topk import TopK
from assay.dictionaries.training import FITTED, MEASURED, train
from assay.learn.reading import Reader, Rows, rows_of
from assay.learn.streams import Stream

PEER = "sae-lens==6.54.12"
NEVER = 1000
"""Steps without a value after which a feature is dead: more than any part has."""
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
    "steps": 120,
    "rates": [2e-3, 4e-3, 8e-3],
    "every": 10,
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
        python = given.peer or peer_python(PEER)
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        print(f"{PEER} could not be installed ({' '.join(detail)}): ours alone, no ratios")
        python = None
    for part in given.parts:
        with tempfile.TemporaryDirectory() as temporary:
            compare(part, Path(temporary), python)


def compare(part: str, folder: Path, python: Path | None) -> None:
    if part == "step":
        compare_steps(folder, python)
        return
    if part == "sites":
        compare_sites(folder, python)
        return
    sizes = PASSES
    ours = train_sites(folder, sizes)
    print(f"with activation passes: assay {described(ours)}")
    if python is None:
        return
    for sparse in (False, True):
        kind = "sparse" if sparse else "dense"
        try:
            theirs = run_peer(python, folder, {**sizes, "sparse": sparse})
        except subprocess.SubprocessError as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            reason = [line for line in said if "Error" in line] or said
            print(f"  SAELens ({kind}) did not run: {reason[-1][:120]}")
            continue
        print(
            f"  SAELens ({kind} activations) {described(theirs)}: ratio"
            f" {theirs['seconds'] / ours['seconds']:.2f} (must reach {TARGETS[part]})",
            flush=True,
        )


def compare_sites(folder: Path, python: Path | None) -> None:
    """Train at several sites and rates on both sides; print the seconds to one share explained."""
    sides: dict[str, dict[float, dict[str, Any]]] = {"assay": {}}
    if python is not None:
        sides["SAELens"] = {}
    for rate in SITES["rates"]:
        sizes = {**SITES, "rate": rate, "sparse": False}
        for side, runs in sides.items():
            if side == "assay":
                runs[rate] = train_sites(folder, sizes)
            else:
                assert python is not None
                runs[rate] = run_peer(python, folder, sizes)
            print(f"several sites, rate {rate:g}: {side} {described(runs[rate])}", flush=True)
    if python is None:
        return
    common = min(max(one["explained"] for one in runs.values()) for runs in sides.values())
    first = {}
    for side, runs in sides.items():
        when = {rate: seconds_to(common, one["trace"]) for rate, one in runs.items()}
        rate = min(when, key=lambda r: when[r])
        first[side] = when[rate]
        print(f"  {side} explains {common:.3f} after {when[rate]:.2f} s, at rate {rate:g}")
    ratio = first["SAELens"] / first["assay"]
    print(f"  ratio {ratio:.2f} (must reach {TARGETS['sites']})", flush=True)


def described(run: Mapping[str, Any]) -> str:
    return f"{run['seconds']:.2f} s, explained {run['explained']:.3f}, dead {run['dead']:.3f}"


def seconds_to(share: float, trace: list[tuple[float, float]]) -> float:
    """Return when a share was explained first, between two looks in proportion; infinity: never."""
    if trace[0][1] >= share:
        return trace[0][0]
    for (before, low), (after, high) in itertools.pairwise(trace):
        if high >= share:
            return before + (after - before) * (share - low) / (high - low)
    return float("inf")


def compare_steps(folder: Path, python: Path | None) -> None:
    """Time one step of each in turn, all from the same weights and on the same batches."""
    generator = torch.Generator().manual_seed(0)
    width, batch, steps = STEP["width"], STEP["batch"], STEP["steps"]
    x = draw_superposed(batch * (steps + 1), width, STEP["features"], generator)
    first = TopK(width, STEP["features"], k=STEP["k"])
    initialise(first, generator, centre=x.mean(0))
    start = {key: value.clone().contiguous() for key, value in first.state_dict().items()}
    save_file({**start, "x": x}, folder / "step.safetensors")
    screened, dense = Steps(copy.deepcopy(first)), Steps(copy.deepcopy(first))
    encoder = []
    with stepping(python, folder, STEP) as peers:
        for step, values in enumerate(x.split(batch)[:steps]):
            screened.step(values, step)
            with mock.patch.object(screen, "pays", return_value=False):
                dense.step(values, step)
            began = time.process_time()
            with torch.no_grad():
                first.before(values)
            encoder.append(time.process_time() - began)
            for kind in list(peers):
                try:
                    peers[kind].ask()
                except RuntimeError as error:
                    print(f"  SAELens ({kind} activations) did not run: {error}")
                    peers.pop(kind).end()
        held = x[-batch:]
        theirs = {kind: peer.result() for kind, peer in peers.items()}
    ours = {"assay": screened}
    if screen.pays(held, STEP["features"]):
        ours["assay, not screened"] = dense
    print(f"the encoder's product in float32 alone: {median(encoder):.2f} s")
    for name, one in ours.items():
        seconds = median(one.spent)
        print(f"training step: {name} {seconds:.2f} s, explained {one.explained(held):.3f}")
        for kind, found in theirs.items():
            print(
                f"  SAELens ({kind} activations) {found['seconds']:.2f} s, explained"
                f" {found['explained']:.3f}: ratio {found['seconds'] / seconds:.2f}"
                f" (must reach {TARGETS['step']})",
                flush=True,
            )


class Steps:
    """Steps of our training: loss, gradients, update, and decoder rows of length one."""

    def __init__(self, dictionary: TopK) -> None:
        self.dictionary, self.spent = dictionary, list[float]()
        width, self.name = dictionary.d_in, "blocks.0.hook_resid_post"
        shape = GPT2Config(
            n_layer=1, n_embd=width, n_head=12, vocab_size=2, bos_token_id=0, eos_token_id=0
        )
        placed = {self.name: Placed(dictionary, self.name, (self.name,))}
        training = Training(
            steps=STEP["steps"], batch=STEP["batch"], rate=STEP["rate"], revive_every=NEVER
        )
        self.problem = Problem(GPT2LMHeadModel(shape), placed, {self.name: 1.0}, training)
        self.optimizer = Adam(self.problem.parameters(), STEP["rate"])

    def step(self, values: Tensor, number: int) -> None:
        began = time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = self.problem.local({self.name: values}, number)
        loss.backward()
        self.optimizer.step()
        normalise(self.dictionary)
        self.spent.append(time.process_time() - began)

    @torch.no_grad()
    def explained(self, x: Tensor) -> float:
        return explained(x, self.dictionary(x))


def median(numbers: list[float]) -> float:
    return sorted(numbers)[len(numbers) // 2]


def train_sites(folder: Path, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Train on token ids, from nothing to dictionaries for values as they are. With `every` the
    trace holds the seconds and the share explained every so many steps.
    """
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
    generator = torch.Generator().manual_seed(0)
    shape = (sizes["windows"], sizes["length"])
    # Few tokens are frequent, as in a text.
    odds = 1 / torch.arange(1, sizes["vocabulary"] + 1)
    ids = torch.multinomial(odds, shape[0] * shape[1], True, generator=generator).reshape(shape)
    held = torch.multinomial(odds, 64 * shape[1], True, generator=generator).reshape(64, -1)
    save_file({"train": ids, "held": held}, folder / "tokens.safetensors")
    names = sizes["sites"]
    model.save_pretrained(folder / "model")
    placed = {
        name: Placed(TopK(sizes["width"], sizes["features"], k=sizes["k"]), name, (name,))
        for name in names
    }
    training = Training(
        steps=sizes["steps"],
        batch=sizes["batch"],
        rate=sizes["rate"],
        warmup=0.0,
        revive_every=NEVER,
    )
    save_start(folder, model, rows_of(ids), placed, training)
    clock = Clock(Reader(model, names)(rows_of(held)))
    local, every = Problem.local, sizes.get("every", sizes["steps"])

    def watched(problem: Problem, values: Mapping[str, Tensor], step: int) -> Any:
        if step and step % every == 0:
            clock.look(
                {
                    name: (one.dictionary, problem.scales[name])
                    for name, one in problem.placed.items()
                }
            )
        return local(problem, values, step)

    with mock.patch.object(Problem, "local", watched):
        trained = train(model, rows_of(ids), placed, training)
    return clock.look({name: (one.dictionary, 1.0) for name, one in trained.items()})


def save_start(
    folder: Path, model: Any, rows: Rows, placed: Mapping[str, Placed], training: Training
) -> None:
    """Save the weights with which `train` begins, for values divided by SAELens's scale."""
    names = list(placed)
    stream = Stream(model, rows, names, batch=training.batch, seed=training.seed)
    sample = stream.sample(MEASURED)
    generator = torch.Generator().manual_seed(training.seed)
    start = {}
    for name, (mean, _) in measure(sample).items():
        begun = copy.deepcopy(placed[name].dictionary)
        scale = float(sample[name].norm(dim=1).mean()) / begun.d_in**0.5
        initialise(begun, generator, centre=mean / scale)
        scale_encoder(begun, sample[name][:FITTED] / scale)
        for key, value in begun.state_dict().items():
            start[f"{name}:{key}"] = value.contiguous()
    save_file(start, folder / "start.safetensors")


def draw_superposed(count: int, width: int, features: int, generator: torch.Generator) -> Tensor:
    """Return vectors of unit variance per coordinate: a few of many directions, and noise."""
    directions = torch.randn(features, width, generator=generator) / width**0.5
    index = torch.randint(features, (count, 24), generator=generator)
    weights = torch.rand(count, 24, generator=generator) + 0.5
    x = torch.nn.functional.embedding_bag(index, directions, per_sample_weights=weights, mode="sum")
    x += 0.02 * torch.randn(count, width, generator=generator)
    return (x - x.mean(0)) / x.std()


def run_peer(python: Path, folder: Path, sizes: Mapping[str, Any]) -> dict[str, Any]:
    (folder / "sizes.json").write_text(json.dumps(sizes))
    done = subprocess.run(
        [*peer_command(python), "sites", str(folder), str(folder / "sizes.json")],
        check=True,
        capture_output=True,
        text=True,
        cwd=folder,
        env=peer_environment(),
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def keep_memory() -> None:
    # As the command does: large buffers are kept between steps. The peer's script does the same.
    if sys.platform == "linux":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, (1 << 31) - 1)


if __name__ == "__main__":
    main()
