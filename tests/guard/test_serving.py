"""Reading, serving and saving: one forward pass, no exception, no acceptance without a verdict."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from laboratories import drawn, small_network
from torch import nn

from assay.core.target import Batch, target
from assay.errors import InputError
from assay.guard import Guard, Settings, fit, of_mechanisms
from assay.guard.files import CONFIG, TENSORS, _checksum, load, save
from assay.guard.reading import Reading, input_keys, read, reading_of, whole
from assay.guard.wrapper import Guarded, RejectedError, hash_of, memory
from assay.io import files
from assay.mechanisms.nodes import nodes
from assay.targets.agreement import build_model


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    return small_network()


@pytest.fixture(scope="module")
def guard(model) -> Guard:
    reading = whole(model, drawn(50), ["1", "3"])
    parts = [read(model, drawn(n, seed=s), reading) for n, s in ((400, 1), (150, 2), (150, 3))]
    settings = Settings(bins=3, modes=("constant", "marginal", "add", "single-edit"))
    return fit(*parts, settings, model_hash=hash_of(model), reading=reading.to_json())


def test_features_are_what_modules_put_out(model):
    x = drawn(7)
    found = read(model, x, Reading({"1": (2, 0), "3": (1,)}))
    first = model[:2](x)
    assert torch.equal(found.values[:, 0], first[:, 2])
    assert torch.equal(found.values[:, 2], model[:4](x)[:, 1])
    assert torch.equal(found.logits, model(x))
    assert found.names == ("1[2]", "1[0]", "3[1]")
    few = whole(model, x, ["1", "3"], most=4)
    assert len(few.names) == 4
    assert reading_of(json.loads(json.dumps(few.to_json())), "x").names == few.names


def test_a_language_model_is_read_at_the_last_real_token():
    language = build_model(20, layers=1, width=8, heads=2, context=8, seed=0).eval()
    ids = torch.tensor([[3, 4, 5, 0], [6, 7, 0, 0], [3, 4, 5, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    reading = Reading({"transformer.h.0.mlp.act": (0, 3)})
    found = read(language, {"input_ids": ids, "attention_mask": mask}, reading)
    for row, length in enumerate((3, 2, 4)):
        alone = ids[row : row + 1, :length]
        one = read(language, {"input_ids": alone, "attention_mask": torch.ones_like(alone)},
                   reading)  # fmt: skip
        assert torch.allclose(found.values[row], one.values[0], atol=1e-5)
        assert torch.allclose(found.logits[row], one.logits[0], atol=1e-5)
        assert found.keys[row] == one.keys[0]
    assert len(set(found.keys)) == 3


@pytest.mark.parametrize(
    ("sites", "message"),
    [({}, "at least one feature"), ({"1": (0, 0)}, "must be distinct"), ({"1": (-1,)}, "distinct")],
)
def test_readings_of_nothing_are_refused(sites, message):
    with pytest.raises(InputError, match=message):
        Reading(sites)


def test_readings_that_do_not_fit_the_network_are_refused(model):
    with pytest.raises(InputError, match="has 6 columns, and the guard reads column 6"):
        read(model, drawn(3), Reading({"1": (6,)}))
    with pytest.raises(InputError, match="unknown site"):
        read(model, drawn(3), Reading({"layers.9": (0,)}))
    for bad in (None, {}, {"sites": {"1": 3}, "logits": True}, {"sites": {"1": [0]}}):
        with pytest.raises(InputError, match="a reading needs sites"):
            reading_of(bad, "here")


def test_any_mechanisms_give_features(model):
    metric = lambda output, batch: output[:, 0]  # noqa: E731
    bound = nodes(target(model, metric), Batch(drawn(9)), sites=["1"], reference="zero",
                  neurons=["1"])  # fmt: skip
    found = of_mechanisms(bound, model(drawn(9)))
    assert torch.allclose(found.values, model[:2](drawn(9)).abs(), atol=1e-6)
    assert len(set(found.names)) == 6


def test_one_pass_serves_and_judges(model, guard):
    guarded = Guarded(model, guard)
    x = drawn(200, seed=5)
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    served = guarded(x)
    handle.remove()
    assert len(calls) == 1
    assert torch.equal(served.output, model(x))
    verdicts = guard(read(model, x, reading_of(guard.reading, "x")))
    assert served.accepted == tuple(verdicts.accepted.tolist())
    assert 0.7 < sum(served.accepted) / 200 < 1
    for accepted, reason, events in zip(
        served.accepted, served.reasons, served.events, strict=True
    ):
        assert accepted == reason.startswith("accepted")
        assert bool(events) == (reason == "features without support")
    assert memory(guard) > 1000


class Broken(nn.Module):
    def __init__(self, inner: nn.Module, what: str):
        super().__init__()
        self.inner, self.what = inner, what

    def forward(self, x):
        if self.what == "raises":
            raise RuntimeError("the network fails")
        out = self.inner(x)
        return {"nan": out * torch.nan, "short": out[:1], "text": "hello"}[self.what]


@pytest.mark.parametrize("what", ["raises", "nan", "short", "text"])
def test_a_failing_network_is_a_rejection(guard, what):
    model = Broken(small_network(), what)
    inner = {f"inner.{site}": columns for site, columns in guard.reading["sites"].items()}
    moved = replace(
        guard,
        model_hash="",
        names=Reading({site: tuple(columns) for site, columns in inner.items()}).names,
        reading={"sites": inner, "logits": True},
    )
    served = Guarded(model, moved)(drawn(4))
    assert not any(served.accepted)
    assert len(served.accepted) == 4
    if what != "nan":
        assert served.output is None
        assert served.error


@pytest.mark.parametrize(
    "x",
    [torch.zeros(3, 9), torch.full((3, 4), torch.nan), "text", None, torch.zeros(0, 4), [], {}],
)
def test_nothing_is_raised_and_nothing_accepted_for_bad_input(model, guard, x):
    served = Guarded(model, guard)(x)
    assert not any(served.accepted)
    assert not served.all_accepted


def test_a_failing_guard_accepts_nothing(model, guard):
    broken = replace(guard, statistic=None)
    served = Guarded(model, broken)(drawn(3))
    assert served.accepted == (False, False, False)
    assert "Error" in served.error
    assert Guarded(model, guard)().accepted == (False,)


def test_raising_is_a_choice_and_names_the_events(model, guard):
    guarded = Guarded(model, guard, raises=True)
    good = next(x[None] for x in drawn(50, seed=5) if Guarded(model, guard)(x[None]).all_accepted)
    assert guarded(good).all_accepted
    with pytest.raises(RejectedError, match="input 0 is rejected: not finite") as raised:
        guarded(torch.full((1, 4), torch.nan))
    assert raised.value.served.accepted == (False,)
    with pytest.raises(RejectedError, match="input 0 is rejected: RuntimeError"):
        guarded(torch.zeros(1, 7))
    odd = 50 * torch.ones(1, 4)
    with pytest.raises(RejectedError, match="input 0 is rejected"):
        guarded(odd)


def test_a_guard_of_another_network_is_refused(guard, tmp_path):
    other = small_network(seed=5)
    with pytest.raises(InputError, match="fitted on another network"):
        Guarded(other, guard)
    save(tmp_path, guard)
    with pytest.raises(InputError, match="fitted on another network"):
        load(tmp_path, model_hash=hash_of(other))
    assert load(tmp_path, model_hash=guard.model_hash).names == guard.names


def test_a_saved_guard_gives_the_same_verdicts(model, guard, tmp_path):
    again = load(save(tmp_path / "guard", guard))
    x = drawn(300, seed=4)
    first, second = Guarded(model, guard)(x), Guarded(model, again)(x)
    assert first.accepted == second.accepted
    assert first.p == second.p
    assert first.events == second.events
    assert again.explanations == guard.explanations
    assert again.refused == guard.refused
    assert torch.equal(again.memory, guard.memory)
    save(tmp_path / "guard", again)  # its own files may be replaced
    bare = fit(*[read(model, drawn(n, seed=s), Reading({"1": (0,)}, logits=False))
                 for n, s in ((200, 1), (80, 2), (80, 3))], Settings(bins=3))  # fmt: skip
    assert load(save(tmp_path / "bare", bare)).scorer.classes is None


def test_damaged_and_foreign_files_are_refused(guard, tmp_path):
    folder = save(tmp_path / "guard", guard)
    entry = files.read_json(folder / CONFIG)

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            load(folder)

    tensors = files.load_tensors(folder / TENSORS, finite=False)
    for name, change, message in (
        ("compiled.edges", lambda t: t + 99, "a feature that does not exist"),
        ("compiled.single", lambda t: t[:, :1], "single has shape"),
        ("distance.whiten", lambda t: t * torch.nan, "holds NaN"),
        ("statistic", lambda t: -t, "must rise"),
    ):
        files.save_tensors(folder / TENSORS, {**tensors, name: change(tensors[name])})
        entry["sha256"] = files.sha256(folder / TENSORS)
        files.write_json(folder / CONFIG, {**entry, "checksum": _checksum(entry)})
        refused(message)
    files.save_tensors(folder / TENSORS, {k: t for k, t in tensors.items() if k != "cuts"})
    refused("is not the file that guard.json was written with")
    entry["sha256"] = files.sha256(folder / TENSORS)
    files.write_json(folder / CONFIG, {**entry, "checksum": _checksum(entry)})
    refused("does not describe its tensors: 'cuts'")
    (folder / CONFIG).write_text(files.to_json({**entry, "format": "other"}))
    refused("is no guard of this version")
    with pytest.raises(InputError, match=r"guard\.json exists and is not a file"):
        save(folder, guard)
    (folder / CONFIG).unlink()
    refused("no file")


def test_keys_tell_inputs_apart():
    x = drawn(4)
    assert input_keys(x) == input_keys(x.clone())
    assert len(set(input_keys((x, x * 2)))) == 4
