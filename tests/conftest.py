"""The longest files first: pytest-xdist hands out whole files in this order, so all workers end together."""

import pytest
import torch
import torch.distributed as dist

from mapet_ds.launch import Ranks

LONGEST = ["methods", "pretrain", "faults", "tutorial", "finetune", "benchmark"]
"""Files that run for minutes, by what follows `test_`."""
SLOW = [
    *LONGEST,
    "counting",
    "ds_configs",
    "engine",
    "export_onnx",
    "extending",
    "fit_codebook",
    "forecast",
    "gpu_path",
]
SLOW += [
    "export",
    "hub",
    "init_from",
    "laptop",
    "launch",
    "make_demo",
    "online_probe",
    "plan",
    "probe",
    "published",
    "readme",
]
SLOW += [
    "report",
    "segment",
    "slurm",
    "teacher",
    "timm_teacher",
    "tokenize_images",
    "tokens",
    "vqkd",
    "wheel",
]
"""Files that start whole programs or count large models: `make quick` leaves them out."""


def pytest_collection_modifyitems(items):
    name = {item: item.path.stem.removeprefix("test_") for item in items}
    items.sort(key=lambda item: LONGEST.index(name[item]) if name[item] in LONGEST else len(LONGEST))
    for item in items:
        if name[item] in SLOW:
            item.add_marker("slow")


@pytest.fixture
def alone():
    """This process as a launch of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), control=None)
    dist.destroy_process_group()
