"""The steps of the first hour on a machine with a GPU, and the same in small shapes on a CPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from mapet_ds.errors import UserError
from mapet_ds.planning.roofline import GPUS
from trials.runner import Failed, Figures, Step

PYTHON = sys.executable
SMALL = "model.args={depth: 2, embed_dim: 64, num_heads: 2}"
"""The student on a CPU."""


def has(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


class Machine(NamedTuple):
    """What the steps run on."""

    gpu: str
    """The name of its first GPU; empty for a CPU."""
    gpus: int
    memory_gib: float
    cores: int

    @classmethod
    def here(cls, cpu: bool) -> Machine:
        """This machine, by its GPUs or as a CPU.

        Raises:
            UserError: torch sees no GPU, and none is to do.
        """
        cores = len(os.sched_getaffinity(0))
        if cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
            return cls("", 0, 0.0, cores)
        if not torch.cuda.is_available():
            raise UserError(
                f"torch {torch.__version__} sees no GPU on this host. `nvidia-smi` shows GPUs and driver: "
                f"wheels of CUDA {torch.version.cuda} need one that is new enough (README, Drivers). "
                "`python tools/trial.py gpu OUT --cpu` tries the steps themselves, in small shapes."
            )
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return cls(torch.cuda.get_device_name(0), torch.cuda.device_count(), memory, cores)

    @property
    def plan_name(self) -> str:
        """The name that plan.py has for such a GPU; empty where it has none."""
        alike = {key: gpu for key, gpu in GPUS.items() if gpu.name in self.gpu}
        return min(alike, key=lambda key: abs(alike[key].gib - self.memory_gib), default="")

    def setup(self) -> Figures:
        """What an outcome rests on, beside step and commit."""
        return {
            "gpu": self.gpu,
            "gpus": self.gpus,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        }


class Shapes(NamedTuple):
    """The sizes of all steps."""

    recipe: str
    engine: str
    images: tuple[object, ...]
    """Options of make_demo.py."""
    settings: tuple[str, ...]
    """Overrides of the recipe: its teacher, and what the trial makes."""
    batch: int
    steps: int
    """Of the real runs."""
    few: int
    """Steps of each half of the resumed run, and of a benchmark's repeat."""
    repeats: int
    batches: int
    """Of a repeat of the loader's."""
    samples: int
    """Entries of the index, images of `assign`."""
    device: str
    teacher: str
    model: str


def shapes(machine: Machine, out: Path) -> Shapes:
    """The published ViT-B at its recipe's micro-batch, on a GPU; the demo's, on a CPU."""
    made = [
        f"data.train={out}/data/train",
        f"tokenizer.path={out}/codebook.safetensors",
        "log.progress=false",
    ]
    made += ["tokenizer.redo=1", "tokenizer.iterations=5", "log.every_steps=5", "log.images_every_steps=0"]
    if machine.gpu:
        images = ("--number", 2048, "--sides", 300, 600, "--teacher_steps", 1)
        made += ["teacher.weights=random", f"data.threads={threads(machine)}", "optim.warmup_epochs=1"]
        return Shapes(
            "mapet_ds/recipes/mapet_vitb16.yaml", "ds_configs/zero2.json", images, (*made, "optim.lr=3e-4"),
            batch=128, steps=200, few=20, repeats=3, batches=64, samples=2048, device="cuda",
            teacher="RN50x64", model="vit_base_patch16_224",
        )  # fmt: skip
    teacher, images = f"local-dir:{out}/data/teacher", ("--number", 128, "--teacher_steps", 1)
    made += [f"teacher.name={teacher}", "tokenizer.vocab_size=32", "optim.warmup_epochs=1", "data.threads=1"]
    return Shapes(
        "mapet_ds/recipes/demo_cpu.yaml", "ds_configs/zero2_cpu.json", images, (*made, SMALL),
        batch=8, steps=20, few=4, repeats=1, batches=2, samples=64, device="cpu",
        teacher=teacher, model="vit_tiny_patch16_224",
    )  # fmt: skip


def threads(machine: Machine) -> int:
    """Of the loader of one rank."""
    return max(1, min(8, machine.cores // max(machine.gpus, 1)))


def training(folder: Path, steps: int, learns: bool = True) -> Figures:
    """The figures of a run of so many steps, from its metrics.

    learns: it is long enough for its loss to fall.

    Raises:
        Failed: it ended elsewhere, or its loss is not finite or has not fallen.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    if lines[-1]["step"] != steps:
        raise Failed(f"the run ended at step {lines[-1]['step']} of {steps}")
    if not all(map(math.isfinite, losses)):
        raise Failed("a loss is not finite")
    quarter = max(1, len(losses) // 4)
    first, last = statistics.mean(losses[:quarter]), statistics.mean(losses[-quarter:])
    if learns and not last < first:
        raise Failed(f"the loss has not fallen: {first:.4f} at the start, {last:.4f} at the end")
    later = lines[len(lines) // 4 :]  # the first ones compile and warm up
    names = ("images_per_second", "data_wait_percent", "seconds", "gpu_memory_gib")
    return {"steps": steps, "loss": {"first": first, "last": last}} | {
        name: {
            "median": statistics.median(values), "min": min(values), "max": max(values)
        }
        for name in names
        if (values := [line[name] for line in later if name in line])
    }  # fmt: skip


def same_losses(straight: Path, resumed: Path) -> Figures:
    """How many losses of two runs are equal.

    Raises:
        Failed: one differs.
    """
    one, two = (
        {
            line["step"]: line["loss"]
            for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        }
        for folder in (straight, resumed)
    )
    if unlike := [step for step in one if one[step] != two.get(step)]:
        step = unlike[0]
        raise Failed(f"at step {step} the straight run has loss {one[step]}, the resumed one {two.get(step)}")
    return {"equal_losses": len(one), "last_step": max(one)}


def counts(printed: str) -> Figures:
    """How many tests passed.

    Raises:
        Failed: none did.
    """
    summary = printed.strip().splitlines()[-1].strip("= ")
    if " passed" not in summary:
        raise Failed(f"no test has passed: {summary}")
    return {"pytest": summary}


class Benchmark(NamedTuple):
    """A command of tools/benchmark.py; {names} are Shapes', and what Steps knows."""

    step: str
    words: str
    after: tuple[str, ...] = ("images",)
    settings: str = ""
    calibrates: bool = False
    dali: bool = True
    together: bool = False
    """It runs on all GPUs, and needs two."""
    config: str = ""
    """Another recipe, on a GPU."""


IDS, CODEBOOK = ("ids",), ("stand_in_codebook",)
STEP = "step --model {model} --repeats {repeats}"
LOADER = "loader --data {data} --batches {batches} --repeats {repeats}"
TRAIN = "train --data {data} --repeats {repeats} --steps {few} --deepspeed_config {engine}"
PARTS = [
    Benchmark("step", f"{STEP} --dtype {{dtype}}", (), calibrates=True, dali=False),
    Benchmark("step_fp32", f"{STEP} --dtype fp32", (), dali=False),
    Benchmark("step_beit", f"{STEP} --dtype {{dtype}} --against none", (), "objective=beit", dali=False,
              config="mapet_ds/recipes/beit_vitb16.yaml"),
    Benchmark("teacher", "teacher --repeats {repeats}", calibrates=True, dali=False),
    Benchmark("teacher_eager", "teacher --repeats {repeats} --against eager", settings="train.compile=true",
              dali=False),
    Benchmark("teacher_sharded", "teacher --repeats {repeats} --against unsharded", dali=False, together=True,
              settings="teacher.shard=node"),
    Benchmark("loader", LOADER, calibrates=True),
    Benchmark("decoders", f"{LOADER} {{decoders}}"),
    Benchmark("bad", "bad --data {data} --batches {batches} --repeats {repeats}"),
    Benchmark("index", "index --images {entries} --repeats {repeats}", ()),
    Benchmark("assign", "assign --data {data} --teacher {teacher} --codebook {codebook} --images {samples}",
              CODEBOOK, calibrates=True),
    Benchmark("allreduce", "allreduce", (), dali=False, together=True),
    Benchmark("storage", "storage --data {data} --images {samples}", dali=False),
]  # fmt: skip
"""The parts of a step alone, and the machine's own rates."""
WHOLE = [
    Benchmark("train", TRAIN, CODEBOOK, calibrates=True),
    Benchmark("train_ahead", TRAIN, CODEBOOK, "teacher.ahead=true"),
    Benchmark("train_eager", TRAIN, CODEBOOK, "train.compile=false"),
    Benchmark("profile", f"{TRAIN} --plot {{out}}/profile.png --trace {{out}}/profile.json.gz", IDS, "{ids}"),
    Benchmark("train_dense", f"{TRAIN} --against dense", IDS, "{ids} model.drop_path=0"),
    Benchmark("scaling", f"{TRAIN.replace('train', 'scaling')} --rounds 1 --ranks {{ranks}}", IDS, "{ids}"),
    Benchmark("checkpoint", TRAIN.replace("train", "checkpoint"), IDS, "{ids}"),
]
"""Whole steps; `profile` has their parts, as a picture and as a trace."""


class Steps:
    """The steps of a machine, with all that is written below one folder."""

    def __init__(self, machine: Machine, out: Path) -> None:
        self.machine, self.out, self.at = machine, out, shapes(machine, out)
        ranks = max(machine.gpus, 1)
        self.together = [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        self.no_dali = (
            "" if has("nvidia.dali") else "nvidia-dali is not installed, and no other loader trains"
        )
        self.no_faiss = "" if has("faiss") else "faiss is not installed"
        self.ids = f"tokenizer.ids={out}/ids"
        sizes = f"train.micro_batch_size={self.at.batch}", f"train.global_batch_size={self.at.batch * ranks}"
        self.recipe = ["--config", self.at.recipe, *self.at.settings, *sizes]
        decoders = ["dali", "dali_whole"]
        decoders += ["dali_hw0", "dali_hw1", "dali_whole_hw1", "dali_preallocated"] if machine.gpu else []
        self.values = self.at._asdict() | {
            "data": f"{out}/data/train", "codebook": f"{out}/codebook.safetensors", "out": out,
            "ids": self.ids, "dtype": "bf16" if machine.gpu else "fp32", "ranks": max(2, ranks),
            "entries": 100 * self.at.samples,
            "decoders": " ".join(f"--against {name}" for name in decoders),
        }  # fmt: skip

    def all(self) -> list[Step]:
        """In their order: what others need comes first, then what a user does, then the figures."""
        benchmarks = [self.benchmark(each) for each in PARTS + WHOLE]
        return [*self.preparations(), *self.runs(), *benchmarks, self.plan()]

    def preparations(self) -> list[Step]:
        """The machine, the tests that need a GPU, and what the other steps read."""
        no_gpu = "" if self.machine.gpu else "the trial runs on a CPU"
        fit = [PYTHON, "tools/fit_codebook.py", "--overwrite", "--config", self.at.recipe, *self.at.settings]
        stand_in = [PYTHON, "tools/trials/stand_in.py", "--config", self.at.recipe, *self.at.settings]
        images = [PYTHON, "tools/make_demo.py", self.out / "data", *self.at.images]
        tests = [PYTHON, "-m", "pytest", "-m", "gpu", "-q", "-n", 0, "tests"]
        return [
            self.benchmark(Benchmark("machine", "machine", (), dali=False)),
            Step("tests", [tests], no_gpu, figures=counts),
            Step("images", [images], fresh=(self.out / "data",)),
            Step("codebook", [fit], self.no_dali or self.no_faiss, ("images",)),
            Step("stand_in_codebook", [stand_in], "", ("images",), unless="codebook"),
        ]

    def runs(self) -> list[Step]:
        """Real runs: ids on the fly, ids that are stored, and one that is interrupted."""
        few, steps, runs = self.at.few, self.at.steps, Path(self.out, "runs")
        exact = ["train.deterministic=true", "train.compile=false", "log.every_steps=1", self.ids]
        halves = [self._run("straight", 2 * few, *exact)]
        halves += [self._run("resumed", last, *exact) for last in (few, 2 * few)]
        tokenize = [*self.together, "tools/tokenize_images.py", *self.recipe, self.ids]
        fly, stored = self._run("on_the_fly", steps), self._run("from_ids", steps, self.ids)
        one, two = runs / "straight", runs / "resumed"

        def real(name: str, command: list[object], after: tuple[str, ...]) -> Step:
            folder = runs / name
            return Step(name, [command], self.no_dali, after, lambda _: training(folder, steps), (folder,))

        return [
            real("on_the_fly", fly, CODEBOOK),
            Step("ids", [tokenize], self.no_dali, CODEBOOK, fresh=(self.out / "ids",)),
            real("from_ids", stored, IDS),
            Step("resume", halves, self.no_dali, IDS, lambda _: same_losses(one, two), (one, two)),
        ]

    def _run(self, name: str, steps: int, *words: str) -> list[object]:
        more = [f"run_dir={self.out}/runs/{name}", f"train.stop_at_step={steps}", "train.epochs=100", *words]
        engine = ["--deepspeed_config", self.at.engine]
        return [*self.together, "mapet_ds/pretrain.py", *engine, *self.recipe, *more]

    def benchmark(self, each: Benchmark) -> Step:
        """The step that runs it."""
        at = self.at

        def filled(words: str) -> list[str]:
            return [part for word in words.split() for part in self._fill(word)]

        sizes = ["--device", at.device, "--batch_size", at.batch, "--threads", threads(self.machine)]
        config = each.config if each.config and self.machine.gpu else at.recipe
        start = self.together if each.together else [PYTHON]
        command = [*start, "tools/benchmark.py", *filled(each.words), *sizes, "--config", config]
        command += [*at.settings, *filled(each.settings)]
        alone = self.machine.gpus < 2 and (each.together or (each.step == "scaling" and self.machine.gpu))
        lacks = "it needs two GPUs" if alone else self.no_dali if each.dali else ""
        return Step(each.step, [command], lacks, each.after, calibrates=each.calibrates)

    def _fill(self, word: str) -> list[str]:
        """A word with its values; that of decoders is several words."""
        text = word.format(**self.values)
        return text.split() if word == "{decoders}" else [text]

    def plan(self) -> Step:
        """What plan.py makes of the figures so far."""
        gpu, name, lines = self.machine.gpu, self.machine.plan_name, self.out / "calibration.jsonl"
        lacks = "" if name else f"plan.py knows no {gpu}" if gpu else "plan.py takes no figures of a CPU"
        cluster = ["--gpu", name, "--nodes", 1, "--gpus_per_node", max(self.machine.gpus, 1), "--json"]
        command = [PYTHON, "tools/plan.py", "--config", self.at.recipe, *cluster, "--calibrate", lines]
        return Step("plan", [command], lacks, ("step",))


def steps(machine: Machine, out: Path) -> list[Step]:
    """All steps, in their order; one that can't run here says why."""
    return Steps(machine, out).all()
