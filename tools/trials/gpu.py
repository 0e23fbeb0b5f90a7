"""The steps of the first hour on a machine with a GPU, and the same in small shapes on a CPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mapet_ds.errors import UserError
from mapet_ds.planning.forecast import GPUS
from trials.runner import Failed, Figures, Step

PYTHON = sys.executable


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
                f"torch {torch.__version__} sees no GPU on this host. `nvidia-smi` shows the GPUs and the driver: "
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
        "mapet_ds/recipes/demo_cpu.yaml", "ds_configs/zero2_cpu.json", images, (*made, "model.args={depth: 2, embed_dim: 64, num_heads: 2}"),
        batch=8, steps=20, few=4, repeats=1, batches=2, samples=64, device="cpu",
        teacher=teacher, model="vit_tiny_patch16_224",
    )  # fmt: skip


def threads(machine: Machine) -> int:
    """Of the loader of one rank."""
    return max(1, min(8, machine.cores // max(machine.gpus, 1)))


def training(folder: Path, steps: int) -> Figures:
    """The figures of a run of so many steps, from its metrics.

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
    if not last < first:
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


class Steps:
    """The steps of a machine, with all that is written below one folder."""

    def __init__(self, machine: Machine, out: Path) -> None:
        self.machine, self.out, self.at = machine, out, shapes(machine, out)
        self.ranks = max(machine.gpus, 1)
        self.together = [
            PYTHON,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={self.ranks}",
        ]
        self.no_dali = (
            "" if has("nvidia.dali") else "nvidia-dali is not installed, and no other loader trains"
        )
        self.no_faiss = "" if has("faiss") else "faiss is not installed"
        self.ids = f"tokenizer.ids={out}/ids"

    def all(self) -> list[Step]:
        """In their order: what others need comes first, then what a user does, then the figures."""
        return [*self.preparations(), *self.runs(), *self.parts(), *self.whole_steps(), self.plan()]

    def preparations(self) -> list[Step]:
        """The machine, the tests that need a GPU, and what the other steps read."""
        no_gpu = "" if self.machine.gpu else "the trial runs on a CPU"
        fit = [PYTHON, "tools/fit_codebook.py", "--overwrite", "--config", self.at.recipe, *self.at.settings]
        stand_in = [PYTHON, "tools/trials/stand_in.py", "--config", self.at.recipe, *self.at.settings]
        no_need = "" if self.no_faiss else "FAISS fits one"
        tests = [PYTHON, "-m", "pytest", "-m", "gpu", "-q", "-n", 0, "tests"]
        return [
            self.benchmark("machine", "machine", dali=False),
            Step("tests", [tests], no_gpu, figures=counts),
            Step("images", [[PYTHON, "tools/make_demo.py", self.out / "data", *self.at.images]]),
            Step("codebook", [fit], self.no_dali or self.no_faiss, ("images",), optional=True),
            Step("stand_in_codebook", [stand_in], no_need, ("images",), optional=True),
        ]

    def runs(self) -> list[Step]:
        """Real runs: ids on the fly, ids that are stored, and one that is interrupted."""
        few, tokenize = self.at.few, [*self.together, "tools/tokenize_images.py", *self._recipe()[2:]]
        exact = ["train.deterministic=true", "train.compile=false", "log.every_steps=1", self.ids]
        halves = [self._run("straight", 2 * few, *exact)]
        halves += [self._run("resumed", steps, *exact) for steps in (few, 2 * few)]
        runs = Path(self.out, "runs")
        fly, stored = (
            [self._run("on_the_fly", self.at.steps)],
            [self._run("from_ids", self.at.steps, self.ids)],
        )
        codebook, ids = ("codebook", "stand_in_codebook"), ("ids",)
        return [
            Step(
                "on_the_fly",
                fly,
                self.no_dali,
                codebook,
                lambda _: training(runs / "on_the_fly", self.at.steps),
            ),
            Step("ids", [[*tokenize, self.ids]], self.no_dali, codebook),
            Step("from_ids", stored, self.no_dali, ids, lambda _: training(runs / "from_ids", self.at.steps)),
            Step(
                "resume",
                halves,
                self.no_dali,
                ids,
                lambda _: same_losses(runs / "straight", runs / "resumed"),
            ),
        ]

    def parts(self) -> list[Step]:
        """The benchmarks of a step's parts alone."""
        at, repeats = self.at, ["--repeats", self.at.repeats]
        data = ["--data", self.out / "data/train"]
        step = ["step", "--model", at.model, *repeats, "--dtype"]
        bf16, beit = (
            ("bf16", "mapet_ds/recipes/beit_vitb16.yaml") if self.machine.gpu else ("fp32", at.recipe)
        )
        loader = ["loader", *data, "--batches", at.batches, *repeats]
        decoders = ["dali", "dali_whole", "dali_hw0", "dali_hw1", "dali_whole_hw1", "dali_preallocated"]
        decoders = decoders if self.machine.gpu else decoders[:2]
        against = [word for name in decoders for word in ("--against", name)]
        assign = ["assign", *data, "--teacher", at.teacher, "--codebook", self.out / "codebook.safetensors"]
        alone = "" if self.machine.gpus > 1 else "it needs two GPUs"
        compiled = ("train.compile=true",)
        return [
            self.benchmark("step", *step, bf16, dali=False, calibrates=True),
            self.benchmark("step_fp32", *step, "fp32", dali=False),
            self.benchmark(
                "step_beit",
                *step,
                bf16,
                "--against",
                "none",
                settings=("objective=beit",),
                config=beit,
                dali=False,
            ),
            self.benchmark("teacher", "teacher", *repeats, dali=False, after=("images",), calibrates=True),
            self.benchmark(
                "teacher_eager",
                "teacher",
                *repeats,
                "--against",
                "eager",
                settings=compiled,
                dali=False,
                after=("images",),
            ),
            self.benchmark(
                "teacher_sharded",
                "teacher",
                *repeats,
                "--against",
                "unsharded",
                settings=("teacher.shard=node",),
                together=True,
                lacks=alone,
                dali=False,
                after=("images",),
            ),
            self.benchmark("loader", *loader, after=("images",), calibrates=True),
            self.benchmark("decoders", *loader, *against, after=("images",)),
            self.benchmark("bad", "bad", *data, "--batches", at.batches, *repeats, after=("images",)),
            self.benchmark("index", "index", "--images", 100 * at.samples, *repeats),
            self.benchmark("assign", *assign, "--images", at.samples, after=("codebook",), calibrates=True),
            self.benchmark("allreduce", "allreduce", together=True, lacks=alone, dali=False),
            self.benchmark(
                "storage", "storage", *data, "--images", at.samples, dali=False, after=("images",)
            ),
        ]

    def whole_steps(self) -> list[Step]:
        """The benchmarks of whole steps; `train` has the profile, by part and as a trace."""
        at, out = self.at, self.out
        few = ["--data", out / "data/train", "--repeats", at.repeats, "--steps", at.few]
        train, codebook, ids = ["train", *few], ("codebook", "stand_in_codebook"), ("ids",)
        trace = ["--plot", out / "profile.png", "--trace", out / "profile.json.gz"]
        alone = "" if self.machine.gpus > 1 or not self.machine.gpu else "it needs two GPUs"
        scaling = ["scaling", *few, "--rounds", 1, "--ranks", max(2, self.machine.gpus)]
        engine = {"engine": True}
        return [
            self.benchmark("train", *train, after=codebook, calibrates=True, **engine),
            self.benchmark("train_ahead", *train, after=codebook, settings=("teacher.ahead=true",), **engine),
            self.benchmark(
                "train_eager", *train, after=codebook, settings=("train.compile=false",), **engine
            ),
            self.benchmark("profile", *train, *trace, after=ids, settings=(self.ids,), **engine),
            self.benchmark(
                "train_dense",
                *train,
                "--against",
                "dense",
                after=ids,
                settings=(self.ids, "model.drop_path=0"),
                **engine,
            ),
            self.benchmark("scaling", *scaling, after=ids, lacks=alone, settings=(self.ids,), **engine),
            self.benchmark("checkpoint", "checkpoint", *few, after=ids, settings=(self.ids,), **engine),
        ]

    def plan(self) -> Step:
        """What plan.py makes of the figures so far."""
        lines, name = self.out / "calibration.jsonl", self.machine.plan_name
        lacks = (
            ""
            if name
            else "plan.py takes no figures of a CPU"
            if not self.machine.gpu
            else f"plan.py knows no {self.machine.gpu}"
        )
        cluster = ["--gpu", name, "--nodes", 1, "--gpus_per_node", self.ranks, "--json"]
        command = [PYTHON, "tools/plan.py", "--config", self.at.recipe, *cluster, "--calibrate", lines]
        return Step("plan", [command], lacks, ("step",))

    def _recipe(self) -> list[object]:
        batch = self.at.batch
        sizes = [f"train.micro_batch_size={batch}", f"train.global_batch_size={batch * self.ranks}"]
        return ["--deepspeed_config", self.at.engine, "--config", self.at.recipe, *self.at.settings, *sizes]

    def _run(self, name: str, steps: int, *words: str) -> list[object]:
        more = [f"run_dir={self.out}/runs/{name}", f"train.stop_at_step={steps}", "train.epochs=100", *words]
        return [*self.together, "mapet_ds/pretrain.py", *self._recipe(), *more]

    def benchmark(
        self, name: str, *words: object, settings: tuple[str, ...] = (), config: str = "", together: bool = False,
        engine: bool = False, dali: bool = True, lacks: str = "", **more: Any,
    ) -> Step:  # fmt: skip
        """A step that runs tools/benchmark.py; together: on all GPUs."""
        at, start = self.at, self.together if together else [PYTHON]
        options = ["--device", at.device, "--batch_size", at.batch, "--threads", threads(self.machine)]
        options += ["--config", config or at.recipe, *(["--deepspeed_config", at.engine] if engine else [])]
        command = [*start, "tools/benchmark.py", *words, *options, *at.settings, *settings]
        return Step(name, [command], lacks or (self.no_dali if dali else ""), **more)


def steps(machine: Machine, out: Path) -> list[Step]:
    """All steps, in their order; one that can't run here says why."""
    return Steps(machine, out).all()
