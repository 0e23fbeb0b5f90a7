"""The steps of the first day on a cluster: one node, all nodes, links, storage, a benchmark, a plan.

They run in a job's own shell, and start their ranks as the job will: by slurm/ranks.sh.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.planning.forecast import LINK_SHARE
from trials.gpu import Machine, training
from trials.runner import Failed, Figures, Step, last_line

STEPS = 20
TOLERANCE = 0.02
"""Share by which losses of one node and of all may differ: the same images, summed in another order."""


def machine() -> Machine:
    """This host, which has the GPUs of all; a CPU where it has none."""
    return Machine.here(cpu=not torch.cuda.is_available())


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (REPOSITORY / folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


class Cluster:
    """The steps of a job, with all that is written below one folder that its hosts share."""

    def __init__(self, arguments: argparse.Namespace, machine: Machine, out: Path) -> None:
        self.arguments, self.machine, self.out = arguments, machine, out
        self.nodes, self.config = arguments.nodes, load_config(arguments.config, arguments.overrides)
        self.recipe = ["--config", arguments.config]
        self.settings = [f"data.train={arguments.data}", "log.progress=false", *arguments.overrides]
        tokenizer = self.config.tokenizer
        self.stand_in = self.config.method.uses_teacher(self.config) and self.config.method.predicts_ids
        self.stand_in = self.stand_in and not Path(tokenizer.path or "/").is_file()
        if self.stand_in:
            self.settings.append(f"tokenizer.path={out}/codebook.safetensors")

    def ranks(self, nodes: int, *words: object) -> list[object]:
        """The command of a program on all GPUs of so many nodes."""
        return ["bash", "slurm/ranks.sh", nodes, *words]

    def benchmark(self, nodes: int, kind: str, *words: object) -> list[object]:
        program = ["tools/benchmark.py", kind, "--batch_size", self.config.train.micro_batch_size, *words]
        return self.ranks(nodes, *program, *self.recipe, *self.settings)

    def run(self, name: str, nodes: int) -> list[list[object]]:
        """Commands of the recipe's first steps. The list of the images is made once for all."""
        folder = self.out / "runs" / name
        index = ["ln", "-sfn", (REPOSITORY / self.out / "index").resolve(), folder / "index"]
        engine = ["--deepspeed_config", self.arguments.deepspeed_config]
        words = [f"run_dir={folder}", f"train.stop_at_step={STEPS}", "log.every_steps=1"]
        words += [f"train.world_size={nodes * self.arguments.gpus_per_node}", "log.images_every_steps=0"]
        train = self.ranks(nodes, "mapet_ds/pretrain.py", *engine, *self.recipe, *self.settings, *words)
        return [["mkdir", "-p", folder], index, train]

    def all_nodes(self, folder: Path, alone: Path) -> Figures:
        """The figures of the run on all nodes, beside those of one.

        Raises:
            Failed: a loss is not that of one node.
        """
        figures, one, all_ = training(folder, STEPS, learns=False), losses(alone), losses(folder)
        worst = max(abs(all_[step] / one[step] - 1) for step in one)
        if worst > TOLERANCE:
            raise Failed(f"a loss differs by {worst:.1%} from that of one node, more than {TOLERANCE:.0%}")
        mine, theirs = figures["images_per_second"], training(alone, STEPS, False)["images_per_second"]
        return figures | {
            "losses_differ_by": worst, "speed_over_one_node": mine["median"] / theirs["median"],
        }  # fmt: skip

    def same_hosts(self, printed: str) -> Figures:
        """The machine's figures.

        Raises:
            Failed: a host is missing, or differs in what must be equal.
        """
        figures = last_line(printed)
        if figures["ranks"] != self.nodes * self.arguments.gpus_per_node:
            raise Failed(f"{figures['ranks']} ranks came")
        if unlike := figures["hosts_differ_in"]:
            raise Failed(f"the hosts {', '.join(figures['hosts'])} differ in {', '.join(unlike)}")
        return figures

    def steps(self) -> list[Step]:
        """In their order: nothing that fails is met twice."""
        nodes, runs = self.nodes, self.out / "runs"
        one, all_ = runs / "one_node", runs / "all_nodes"
        weights = self.ranks(nodes, "tools/fetch_weights.py", "--offline", *self.recipe, *self.settings)
        stand_in = [sys.executable, "tools/trials/stand_in.py", *self.recipe, *self.settings]
        no_need = "" if self.stand_in else "the recipe needs none, or has one"
        data = ["--data", self.arguments.data]
        storage = [*data, "--index", self.out / "index", "--threads", 16]
        engine = ["--deepspeed_config", self.arguments.deepspeed_config]
        threads = ["--threads", self.config.data.threads]
        train = self.benchmark(1, "train", *data, *engine, *threads, "--repeats", 2)
        alone = "it needs two nodes" if nodes < 2 else ""
        figures, beside = lambda _: training(one, STEPS, learns=False), lambda _: self.all_nodes(all_, one)
        return [
            Step("hosts", [self.benchmark(nodes, "machine")], figures=self.same_hosts),
            Step("weights_offline", [weights], figures=lambda _: {}),
            Step("stand_in_codebook", [stand_in], no_need),
            Step("storage", [self.benchmark(nodes, "storage", *storage)]),
            Step("one_node", self.run("one_node", 1), "", ("storage",), figures, (one,)),
            Step("all_nodes", self.run("all_nodes", nodes), alone, ("one_node",), beside, (all_,)),
            Step("allreduce_one_node", [self.benchmark(1, "allreduce")]),
            Step("allreduce", [self.benchmark(nodes, "allreduce")], alone),
            Step("train", [train], "", ("one_node",), calibrates=True),
            self.plan(),
        ]

    def plan(self) -> Step:
        """What plan.py makes of the figures, with the measured links and storage."""
        gpu, name = self.machine.gpu, self.machine.plan_name
        lacks = "" if name else f"plan.py knows no {gpu}" if gpu else "plan.py takes no figures of a CPU"

        def storage(figures: dict[str, Figures]) -> float:
            return figures["storage"]["host_gbyte_s"]["median"]

        def link(figures: dict[str, Figures]) -> float:
            """Gbit/s of the adapters whose attained share this is: a ring leaves each node once."""
            sizes = figures["allreduce"]["sizes"].values()
            return 8 * max(size["bus_gbyte_s"]["median"] for size in sizes) / LINK_SHARE

        recipe = [sys.executable, "tools/plan.py", *self.arguments.overrides, *self.recipe]
        cluster = ["--gpu", name, "--nodes", self.nodes, "--gpus_per_node", self.arguments.gpus_per_node]
        several = self.nodes > 1
        measured = ["--storage_gbyte_s", storage, *(["--link_gbit", link] if several else [])]
        command = [*recipe, *cluster, *measured, "--json", "--calibrate", self.out / "calibration.jsonl"]
        after = ("train", "storage", *(["allreduce"] if several else []))
        return Step("plan", [command], lacks, after)


def steps(arguments: argparse.Namespace, machine: Machine, out: Path) -> list[Step]:
    """All steps, in their order; one that can't run here says why."""
    return Cluster(arguments, machine, out).steps()
