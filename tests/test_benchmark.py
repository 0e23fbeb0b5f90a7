"""tools/benchmark.py by its own command, on sizes that take seconds. No test asks how fast anything is."""

import json
import sys

import numpy as np
import pytest
import torch
from forked import ENVIRONMENT, start
from images import encode, picture
from line import make_line
from towers import write_tower

from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY, DataConfig, TeacherConfig
from mapet_ds.methods import build_objective
from mapet_ds.targets.codebook import Codebook, source_of
from mapet_ds.targets.teacher import build_teacher

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
    assert {"python", "torch", "torchvision", "timm", "pillow", "nvidia-dali-cuda130"} <= set(
        found["versions"]
    )
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
    for kind in ("folders", "shards"):
        listed = found["listing_us"][kind]
        assert set(listed) == {"first", "bare", "again"} and all(
            set(each) == SPREAD for each in listed.values()
        )
    whole, windowed = found["order_window_0"], found["order_window_65536"]
    assert all(set(values) == SPREAD for values in (*whole.values(), *windowed.values()))
    assert whole["samples_side_by_side"]["max"] < 20 < 200 < windowed["samples_side_by_side"]["min"]


def small_beit():
    return build_objective(
        load_config(REPOSITORY / "mapet_ds/recipes/beit_vitb16.yaml", [*SMALL, "tokenizer.vocab_size=64"]), 64
    )


def test_machine_links_and_storage(photos):
    machine = benchmark("machine", "--device", "cpu")
    check_circumstances(machine, "machine")
    assert set(machine["matrix_product_tflops"]) == {"bf16", "fp32"}
    assert machine["copy_gbyte_s"] > 0
    assert (machine["ranks"], len(machine["hosts"]), machine["hosts_differ_in"]) == (1, 1, [])
    assert {"nvcc", "ninja", "g++", "Python.h"} <= set(machine["tools"])
    words = ["--nproc_per_node=2", "tools/benchmark.py", "allreduce", "--mebibytes", 1, "--repeats", 2]
    done = start(sys.executable, "-m", "torch.distributed.run", "--standalone", *words, "--device", "cpu")
    summed = json.loads(done.stdout)
    assert (summed["ranks"], summed["hosts"], summed["backend"]) == (2, 1, "gloo")
    bus, milliseconds = summed["sizes"]["1 MiB"]["bus_gbyte_s"], summed["sizes"]["1 MiB"]["ms"]
    assert set(bus) == SPREAD
    assert bus["max"] * milliseconds["min"] == pytest.approx(
        2**20 / 1e6
    )  # two ranks: as many bytes as there are
    sizes = ["--images", 8, "--repeats", 2, "--threads", 2]
    read = benchmark("storage", "--data", photos, "--device", "cpu", *sizes)
    assert (read["images"], read["hosts"], read["repeatedly"]) == (20, 1, False)
    assert set(read["host_gbyte_s"]) == set(read["images_per_second"]) == SPREAD


def test_loader_against_one(photos):
    sizes = ["--batch_size", 4, "--threads", 1, "--batches", 2, "--repeats", 1, "--against", "dali_whole"]
    found = benchmark("loader", "--data", photos, "--device", "cpu", *sizes, "model.img_size=32")
    assert set(found["one_view"]["images_per_second"]) == {"ours", "dali_whole"}


def test_loader(photos):
    sizes = ["--batch_size", 4, "--threads", 1, "--batches", 4, "--repeats", 2]
    found = benchmark("loader", "--data", photos, "--device", "cpu", *sizes, "model.img_size=32")
    check_circumstances(found, "loader")
    assert found["images"] == 20
    for views in (found["one_view"], found["two_views"]):
        for measured in (views["images_per_second"], views["cpu_ms_per_image"]):
            assert set(measured) == {"ours", "dali", "torchvision"}
            assert all(
                set(values) == SPREAD and 0 < values["min"] <= values["median"]
                for values in measured.values()
            )
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
        assert set(measured) == {"step", "dense", "masks"}
        assert all(
            set(values) == SPREAD and 0 < values["min"] <= values["median"] for values in measured.values()
        )
    for name in ("dense_over_step", "dense_with_masks_over_step", "cpu_dense_over_step"):
        check_ratio(found[name])
    assert all(peak > 0 for peak in found["peak_bytes"].values())
    assert found["peak_dense_over_step"] == pytest.approx(
        found["peak_bytes"]["dense"] / found["peak_bytes"]["step"]
    )
    assert abs(found["loss"]["step"] - np.log(64)) < 0.5  # near that of equal chances
    assert found["loss_relative_difference"] < 1e-5


def check_breakdown(found, *more):
    """Parts and rest make up the step, a part's figures fit together, FLOPs are where the model does them."""
    parts, peak, copy = (
        found["breakdown"]["parts"],
        found["ceiling_tflops"],
        found["breakdown"]["bandwidth_gbyte_s"],
    )
    assert set(parts) == {
        "patch_embed",
        "qkv",
        "attention",
        "proj",
        "mlp",
        "norms and rest",
        "head and loss",
        "gradients",
        *more,
    }
    assert sum(part["share"] for part in parts.values()) + found["breakdown"]["unexplained"] == pytest.approx(
        1
    )
    assert 0 < found["breakdown"]["unexplained"] < 0.9  # mostly Python at these sizes
    for name, part in parts.items():
        assert part["seconds"] > 0 and part["share"] == pytest.approx(
            part["seconds"] / found["breakdown"]["seconds"]
        )
        assert part["share_of_ceiling"] == pytest.approx(part["gflop"] / 1e3 / peak / part["seconds"])
        if part["gbyte"]:
            compute, memory = part["gflop"] / 1e3 / peak, part["gbyte"] / copy
            assert part["bound"] == ("compute" if compute > memory else "memory"), name


def test_the_breakdown_of_a_step_of_another_objective(tmp_path):
    """FLOPs and bytes of each part of BEiT by hand: 2 images of 16 patches of 192 numbers, 6 hidden."""
    recipe = ["--config", "mapet_ds/recipes/beit_vitb16.yaml", "--plot", tmp_path / "parts.png"]
    sizes = [
        "--model",
        "vit_tiny_patch16_224",
        "--batch_size",
        2,
        "--threads",
        1,
        "--repeats",
        1,
        "--against",
        "none",
    ]
    found = benchmark("step", "--device", "cpu", *sizes, *recipe, *SMALL, "tokenizer.vocab_size=64")
    check_breakdown(found, "optimizer")
    parts = found["breakdown"]["parts"]
    assert set(found["seconds"]) == {"step"} and "dense_over_step" not in found
    flops = {name: 1e9 * part["gflop"] for name, part in parts.items()}
    assert flops["patch_embed"] == pytest.approx(2 * 4 * 16 * 192 * 32)
    assert flops["mlp"] == pytest.approx(2 * 12 * (17 + 6) * 32 * 128)
    assert flops["proj"] == pytest.approx(2 * 6 * (17 + 6) * 32**2)
    assert flops["head and loss"] == pytest.approx(2 * 6 * 6 * 32 * 64)
    assert flops["optimizer"] == flops["norms and rest"] == 0
    weights = sum(p.numel() for p in small_beit().parameters())
    assert 1e9 * parts["optimizer"]["gbyte"] > 7 * 4 * weights  # four read, three written, each once at least
    assert (
        1e9 * parts["mlp"]["gbyte"] > 3 * 4 * 2 * 2 * 32 * 128
    )  # two matrices a block: forward, and twice backward
    useful = found["mfu"]["median"] * found["seconds"]["step"]["median"] * 1e12 * found["ceiling_tflops"]
    assert sum(flops.values()) == pytest.approx(useful), "BEiT computes nothing in vain"
    assert (tmp_path / "parts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words", [["step"], ["train", "--device", "cpu", "--data", "/none", "--against", "dense"]]
)
def test_the_twin_is_mapets_alone(words):
    done = start(sys.executable, "tools/benchmark.py", *words, "objective=beit")
    assert done.returncode == 2
    assert done.stderr == "The dense twin is MaPeT's, and objective = beit: add --against none.\n"


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
    assert set(found["changed_share"]) == {"bf16_teacher", "bf16_features", "bf16_in_tf32"}
    assert found["changed_share"]["bf16_in_tf32"] == 0
    assert 0 < found["changed_share"]["bf16_teacher"] < 0.5
    assert 0 <= found["changed_share"]["bf16_features"] < 0.5
    assert set(found["ms_per_image"]) == {"teacher_fp32", "teacher_bf16", "assign_fp32", "assign_bf16"}
    assert all(set(values) == SPREAD and values["min"] > 0 for values in found["ms_per_image"].values())


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    recipe = make_line(tmp_path_factory.mktemp("line"))
    return [
        "--config",
        recipe,
        "--data",
        recipe.parent / "train",
        "--deepspeed_config",
        "ds_configs/zero2_cpu.json",
    ]


FEW = ["--device", "cpu", "--batch_size", 4, "--threads", 1, "--repeats", 2]


def test_teacher(line, monkeypatch):
    found = benchmark("teacher", *line[:2], *FEW)
    check_circumstances(found, "teacher")
    tower = build_teacher(load_config(line[1]).teacher, torch.device("cpu"))
    weights = sum(p.numel() for p in tower.visual.transformer.parameters() if p.ndim > 1)
    assert (
        found["gflop_per_image"] * 1e9 > 2 * weights * 17
    )  # each weight meets 16 patches and the class token
    assert "bf16" not in found and set(found["fp32"]["images_per_second"]) == SPREAD
    assert found["fp32"]["ceiling_tflops"] > 0
    monkeypatch.setitem(ENVIRONMENT, "TORCH_COMPILE_DISABLE", "1")
    compiled = benchmark(
        "teacher", *line[:2], *FEW, "--against", "eager", "train.compile=true", "teacher.precision=bf16"
    )
    assert (
        compiled["compiled"]
        and not found["compiled"]
        and compiled["gflop_per_image"] == found["gflop_per_image"]
    )
    check_ratio(compiled["bf16"]["speed_over_eager"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = start(*torchrun, "tools/benchmark.py", "teacher", *line[:2], *FEW, "--against", "unsharded")
    assert done.returncode == 0, done.stderr[-2000:]
    both = json.loads(done.stdout)
    assert both["ranks"] == 2
    assert both["fp32"]["local_mib"] < 0.8 * both["fp32"]["unsharded"]["local_mib"]
    check_ratio(both["fp32"]["speed_over_unsharded"])


@pytest.mark.drill
def test_scaling(line):
    found = benchmark("scaling", *line, *FEW, "--steps", 2, "--ranks", 2, "--rounds", 1)
    assert set(found["images_per_second"]) == set(found["weak_scaling"]) == {"1", "2"}
    assert found["weak_scaling"]["1"]["ratio"] == 1


def test_train(line):
    one = benchmark("train", *line, *FEW, "--steps", 2, "--against", "dense")
    check_circumstances(one, "train")
    flops = one["gflop_per_image"]
    assert flops["train"] == flops["student"] + flops["target"]
    assert set(one["images_per_second"]) == {"data", "target", "student", "train", "dense"}
    for name, share in one["share_of_ceiling"].items():
        speed = one["images_per_second"][name]["median"]
        assert share["median"] == pytest.approx(flops[name] * speed / 1e3 / one["ceiling_tflops"])
    for ratio in ("target_and_student_over_train", "dense_over_train"):
        check_ratio(one[ratio])
    check_breakdown(
        one, "data", "target", "optimizer", *(["comm"] if "comm" in one["breakdown"]["parts"] else [])
    )
    assert one["breakdown"]["parts"]["target"]["gflop"] == pytest.approx(4 * flops["target"])
    assert 0 < one["mfu"]["median"] < one["share_of_ceiling"]["train"]["median"]
    assert 0 <= one["data_wait_percent"]["min"] <= 100


def test_checkpoint(line):
    found = benchmark("checkpoint", *line, *FEW)
    check_circumstances(found, "checkpoint")
    model = build_objective(load_config(line[1]), 16)
    assert found["checkpoint_bytes"] > 12 * sum(
        p.numel() for p in model.parameters()
    )  # weights and two moments in fp32
    seconds = found["seconds"]
    assert seconds["save_alone"]["min"] > seconds["gather"]["min"] > 0
    assert seconds["cost"]["max"] <= seconds["steps_with_save"]["max"] - seconds["steps"]["min"]


def test_nothing_can_not_be_measured(line):
    done = start(sys.executable, "tools/benchmark.py", "teacher", "--repeats", "0")
    assert done.returncode == 2 and "argument --repeats: 0 must be at least 1" in done.stderr
    done = start(sys.executable, "tools/benchmark.py", "teacher", *line[:2], *FEW, "--against", "eager")
    assert done.returncode == 2 and "train.compile = False: add train.compile=true." in done.stderr


def test_mistake_is_one_line():
    done = start(sys.executable, "tools/benchmark.py", "step", "model.nam=vit_tiny")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "model.name" in done.stderr
