"""A few steps of a tiny MaPeT engine on made-up batches, a case an engine config; test_engine.py starts it.

    engine_worker.py FOLDER CASE[,CASE...] accum

With two ranks each case trains 6 steps straight, then 3, gathers, scatters into a fresh engine, trains the
other 3, and then meets gradients that are not finite. With another number of ranks it trains the last 3 from
what two ranks have gathered. Losses go to FOLDER/CASE.RANKS.json.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from safetensors.torch import load_file, save_file
from test_objectives import VOCAB, tiny_config

from mapet_ds import objectives
from mapet_ds.config.running import OptimConfig, TrainConfig
from mapet_ds.draws import first_slot
from mapet_ds.methods import build_objective
from mapet_ds.training.engine import build_engine, gather_state, scatter_state, set_learning_rate
from mapet_ds.training.optim import parameter_groups

GLOBAL_BATCH = 8
objectives.LOGITS = (
    1  # one image at a time: the head is called several times, and once more each in the backward pass
)


def batch(step, slot, slots):
    images, ids = [], []
    for i in range(slot, slot + slots):
        generator = torch.Generator().manual_seed(1000 * step + i)
        images.append(torch.randn(3, 16, 16, generator=generator))
        ids.append(torch.randint(VOCAB, (16,), generator=generator))
    return torch.stack(images), torch.stack(ids)


def engine_config(case):
    zero = {"stage": int(case[4])}
    if zero["stage"] == 3:  # small tensors would otherwise stay whole on every rank, and nothing be tested
        zero["stage3_param_persistence_threshold"] = 0
    config = {"zero_optimization": zero}
    if "bf16" in case:
        config |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return config


class Trainer:
    def __init__(self, case, accum):
        world = dist.get_world_size()
        self.accum, self.micro = accum, GLOBAL_BATCH // world // accum
        train = TrainConfig(global_batch_size=GLOBAL_BATCH, micro_batch_size=self.micro)
        adamw = "deepspeed" if "fused" in case else "torch"
        config = tiny_config(train=train, optim=OptimConfig(lr=5e-3, adamw=adamw, clip_grad=1.0))
        self.device = (
            torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "cuda" in case else torch.device("cpu")
        )
        objective = build_objective(config, config.tokenizer.vocab_size)
        self.engine = build_engine(
            objective, parameter_groups(objective, 0.05), config, engine_config(case), world, self.device
        )

        self.norms = self.hear_norms()

    def hear_norms(self):
        """Under ZeRO-1/2, each norm of a step beside the one that DeepSpeed's own method gives."""
        zero, norms = self.engine.optimizer, []
        if not isinstance(zero, DeepSpeedZeroOptimizer):
            return norms
        ours = zero.scaled_global_norm

        def both():
            norms.append([float(ours()), float(DeepSpeedZeroOptimizer.scaled_global_norm(zero))])
            return ours()

        zero.scaled_global_norm = both
        return norms

    def train(self, first, last):
        losses = []
        rank, world = dist.get_rank(), dist.get_world_size()
        for step in range(first, last):
            set_learning_rate(self.engine, 5e-3 / (1 + step))
            total = torch.zeros((), device=self.device)
            for micro_step in range(self.accum):
                slot = first_slot(micro_step, rank, world, self.micro)
                images, ids = (tensor.to(self.device) for tensor in batch(step, slot, self.micro))
                draw = self.engine.module.draw(step, slot, self.micro).to(self.device)
                loss = self.engine(images, ids, draw).loss
                self.engine.backward(loss)
                self.engine.step()
                total += loss.detach().float() / (world * self.accum)
            dist.all_reduce(total)
            losses.append(total.item())
        return losses


def save(path, state):
    weights, moments = state
    save_file({f"w.{k}": v for k, v in weights.items()} | {f"m.{k}": v for k, v in moments.items()}, path)


def load(path):
    state = load_file(path)
    return [{k[2:]: v for k, v in state.items() if k[0] == kind} for kind in "wm"]


def straight_and_resumed(folder, case, accum):
    rank = dist.get_rank()
    trainer = Trainer(case, accum)
    start = gather_state(trainer.engine, rank)
    straight = trainer.train(0, 6)
    end = gather_state(trainer.engine, rank)
    trainer = Trainer(case, accum)
    first = trainer.train(0, 3)
    half = gather_state(trainer.engine, rank)
    if rank == 0:
        save(folder / f"{case}.half.safetensors", half)
        save(folder / f"{case}.start.safetensors", start)
        save(folder / f"{case}.end.safetensors", end)
    dist.barrier()
    trainer = Trainer(case, accum)
    scatter_state(trainer.engine, *load(folder / f"{case}.half.safetensors"), updates=3)
    rest = trainer.train(3, 6)
    resumed = gather_state(trainer.engine, rank)
    if rank == 0:
        save(folder / f"{case}.resumed.safetensors", resumed)
    norms = list(trainer.norms)
    return {
        "straight": straight, "first": first, "rest": rest, "norms": norms,
        "changed": meet_gradients_that_are_not_finite(trainer, resumed),
    }  # fmt: skip


def meet_gradients_that_are_not_finite(trainer, before):
    """One number of one gradient of the last rank is NaN, inf, -inf. Gives what changed by it on rank 0."""
    rank, changed = dist.get_rank(), []
    for number, value in enumerate(map(float, ("nan", "inf", "-inf")), start=1):

        def spoil(gradient, value=value):
            if rank == dist.get_world_size() - 1:
                gradient = gradient.clone()
                gradient.flatten()[1] = value
            return gradient

        hook = trainer.engine.module.vit.blocks[1].attn.proj.weight.register_hook(spoil)
        trainer.train(6, 7)
        hook.remove()
        after = gather_state(trainer.engine, rank)
        changed += [] if trainer.engine.skipped_steps == number else [f"{value} was not skipped"]
        for old, new in zip(before, after):
            changed += [f"{name} by {value}" for name in old if not torch.equal(old[name], new[name])]
    return changed


def elsewhere(folder, case, accum):
    trainer = Trainer(case, accum)
    scatter_state(trainer.engine, *load(folder / f"{case.split('@')[-1]}.half.safetensors"), updates=3)
    return {"rest": trainer.train(3, 6)}


def main(folder, cases, accum):
    torch.set_num_threads(1)
    if "cuda" in cases:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.backends.cudnn.allow_tf32 = False  # the patch embedding's convolution, as exact as the CPU's
    dist.init_process_group("nccl" if "cuda" in cases else "gloo")
    for case in cases.split(","):
        same = dist.get_world_size() == 2 and "@" not in case
        losses = (straight_and_resumed if same else elsewhere)(Path(folder), case, int(accum))
        if dist.get_rank() == 0:
            (Path(folder) / f"{case}.{dist.get_world_size()}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
