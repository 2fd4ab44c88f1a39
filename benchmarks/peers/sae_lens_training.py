"""SAELens's side of `dictionary_training.py`, run by it in an environment of its own: its training
step, and its runner for several sites on a shared forward pass.

Arguments: `step` or `sites`, a folder, a JSON file with the sizes. Prints CPU seconds and the share
of variance explained as JSON."""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from looks import Clock, explained
from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformers import GPT2LMHeadModel


def load(folder: str) -> HookedTransformer:
    theirs = GPT2LMHeadModel.from_pretrained(folder)
    shape = theirs.config
    config = HookedTransformerConfig(
        n_layers=shape.n_layer,
        d_model=shape.n_embd,
        n_heads=shape.n_head,
        d_head=shape.n_embd // shape.n_head,
        d_mlp=4 * shape.n_embd,
        n_ctx=shape.n_positions,
        d_vocab=shape.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=shape.layer_norm_epsilon,
        device="cpu",
    )
    model = HookedTransformer(config)
    model.load_state_dict(convert_gpt2_weights(theirs, config), strict=False)
    return model.eval()


def make(given: dict[str, Any], width: int, scaling: str = "none") -> TopKTrainingSAEConfig:
    return TopKTrainingSAEConfig(
        d_in=width,
        d_sae=given["features"],
        k=given["k"],
        device="cpu",
        normalize_activations=scaling,
        use_sparse_activations=given["sparse"],
    )


def train_steps(folder: Path, given: dict[str, Any]) -> dict[str, float]:
    """The trainer's own step on given batches, from given weights: one for every line read."""
    data = load_file(folder / "step.safetensors")
    sae = TopKTrainingSAE(make(given, given["width"]))
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_dec"):
            getattr(sae, name).copy_(data[name])
        sae.b_enc.zero_()
    batches = data["x"].split(given["batch"])
    steps = given["steps"]
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * given["batch"],
        device="cpu",
        autocast=False,
        lr=given["rate"],
        lr_end=given["rate"],
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=given["batch"],
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=1,
    )
    trainer = SAETrainer(config, sae, iter(()))
    spent = []
    print("ready", flush=True)
    for step, _ in zip(range(steps), sys.stdin, strict=False):
        began = time.process_time()
        trainer.step(batches[step])
        trainer.n_training_steps += 1
        spent.append(time.process_time() - began)
        print("done", flush=True)
    with torch.no_grad():
        share = explained(batches[-1], sae(batches[-1]))
    return {"seconds": sorted(spent)[len(spent) // 2], "explained": share}


def train_sites(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The runner for several sites: tokens to dictionaries, looked at every so many steps."""
    model = load(str(folder / "model"))
    tokens = load_file(folder / "tokens.safetensors")
    dataset = Dataset.from_dict({"tokens": tokens["train"].tolist()})
    width, names = model.cfg.d_model, given["sites"]
    config = MultiSAETrainingRunnerConfig(
        saes={name: make(given, width, "expected_average_only_in") for name in names},
        hook_names={name: name for name in names},
        dataset_path="none",
        streaming=False,
        context_size=tokens["train"].shape[1],
        n_batches_in_buffer=given["buffer"],
        training_tokens=given["steps"] * given["batch"],
        store_batch_size_prompts=given["prompts"],
        device="cpu",
        prepend_bos=False,
        sequence_separator_token=None,
        train_batch_size_tokens=given["batch"],
        lr=given["rate"],
        lr_scheduler_name="cosineannealing",
        lr_end=0.0,
        dead_feature_window=1000,
        n_batches_for_norm_estimate=1,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
    )
    runner = MultiSAETrainingRunner(config, override_dataset=dataset, override_model=model)
    start = load_file(folder / "start.safetensors")
    with torch.no_grad():
        for name in names:
            for key in ("W_enc", "W_dec", "b_enc", "b_dec"):
                getattr(runner.saes[name], key).copy_(start[f"{name}:{key}"])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens["held"])
    clock = Clock({name: cache[name].flatten(0, 1) for name in names})
    after, every = MultiSAETrainer._update_pbar, given.get("every", given["steps"])

    def watched(self: MultiSAETrainer, *others: Any) -> None:
        if self.n_training_steps % every == 0 and self.n_training_steps < given["steps"]:
            scales = {n: one.activation_scaler.scaling_factor for n, one in self.trainers.items()}
            clock.look({name: (self.saes[name], 1 / scales[name]) for name in names})
        after(self, *others)

    with mock.patch.object(MultiSAETrainer, "_update_pbar", watched):
        trained = runner.run()
    return clock.look({name: (trained[name], 1.0) for name in names})


if __name__ == "__main__":
    torch.set_num_threads(1)
    # As the command does for ours: large buffers are kept between steps.
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 30)
    libc.mallopt(-1, (1 << 31) - 1)
    torch.manual_seed(0)
    task = {"step": train_steps, "sites": train_sites}[sys.argv[1]]
    print(json.dumps(task(Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))))
