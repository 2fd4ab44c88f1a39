"""A GPT-2 written out node by node, so that every edge between heads and MLPs can be cut by
hand: an oracle in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from transformers import GPT2Config, GPT2LMHeadModel

from assay.core.target import Batch, Target
from assay.targets.metrics import logit_difference


def tiny_gpt2(
    *, layers: int = 2, heads: int = 2, width: int = 8, seed: int = 0, scale: float = 0.5
) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=19,
        n_positions=8,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = (
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        )
    return model


def pair(
    examples: int = 3, positions: int = 5, seed: int = 1, vocabulary: int = 19
) -> tuple[Batch, Batch]:
    """Return clean and patch prompts that differ in one token, the last example padded by one
    position.
    """
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(1, vocabulary, (examples, positions), generator=generator)
    patch = clean.clone()
    patch[:, 1] = (patch[:, 1] + 3) % (vocabulary - 1) + 1
    mask = torch.ones_like(clean)
    mask[-1, -1] = 0
    labels = {"answers": torch.tensor([[3, 7]]).expand(examples, 2), "last": mask.sum(1) - 1}
    return tuple(
        Batch({"input_ids": ids, "attention_mask": mask}, labels) for ids in (clean, patch)
    )  # type: ignore[return-value]


def target_of(model: Any) -> Target:
    return Target(model, logit_difference)


class Plain:
    """Outputs of all nodes, with the input of each receiver put together source by source."""

    def __init__(self, model: GPT2LMHeadModel):
        self.model, self.heads = model, model.config.n_head

    def run(
        self,
        batch: Batch,
        theirs: list[Tensor] | None = None,
        keep: Tensor | None = None,
        shifts: dict[int, Tensor] | None = None,
    ):
        """Return the metric and the outputs of the sources; edges not kept carry `theirs`,
        `shifts` are added to receivers' inputs.
        """
        body = self.model.transformer
        ids = batch.inputs["input_ids"]
        constant = torch.zeros(ids.shape[1], self.model.config.n_embd, dtype=torch.float64)
        sources = [body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))]
        receiver = 0

        def stream() -> Tensor:
            nonlocal receiver
            total = constant
            for place, now in enumerate(sources):
                cut = keep is not None and not keep[place, receiver]
                total = total + (theirs[place] if cut and theirs is not None else now)
            if shifts is not None:
                total = total + shifts[receiver]
            receiver += 1
            return total

        for block in body.h:
            made: dict[str, list[Tensor]] = {slot: [] for slot in "qkv"}
            size = self.model.config.n_embd // self.heads
            for number, slot in enumerate("qkv"):
                for head in range(self.heads):
                    columns = slice(
                        number * self.heads * size + head * size,
                        number * self.heads * size + (head + 1) * size,
                    )
                    normed = layer_norm(
                        stream(),
                        (constant.shape[1],),
                        block.ln_1.weight,
                        block.ln_1.bias,
                        block.ln_1.eps,
                    )
                    made[slot].append(
                        normed @ block.attn.c_attn.weight[:, columns]
                        + block.attn.c_attn.bias[columns]
                    )
            causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
            allowed = causal & batch.inputs["attention_mask"].bool()[:, None, :]
            outputs = []
            for head, (q, k, v) in enumerate(zip(*made.values(), strict=True)):
                logits = (q @ k.transpose(1, 2) / size**0.5).masked_fill(~allowed, float("-inf"))
                z = logits.softmax(-1).nan_to_num() @ v
                outputs.append(z @ block.attn.c_proj.weight[head * size : (head + 1) * size])
            sources += outputs
            constant = constant + block.attn.c_proj.bias
            hidden = layer_norm(
                stream(), (constant.shape[1],), block.ln_2.weight, block.ln_2.bias, block.ln_2.eps
            )
            hidden = gelu(hidden @ block.mlp.c_fc.weight + block.mlp.c_fc.bias, approximate="tanh")
            sources.append(hidden @ block.mlp.c_proj.weight + block.mlp.c_proj.bias)
        final = layer_norm(
            stream(), (constant.shape[1],), body.ln_f.weight, body.ln_f.bias, body.ln_f.eps
        )
        logits = final @ self.model.lm_head.weight.T
        return logit_difference(logits, batch), sources
