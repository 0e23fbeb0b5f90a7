"""The shipped DeepSpeed JSONs: DeepSpeed, which ignores misspelt keys, knows each, and builds an engine."""

import json
import os
import subprocess
import sys

import pytest
from deepspeed.runtime import constants
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.sections import REPOSITORY

FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))
NAMES = [f"zero{stage}{suffix}" for stage in (1, 2, 3) for suffix in ("", "_cpu")]
TOP_LEVEL = {value for value in vars(constants).values() if isinstance(value, str)} | {"zero_optimization"}


def test_the_set_is_complete():
    assert sorted(path.stem for path in FILES) == sorted(NAMES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_known_to_deepspeed(path):
    engine = load_deepspeed_config(path)
    assert set(engine) <= TOP_LEVEL
    assert set(engine.get("data_types", {})) <= TOP_LEVEL
    zero = DeepSpeedZeroConfig(**engine["zero_optimization"])
    DeepSpeedBF16Config(**engine.get("bf16", {}))
    assert f"zero{int(zero.stage)}" == path.stem.removesuffix("_cpu")
    assert engine.get("bf16", {}).get("enabled", False) is not path.stem.endswith("_cpu")


def test_a_misspelt_key_would_be_found():
    assert "gradient_cliping" not in TOP_LEVEL
    assert "gradient_clipping" in TOP_LEVEL
    with pytest.raises(ValueError, match="overlap_com"):
        DeepSpeedZeroConfig(stage=2, overlap_com=True)


WORKER = """
import json, os, socket, sys
import torch, torch.distributed as dist
from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.recipe import load_config
from mapet_ds.training.engine import build_engine
from mapet_ds.training.optim import parameter_groups
from mapet_ds.launch import init_distributed
from mapet_ds.methods import build_objective

ranks = init_distributed()
config = load_config(sys.argv[1])
facts = {}
for path in sys.argv[2:]:
    torch.manual_seed(0)
    objective = build_objective(config, config.tokenizer.vocab_size)
    engine = build_engine(
        objective, parameter_groups(objective, 0.05), config, load_deepspeed_config(path), 1,
        torch.device("cpu")
    )
    dtype, accumulate = engine.get_data_types()
    ids = torch.arange(4 * config.num_patches).view(4, -1) % config.tokenizer.vocab_size
    losses = []
    for step in range(3):
        loss = engine(torch.ones(4, 3, 32, 32, dtype=dtype), ids, engine.module.draw(0, 0, 4)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    types = [str(dtype), str(accumulate), str(engine.communication_data_type)]
    waits = engine.tput_timer.config.enabled, engine.zero_overlap_comm()
    facts[path] = [engine.zero_optimization_stage(), *types, losses, waits]
    engine.destroy()
print("FACTS", json.dumps(facts))
"""


def test_each_builds_an_engine_that_learns(tmp_path):
    recipe = {
        "model": {
            "name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "drop_path": 0.0,
            "args": {"depth": 2, "embed_dim": 32, "num_heads": 2},
        },
        "tokenizer": {"vocab_size": 16},
        "train": {"global_batch_size": 4, "micro_batch_size": 4},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "recipe.yaml"), *map(str, FILES)]
    environment = {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.split("FACTS")[1])
    for path in FILES:
        stage, dtype, accumulate, communicate, losses, waits = facts[str(path)]
        assert stage == int(path.stem[4])
        assert dtype == ("torch.float32" if path.stem.endswith("_cpu") else "torch.bfloat16")
        assert accumulate == communicate == "torch.float32"
        assert losses[2] < losses[0]
        assert waits == [False, False], "a timer, and one rank's overlap, would make the host wait"
