"""A mechanism kind of your own in fifteen lines: neurons of any torch network, attributed, ablated
exactly and audited.

This file does not register the kind anywhere: an object with gate groups and parts is all that the
operations need."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

import assay


class Neurons(assay.Mechanisms):
    """part_k = relu(pre_k) W[:, k]: the contribution of hidden unit k to the output of the
    second layer.
    """

    kind = "neurons"

    @property
    def groups(self) -> Mapping[str, assay.Group]:
        return {
            "hidden": assay.Group(
                "hidden", sites=("2",), shape=(len(self.batch), self.target.model[2].in_features)
            )
        }

    def parts(self, site: str, seen: assay.Seen) -> Mapping[str, assay.Parts]:
        return {
            "hidden": assay.Atoms(
                seen.input, self.target.model[2].weight.T, self.groups["hidden"].shape
            )
        }


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            )
    target = assay.target(model, metric=lambda output, batch: output[:, 0])
    neurons = Neurons(target, assay.Batch(torch.randn(200, 6, generator=generator)))

    for method in (assay.Gradient(), assay.SecondOrder(), assay.IntegratedGradients()):
        audit = assay.attribute(neurons, method).audit(exact=8)
        print(
            f"{method.name:>20}: r {audit.pooled.pearson:.3f}, slope {audit.pooled.slope:.3f}, "
            f"bars cover {audit.coverage:.2f} at a mean width of {audit.width:.3f}"
        )
    scores = assay.attribute(neurons)
    kept = assay.faithfulness(neurons, assay.keep_top(scores, 0.5))
    print(f"half of the neurons keep {kept.faithfulness:.2f} of the metric")
    worst = assay.worst_case(neurons, assay.keep_top(scores, 0.5))
    print(
        f"the other half can lower it by at least {float(worst.damage.mean()):.3f} (found in"
        f" {worst.evaluations} runs)"
    )


if __name__ == "__main__":
    main()
