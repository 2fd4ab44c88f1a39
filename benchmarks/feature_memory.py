"""Memory of attribution patching over large dictionaries: 26 sites of 16,384 features, read from
files one site at a time, beside the model alone.

Each line is a process of its own; its peak is the largest resident set (ru_maxrss) less that after
the imports. A site is one dictionary and its features, dense, on the batch. The allowance is the
peak of one forward and backward pass of the model plus two sites. Run: python
benchmarks/feature_memory.py"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

LAYERS, WIDTH, SIZE, ACTIVE = 13, 256, 16_384, 32
EXAMPLES, POSITIONS, VOCABULARY = 16, 24, 512
SITES = [
    f"blocks.{layer}.{hook}"
    for layer in range(LAYERS)
    for hook in ("hook_attn_out", "hook_mlp_out")
]
MIB = 1 << 20


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build():
    """Return the model as a target and a pair of batches."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from assay.core.target import Batch, Target
    from assay.targets.metrics import logit_difference

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        attn_implementation="eager",
    )
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(VOCABULARY, (2, EXAMPLES, POSITIONS))
    labels = {
        "answers": torch.randint(VOCABULARY, (EXAMPLES, 2)),
        "last": torch.full((EXAMPLES,), POSITIONS - 1),
    }
    mask = torch.ones(EXAMPLES, POSITIONS, dtype=torch.long)
    clean, patch = (Batch({"input_ids": ids, "attention_mask": mask}, labels) for ids in tokens)
    return Target(model, logit_difference), clean, patch


def dictionary(site: int):
    import torch

    from assay.dictionaries import architecture

    found = architecture("topk")(WIDTH, SIZE, k=ACTIVE)
    generator = torch.Generator().manual_seed(site)
    for parameter in found.parameters():
        parameter.data.normal_(std=WIDTH**-0.5, generator=generator)
    return found


def stored(folder: Path):
    """Return the dictionaries of the folder as a mapping that reads one when it is asked for."""
    from safetensors.torch import load_file

    from assay.dictionaries import Placed, make

    config = json.loads((folder / "config.json").read_text())

    class Stored(Mapping[str, Placed]):
        def __getitem__(self, name: str) -> Placed:
            found = make("topk", config)
            found.load_state_dict(load_file(folder / f"{name}.safetensors"), assign=True)
            return Placed(found, name, (name,))

        def __iter__(self) -> Iterator[str]:
            return iter(SITES)

        def __len__(self) -> int:
            return len(SITES)

    return Stored()


def write(folder: Path) -> None:
    from safetensors.torch import save_file

    for number, site in enumerate(SITES):
        made = dictionary(number)
        save_file(made.state_dict(), folder / f"{site}.safetensors")
    (folder / "config.json").write_text(json.dumps(made.config()))


def measure(what: str, folder: Path) -> None:
    """Print the peak of one kind of work, in MiB above the imports."""
    import torch

    import assay
    from assay.core.values import data
    from assay.targets.metrics import logit_difference

    assert logit_difference
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    attribute, features = assay.attribute, assay.features  # imported on first use
    before = peak()
    target, clean, patch = build()
    if what == "model":
        target.values(clean).sum().backward()
        found = {}
    else:
        dictionaries = stored(folder)
        bound = features(target, dictionaries, clean, patch)
        scores = attribute(bound)
        found = {
            "parts": sum(torch.Size(values.shape).numel() for values in scores.values.values()),
            "held": sum(len(data(values)) for values in scores.values.values()),
        }
    print(json.dumps({"peak": peak() - before, **found}))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "write", name], check=True)
        found = {}
        for what in ("model", "AtP"):
            command = [sys.executable, __file__, what, name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[what] = json.loads(done.stdout.splitlines()[-1])
        size = (folder / f"{SITES[0]}.safetensors").stat().st_size
        everything = size * len(SITES) / MIB
    codes = EXAMPLES * POSITIONS * SIZE * 4
    site = (size + codes) / MIB
    allowance = found["model"]["peak"] + 2 * site
    print(f"{len(SITES)} sites of {SIZE:,} features; {EXAMPLES} prompts of {POSITIONS} tokens")
    print(f"model, one forward and backward pass   {found['model']['peak']:8.0f} MiB")
    print(f"one site: dictionary and features      {site:8.0f} MiB")
    print(f"all dictionaries                       {everything:8.0f} MiB")
    print(f"allowance: model plus two sites        {allowance:8.0f} MiB")
    print(f"AtP over {found['AtP']['parts']:,} parts          {found['AtP']['peak']:8.0f} MiB")
    print(f"scores held: {found['AtP']['held']:,} that are not zero")
    print(f"within the allowance: {found['AtP']['peak'] <= allowance}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    elif len(sys.argv) > 1:
        measure(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
