"""What all but a circuit can do: a bracket for few parts, a line with a name for many."""

from __future__ import annotations

import pytest
import torch
from cases import bound_features

from assay.studies.features import worst


@pytest.mark.slow
def test_few_free_parts_are_bounded_and_many_are_named(monkeypatch):
    mechanisms = bound_features()
    name, group = next(iter(mechanisms.groups.items()))
    nodes = [(name, (0,) * len(group.axes))]
    asked = {"searched": 2, "certified": 1, "seed": 0}
    found = worst.worst_of(mechanisms, nodes, (), **asked)
    assert found["examples"] == 2
    bracket = found["bracket"]
    assert bracket["proved_mean"] >= bracket["found_mean"] - 1e-9
    free = sum(torch.Size(one.axes).numel() for one in mechanisms.groups.values()) - 1
    monkeypatch.setattr(worst, "MOST", free)
    again = worst.worst_of(mechanisms, nodes, (), **asked)["bracket"]
    assert again["proved_mean"] == bracket["proved_mean"]
    monkeypatch.setattr(worst, "MOST", free - 1)
    refused = worst.worst_of(mechanisms, nodes, (), **asked)["bracket"]["refused"]
    assert refused.startswith(f"{free} parts of an example are free, more than the {free - 1}")
    assert worst.worst_of(mechanisms, nodes, (), searched=0, certified=1, seed=0) == {}
