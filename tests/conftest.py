"""The longest files first: pytest-xdist hands out whole files in this order, so all workers end together."""

import os
import runpy
import sys

import pytest
import torch
import torch.distributed as dist

from mapet_ds.config.sections import REPOSITORY
from mapet_ds.launch import Ranks

LONGEST = ["methods", "pretrain", "faults", "tutorial", "finetune", "benchmark"]
"""Files that run for minutes, by what follows `test_`."""
SLOW = [
    *LONGEST,
    "counting",
    "crops",
    "detection",
    "ds_configs",
    "engine",
    "engine_settings",
    "export",
    "export_onnx",
    "extending",
    "fit_codebook",
    "forecast",
    "gpu_path",
    "hub",
    "init_from",
    "laptop",
    "launch",
    "library",
    "make_demo",
    "online_probe",
    "plan",
    "probe",
    "published",
    "readme",
    "report",
    "roofline",
    "segment",
    "slurm",
    "study",
    "teacher",
    "timm_teacher",
    "tokenize_images",
    "tokens",
    "trackers",
    "trial",
    "vqkd",
    "wheel",
]
"""Files that start programs or count large models. `make quick` leaves them out, and tests marked slow."""


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


@pytest.fixture
def run_tool_with(monkeypatch, capsys):
    """tools/evaluate.py in this process, without seconds of imports: exit code and what it prints."""
    program = REPOSITORY / "tools" / "evaluate.py"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that what the program sets is taken back
        monkeypatch.delenv(name)

    def run(command, *arguments):
        words = (program, command, "--device", "cpu", "--workers", "0", *arguments)
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        monkeypatch.syspath_prepend(program.parent)  # as Python does for a script
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(program), run_name="__main__")
        return exit.value.code, capsys.readouterr()

    return run
