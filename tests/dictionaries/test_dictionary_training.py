"""Training of dictionaries: gradients of every architecture, resumption, processes, revival."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from assay.dictionaries import Placed, architecture
from assay.dictionaries.codes import codes_of, rebuild
from assay.dictionaries.evaluation import evaluate
from assay.dictionaries.initial import initialise
from assay.dictionaries.problem import Problem
from assay.dictionaries.revival import revive
from assay.dictionaries.settings import Training
from assay.dictionaries.sparse import Everything
from assay.dictionaries.training import train
from assay.errors import AssayError, InputError
from assay.io.runs import Run
from assay.learn.reading import Reader, rows_of

SITE = "blocks.0.hook_mlp_out"
OPTIONS = {
    "relu": {},
    "topk": {"k": 3},
    "batchtopk": {"k": 2.5},
    "matryoshka": {"k": 3, "nested": (4, 12)},
    "jumprelu": {},
    "gated": {},
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=30, n_positions=8, n_embd=8, n_layer=2, n_head=2, attn_implementation="eager"
    )
    found = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in found.parameters():
        parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return found


@pytest.fixture(scope="module")
def rows():
    ids = torch.randint(30, (32, 8), generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(32) % 5 + 4
    return rows_of(ids, torch.arange(8) < lengths[:, None], constant=1)


def make(name, width=6, size=12, **more):
    dictionary = architecture(name)(width, size, **OPTIONS[name], **more).double()
    generator = torch.Generator().manual_seed(2)
    initialise(dictionary, generator, threshold=0.3 if name == "jumprelu" else None)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).double()
    return dictionary


def dense(name, dictionary, x, training):
    """What each architecture rebuilds in training, and its penalty, without sparse products."""
    before, norms, width = dictionary.before(x), dictionary.W_dec.norm(dim=1), dictionary.d_out
    if name == "jumprelu":
        codes = dictionary.encode_training(x, training.bandwidth)
        return codes, dictionary.count_active(x, training.bandwidth).sum() / width
    if name == "gated":
        return dictionary.encode(x), dictionary.open_gates(x).sum() / width**0.5
    codes = dictionary.encode_training(x)
    return codes, (torch.relu(before) * norms).sum() / width**0.5 if name == "relu" else None


FORMS = {"itself": {}, "transcoder": {"d_out": 4}, "skip transcoder": {"d_out": 4, "skip": 3}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("many", [False, True], ids=["sparse", "as it comes"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_of_the_dense_formula(name, many, form, monkeypatch):
    if not many:  # at 12 features nothing is sparse enough by itself
        monkeypatch.setattr("assay.dictionaries.sparse.DENSE", 2.0)
    training = Training(bandwidth=0.5)
    dictionary = make(name, **FORMS[form])
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
    shape = (9, dictionary.d_out)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(4)).double()
    parameters = [x, *dictionary.parameters()]

    def gradients(out, penalty):
        total = (out * weights).sum() + (0.0 if penalty is None else 0.7 * penalty)
        return torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)

    codes, penalty = dense(name, dictionary, x, training)
    expected = gradients(dictionary.decode(codes, x), penalty)
    found = codes_of(dictionary, x, [9], training)
    assert isinstance(found.active, Everything) == (many and name in ("relu", "jumprelu", "gated"))
    out = rebuild(dictionary, found, x)
    assert torch.allclose(out, dictionary.decode(codes, x))
    for one, other in zip(gradients(out, found.penalty), expected, strict=True):
        assert torch.allclose(one, other)
    counts = (codes > 0).sum(0)
    assert torch.equal(found.active.count(found.values.detach()), counts)
    if name == "matryoshka":
        nested = dictionary.decode_nested(codes, x)
        assert torch.allclose(found.others[0], nested[0])


def fitted(model, rows, run=None, sites=(SITE, "blocks.1.hook_resid_post"), **changes):
    options = {"steps": 6, "batch": 32, "save_every": 2, "end_to_end": 0.34, "windows": 4}
    placed = {site: Placed(architecture("topk")(8, 24, k=3), site, (site,)) for site in sites}
    return train(model, rows, placed, Training(**{**options, **changes}), run=run)


def test_a_killed_training_ends_with_the_same_numbers(model, rows, tmp_path, monkeypatch):
    whole = fitted(model, rows, Run(tmp_path / "whole"))
    step = Problem.local

    def killed(self, values, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, values, number)

    monkeypatch.setattr(Problem, "local", killed)
    with pytest.raises(KeyboardInterrupt):
        fitted(model, rows, Run(tmp_path / "part"))
    monkeypatch.undo()
    again = fitted(model, rows, Run(tmp_path / "part"))
    for name, one in whole.items():
        for key, value in one.dictionary.state_dict().items():
            assert torch.equal(again[name].dictionary.state_dict()[key], value)
    logged = Run(tmp_path / "part").metrics()
    assert {f"losses/{SITE}", f"metrics/l0/{SITE}"} <= set(logged.columns)


def test_scales_are_folded_back(model, rows):
    """Of a network whose values are a thousand times larger, dictionaries rebuild a thousand
    times as much, with the same features.
    """
    large = GPT2LMHeadModel(model.config).eval()
    large.load_state_dict(model.state_dict())
    large.requires_grad_(False)
    large.transformer.h[0].mlp.c_proj.weight.mul_(1000)
    large.transformer.h[0].mlp.c_proj.bias.mul_(1000)
    one, other = (fitted(net, rows, sites=(SITE,), end_to_end=0.0) for net in (model, large))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        one[SITE].dictionary(x), other[SITE].dictionary(1000 * x) / 1000, atol=1e-4
    )
    codes = one[SITE].dictionary.encode(x), other[SITE].dictionary.encode(1000 * x)
    assert torch.allclose(*codes, atol=1e-4)
    assert not one[SITE].dictionary.training


@pytest.mark.parametrize("name", ["topk", "batchtopk", "relu", "gated"])
def test_training_begins_with_the_size_that_rebuilds_best(model, rows, name):
    """No multiple of what a dictionary adds to its bias is nearer to the values than itself."""
    placed = {SITE: Placed(architecture(name)(8, 24, **OPTIONS[name]), SITE, (SITE,))}
    training = Training(steps=1, batch=32, rate=1e-12, sparsity=0.0)
    found = train(model, rows, placed, training)[SITE].dictionary.train()
    x = Reader(model, [SITE])(rows)[SITE]
    rebuilt = found.encode_training(x) @ found.W_dec
    best = (rebuilt * (x - found.b_dec)).sum() / rebuilt.square().sum()
    assert float(best) == pytest.approx(1.0, abs=1e-3)
    assert not torch.allclose(found.W_enc.norm(dim=0), found.W_dec.norm(dim=1), rtol=0.1)


def test_a_loss_that_is_not_finite_names_its_site(model, rows, monkeypatch):
    monkeypatch.setattr("assay.dictionaries.problem.Problem.local", _poisoned(Problem.local))
    with pytest.raises(AssayError, match=f"losses/{SITE} is nan"):
        fitted(model, rows, sites=(SITE,))


def _poisoned(local):
    def poisoned(self, values, step):
        return local(self, {name: value * float("nan") for name, value in values.items()}, step)

    return poisoned


def test_dead_features_move_to_badly_rebuilt_inputs(model):
    dictionary = architecture("topk")(8, 6, k=2)
    generator = torch.Generator().manual_seed(0)
    initialise(dictionary, generator)
    training = Training(steps=20, batch=4, revive_every=5)
    problem = Problem(model, {SITE: Placed(dictionary, SITE, (SITE,))}, {SITE: 1.0}, training)
    optimizer = torch.optim.Adam(problem.parameters())
    for parameter in problem.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    problem.silent(SITE)[1] = 5
    error = torch.zeros(4, 8)
    error[2] = torch.arange(8.0)
    problem.seen[SITE] = (torch.randn(4, 8), error)
    before = dictionary.W_dec.detach().clone()
    assert revive(problem, optimizer, generator) == 1
    expected = error[2] / error[2].norm()
    assert torch.allclose(dictionary.W_dec[1] / dictionary.W_dec[1].norm(), expected)
    assert torch.allclose(dictionary.W_enc[:, 1] / dictionary.W_enc[:, 1].norm(), expected)
    kept = [0, 2, 3, 4, 5]
    assert torch.equal(dictionary.W_dec[kept], before[kept])
    assert not optimizer.state[dictionary.W_dec]["exp_avg"][1].any()
    assert optimizer.state[dictionary.W_dec]["exp_avg"][0].any()
    assert int(problem.silent(SITE)[1]) == 0


def test_the_divergence_of_one_site_is_divided_by_that_of_zeros(model, rows):
    """In odd steps the loss is the share of the divergence that zeros at the site cause."""
    dictionary = architecture("topk")(8, 24, k=3)
    initialise(dictionary, torch.Generator().manual_seed(0))
    some = rows.take(slice(0, 4))
    training = Training(steps=20, batch=4, windows=4, local=0.0)
    problem = Problem(model, {SITE: Placed(dictionary, SITE, (SITE,))}, {SITE: 1.0}, training)
    with torch.no_grad():
        whole, share = (problem.end_to_end(some, step)[0] for step in (0, 1))
    clean = model(**some.inputs()).logits.log_softmax(-1)
    handle = model.transformer.h[0].mlp.register_forward_hook(
        lambda module, args, out: torch.where(some.kept[..., None], 0.0, out)
    )
    zeroed = model(**some.inputs()).logits.log_softmax(-1)
    handle.remove()
    known = some.mask[:, 1:]
    divergence = (clean.exp() * (clean - zeroed)).sum(-1)[:, :-1][known].mean()
    assert 1e-3 < float(divergence) < 1
    assert float(share) == pytest.approx(float(whole / divergence), rel=1e-3)


def test_half_precision_is_trained_in_float32(model, rows):
    placed = {SITE: Placed(architecture("topk")(8, 24, k=3).bfloat16(), SITE, (SITE,))}
    found = train(model, rows, placed, Training(steps=2, batch=32))[SITE].dictionary
    assert found.W_dec.dtype == torch.float32
    assert placed[SITE].dictionary.W_dec.dtype == torch.bfloat16


def test_bad_input_is_refused(model, rows):
    with pytest.raises(InputError, match="token 37 is none of the network's 30 tokens"):
        fitted(model, rows_of(torch.full((32, 8), 37)))
    wrong = {SITE: Placed(architecture("topk")(9, 24, k=3), SITE, (SITE,))}
    with pytest.raises(InputError, match=r"width 9, and those at .* have width 8"):
        train(model, rows, wrong, Training(steps=1, batch=8))
    fixed = {SITE: Placed(architecture("identity")(8), SITE, (SITE,))}
    with pytest.raises(InputError, match="'identity' cannot be trained"):
        train(model, rows, fixed)
    with pytest.raises(InputError, match="no dictionary"):
        train(model, rows, {})
    for changes in ({"steps": 0}, {"rate": 0.0}, {"shares": 3}, {"penalty": "l2"}):
        with pytest.raises(InputError):
            replace(Training(), **changes)


JOB = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[2])
    import torch
    import test_dictionary_training as tests
    from assay.learn.processes import join

    model, rows = tests.model.__wrapped__(), tests.rows.__wrapped__()
    found = tests.fitted(model, rows, shares=2, revive_every=1, steps=8)
    if join()[0] == 0:
        torch.save({k: v.dictionary.state_dict() for k, v in found.items()}, sys.argv[1])
    """)


@pytest.mark.slow
def test_two_processes_train_as_one(model, rows, tmp_path):
    job, out = tmp_path / "job.py", tmp_path / "both.pt"
    job.write_text(JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(job), str(out), os.path.dirname(__file__)],
        check=True,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    both = torch.load(out, weights_only=True)
    alone = fitted(model, rows, shares=2, revive_every=1, steps=8)
    for name, one in alone.items():
        for key, value in one.dictionary.state_dict().items():
            assert torch.allclose(both[name][key], value, rtol=1e-3, atol=1e-4)


class Superposed(nn.Module):
    """A network whose only module gives, for every token, a row of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_superposed_features_are_recovered(name):
    """64 sparse features in 32 dimensions with noise: each is found, with the default penalty.

    The losses of a Matryoshka dictionary have more local minima, which larger steps leave."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(64, 32, generator=generator)
    truth /= truth.norm(dim=1, keepdim=True)
    count = 20_000
    on = torch.rand(count, 64, generator=generator) < 3 / 64
    strength = on * (torch.rand(count, 64, generator=generator) + 0.5)
    table = strength @ truth + 0.02 * torch.randn(count, 32, generator=generator)
    model = Superposed(table).requires_grad_(False)
    rows = rows_of(torch.arange(count).reshape(-1, 10))
    options = {**OPTIONS[name], **({"k": 3} if "k" in OPTIONS[name] else {})}
    options |= {"nested": (48, 64)} if name == "matryoshka" else {}
    placed = {"table": Placed(architecture(name)(32, 64, **options), "table", ("table",))}
    training = Training(steps=1500, batch=1000, rate=2e-2 if name == "matryoshka" else 3e-3)
    found = train(model, rows, placed, training)["table"].dictionary
    rows_ = found.W_dec / found.W_dec.norm(dim=1, keepdim=True)
    assert float((truth @ rows_.T).amax(1).mean()) >= 0.95


def spoken(model, rows):
    """The same windows with what the network itself predicts behind their first tokens, so that
    there is a loss to recover.
    """
    ids = rows.ids.clone()
    for place in range(1, ids.shape[1]):
        ids[:, place] = model(ids[:, :place]).logits[:, -1].argmax(-1)
    return rows_of(ids, rows.mask, constant=1)


def test_evaluation_against_plain_hooks(model, rows):
    """Every number of an evaluation, worked out with hooks and float64."""
    site = "blocks.0.hook_resid_post"
    rows = spoken(model, rows)
    dictionary = architecture("topk")(8, 24, k=3)
    initialise(dictionary.requires_grad_(False), torch.Generator().manual_seed(0))
    placed = {
        site: Placed(dictionary, site, (site,)),
        SITE: Placed(architecture("identity")(8), SITE, (SITE,)),
    }
    found = evaluate(model, rows, placed)
    block = model.transformer.h[0]
    kept, inputs = rows.kept, rows.inputs()

    def loss(change):
        handle = block.register_forward_hook(
            lambda module, args, out: torch.where(kept[..., None], change(out), out)
        )
        logits = model(**inputs).logits[:, :-1].double()
        handle.remove()
        known = rows.mask[:, 1:]
        return float(nn.functional.cross_entropy(logits[known], rows.ids[:, 1:][known]))

    seen = []
    clean = loss(lambda x: seen.append(x) or x)
    x = seen[0][kept].double()
    zero, spliced = loss(torch.zeros_like), loss(dictionary)
    one = next(entry for entry in found.sites if entry.name == site)
    assert found.loss == pytest.approx(clean, abs=1e-5)
    assert one.loss_zero == pytest.approx(zero, abs=1e-5)
    assert one.loss_recovered == pytest.approx((zero - spliced) / (zero - clean), abs=1e-5)
    error = x - dictionary.double()(x)
    centred = x - x.mean(0)
    assert one.explained == pytest.approx(
        1 - float(error.square().sum() / centred.square().sum()), abs=1e-5
    )
    codes = dictionary.encode(x)
    assert one.l0 == pytest.approx(float((codes > 0).sum(1).double().mean()))
    assert one.dead == pytest.approx(float((~(codes > 0).any(0)).double().mean()))
    values, basis = torch.linalg.svd(centred)[1:]
    assert one.rank == 3
    share = float(values[:3].square().sum() / values.square().sum())
    assert one.pca_explained == pytest.approx(share, abs=1e-5)
    dictionary.float()
    basis = basis[:3].float()
    mean = x.mean(0).float()
    pca = loss(lambda y: mean + (y - mean) @ basis.T @ basis)
    assert one.pca_loss_recovered == pytest.approx((zero - pca) / (zero - clean), abs=1e-5)
    exact = next(entry for entry in found.sites if entry.name == SITE)
    assert one.recovered.low < one.loss_recovered < one.recovered.high
    assert one.recovered.rise == pytest.approx(zero - clean, abs=1e-5)
    assert exact.explained == 1.0
    assert exact.loss_spliced == pytest.approx(found.loss, abs=1e-5)
    assert (exact.loss_recovered is None) == (SITE in found.reasons)
    # An exact dictionary changes nothing where all are spliced.
    assert found.loss_spliced == pytest.approx(spliced, abs=1e-5)
    assert "all at once" in repr(found)
    assert "<table>" in found._repr_html_()
