"""The training loop: learns, resumes to the bit after kill -9, and refuses what it cannot go on
from.
"""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from assay.errors import AssayError, InputError
from assay.io import runs
from assay.learn import cosine, fit, ramp

SCRIPT = textwrap.dedent("""
    import time
    import torch
    from torch import nn
    from assay.io.runs import Run
    from assay.learn import cosine, fit

    def train(folder, steps=400, pause=0.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

        def objective(step):
            time.sleep(pause)
            x = torch.randn(16, 3, generator=generator)
            loss = (model(x)[:, 0] - x.prod(1)).square().mean()
            return loss, {"metrics/size": loss.detach()}

        fit(model, objective, optimizer, steps=steps, generator=generator, schedule=cosine,
            run=Run(folder), log_every=10, save_every=25)
        return model
    """)


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "job.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "job.py"
    sys.modules.pop("job", None)


def killed_once(reached, work):
    """Do the work in a forked process, which is killed (-9) once a state is reached."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.slow
def test_resume_after_kill_is_bit_identical(script, tmp_path):
    import job

    whole = job.train(tmp_path / "whole")
    checkpoint = tmp_path / "killed" / "training.pt"
    killed_once(checkpoint.exists, lambda: job.train(tmp_path / "killed", pause=0.002))
    state = torch.load(tmp_path / "killed" / "training.pt", weights_only=True)
    assert 0 < state["step"] < 400
    resumed = job.train(tmp_path / "killed")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    first, second = (runs.Run(tmp_path / name).metrics() for name in ("whole", "killed"))
    assert first.equals(second)
    assert first["losses/total"][-1] < first["losses/total"][0]


def simple(run=None, *, width=2, rate=0.1, steps=5, momentum=0.0):
    model = nn.Linear(width, 1)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)

    def objective(step):
        return (
            model(torch.ones(1, width)).square().sum() * (float("nan") if rate > 1e8 else 1.0),
            {},
        )

    fit(model, objective, optimizer, steps=steps, generator=generator, run=run)
    return optimizer


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="at least 1"):
        simple(steps=0)
    with pytest.raises(AssayError, match="the loss is nan at step 0"):
        simple(rate=1e9)
    run = runs.Run(tmp_path)
    simple(run)
    with pytest.raises(InputError, match=r"not a checkpoint of this training: .*size mismatch"):
        simple(run, width=3)
    with pytest.raises(InputError, match="is at step 5, and this training has 4 steps"):
        simple(run, steps=4)
    whole = run.path("training.pt").read_bytes()
    for data in (b"rubbish", whole[:-1], whole[:200] + b"?" + whole[201:]):
        run.path("training.pt").write_bytes(data)
        with pytest.raises(InputError, match=r"training\.pt is damaged") as refused:
            simple(run)
        assert "weights_only" not in str(refused.value)
    run.path("training.pt").unlink()
    with pytest.raises(InputError, match=r"training\.pt is missing, and the run wrote it"):
        simple(run)


@pytest.mark.parametrize(
    "state",
    [{}, {"model": 5}, {"step": -1}, {"step": "many"}, {"generator": torch.zeros(3)}],
    ids=["empty", "model", "negative", "no number", "generator"],
)
def test_a_checkpoint_of_something_else_is_refused(state, tmp_path):
    run = runs.Run(tmp_path)
    simple(run)
    run.save_state("training.pt", {**run.state("training.pt"), **state} if state else {})
    with pytest.raises(InputError, match=r"training\.pt is "):
        simple(run)


def test_a_checkpoint_with_a_damaged_moment_or_weight_is_refused(tmp_path):
    for what, words in (("optimizer", "the optimizer's momentum_buffer"), ("model", "weight")):
        run = runs.Run(tmp_path / what)
        simple(run, momentum=0.9)
        state = run.state("training.pt")
        held = state[what]["state"][0] if what == "optimizer" else state[what]
        next(entry for key, entry in held.items() if words.endswith(key)).fill_(torch.nan)
        run.save_state("training.pt", state)
        with pytest.raises(InputError, match=f"is damaged: {words} is not finite"):
            simple(run, momentum=0.9)


def test_a_moment_that_overflows_stops_the_training():
    """Adam divides by it: the parameter would stay where it is, finite and untrained."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with pytest.raises(AssayError, match="the optimizer's exp_avg_sq is not finite after step 2"):
        fit(
            model,
            lambda step: (1e25 * model.weight.sum(), {}),
            optimizer,
            steps=3,
            generator=torch.Generator(),
        )
    assert bool(model.weight.isfinite().all())


def test_metrics_before_the_first_checkpoint_resume_exactly(script, tmp_path):
    import job

    job.train(tmp_path / "whole", steps=60)
    log = tmp_path / "killed" / "metrics.jsonl"
    killed_once(
        lambda: log.exists() and log.read_text().count("\n") > 1,
        lambda: job.train(tmp_path / "killed", steps=60, pause=0.1),
    )
    assert not (tmp_path / "killed" / "training.pt").exists()
    job.train(tmp_path / "killed", steps=60)
    assert log.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_two_trainings_in_one_folder_do_not_interleave(tmp_path):
    run = runs.Run(tmp_path)
    rival = runs.Run(tmp_path)
    with rival.held(), pytest.raises(InputError, match="in use by another process"):
        simple(run)
    simple(run)


def test_a_full_disk_loses_nothing_but_the_new_checkpoint(tmp_path, monkeypatch):
    run = runs.Run(tmp_path)
    simple(run)
    before = run.path("training.pt").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(AssayError, match="No space left"):
        simple(run, steps=9)
    assert run.path("training.pt").read_bytes() == before
    assert [path.name for path in Path(tmp_path).iterdir() if path.name.startswith(".")] == []


def test_schedules():
    assert cosine(0.0) == 1
    assert cosine(1.0, floor=0.1) == pytest.approx(0.1)
    assert cosine(0.05, warmup=0.1) == pytest.approx(0.5)
    assert [ramp(done, 0.2, 0.5) for done in (0.1, 0.2, 0.35, 0.5, 0.9)] == pytest.approx(
        [0, 0, 0.5, 1, 1]
    )
