"""The JAX step and the torch step: one committed fixture, which torch reproduces here and JAX in an
environment that the test makes (skipped, with the reason, where it cannot be made; ASSAY_PEERS
names a folder that keeps it from run to run)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from component_steps import FIXTURE, compute_steps

from assay.errors import InputError
from assay.io.files import load_tensors

SECONDS = 150  # for an installation


def test_torch_gives_the_fixture() -> None:
    """What JAX is compared with is what torch computes today."""
    fixture, now = load_tensors(FIXTURE), compute_steps()
    assert fixture.keys() == now.keys()
    for name, entry in now.items():
        torch.testing.assert_close(fixture[name], entry, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(fixture["lp/end/V/up"], fixture["begin/V/up"])
    assert fixture["lp/end/source/up"].max() <= 1


@pytest.mark.skipif(importlib.util.find_spec("jax") is not None, reason="JAX is installed")
def test_without_jax_the_line_says_how_to_install_it() -> None:
    with pytest.raises(InputError, match=r"pip install 'assay-interp\[jax\]'"):
        importlib.import_module("assay.mechanisms.components.jax")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with JAX in which this one's packages are seen too."""
    kept = os.environ.get("ASSAY_PEERS")
    folder = (Path(kept) if kept else tmp_path_factory.mktemp("peers")) / "jax"
    python, ready = folder / "bin" / "python", folder / "installed"
    if ready.exists():
        return python
    make = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    try:
        subprocess.run(make, check=True, capture_output=True, timeout=SECONDS)
        done = subprocess.run(
            [*install, "--no-compile", "--no-input", "jax>=0.5"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"JAX could not be installed in {SECONDS} seconds")
    if done.returncode:
        pytest.skip(f"JAX could not be installed: {done.stderr.strip()[-300:]}")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    (site / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    ready.touch()
    return python


def run(python: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    source = here.parents[2] / "src"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (source, here))),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return subprocess.run(
        [str(python), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_jax_step_is_the_torch_step_on_any_number_of_devices(python: Path) -> None:
    done = run(python, str(Path(__file__).parent / "jax_steps.py"), str(FIXTURE))
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    print("minimality, units in the last place:", answer["ulps"])
    assert answer["devices"] == 4
    assert len(answer["terms"]) == 5
    assert max(answer["terms"].values()) < 1e-5
    assert max(answer["parameters"].values()) < 1e-4
    assert len(answer["shards"]) == 8
    assert max(answer["shards"].values()) < 1e-6
    # One bit is 6e-8; powers and the order of the sums differ by a few of them.
    assert max(answer["ulps"].values()) <= 8
    assert min(answer["ulps"].values()) == 0
    assert "a mesh of 5 devices was asked for, and JAX sees 4" in answer["too many devices"]
    assert "cannot be split over 4 devices" in answer["odd batch"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_jax_without_devices_is_refused_in_one_line(python: Path) -> None:
    script = (
        "from assay.errors import InputError\n"
        "from assay.mechanisms.components.jax import make_mesh\n"
        "try:\n    make_mesh()\nexcept InputError as error:\n    print(error)\n"
    )
    done = run(python, "-c", script, JAX_PLATFORMS="cuda")
    assert "JAX has no device to compute on" in done.stdout, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 1
