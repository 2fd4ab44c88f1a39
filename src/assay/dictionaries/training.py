"""Training of dictionaries at several sites in one pass over the data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from assay.dictionaries.base import DictionarySet, Placed
from assay.dictionaries.codes import require_rule
from assay.dictionaries.fold import fold_scale
from assay.dictionaries.initial import initialise, scale_encoder
from assay.dictionaries.linear import Linear
from assay.dictionaries.optimizer import Adam
from assay.dictionaries.problem import Problem, measure
from assay.dictionaries.revival import normalise, revive
from assay.dictionaries.settings import Training
from assay.errors import InputError
from assay.io.runs import Run
from assay.learn.loop import cosine, fit
from assay.learn.processes import join, sum_gradients
from assay.learn.reading import Rows
from assay.learn.streams import Stream

MEASURED = 256
"""Windows on which means and scales are measured before training."""
FITTED = 1024
"""Positions of these to which the size of first encoders is fitted."""

UNCONSTRAINED = ("relu",)
"""Architectures whose penalty weighs a feature by the norm of its decoder row; the rows of all
others are kept at length one."""


def train(
    model: nn.Module,
    rows: Rows,
    placed: DictionarySet,
    training: Training | None = None,
    *,
    run: Run | None = None,
    name: str = "dictionaries",
) -> dict[str, Placed]:
    """Train dictionaries on what a frozen network computes on some windows, and return them, for
    values as they are, in evaluation mode.

    `placed` says which architecture of which size stands where; it stays as it is. All sites are
    read in one pass. The local loss is the share of variance that is not explained, summed over
    sites, plus what the architecture is charged; see `Training` for the rest. Dictionaries of half
    precision are trained in float32. With `run`, a
    checkpoint holds dictionaries, optimizer, silent features and the generator; a later call goes
    on from the last one and ends with the same bits. Of several processes (`torchrun`) each takes
    its shares of every batch, and each has a run of its own.

    Raises InputError for an architecture that is not trained, sites that the network does not have
    and dictionaries of another width, AssayError, with the site, when the loss is not finite."""
    training = Training() if training is None else training
    placed = {key: _copied(one) for key, one in placed.items()}
    if not placed:
        raise InputError("no dictionary to train was given")
    rank, world = join()
    names = list(dict.fromkeys(s for one in placed.values() for s in (one.reads, *one.writes)))
    stream = Stream(
        model,
        rows,
        names,
        batch=training.batch,
        seed=training.seed,
        shares=training.shares,
        rank=rank,
        world=world,
    )
    _require_widths(placed, stream.widths)
    sample = stream.sample(MEASURED)
    measured = measure(sample)
    scales = {site: scale for site, (_, scale) in measured.items()}
    generator = torch.Generator().manual_seed(training.seed)
    means = {site: mean / scales[site] for site, (mean, _) in measured.items()}
    first = {site: values[:FITTED] / scales[site] for site, values in sample.items()}
    _begin(placed, means, first, training, generator)
    del sample, first
    problem = Problem(model, placed, scales, training)
    parameters = list(problem.dictionaries.parameters())
    optimizer = Adam(parameters, training.rate)
    frozen = [one for one in model.parameters() if one.requires_grad]
    done = 0

    def objective(step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        nonlocal done
        done = step + 1
        if step < training.local_steps:
            return problem.local(stream(step), step)
        return problem.end_to_end(stream.draw_windows(step, training.windows), step)

    def after() -> None:
        every = training.between_revivals
        revived = training.local_steps or training.steps
        if done % every == 0 and done <= training.revive_until * revived:
            revive(problem, optimizer, generator)
        for one in placed.values():
            if one.dictionary.architecture not in UNCONSTRAINED:
                normalise(one.dictionary)

    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        fit(
            problem,
            objective,
            optimizer,
            steps=training.steps,
            generator=generator,
            schedule=partial(cosine, warmup=training.warmup),
            run=run,
            name=name,
            log_every=training.log_every,
            save_every=training.save_every,
            before_step=partial(sum_gradients, problem),
            after_step=after,
        )
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return {key: _folded(one, scales) for key, one in placed.items()}


def _copied(one: Placed) -> Placed:
    require_rule(one.dictionary)
    dictionary = copy.deepcopy(one.dictionary)
    if dictionary.W_dec.dtype in (torch.bfloat16, torch.float16):  # too coarse for small steps
        dictionary = dictionary.float()
    return Placed(dictionary, one.reads, one.writes)


def _require_widths(placed: DictionarySet, widths: Mapping[str, int]) -> None:
    """Raise InputError where a dictionary does not fit the values that it reads or writes."""
    for name, one in placed.items():
        if one.dictionary.d_in != widths[one.reads]:
            raise InputError(
                f"dictionary {name!r} reads vectors of width {one.dictionary.d_in}, and those at"
                f" {one.reads!r} have width {widths[one.reads]}"
            )
        for site in one.writes:
            if one.width != widths[site]:
                raise InputError(
                    f"dictionary {name!r} writes vectors of width {one.width}, and those at"
                    f" {site!r} have width {widths[site]}"
                )


def _begin(
    placed: DictionarySet,
    means: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    training: Training,
    generator: torch.Generator,
) -> None:
    """Draw the dictionaries' first state: each site's mean stands in the bias of the first
    dictionary that writes there, and autoencoders without thresholds rebuild some values as well
    as the size of their encoder lets them.
    """
    taken: set[str] = set()
    for one in placed.values():
        centre = torch.cat(
            [means[site] * (site not in taken) for site in one.writes],
        )
        taken.update(one.writes)
        assert isinstance(one.dictionary, Linear)
        jumps = one.dictionary.architecture == "jumprelu"
        initialise(
            one.dictionary,
            generator,
            centre=centre.to(one.dictionary.b_dec),
            threshold=training.threshold if jumps else None,
        )
        if one.writes == (one.reads,) and not jumps:
            scale_encoder(one.dictionary, values[one.reads].to(one.dictionary.W_enc))


def _folded(one: Placed, scales: Mapping[str, float]) -> Placed:
    """Return a dictionary for values as they are."""
    written = [scales[site] for site in one.writes]
    if one.writes == (one.reads,):
        dictionary = fold_scale(one.dictionary, scales[one.reads])
    else:
        columns = torch.tensor(written, dtype=torch.float64).repeat_interleave(one.width)
        dictionary = fold_scale(one.dictionary, scales[one.reads], columns)
    for parameter in dictionary.parameters():
        parameter.data = parameter.data.contiguous()
    return Placed(dictionary.eval().requires_grad_(False), one.reads, one.writes)
