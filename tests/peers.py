"""Environments of other packages, which slow tests make and run scripts in.

One environment serves all files and processes of a session. Where one cannot be made in the time,
its tests are skipped with the reason; ASSAY_PEERS names a folder that keeps the environments from
run to run.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SECONDS = 150  # for an installation


def environment(package: str, folder: Path) -> Path:
    """Return the Python of an environment with a package, made where it is not there yet; the test
    is skipped with the reason where that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{package}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it
        return _environment(package, folder)


def _environment(package: str, folder: Path) -> Path:
    python = folder / package / "bin" / "python"
    ready, failed = (folder / package / name for name in ("installed", "failed"))
    if ready.exists():
        return python
    if failed.exists() and "ASSAY_PEERS" not in os.environ:  # the session has tried
        pytest.skip(failed.read_text())
    release = torch.__version__.partition("+")[0]
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder / package)]
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    install += ["--no-compile", "--no-input", f"torch=={release}", package]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        done = subprocess.run(install, capture_output=True, text=True, timeout=SECONDS, check=False)
        reason = f": {done.stderr.strip()[-300:]}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f" in {SECONDS} seconds"
    if reason:
        failed.write_text(f"{package} could not be installed{reason}")
        pytest.skip(failed.read_text())
    ready.touch()
    return python


def run_script(python: Path, script: str, folder: Path, *paths: Path) -> None:
    """Run a script in a peer's environment, with the folder as its argument; `paths` are added to
    where it imports from.
    """
    (folder / "script.py").write_text(script)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    if paths:
        variables["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    done = subprocess.run(
        [str(python), str(folder / "script.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=variables,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def kept_environments(make: pytest.TempPathFactory) -> Path:
    """Return the folder of the environments."""
    kept, own = os.environ.get("ASSAY_PEERS"), make.getbasetemp()
    # pytest-xdist gives each of its processes a folder inside of the session's.
    session = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return Path(kept) if kept else session / "peers"


def lens_weights(model) -> dict[str, torch.Tensor]:
    """Return the weights of a GPT-2 by their names in TransformerLens."""
    body, heads = model.transformer, model.config.n_head
    found = {"embed.W_E": body.wte.weight, "pos_embed.W_pos": body.wpe.weight}
    found |= {"ln_final.w": body.ln_f.weight, "ln_final.b": body.ln_f.bias}
    found |= {"unembed.W_U": model.lm_head.weight.T}
    for layer, block in enumerate(body.h):
        to = f"blocks.{layer}."
        for ours, theirs in (("ln_1", "ln1"), ("ln_2", "ln2")):
            norm = block.get_submodule(ours)
            found |= {f"{to}{theirs}.w": norm.weight, f"{to}{theirs}.b": norm.bias}
        width = model.config.n_embd
        weights = block.attn.c_attn.weight.split(width, 1)
        biases = block.attn.c_attn.bias.split(width)
        for letter, weight, bias in zip("QKV", weights, biases, strict=True):
            found[f"{to}attn.W_{letter}"] = weight.unflatten(1, (heads, -1)).transpose(0, 1)
            found[f"{to}attn.b_{letter}"] = bias.unflatten(0, (heads, -1))
        found[f"{to}attn.W_O"] = block.attn.c_proj.weight.unflatten(0, (heads, -1))
        found[f"{to}attn.b_O"] = block.attn.c_proj.bias
        for ours, theirs in (("c_fc", "in"), ("c_proj", "out")):
            linear = block.mlp.get_submodule(ours)
            found |= {f"{to}mlp.W_{theirs}": linear.weight, f"{to}mlp.b_{theirs}": linear.bias}
    return {name: tensor.detach().contiguous().clone() for name, tensor in found.items()}
