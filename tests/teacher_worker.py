"""Features of sharded teachers on made-up images; started by test_teacher.py under torchrun.

teacher_worker.py TOWERS OUT DEVICE     TOWERS holds the folders vit, resnet, ...; rank r writes OUT/r.pt
"""

import dataclasses
import os
import shutil
import sys
import time
from pathlib import Path

import open_clip
import safetensors
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from towers import SIZE, know_tiny_models

from mapet_ds.config.sections import TeacherConfig
from mapet_ds.errors import ConfigError
from mapet_ds.targets import teacher as module

open_file = safetensors.safe_open

CASES = [
    ("vit", "fp32", "world"), ("vit", "bf16", "node"), ("resnet", "fp32", "node"),
    ("resnet", "bf16", "world"),
    ("timm", "fp32", "world"), ("relpos", "fp32", "node"), ("vit", "fp32", "none"),
    ("vit.pt", "fp32", "world"), ("trunk", "fp32", "world"), ("trunk", "bf16", "node"),
]  # fmt: skip


class CountingFile:
    """A safetensors file that adds up the elements read through its slices."""

    def __init__(self, path, framework):
        self.file = open_file(path, framework)
        self.read = 0
        CountingFile.last = self

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return CountingSlice(self, self.file.get_slice(name))


class CountingSlice:
    def __init__(self, owner, inner):
        self.owner, self.inner = owner, inner
        self.get_shape = inner.get_shape

    def __getitem__(self, rows):
        values = self.inner[rows]
        self.owner.read += values.numel()
        return values


def images(kind):
    return torch.randn(3, 3, SIZE[kind], SIZE[kind], generator=torch.Generator().manual_seed(3))


def settings(towers, case):
    """TeacherConfig of a case: a folder; <kind>.pt, the same weights pickled under the model's name; or the
    trunk of `timm` by timm's own name."""
    name, precision, shard = case
    kind = name.removesuffix(".pt")
    named = (
        {"name": kind, "weights": f"{towers}/{name}"}
        if name != kind
        else {"name": f"local-dir:{towers}/{kind}"}
    )
    if name == "trunk":
        named = {"name": "timm:test_vit", "weights": f"{towers}/trunk.safetensors"}
    return TeacherConfig(**named, img_size=SIZE[kind], precision=precision, shard=shard)


def gpu_bytes(device):
    """Bytes of a GPU that tensors hold, without the allocator's rounding: these teachers are tiny."""
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_stats(device)["requested_bytes.all.current"]


def download_results(towers, out, device):
    """What a tag's teacher is made of when only the node's first rank may download, and when that fails."""
    calls = Path(out) / "calls"

    def download(cfg):
        with calls.open("a") as file:
            file.write(f"rank {os.environ['RANK']}\n")
        if "fail" in cfg["url"]:
            raise OSError("no route to host")
        time.sleep(1)
        return shutil.copy(f"{towers}/vit.pt", Path(out) / "downloaded.pt")

    open_clip.download_pretrained = download
    open_clip.pretrained._PRETRAINED["vit"] = {"good": {"url": "good"}, "bad": {"url": "fail"}}
    config = TeacherConfig(name="vit", img_size=SIZE["vit"], precision="fp32", weights="good", shard="world")
    results = {"good": module.build_teacher(config, device).identity}
    try:
        module.build_teacher(dataclasses.replace(config, weights="bad"), device)
    except ConfigError as error:
        results["bad"] = str(error)
    return results


def compiled_features(towers, device):
    """What blocks traced beneath the hooks that gather their weights give, twice; and how many graphs."""
    compiler, results = torch.compile, {}
    torch.compile = lambda forward, dynamic, options: compiler(
        forward, dynamic=dynamic, backend="aot_eager"
    )  # no C++ compiler
    for case in CASES[0], CASES[2]:
        torch.compiler.reset()
        counters.clear()
        teacher = module.build_teacher(settings(towers, case), device, compiled=True)
        features = [teacher(images(case[0]).to(device)).cpu() for _ in range(2)]
        results[case] = features, counters["stats"]["unique_graphs"], teacher.local_bytes
    torch.compile = compiler
    return results


def main(towers, out, device):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    device = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    know_tiny_models(setattr)
    safetensors.safe_open = CountingFile  # here, not at import: the tests import this file
    results = {}
    for case in CASES:
        kind = case[0].removesuffix(".pt")
        CountingFile.last = teacher = None  # the teacher before gives its memory back
        before = gpu_bytes(device)
        teacher = module.build_teacher(settings(towers, case), device)
        allocated = gpu_bytes(device) - before
        read = CountingFile.last.read if CountingFile.last else None
        features = [
            teacher(images(kind).to(device)) for _ in range(2)
        ]  # the second after the first gave its memory back
        results[case] = [f.cpu() for f in features], teacher.identity, teacher.local_bytes, read, allocated
    results["compiled"] = compiled_features(towers, device)
    results["download"] = download_results(towers, out, device)
    torch.save(results, Path(out) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
