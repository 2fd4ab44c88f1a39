"""EAP and EAP-IG on the edges between heads and MLPs against the plain way with hooks, in CPU
seconds, on the same weights.

The plain way is that of the public implementations (arXiv 2310.10348, 2403.17806): every head's q,
k and v gets its own copy of the residual stream, every head's output is kept apart, and a backward
hook at each of these inputs contracts the gradient with the kept differences, step by step. As
published, the weights track gradients during this; the second column freezes them. Run with `python
benchmarks/eap.py [--layers 4 --width 128 --heads 4 --batch 8 ...]`."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from assay.core.target import Batch, Target
from assay.edges import edges, exact_edges
from assay.edges.scores import Method
from assay.edges.wiring import wire
from assay.targets.metrics import logit_difference


class PlainModel:
    """GPT-2 with a copy of the residual stream per head and slot, and callbacks at every node's
    output and input.
    """

    def __init__(self, model: GPT2LMHeadModel, *, frozen: bool):
        model = copy.deepcopy(model).requires_grad_(not frozen)
        config, self.body = model.config, model.transformer
        self.heads, self.width, self.unembed = config.n_head, config.n_embd, model.lm_head.weight
        size = self.width // self.heads
        self.layers: list[dict[str, Any]] = []
        for block in self.body.h:
            qkv, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
            cut = [
                _leaf(slot.unflatten(-1, (self.heads, size)), frozen)
                for slot in qkv.split(self.width, dim=1)
            ]
            shift = [
                _leaf(slot.unflatten(-1, (self.heads, size)), frozen)
                for slot in bias.split(self.width)
            ]
            out = _leaf(block.attn.c_proj.weight.unflatten(0, (self.heads, size)), frozen)
            self.layers.append(
                {
                    "block": block,
                    "qkv": cut,
                    "bias": shift,
                    "out": out,
                    "out_bias": block.attn.c_proj.bias,
                }
            )

    def __call__(
        self,
        ids: Tensor,
        output: Callable[[Any, Tensor], Tensor],
        enter: Callable[[Any, Tensor], Tensor],
    ) -> Tensor:
        positions = ids.shape[1]
        stream = output("input", self.body.wte(ids) + self.body.wpe(torch.arange(positions)))
        causal = torch.ones(positions, positions).tril().bool()
        for index, layer in enumerate(self.layers):
            block = layer["block"]
            slots = []
            for slot in range(3):
                copies = enter((index, slot), stream.unsqueeze(2).repeat(1, 1, self.heads, 1))
                slots.append(
                    torch.einsum("bphd,dhk->bhpk", block.ln_1(copies), layer["qkv"][slot])
                    + layer["bias"][slot][:, None]
                )
            q, k, v = slots
            weights = (
                (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5)
                .masked_fill(~causal, float("-inf"))
                .softmax(-1)
            )
            results = output(
                (index, "heads"), torch.einsum("bhpk,hkd->bphd", weights @ v, layer["out"])
            )
            stream = stream + results.sum(2) + layer["out_bias"]
            inner = enter((index, "mlp"), stream.clone())
            stream = stream + output((index, "m"), block.mlp(block.ln_2(inner)))
        stream = enter("logits", stream)
        return self.body.ln_f(stream) @ self.unembed.T


def plain_edges(model: PlainModel, clean: Batch, patch: Batch, steps: int) -> Tensor:
    """Return the summed scores of all edges (sources, receivers), step by step with hooks; one
    step is EAP.
    """
    ids, other = clean.inputs["input_ids"], patch.inputs["input_ids"]
    heads, layers = model.heads, len(model.layers)
    sources, receivers = 1 + layers * (heads + 1), layers * (3 * heads + 1) + 1
    differences = torch.zeros(*ids.shape, sources, model.width)
    scores = torch.zeros(sources, receivers)
    starts: list[Tensor] = []

    def place(name: Any) -> Any:
        if name == "input":
            return 0
        first = 1 + name[0] * (heads + 1)
        return slice(first, first + heads) if name[1] == "heads" else first + heads

    def store(sign: int) -> Callable[[Any, Tensor], Tensor]:
        def output(name: Any, value: Tensor) -> Tensor:
            differences[:, :, place(name)] += sign * value.detach()
            if name == "input":
                starts.append(value.detach())
            return value

        return output

    def hooked(name: Any, value: Tensor) -> Tensor:
        if name == "logits":
            seen, columns = sources, slice(receivers - 1, receivers)
        else:
            first = name[0] * (3 * heads + 1)
            slot = 3 if name[1] == "mlp" else name[1]
            seen = 1 + name[0] * (heads + 1) + (heads if slot == 3 else 0)
            columns = slice(
                first + slot * heads, first + slot * heads + (1 if slot == 3 else heads)
            )

        def contract(gradient: Tensor) -> None:
            rows = gradient if gradient.ndim == 4 else gradient.unsqueeze(2)
            scores[:seen, columns] += torch.einsum("bpsd,bprd->sr", differences[:, :, :seen], rows)

        value.register_hook(contract)
        return value

    def plain(name: Any, value: Tensor) -> Tensor:
        return value

    with torch.no_grad():
        model(other, store(1), plain)
        model(ids, store(-1), plain)
    patched, own = starts
    for step in range(1, steps + 1):

        def begin(name: Any, value: Tensor, share: float = step / steps) -> Tensor:
            return (
                (patched + share * (own - patched)).requires_grad_() if name == "input" else value
            )

        logits = model(ids, begin, hooked)
        logit_difference(logits, clean).sum().backward()
    return scores / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {
        "layers": 4,
        "width": 128,
        "heads": 4,
        "batch": 8,
        "positions": 16,
        "vocabulary": 512,
        "steps": 5,
        "repeats": 9,
    }
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--exact", action="store_true", help="also patch every edge exactly")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = GPT2Config(
        vocab_size=given.vocabulary,
        n_positions=given.positions,
        n_embd=given.width,
        n_layer=given.layers,
        n_head=given.heads,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.08
    batches = []
    for _ in range(2):
        ids = torch.randint(
            1, given.vocabulary, (given.batch, given.positions), generator=generator
        )
        labels = {
            "answers": torch.tensor([[1, 2]]).expand(given.batch, 2),
            "last": torch.full((given.batch,), given.positions - 1),
        }
        batches.append(Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels))
    clean, patch = batches
    target = Target(model, logit_difference)
    shape = (
        f"{given.layers} layers of width {given.width}, {given.heads} heads, batch {given.batch},"
        f" {given.positions} positions"
    )
    print(
        f"{shape}: {wire(model).graph.edges} edges; median CPU s of {given.repeats} runs, one"
        " thread"
    )
    print(f"{'':18} {'plain hooks':>12} {'frozen':>8} {'assay':>8}   ratios")
    methods: tuple[tuple[Method, int, str], ...] = (
        ("eap", 1, "EAP"),
        ("eap-ig", given.steps, f"EAP-IG, {given.steps} steps"),
    )
    for method, steps, name in methods:
        published, _ = _timed(
            partial(plain_edges, PlainModel(model, frozen=False), clean, patch, steps),
            given.repeats,
        )
        frozen, expected = _timed(
            partial(plain_edges, PlainModel(model, frozen=True), clean, patch, steps), given.repeats
        )
        ours, found = _timed(
            partial(edges, target, clean, patch, method=method, steps=steps), given.repeats
        )
        gap = float((found.values.sum(0) - expected).abs().max() / expected.abs().max())
        ratios = f"{published / ours:4.1f} x {frozen / ours:4.1f} x"
        print(
            f"{name:18} {published:12.3f} {frozen:8.3f} {ours:8.3f}   {ratios}   largest difference"
            f" {gap:.0e}"
        )
    if given.exact:
        spent, _ = _timed(partial(exact_edges, target, clean, patch), 1)
        print(f"{'exact edges':18} {'':12} {'':8} {spent:8.3f}")


def _leaf(weight: Tensor, frozen: bool) -> Tensor:
    return weight.detach().clone().requires_grad_(not frozen)


def _timed(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    function()
    spent = []
    for _ in range(repeats):
        begin = time.process_time()
        result = function()
        spent.append(time.process_time() - begin)
    return statistics.median(spent), result


if __name__ == "__main__":
    main()
