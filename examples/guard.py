"""A guard from nothing: A fires, and B fires 90 % of the time. Is that an explanation?

In the network of this example A makes B fire, and a twin of C fires whenever D does without
reaching it. Laboratory tables cannot tell the two cases apart; gates can.
"""

from __future__ import annotations

import torch

from assay import Batch, nodes, target
from assay.guard import Explanation, Guarded, Settings, fit
from assay.guard.gates import last_column_off, swaps
from assay.guard.proposals import Proposal, judge, predict
from assay.guard.quantise import quantise
from assay.guard.reading import Reading, read
from assay.guard.wrapper import hash_of
from assay.targets.firing import FEATURES, Firing, draw_inputs

A, C, TWIN, B, D, E = FEATURES


def main() -> None:
    torch.set_num_threads(1)
    model, reading = Firing(), Reading({"first": (0, 1, 2), "second": (0, 1, 2)})
    inputs, paired = draw_inputs(900, seed=1), draw_inputs(900, seed=2)
    tables, fresh, calibration = (
        read(model, x, reading) for x in (inputs, draw_inputs(400, 3), draw_inputs(300, 4))
    )

    # Gates first: swap the cause's value in from another input, and see whether the effect fires.
    quantiser = quantise(tables.values, 4)
    metric = target(model, lambda output, batch: output[:, 0])
    bound = nodes(metric, Batch(inputs), Batch(paired), ["first", "second"],
                  neurons=["first", "second"])  # fmt: skip
    off = last_column_off(reading, None)
    swap = swaps(bound, reading, quantiser, read(model, paired, reading), off)
    proposals = [Proposal(A, B), Proposal(TWIN, D), Proposal(D, E, parent=C)]
    predictions = [predict(one, swap, FEATURES) for one in proposals]

    # Tables second: a fresh split decides.
    rates = (quantiser(tables.values) >= quantiser.fires).double().mean(0)
    fires = quantiser(fresh.values) >= quantiser.fires
    admitted, refused = [], []
    for one in predictions:
        rate = float(rates[FEATURES.index(one.proposal.effect)])
        found = judge(one, rate, fires, FEATURES)
        name = f"{one.proposal.cause} -> {one.proposal.effect}"
        if isinstance(found, Explanation):
            admitted.append(found)
            print(f"admitted  {name}: predicted {found.predicted:.2f}, seen {found.observed:.2f}")
        else:
            refused.append(found)
            print(f"refused   {name}: {found.reason}")

    guard = fit(
        tables, fresh, calibration, Settings(bins=4), given=admitted, refused=refused,
        model_hash=hash_of(model), reading=reading.to_json(),
    )  # fmt: skip
    nothing = fit(tables, fresh, calibration, Settings(bins=4, modes=()))
    new = draw_inputs(1000, seed=5)
    data = read(model, new, reading)
    print(f"without explanations {float(nothing(data).accepted.double().mean()):.0%} are accepted,")
    print(
        f"with {len(guard.explanations)} of them {float(guard(data).accepted.double().mean()):.0%}"
    )
    served = Guarded(model, guard)(10 * new[:3])
    print(served.accepted, served.reasons[0], served.events[0])


if __name__ == "__main__":
    main()
