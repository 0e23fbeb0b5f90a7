"""tools/benchmark.py by its own command, on sizes that take seconds. No test looks at how fast anything is."""

import json
import sys

import numpy as np
import pytest
import torch
from images import encode, picture
from line import make_line, start
from towers import write_tower

from mapet_ds.config import DataConfig, TeacherConfig
from mapet_ds.objectives import build_objective
from mapet_ds.recipe import load_config
from mapet_ds.teacher import build_teacher
from mapet_ds.tokenizer import Codebook, source_of

SMALL = ["model.img_size=32", "model.patch_size=8", "model.args={depth: 2, embed_dim: 32, num_heads: 2}"]
SPREAD = {"median", "min", "max"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(20):
        (folder / f"{number}.jpg").write_bytes(encode(picture(96 + number, 80, number), "JPEG"))
    return folder


def benchmark(*words):
    done = start(sys.executable, "tools/benchmark.py", *words)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout)


def test_bad(photos):
    sizes = ["--batch_size", 4, "--threads", 1, "--batches", 4, "--repeats", 2]
    found = benchmark("bad", "--data", photos, "--device", "cpu", *sizes, "model.img_size=32")
    check_circumstances(found, "bad")
    assert (found["images"], found["bad"]) == (22, 2)
    assert set(found["images_per_second"]) == {"known", "none", "first_sight"}
    for ratio in found["speed_known_over"].values():
        check_ratio(ratio)


def check_circumstances(found, name):
    assert set(found["hardware"]) == {"cpu", "cores", "load_average", "gpu"}
    assert {"python", "torch", "torchvision", "timm", "pillow", "nvidia-dali-cuda130"} <= set(found["versions"])
    assert found["command"].startswith(f"benchmark.py {name} ")
    assert found["settings"]["benchmark"] == name
    assert found["settings"]["device"] == "cpu"


def check_ratio(found):
    assert 0 < found["min"] <= found["max"]
    assert found["ratio"] > 0


def test_index():
    sizes = ["--images", 70_000, "--batch_size", 4, "--threads", 1, "--repeats", 2]
    found = benchmark("index", "--device", "cpu", *sizes, "model.img_size=32", "data.workers=0")
    check_circumstances(found, "index")
    assert found["images"] == 70_000
    for name in ("write", "open", "look_up_10000"):
        assert found[name]["seconds"] > 0
        assert 0 <= found[name]["own_mib"] - found["before"]["own_mib"] < 20
    assert set(found["first_batch"]) == {"0", "10000000"}
    for first in (found["first_batch_of_few"], *found["first_batch"].values()):
        assert first["workers"] == [] and first["rank"]["own_mib"] > 0 and first["seconds"] > 0
    whole, windowed = found["order_window_0"], found["order_window_65536"]
    assert all(set(values) == SPREAD for values in (*whole.values(), *windowed.values()))
    assert whole["samples_side_by_side"]["max"] < 20 < 200 < windowed["samples_side_by_side"]["min"]


def test_loader(photos):
    sizes = ["--batch_size", 4, "--threads", 1, "--batches", 4, "--repeats", 2]
    found = benchmark("loader", "--data", photos, "--device", "cpu", *sizes, "model.img_size=32")
    check_circumstances(found, "loader")
    assert found["images"] == 20
    for views in (found["one_view"], found["two_views"]):
        for measured in (views["images_per_second"], views["cpu_ms_per_image"]):
            assert set(measured) == {"ours", "dali", "torchvision"}
            assert all(set(values) == SPREAD and 0 < values["min"] <= values["median"] for values in measured.values())
        for ratios in (views["speed_ours_over"], views["cpu_time_over_ours"]):
            assert set(ratios) == {"dali", "torchvision"}
            for ratio in ratios.values():
                check_ratio(ratio)


def test_step():
    sizes = ["--model", "vit_tiny_patch16_224", "--batch_size", 2, "--threads", 1, "--repeats", 2]
    found = benchmark("step", "--device", "cpu", *sizes, *SMALL, "tokenizer.vocab_size=64")
    check_circumstances(found, "step")
    assert found["vocab_size"] == 64
    for measured in (found["seconds"], found["cpu_seconds"]):
        assert set(measured) == {"sorted", "dense", "masks"}
        assert all(set(values) == SPREAD and 0 < values["min"] <= values["median"] for values in measured.values())
    for name in ("dense_over_sorted", "dense_with_masks_over_sorted", "cpu_dense_over_sorted"):
        check_ratio(found[name])
    assert all(peak > 0 for peak in found["peak_bytes"].values())
    assert found["peak_dense_over_sorted"] == pytest.approx(found["peak_bytes"]["dense"] / found["peak_bytes"]["sorted"])
    assert abs(found["loss"]["sorted"] - np.log(64)) < 0.5  # near that of equal chances
    assert found["loss_relative_difference"] < 1e-5


def test_assign(photos, tmp_path):
    folder, path = write_tower(tmp_path / "teacher", "vit"), tmp_path / "codebook.safetensors"
    teacher = build_teacher(TeacherConfig(name=f"local-dir:{folder}", img_size=64), torch.device("cpu"))
    centroids = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    Codebook(centroids, source_of(teacher.identity, DataConfig()) | {"tokenizer.vocab_size": 16}).save(path)
    words = ["--data", photos, "--device", "cpu", "--batch_size", 8, "--images", 16, "--threads", 1]
    recipe = ["model.img_size=32", "model.patch_size=8", "teacher.img_size=64", "data.workers=0"]
    found = benchmark("assign", "--teacher", f"local-dir:{folder}", "--codebook", path, *words, *recipe)
    check_circumstances(found, "assign")
    assert found["codes"] == 16
    assert found["ids"] == (16 + 8) * 16  # the warm-up batch counts too; 16 patches an image
    assert set(found["changed_share"]) == {"bf16_teacher", "bf16_features"}
    assert 0 < found["changed_share"]["bf16_teacher"] < 0.5
    assert 0 <= found["changed_share"]["bf16_features"] < 0.5
    assert set(found["ms_per_image"]) == {"teacher_fp32", "teacher_bf16", "assign"}
    assert all(set(values) == SPREAD and 0 < values["min"] for values in found["ms_per_image"].values())


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    recipe = make_line(tmp_path_factory.mktemp("line"))
    return ["--config", recipe, "--data", recipe.parent / "train", "--deepspeed_config", "ds_configs/zero2_cpu.json"]


FEW = ["--device", "cpu", "--batch_size", 4, "--threads", 1, "--repeats", 2]


def test_teacher(line):
    found = benchmark("teacher", *line[:2], *FEW)
    check_circumstances(found, "teacher")
    tower = build_teacher(load_config(line[1]).teacher, torch.device("cpu"))
    weights = sum(p.numel() for p in tower.visual.transformer.parameters() if p.ndim > 1)
    assert found["gflop_per_image"] * 1e9 > 2 * weights * 17  # each weight meets 16 patches and the class token
    assert "bf16" not in found and set(found["fp32"]["images_per_second"]) == SPREAD
    assert found["fp32"]["ceiling_tflops"] > 0


@pytest.mark.drill
def test_scaling(line):
    found = benchmark("scaling", *line, *FEW, "--steps", 2, "--ranks", 2, "--rounds", 1)
    assert set(found["images_per_second"]) == set(found["weak_scaling"]) == {"1", "2"}
    assert found["weak_scaling"]["1"]["ratio"] == 1


def test_train(line):
    one = benchmark("train", *line, *FEW, "--steps", 2)
    check_circumstances(one, "train")
    flops = one["gflop_per_image"]
    assert flops["train"] == flops["student"] + flops["target"]
    assert set(one["images_per_second"]) == {"data", "target", "student", "train"}
    for name, share in one["share_of_ceiling"].items():
        speed = one["images_per_second"][name]["median"]
        assert share["median"] == pytest.approx(flops[name] * speed / 1e3 / one["ceiling_tflops"])
    check_ratio(one["target_and_student_over_train"])
    assert 0 <= one["data_wait_percent"]["min"] <= 100


def test_checkpoint(line):
    found = benchmark("checkpoint", *line, *FEW)
    check_circumstances(found, "checkpoint")
    model = build_objective(load_config(line[1]), 16)
    assert found["checkpoint_bytes"] > 12 * sum(p.numel() for p in model.parameters())  # weights and two moments in fp32
    assert found["seconds"]["save"]["min"] > 0


def test_mistake_is_one_line():
    done = start(sys.executable, "tools/benchmark.py", "step", "model.nam=vit_tiny")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "model.name" in done.stderr
