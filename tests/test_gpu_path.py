"""The way of a run on a GPU, on a CUDA device that runs nothing (nullcuda/README.md).

Each case is the user's own command at a recipe's own sizes. `make gpu_path` runs all of them, `make test`
those that hold most.
"""

import getpass
import itertools
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from forked import free_port
from images import photos, write
from line import write_classes
from nullcuda import CannotBuild, NullDevice
from PIL import Image
from towers import write_tower

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.planning.counting import student, target
from mapet_ds.planning.forecast import GIB, USABLE, Cluster, Request, Speeds, memory
from mapet_ds.planning.roofline import GPUS
from mapet_ds.targets.codebook import Codebook, source_of
from mapet_ds.targets.teacher import build_teacher

NORM = {"mask_nan_or_inf_with_val_inplace", "is_invalid_grad_norm"}
GATHERS = {"wait", "independent_gradient_partition_epilogue", "get_grad_norm_direct", "is_invalid_grad_norm"}
MASTERS = {"_get_fp32_opt_state_partition"}  # for each that a momentum teacher takes
WAITS = {"zero1": NORM | {"clip_tensors_by_global_norm"}, "zero2": set(), "zero3": GATHERS | MASTERS}
"""DeepSpeed's functions that make the host wait in a step. Nothing else may."""
OURS = {"training/engine.py _gradient_norm"}  # in the place of all of DeepSpeed's under ZeRO-2
FUSED = {"flash_attention", "efficient_attention", "cudnn_attention"}
"""What scaled_dot_product_attention may launch; never products and a softmax."""
OUTSIDE = ("context", "decoder")
"""Parts of a plan's memory that are not torch's, and not there on this device."""
NULL = [
    "data.device=cpu",
    "data.workers=0",
    "data.prefetch=1",
    "data.threads=1",
    "log.progress=false",
    "optim.adamw=torch",
]
"""Settings of every case. FusedAdam would be compiled for minutes."""


class Case(NamedTuple):
    recipe: str
    engine: str = "zero2"
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    gpu: str = "h100"
    sanitize: bool = False

    @property
    def compiled(self) -> bool:
        """Whether Triton has anything to do. ZeRO-3 leaves only a loss of its own to be compiled."""
        objective = self.recipe.partition("_")[0]
        return "train.compile=true" in self.overrides and (self.engine != "zero3" or objective in LOSSES)

    def __str__(self) -> str:
        words = [self.recipe, self.engine, *self.overrides]
        words += [f"{self.ranks} ranks"] * (self.ranks > 1) + [self.gpu] * (self.gpu != "h100")
        return " ".join(words + ["sanitized"] * self.sanitize)


EAGER, COMPILED = ("train.compile=false",), ("train.compile=true",)
DETERMINISTIC = ("train.compile=false", "train.deterministic=true")
LOSSES = {"mapet", "beit", "mvp", "conmim", "cae"}
"""Objectives that have a module beside the ViT which is compiled."""
SPARED = {"conmim": 1 / 2}
"""What compilation keeps less of activations, at most, where it isn't a sixth."""
OFTEN = [
    Case("mapet_vitb16", overrides=COMPILED),
    Case("conmim_vits16", "zero3", EAGER),
    Case("saim_vitb16", "zero1", DETERMINISTIC),
    Case("mvp_vitb16", "zero2", (*EAGER, "teacher.ahead=true"), ranks=2, sanitize=True),
]
"""Those that hold most."""
RECIPES = [
    "mapet_vitb16",
    "beit_vitb16",
    "mvp_vitb16",
    "saim_vitb16",
    "conmim_vits16",
    "mae_vitb16",
    "cae_vitb16",
]
PRODUCT = itertools.product(RECIPES, ("zero1", "zero2", "zero3"), (EAGER, COMPILED, DETERMINISTIC))
SELDOM = [Case(*words) for words in PRODUCT]
SELDOM += [Case(recipe, overrides=COMPILED) for recipe in ("mapet_vits16", "mapet_vitl16", "conmim_vitl16")]
SELDOM += [Case(recipe, overrides=COMPILED, gpu="a100-40") for recipe in RECIPES]
SELDOM += [Case(recipe, overrides=EAGER, sanitize=True) for recipe in RECIPES]
PUBLISHED = [
    Case("mapet_vitb16", overrides=COMPILED),
    Case("mapet_vitl16", "zero3", (*EAGER, "teacher.shard=world"), ranks=2),
    Case("beit_vitb16", overrides=(*EAGER, "teacher.ahead=true"), ranks=2),
    Case("mvp_vitb16", overrides=(*COMPILED, "teacher.name=ViT-B-16-quickgelu", "teacher.img_size=224")),
]
CASES = [*OFTEN, *(pytest.param(case, marks=pytest.mark.gpu_path) for case in SELDOM if case not in OFTEN)]


@pytest.fixture(scope="module")
def device():
    try:
        device = NullDevice(Path(tempfile.gettempdir()) / f"nullcuda-of-{getpass.getuser()}", REPOSITORY)
    except CannotBuild as reason:
        pytest.skip(f"the null CUDA device can't be built: {reason}")
    yield device
    device.close()


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Overrides that name images, a small teacher of 14 x 14 patches, and 8192 centroids of its features."""
    folder = tmp_path_factory.mktemp("line")
    overrides = [f"data.train={write(folder / 'images', photos(16))}", "data.crop=center", "data.flip=0"]
    teacher = [f"teacher.name=local-dir:{write_tower(folder / 'teacher', 'vit')}", "teacher.img_size=224"]
    return overrides + with_codebook(teacher, folder)


@pytest.fixture(scope="module")
def published(line, tmp_path_factory):
    """The same with the published teacher of MaPeT and BEiT, its weights random."""
    teacher = ["teacher.name=RN50x64", "teacher.weights=random", "teacher.img_size=448"]
    return line + with_codebook(teacher, tmp_path_factory.mktemp("published"))


def with_codebook(teacher, folder):
    """The overrides, and those that name 8192 centroids of this teacher's features."""
    config = load_config(REPOSITORY / "mapet_ds/recipes/mapet_vitb16.yaml", teacher)
    built = build_teacher(config.teacher, torch.device("cpu"))
    source = source_of(built.identity, config.data) | {"tokenizer.vocab_size": "8192"}
    Codebook(torch.zeros(8192, built.embed_dim), source).save(folder / "codebook")
    return [*teacher, f"tokenizer.path={folder}/codebook"]


def settings(case, line):
    """The overrides of a case: four steps of one micro-step, at the recipe's sizes."""
    recipe = f"mapet_ds/recipes/{case.recipe}.yaml"
    micro = load_config(REPOSITORY / recipe, list(case.overrides)).train.micro_batch_size
    steps = [
        f"train.global_batch_size={micro * case.ranks}",
        "train.stop_at_step=4",
        "train.max_skipped_steps=0",
        "log.images_every_steps=0",  # the last step has a picture, for which the host waits
    ]
    return [*line, *NULL, *steps, *case.overrides]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step(device, line, tmp_path, case):
    check_step(device, tmp_path, case, settings(case, line))


@pytest.mark.gpu_path
@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_a_step_with_a_published_teacher(device, published, tmp_path, case):
    check_step(device, tmp_path, case, settings(case, published))


def check_step(device, folder, case, overrides):
    """Runs pretrain.py, and looks at its fourth step."""
    words = ["--config", f"mapet_ds/recipes/{case.recipe}.yaml", "--deepspeed_config"]
    words += [f"ds_configs/{case.engine}.json", f"run_dir={folder}/run", *overrides]
    ranks = device.run(
        folder, "mapet_ds/pretrain.py", *words, ranks=case.ranks, gpu=case.gpu, port=free_port(),
        sanitize=case.sanitize,
    )  # fmt: skip
    shutil.rmtree(folder / "run")
    for facts in ranks:
        assert unlisted(facts["waits"], case.engine) == {}
        assert {kernel.partition("scaled_dot_product_")[2] for kernel, *_ in facts["attention"]} <= FUSED
        assert facts["attention"]
        assert facts["launches"] and (facts["triton"] > 0) == case.compiled
        if not case.sanitize:
            check_memory(facts, case, overrides)


def unlisted(waits, engine):
    """The host's waits that are not listed, with file and line, and how many there were."""
    found = {}
    for place, number in waits.items():
        path, function = place.split(" < ")[0].split(" ")
        file = re.sub(r":\d+$", "", path)
        deepspeed = file.startswith("deepspeed/") and function in WAITS[engine]
        if not deepspeed and f"{file.rpartition('/mapet_ds/')[2]} {function}" not in OURS:
            found[place] = number
    return found


def check_memory(facts, case, overrides):
    """Holds the allocator's peak to what tools/plan.py predicts."""
    config = load_config(REPOSITORY / f"mapet_ds/recipes/{case.recipe}.yaml", overrides)
    engine = load_deepspeed_config(REPOSITORY / f"ds_configs/{case.engine}.json")
    cluster = Cluster(GPUS[case.gpu], 1, case.ranks, 400, 2, 110)
    request = Request(config, engine, cluster, 1_281_167, Speeds(0.2, 0.2), fixed=True)
    held = memory(request, student(config), target(config))
    parts = {name: f"{size / 1e6:.0f} MB" for name, size in held.items()} | facts
    outside = sum(held[name] for name in OUTSIDE)
    spared = SPARED.get(config.objective, 1 / 6) * held["activations"] if case.compiled else 0
    expected = sum(held.values()) - outside
    assert 0.95 * expected - spared < facts["in_use"] < 1.05 * expected, parts
    assert facts["reserved"] < facts["in_use"] / USABLE
    assert facts["reserved"] + outside < min(GPUS[case.gpu].gib, 80e9 / GIB) * GIB


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A recipe of 12 steps on labelled images, with evaluation."""
    folder = tmp_path_factory.mktemp("small")
    write_classes(folder / "train", 48, 0)
    write_classes(folder / "val", 24, 1)
    write_tower(folder / "teacher", "vit")
    recipe = {
        "run_dir": str(folder / "run"),
        "model": {
            "name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8,
            "args": {"depth": 3, "embed_dim": 64, "num_heads": 2},
        },
        "data": {"train": str(folder / "train"), "crop": "center"},
        "teacher": {"name": f"local-dir:{folder}/teacher", "img_size": 64},
        "tokenizer": {"path": str(folder / "codebook"), "vocab_size": 16, "redo": 1, "iterations": 2},
        "train": {"epochs": 2, "global_batch_size": 8, "micro_batch_size": 4},
        "optim": {"warmup_epochs": 0.5},
        "checkpoint": {"every_steps": 3}, "log": {"every_steps": 1},
        "evaluate": {"train": str(folder / "train"), "val": str(folder / "val"), "every_epochs": 1},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_every_program_from_images_to_a_fine_tuned_model(device, small, tmp_path):
    recipe = ["--config", f"{small}/recipe.yaml", *NULL]
    engine = ["--deepspeed_config", "ds_configs/zero2.json"]
    ids = f"tokenizer.ids={small}/ids"
    device.run(tmp_path / "fit", "tools/fit_codebook.py", *recipe)
    device.run(tmp_path / "tokenize", "tools/tokenize_images.py", *recipe, ids)
    device.run(tmp_path / "check", "tools/tokenize_images.py", *recipe, ids, "--check", 8)
    for end in (5, 12):  # the second run resumes
        (facts,) = device.run(
            tmp_path / f"to_{end}", "mapet_ds/pretrain.py", *recipe, *engine, ids, f"train.stop_at_step={end}"
        )
        assert end == 12 or unlisted(facts["waits"], "zero2") == {}
    assert (small / "run/DONE").exists()
    assert "val" in (small / "run/metrics.jsonl").read_text()
    device.run(tmp_path / "export", "tools/export_timm.py", small / "run", small / "timm")
    folders = ["--train", small / "train", "--val", small / "val"]
    device.run(tmp_path / "evaluate", "tools/evaluate.py", "all", "--model", small / "timm", *folders)
    device.run(
        tmp_path / "finetune", "tools/finetune.py", "--config", "mapet_ds/recipes/finetune_mapet_vits16.yaml",
        *engine, f"model.path={small}/timm", f"data.train={small}/train", f"data.val={small}/val",
        f"run_dir={small}/finetuned", "data.num_classes=3", "data.workers=0", "optim.warmup_epochs=0",
        "optim.adamw=torch", "train.epochs=1", "train.global_batch_size=8", "train.micro_batch_size=8",
        "train.compile=false",
    )  # fmt: skip
    assert (small / "finetuned/DONE").exists()


def test_segmentation(device, small, tmp_path):
    pytest.importorskip("transformers", reason="pip install -e '.[segment]'")
    for split in ("train", "val"):
        for path in sorted((small / split).rglob("*.png")):
            mask = tmp_path / split / path.relative_to(small / split)
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", Image.open(path).size).save(mask)
    (facts,) = device.run(
        tmp_path / "segment", "tools/segment.py", "--config", "segment_upernet_vitb16_ade20k",
        "--deepspeed_config", "zero2", "model.name=vit_tiny_patch16_224", "model.untrained=true",
        "model.img_size=64", "model.width=16", f"data.train={small}/train", f"data.val={small}/val",
        f"data.train_masks={tmp_path}/train", f"data.val_masks={tmp_path}/val", "data.release=null",
        "data.num_classes=3", "data.short_side=64", "data.workers=0", "evaluate.stride=48",
        f"run_dir={tmp_path}/run", "optim.adamw=torch", "optim.warmup_epochs=0", "train.epochs=1",
        "train.global_batch_size=8", "log.evaluate_every_epochs=1",
    )  # fmt: skip
    assert (tmp_path / "run/DONE").exists()
    assert unlisted(facts["waits"], "zero2") == {}
