"""Measure on this machine, each sub-command printing one JSON line.

    tools/benchmark.py loader --data DIR      img/s of the loader, of DALI's own file reader, of torchvision
    tools/benchmark.py bad --data DIR         img/s of the loader where 5 % of the images are unreadable
    tools/benchmark.py step                   forward and backward, sorted by rank against as published
    tools/benchmark.py assign --teacher NAME --data DIR --codebook FILE    ids that change in bf16

What is compared is measured in turns in one process, so that ratios hold on a machine that others use too; CPU seconds
count all threads and child processes. Settings are a recipe's with `a.b=value` on top.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from mapet_ds.config import REPOSITORY, Config, ConfigError
from mapet_ds.index import DataError, Index, open_index
from mapet_ds.recipe import load_config

TEACHER_VIEW = (448, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Side, mean and std of the published teacher's view, the second one of `loader`."""
Figures = dict[str, Any]


def summary(values: list[float]) -> Figures:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(above: list[float], below: list[float]) -> Figures:
    """Ratio of the medians; min and max are of the pairs measured one after the other."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    return {"ratio": statistics.median(above) / statistics.median(below), "min": min(pairs), "max": max(pairs)}


def cpu_seconds() -> float:
    """User and system time so far of this process and its living children."""
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in children)


def timed(device: torch.device, work: Callable[..., Any], *arguments: Any) -> tuple[float, float, Any]:
    """Wall-clock seconds, CPU seconds, and what the work gives. Waits for the GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start, cpu = time.perf_counter(), cpu_seconds()
    result = work(*arguments)
    wait()
    return time.perf_counter() - start, cpu_seconds() - cpu, result


def device_of(name: str) -> torch.device:
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}, but torch sees no GPU on this host; say --device cpu.")
    return device


def circumstances(config: Config, arguments: argparse.Namespace) -> Figures:
    """Hardware, versions, command and settings: what any figure rests on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = ["torch", "torchvision", "timm", "open_clip_torch", "pillow", "nvidia-dali-cuda130"]
    settings = {key: str(value) if key == "config" else value for key, value in vars(arguments).items() if key != "measure"}
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return {
        "hardware": {"cpu": cpu, "cores": cores, "load_average": load, "gpu": gpu},
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": settings | {"model": config.model.name},
    }


def ours(index: Index, views: list[Any], config: Config, device: torch.device) -> Iterator[Any]:
    """The package's loader: its index, its exact order, its crops."""
    from mapet_ds.data import Loader, View

    second = View(*views[1]) if len(views) > 1 else None
    loader = Loader(config, index, student=True, teacher=second, rank=0, world_size=1, local_rank=0)
    with contextlib.closing(loader):
        yield from loader


def dali(index: Index, views: list[Any], config: Config, device: torch.device) -> Iterator[Any]:
    """DALI's file reader, shuffle buffer and random crop; its outputs are not even copied."""
    from nvidia.dali import Pipeline, fn, types

    data, device_id = config.data, 0 if device.type == "cuda" else None
    with Pipeline(config.train.micro_batch_size, data.threads, device_id, prefetch_queue_depth=data.prefetch) as pipeline:
        encoded, label = fn.readers.file(files=[index.path(i) for i in range(len(index))], random_shuffle=True)
        crop = fn.decoders.image_random_crop(
            encoded, device="cpu" if device_id is None else "mixed", output_type=types.RGB, adjust_orientation=False,
            random_area=data.crop_scale, random_aspect_ratio=data.crop_ratio, num_attempts=10,
        )  # fmt: skip
        mirror, outputs = fn.random.coin_flip(probability=data.flip), []
        for side, mean, std in views:
            image = fn.resize(crop, size=[side, side], interp_type=types.INTERP_CUBIC, antialias=True)
            mean, std = [255 * m for m in mean], [255 * s for s in std]
            outputs.append(fn.crop_mirror_normalize(image, mirror=mirror, mean=mean, std=std, output_layout="CHW"))
        pipeline.set_outputs(*outputs, label)
    while True:
        yield pipeline.run()


class Images(torch.utils.data.Dataset):
    """Image files as torchvision's transforms see them: cropped once, each view resized from the crop."""

    def __init__(self, paths: list[str], views: list[Any], config: Config) -> None:
        self.paths, self.views, self.data = paths, views, config.data

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> list[Tensor]:
        with Image.open(self.paths[i]) as image:
            image = image.convert("RGB")
        image = F.crop(image, *RandomResizedCrop.get_params(image, self.data.crop_scale, self.data.crop_ratio))
        if torch.rand(1) < self.data.flip:
            image = F.hflip(image)
        resized = [F.resize(image, [side, side], InterpolationMode.BICUBIC) for side, _, _ in self.views]
        return [F.normalize(F.to_tensor(im), mean, std) for im, (_, mean, std) in zip(resized, self.views)]


def torchvision(index: Index, views: list[Any], config: Config, device: torch.device) -> Iterator[Any]:
    """A DataLoader of worker processes, as many as the others have threads."""
    images = Images([index.path(i) for i in range(len(index))], views, config)
    # Without replacement, one permutation after another: no end of an epoch within a measurement.
    order = torch.utils.data.RandomSampler(images, num_samples=10**6)
    batch_size, workers, gpu = config.train.micro_batch_size, config.data.threads, device.type == "cuda"
    for batch in torch.utils.data.DataLoader(images, batch_size, sampler=order, num_workers=workers, pin_memory=gpu):
        yield [view.to(device, non_blocking=True) for view in batch]


def measure_loader(arguments: argparse.Namespace) -> Figures:
    device = device_of(arguments.device)
    config = settings(
        arguments, "data.crop=random", "data.flip=0.5", "data.color_jitter=0", "data.workers=0", "data.prefetch=2"
    )
    student = (config.model.img_size, config.data.mean, config.data.std)
    with tempfile.TemporaryDirectory() as cache:
        index = open_index(arguments.data, Path(cache) / "index")
        if not Path(index.path(0)).is_file():
            raise DataError(f"--data {arguments.data} holds shards: the readers compared with need image files.")
        readers = {"ours": ours, "dali": dali, "torchvision": torchvision}
        one, two = (
            race(arguments, {name: partial(reader, index, views, config, device) for name, reader in readers.items()})
            for views in ([student], [student, TEACHER_VIEW])
        )
    return circumstances(config, arguments) | {"images": len(index), "one_view": one, "two_views": two}


def draw(batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(batches)


def measure_bad(arguments: argparse.Namespace) -> Figures:
    """Our loader on --data with one unreadable image more for every 19: cut off, or only its decoder can tell."""
    from mapet_ds.data import Loader

    config = settings(arguments, "data.crop=random", "data.color_jitter=0", "data.workers=0", "data.max_bad_share=0.1")

    def loader(index: Index, bad: list[int]) -> Iterator[Any]:
        loader = Loader(config, index, student=True, teacher=None, rank=0, world_size=1, local_rank=0, bad=bad)
        with contextlib.closing(loader):
            yield from loader

    with tempfile.TemporaryDirectory() as folder:
        good = open_index(arguments.data, Path(folder) / "good")
        (Path(folder) / "mixed/bad").mkdir(parents=True)
        os.symlink(Path(arguments.data).resolve(), Path(folder) / "mixed/good")
        for number in range(-(-len(good) // 19)):
            data = good.read(number)
            spoilt = data[: len(data) // 2] if number % 2 else data.replace(b"\xff\xdb", b"\xff\xe9")
            (Path(folder) / f"mixed/bad/{number}.jpg").write_bytes(spoilt)
        mixed = open_index(str(Path(folder) / "mixed"), Path(folder) / "index")
        bad = [i for i in range(len(mixed)) if "/bad/" in mixed.path(i)]
        contestants = {"known": (mixed, bad), "none": (good, []), "first_sight": (mixed, [])}
        found = race(arguments, {name: partial(loader, *which) for name, which in contestants.items()})
    return circumstances(config, arguments) | {"images": len(mixed), "bad": len(bad)} | found


def race(arguments: argparse.Namespace, contestants: dict[str, Callable[[], Any]]) -> Figures:
    """Each in turn, started afresh, with the batches that are prepared ahead drawn before the clock starts; ratios are of
    the first one over the others."""
    first, *others = contestants
    wall, cpu = ({name: [] for name in contestants} for _ in range(2))
    number = arguments.batch_size * arguments.batches
    for _ in range(arguments.repeats):
        for name, contestant in contestants.items():
            with contextlib.closing(contestant()) as batches:
                draw(batches, 2 * arguments.threads)
                seconds, cpu_used, _ = timed(device_of(arguments.device), draw, batches, arguments.batches)
            wall[name].append(number / seconds)
            cpu[name].append(1000 * cpu_used / number)
    return {
        "images_per_second": {name: summary(values) for name, values in wall.items()},
        "cpu_ms_per_image": {name: summary(values) for name, values in cpu.items()},
        f"speed_{first}_over": {name: ratio(wall[first], wall[name]) for name in others},
        f"cpu_time_over_{first}": {name: ratio(cpu[name], cpu[first]) for name in others},
    }


def build_step(config: Config, device: torch.device, dtype: str) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Forward and backward of MaPeT by name, on one batch and the same weights, and what makes the dense one's masks."""
    # The dense twin is the tests' reference too, and no part of the package.
    sys.path.insert(0, str(REPOSITORY / "tests"))
    try:
        from reference import DenseMaPeT
    except ModuleNotFoundError as error:
        raise ConfigError(f"`step` compares with tests/reference.py, but {REPOSITORY}/tests has none.") from error
    from mapet_ds.objectives import build_objective

    model = build_objective(config, config.tokenizer.vocab_size).to(device)
    twin, batch = DenseMaPeT(model), config.train.micro_batch_size
    generator = torch.Generator().manual_seed(config.seed)
    images = torch.randn(batch, 3, config.model.img_size, config.model.img_size, generator=generator).to(device)
    ids = torch.randint(config.tokenizer.vocab_size, (batch, config.num_patches), generator=generator).to(device)
    on_cpu = model.draw(0, 0, batch)
    draw = on_cpu.to(device)

    def masks() -> tuple[Tensor, ...]:
        return tuple(mask.to(device) for mask in twin.masks(on_cpu.order, model.num_visible))

    def run(loss: Callable[[], Tensor]) -> float:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            value = loss()
        value.backward()
        return value.item()

    ready = masks()
    sorted_step = partial(run, lambda: model(images, ids, draw).loss)
    return {"sorted": sorted_step, "dense": partial(run, lambda: twin(images, ids, draw.order, ready))}, masks


def peak_memory(name: str, config: Config, device: torch.device, dtype: str, threads: int) -> int:
    """Bytes that one step needs at its peak over what lies in memory before it. On a CPU: in a process of its own."""
    torch.set_num_threads(threads)
    steps, _ = build_step(config, device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps[name]()
        return torch.cuda.max_memory_allocated() - before
    # Not getrusage, whose maximum begins at the parent's. Writing 5 sets VmHWM, the peak, back to what is used now.
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    steps[name]()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - before


def measure_step(arguments: argparse.Namespace) -> Figures:
    device, threads = device_of(arguments.device), arguments.threads
    config = settings(arguments, f"model.name={arguments.model}", "model.drop_path=0", "objective=mapet")
    figures = circumstances(config, arguments) | {"vocab_size": config.tokenizer.vocab_size}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as child:
        shared = (config, device, arguments.dtype, threads)
        sorted_peak, dense_peak = (child.submit(peak_memory, name, *shared).result() for name in ("sorted", "dense"))
    torch.set_num_threads(threads)
    steps, masks = build_step(config, device, arguments.dtype)
    losses = {name: step() for name, step in steps.items()}
    wall, cpu = ({name: [] for name in (*steps, "masks")} for _ in range(2))
    for _ in range(arguments.repeats):
        for name, work in {**steps, "masks": masks}.items():
            seconds, cpu_used, _ = timed(device, work)
            wall[name].append(seconds)
            cpu[name].append(cpu_used)
    whole = [step + mask for step, mask in zip(wall["dense"], wall["masks"])]
    return figures | {
        "seconds": {name: summary(values) for name, values in wall.items()},
        "cpu_seconds": {name: summary(values) for name, values in cpu.items()},
        "dense_over_sorted": ratio(wall["dense"], wall["sorted"]),
        "dense_with_masks_over_sorted": ratio(whole, wall["sorted"]),
        "cpu_dense_over_sorted": ratio(cpu["dense"], cpu["sorted"]),
        "peak_bytes": {"sorted": sorted_peak, "dense": dense_peak},
        "peak_dense_over_sorted": dense_peak / sorted_peak,
        "loss": losses,
        "loss_relative_difference": abs(losses["dense"] - losses["sorted"]) / abs(losses["sorted"]),
    }


def measure_assign(arguments: argparse.Namespace) -> Figures:
    from mapet_ds.data import Loader, View
    from mapet_ds.teacher import build_teacher, teacher_mean_std
    from mapet_ds.tokenizer import Codebook

    device, name = device_of(arguments.device), f"teacher.name={json.dumps(arguments.teacher)}"
    configs = {precision: settings(arguments, name, f"teacher.precision={precision}") for precision in ("fp32", "bf16")}
    config, codebook = configs["fp32"], Codebook.load(arguments.codebook)
    teachers = {f"teacher_{precision}": build_teacher(configs[precision].teacher, device) for precision in configs}
    codebook.check(teachers["teacher_fp32"].identity, config.data, len(codebook.centroids))
    codebook.to(device)
    milliseconds, changed, total = {name: [] for name in (*teachers, "assign")}, {"bf16_teacher": 0, "bf16_features": 0}, 0
    with tempfile.TemporaryDirectory() as cache:
        view = View(config.teacher.img_size, *teacher_mean_std(config.teacher))
        index = open_index(arguments.data, Path(cache) / "index")
        loader = Loader(config, index, student=False, teacher=view, rank=0, world_size=1, local_rank=0)
        with contextlib.closing(loader):
            for _ in range(1 + -(-arguments.images // arguments.batch_size)):
                images, found = next(loader).teacher_images.to(device), {}
                for name, teacher in teachers.items():
                    seconds, _, found[name] = timed(device, teacher, images)
                    milliseconds[name].append(1000 * seconds / len(images))
                seconds, _, ids = timed(device, codebook.assign, found["teacher_fp32"])
                milliseconds["assign"].append(1000 * seconds / len(images))
                changed["bf16_teacher"] += int((codebook.assign(found["teacher_bf16"]) != ids).sum())
                changed["bf16_features"] += int((codebook.assign(found["teacher_fp32"].bfloat16()) != ids).sum())
                total += ids.numel()
    return circumstances(config, arguments) | {
        "codes": len(codebook.centroids),
        "ids": total,
        "changed_share": {name: count / total for name, count in changed.items()},
        "ms_per_image": {name: summary(values[1:]) for name, values in milliseconds.items()},  # the first is a warm-up
    }


def settings(arguments: argparse.Namespace, *overrides: str) -> Config:
    """The recipe, what the sub-command needs, then the user's words."""
    device, batch_size = device_of(arguments.device).type, arguments.batch_size
    shared = [
        f"train.micro_batch_size={batch_size}", f"train.global_batch_size={batch_size}",
        f"data.threads={arguments.threads}", f"data.device={'gpu' if device == 'cuda' else 'cpu'}",
    ]  # fmt: skip
    return load_config(arguments.config, [*shared, *overrides, *arguments.overrides])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)

    def command(name: str, measure: Callable[..., Figures], batch_size: int, **options: Any) -> Any:
        made = commands.add_parser(name, **options)
        made.set_defaults(measure=measure)
        recipe = REPOSITORY / "mapet_ds/recipes/mapet_vitb16.yaml"
        made.add_argument("--config", default=recipe, metavar="YAML", type=Path, help="a recipe; default: ViT-B/16's")
        made.add_argument("--batch_size", type=int, default=batch_size)
        made.add_argument("--threads", type=int, default=2, help="CPU threads; torchvision's workers")
        made.add_argument("--device", default="auto", help="cuda, cpu or auto")
        made.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace the recipe's")
        return made

    loader = command("loader", measure_loader, 32, help="images per second of three loaders")
    bad = command("bad", measure_bad, 32, help="images per second with 5 %% of unreadable images")
    for made in (loader, bad):
        made.add_argument("--data", required=True, help="folder of images")
        made.add_argument("--batches", type=int, default=16, help="timed, a multiple of --threads: workers come in turns")
        made.add_argument("--repeats", type=int, default=5)
    step = command("step", measure_step, 8, help="one step of MaPeT, sorted by rank and as published")
    step.add_argument("--model", default="vit_base_patch16_224", help="timm model name")
    step.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="bf16: autocast")
    step.add_argument("--repeats", type=int, default=3)
    assign = command("assign", measure_assign, 32, help="token ids that change in bf16")
    assign.add_argument("--teacher", required=True, help="open_clip model name, or local-dir:PATH")
    assign.add_argument("--data", required=True, help="folder of images")
    assign.add_argument("--codebook", required=True, help="fitted on this teacher's fp32 features")
    assign.add_argument("--images", type=int, default=256)
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse(sys.argv[1:])
    try:
        print(json.dumps(arguments.measure(arguments)))
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
