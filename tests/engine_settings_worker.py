"""Engines of many DeepSpeed JSONs on two ranks, against torch.optim.AdamW; test_engine_settings.py starts it.

    engine_settings_worker.py FILE

FILE holds the JSONs by name. Each trains a few steps, with clipping and accumulation. What differs from plain
AdamW, or the refusal of gather_state, goes to FILE.found.
"""

import json
import sys
from pathlib import Path

import torch
from test_objectives import TINY, VOCAB, tiny_config

from mapet_ds.config.running import OptimConfig, TrainConfig
from mapet_ds.config.sections import ModelConfig
from mapet_ds.draws import first_slot
from mapet_ds.errors import RunError
from mapet_ds.launch import init_distributed
from mapet_ds.methods import build_objective
from mapet_ds.training.engine import build_engine, gather_state, set_learning_rate
from mapet_ds.training.optim import parameter_groups

RANKS, ACCUMULATE, STEPS, MICRO = 2, 2, 2, 2
CONFIG = tiny_config(
    model=ModelConfig("vit_tiny_patch16_224", img_size=16, patch_size=4, args={**TINY, "depth": 1}),
    train=TrainConfig(global_batch_size=RANKS * ACCUMULATE * MICRO, micro_batch_size=MICRO),
    optim=OptimConfig(lr=5e-3, adamw="torch", clip_grad=0.5),
)


def loss(call, objective, step, micro_step, rank):
    slot = first_slot(micro_step, rank, RANKS, MICRO)
    generator = torch.Generator().manual_seed(1000 * step + slot)
    images = torch.randn(MICRO, 3, 16, 16, generator=generator)
    ids = torch.randint(VOCAB, (MICRO, 16), generator=generator)
    return call(images, ids, objective.draw(step, slot, MICRO)).loss


def rate(step):
    return CONFIG.optim.lr / (1 + step)


def plain():
    """Weights, moments and gradient norms of torch.optim.AdamW and clip_grad_norm_ on the joined batch."""
    objective, optim, norms = build_objective(CONFIG, VOCAB), CONFIG.optim, []
    groups = parameter_groups(objective, optim.weight_decay)
    adam = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    for step in range(STEPS):
        for group in adam.param_groups:
            group["lr"] = rate(step)
        adam.zero_grad()
        for micro_step in range(ACCUMULATE):
            for rank in range(RANKS):
                (loss(objective, objective, step, micro_step, rank) / ACCUMULATE / RANKS).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(objective.parameters(), optim.clip_grad)))
        adam.step()
    parameters = dict(objective.named_parameters())
    moments = {f"exp_avg.{name}": adam.state[p]["exp_avg"] for name, p in parameters.items()}
    return {name: p.detach() for name, p in parameters.items()} | moments, norms


def differences(engine_config, rank, state, norms):
    objective, optim, apart = build_objective(CONFIG, VOCAB), CONFIG.optim, []
    groups = parameter_groups(objective, optim.weight_decay)
    engine = build_engine(objective, groups, CONFIG, engine_config, RANKS, torch.device("cpu"))
    for step in range(STEPS):
        set_learning_rate(engine, rate(step))
        for micro_step in range(ACCUMULATE):
            engine.backward(loss(engine, objective, step, micro_step, rank))
            engine.step()
        apart.append(abs(float(engine.get_global_grad_norm()) / norms[step] - 1))
    weights, moments = gather_state(engine, rank)
    found = {
        "norms": max(apart),
        "weights": max([float((weights[name] - state[name]).abs().max()) for name in weights], default=0),
        "moments": max(
            [float((moments[k] - state[k]).abs().max()) for k in moments if k in state], default=0
        ),
    }
    engine.destroy()
    return found


def main(path):
    torch.set_num_threads(1)
    rank = init_distributed(60).rank
    state, norms = plain()
    found = {}
    for name, engine_config in json.loads(path.read_text()).items():
        try:
            found[name] = differences(engine_config, rank, state, norms)
        except RunError as error:
            found[name] = str(error)
    if rank == 0:
        path.with_suffix(".found").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
