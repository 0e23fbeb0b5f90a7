"""The longest files first: pytest-xdist hands out whole files in this order, so all workers end together."""

import pytest
import torch
import torch.distributed as dist

from mapet_ds.launch import Ranks

LONGEST = [
    "test_methods.py",
    "test_pretrain.py",
    "test_faults.py",
    "test_tutorial.py",
    "test_finetune.py",
    "test_benchmark.py",
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def alone():
    """This process as a launch of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), control=None)
    dist.destroy_process_group()
