"""Dictionaries in training: the loss of a batch at all sites, and the state that a step carries to
the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss

from assay.dictionaries import sparse
from assay.dictionaries.base import Placed
from assay.dictionaries.batchtopk import BatchTopK
from assay.dictionaries.codes import Codes, codes_of, rebuild, require_rule, take
from assay.dictionaries.linear import Linear
from assay.dictionaries.settings import Training
from assay.dictionaries.splicing import logits_of, predicted, splice
from assay.learn.loop import ramp
from assay.learn.processes import sum_over_processes
from assay.learn.reading import Rows

LEAST, MOST = 1e-3, 1.0
"""Between what the KL of zeros at one site is held, in nats, before it divides that site's loss."""

FOLLOWS = 0.01
"""How far a batch moves the threshold of a dictionary that chooses over the batch."""


class Problem(nn.Module):
    """The dictionaries at their places, the scales of their sites, and for how many steps each
    feature has been silent.

    Everything is computed on values over their scale, so that every site's loss is the share of
    variance that is not explained. Of `world` processes each gives its share of the batch; the sum
    of their gradients is that of one process with the whole batch."""

    def __init__(
        self,
        model: nn.Module,
        placed: Mapping[str, Placed],
        scales: Mapping[str, float],
        training: Training,
    ) -> None:
        super().__init__()
        for one in placed.values():
            require_rule(one.dictionary)
        self.splice = splice(model, placed)
        self.placed, self.training_, self.scales = dict(placed), training, dict(scales)
        self._names = list(placed)
        self.dictionaries = nn.ModuleList(one.dictionary for one in placed.values())
        for index, dictionary in enumerate(self.dictionaries):
            assert isinstance(dictionary, Linear)
            dictionary.W_enc.data = sparse.row_major(dictionary.W_enc.data)
            silent = torch.zeros(dictionary.size, dtype=torch.long, device=dictionary.b_enc.device)
            self.register_buffer(f"silent{index}", silent)
        self.zeros: Tensor
        self.register_buffer("zeros", torch.zeros(len(placed)))
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        """What each dictionary read at the first part of the last batch, and what it left there."""

    def silent(self, name: str) -> Tensor:
        """For how many steps each feature of a dictionary has been silent, (size,)."""
        found: Tensor = getattr(self, f"silent{self._names.index(name)}")
        return found

    def local(
        self, values: Mapping[str, Float[Tensor, "positions width"]], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of this process's share of a batch, and what is logged: the share of
        variance that is not explained, per site, and the number of active features.
        """
        training = self.training_
        count = len(next(iter(values.values())))
        parts = [training.batch // training.shares] * (count * training.shares // training.batch)
        losses = []
        terms: dict[str, Tensor] = {}
        rebuilt: dict[str, list[Tensor]] = {}
        made: dict[str, tuple[Tensor, Codes]] = {}
        for name, one in self.placed.items():
            x = values[one.reads] / self.scales[one.reads]
            codes = codes_of(one.dictionary, x, parts, training)
            made[name] = (x, codes)
            pieces = rebuild(one.dictionary, codes, x).split(one.width, dim=-1)
            for site, piece in zip(one.writes, pieces, strict=True):
                rebuilt.setdefault(site, []).append(piece)
            active = codes.active.count(codes.values.detach())
            with torch.no_grad():
                terms[f"metrics/l0/{name}"] = sum_over_processes(
                    active.sum().to(x.dtype) / training.batch
                )
                self._note(name, active, codes)
            if codes.penalty is not None:
                sparsity = training.sparsity_of(one.dictionary.architecture)
                share = sparsity * ramp(step / training.steps, 0.0, 0.1)
                losses.append(share * codes.penalty / training.batch)
        errors: dict[str, Tensor] = {}
        for site, pieces_ in rebuilt.items():
            y = values[site] / self.scales[site]
            whole = sum(pieces_[1:], pieces_[0])
            errors[site] = y - whole.detach()
            # The library's sum of squares keeps no squares for its derivative.
            squares = mse_loss(whole, y, reduction="sum")
            shared = squares / (training.batch * y.shape[1])
            terms[f"losses/{site}"] = sum_over_processes(shared.detach())
            losses.append(shared)
        for name, (x, codes) in made.items():
            one = self.placed[name]
            error = _beside([errors[site] for site in one.writes])
            losses += self._others(values, one, codes, training)
            losses += self._auxiliary(name, x, error)
            self.seen[name] = (x[: parts[0]], error[: parts[0]])
        return torch.stack(losses).sum(), terms

    def end_to_end(self, rows: Rows, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the KL of the spliced network from the network itself on this process's share of
        some windows, plus `local` times the local loss at the same values.

        All sites are spliced in even steps, one of them, in turn, in odd ones. The KL of one site
        is divided by that of zeros there, held between `LEAST` and `MOST`, measured when its turn
        first comes: a site that the network hardly needs shall be rebuilt as well as it is needed.
        """
        training, names = self.training_, self._names
        place = step // 2 % len(names)
        chosen = names if step % 2 == 0 else names[place : place + 1]
        splice = self.splice
        with torch.no_grad():
            output = splice.model(**rows.inputs(self._device()))
            clean = logits_of(output).float().log_softmax(-1)
        known = predicted(rows).to(clean.device)
        total = sum_over_processes(known.sum().to(clean.dtype))
        kept = rows.kept.sum(1)
        share = len(rows) * training.shares // training.windows
        parts = [int(some.sum()) for some in kept.chunk(share)]
        positions = sum_over_processes(kept.sum().to(clean))
        locals_: list[Tensor] = []
        read: dict[str, Tensor] = {}

        def put(name: str, x: Tensor) -> Tensor:
            one = self.placed[name]
            x = x / self.scales[one.reads]
            codes = codes_of(one.dictionary, x, parts, training)
            with torch.no_grad():
                self._note(name, codes.active.count(codes.values), codes)
            read[name] = x.detach()
            if codes.penalty is not None:
                sparsity = training.sparsity_of(one.dictionary.architecture)
                locals_.append(sparsity * codes.penalty / positions)
            pieces = rebuild(one.dictionary, codes, x).split(one.width, dim=-1)
            found = [
                piece * self.scales[site] for site, piece in zip(one.writes, pieces, strict=True)
            ]
            return _beside(found)

        def watch(site: str, rebuilt: Tensor, value: Tensor) -> None:
            error = (rebuilt - value.detach()) / self.scales[site]
            locals_.append(training.local * error.square().sum() / (positions * error.shape[1]))
            for name in read:
                if self.placed[name].writes == (site,):
                    self.seen[name] = (read[name][: parts[0]], -error.detach()[: parts[0]])

        some = {name: self.placed[name] for name in chosen}

        def divergence(output: object) -> Tensor:
            spliced = logits_of(output).float().log_softmax(-1)
            return (
                kl_div(
                    spliced[:, :-1][known], clean[:, :-1][known], log_target=True, reduction="sum"
                )
                / total
            )

        loss = divergence(splice.run(rows, put, chosen=some, watch=watch))
        what = "all sites" if len(chosen) == len(names) else chosen[0]
        terms = {f"losses/kl/{what}": sum_over_processes(loss.detach())}
        if step % 2:
            if not self.zeros[place]:
                with torch.no_grad():
                    zero = divergence(splice.run(rows, self._zeros, chosen=some))
                self.zeros[place] = sum_over_processes(zero)
            loss = loss / self.zeros[place].clamp(LEAST, MOST)
        return torch.stack([loss, *locals_]).sum(), terms

    def _zeros(self, name: str, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.placed[name].dictionary.d_out)

    def _others(
        self, values: Mapping[str, Tensor], one: Placed, codes: Codes, training: Training
    ) -> list[Tensor]:
        """Return the losses of the further vectors that shall rebuild the same values."""
        losses = []
        for other in codes.others:
            for site, piece in zip(one.writes, other.split(one.width, dim=-1), strict=True):
                error = values[site] / self.scales[site] - piece
                losses.append(error.square().sum() / (training.batch * piece.shape[1]))
        return losses

    def _auxiliary(self, name: str, x: Tensor, error: Tensor) -> list[Tensor]:
        """Return the share of the error that the strongest dead features do not explain."""
        training, dictionary = self.training_, self.placed[name].dictionary
        assert isinstance(dictionary, Linear)
        if not training.auxiliary:
            return []
        dead = (self.silent(name) >= training.between_revivals).nonzero()[:, 0]
        if not len(dead):
            return []
        some = min(training.auxiliary_features, len(dead))
        with torch.no_grad():
            columns = sparse.row_major(dictionary.W_enc[:, dead])
            before = torch.addmm(dictionary.b_enc[dead], dictionary.centred(x), columns)
            strongest = before.topk(some, dim=-1, sorted=False)
        active = sparse.active_at(dead[strongest.indices], dictionary.size)
        strength = torch.relu(take(dictionary, x, strongest.values.flatten(), active))
        rest = error - sparse.decode(strength, dictionary.W_dec, active)
        size = sum_over_processes(error.square().sum()).clamp(min=1e-12)
        return [training.auxiliary * rest.square().sum() / size]

    def _note(self, name: str, active: Tensor, codes: Codes) -> None:
        """Keep which features were silent, and the threshold of a choice over the batch."""
        silent = self.silent(name)
        fired = sum_over_processes(active.to(torch.float32)) > 0
        silent.copy_(torch.where(fired, 0, silent + 1))
        dictionary = self.placed[name].dictionary
        if codes.smallest is not None and isinstance(dictionary, BatchTopK):
            smallest = sum_over_processes(codes.smallest) / self.training_.shares
            now = dictionary.threshold
            now.copy_(torch.where(now > 0, now + FOLLOWS * (smallest - now), smallest))

    def _device(self) -> torch.device:
        return next(self.dictionaries.parameters()).device


def _beside(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def measure(
    sample: Mapping[str, Float[Tensor, "positions width"]],
) -> dict[str, tuple[Float[Tensor, " width"], float]]:
    """Return the mean of the values at every site and their scale: the root of the mean variance
    per coordinate.
    """
    found = {}
    for name, values in sample.items():
        value = values.double()
        mean = value.mean(0)
        scale = float((value - mean).square().mean().sqrt())
        found[name] = (mean.float(), scale if scale > 0 else 1.0)
    return found
