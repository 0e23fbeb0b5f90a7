"""The runs of a study: how long each is, the commands that train and measure it, what it has come to."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from studies.jobs import Failed, Job, measured, options, program, run, subset, trained

from mapet_ds.__main__ import programs
from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.recipe import load_config
from mapet_ds.config.running import flatten, total_steps
from mapet_ds.config.sections import Config
from mapet_ds.config.study import StudyConfig, compared, row_settings, words
from mapet_ds.data.index import open_index
from mapet_ds.errors import ConfigError
from mapet_ds.planning.study import (
    Row,
    Work,
    base_row,
    check_folders,
    counted,
    equal_flops,
    equal_time,
    fitted,
    folders,
    lasting,
    load_row,
    rows,
    settings_of,
    stored,
)
from mapet_ds.results.report.study import Outcome
from mapet_ds.training.checkpoint import FREE

BY_NAME = (
    "data.train", "data.val", "evaluate",
    "teacher.name", "teacher.weights", "tokenizer.path", "tokenizer.ids",
)  # fmt: skip
"""What may differ at resume, where content is compared or nothing else is, but not within a table."""
MAY_DIFFER = tuple(name for name in FREE if name not in BY_NAME)


class Runs:
    """A study in its folder.

    Raises:
        ConfigError: the images are not there, or two rows would share a folder.
    """

    def __init__(self, study: StudyConfig, out: Path) -> None:
        self.out, self.images = Path(os.path.abspath(out)), folders(study, out)
        count = study.data.count or study.data.train_images
        if not (count or study.data.train):
            raise ConfigError("data.train is empty: name the images, or data.count=N to plan without them.")
        count = count or len(open_index(study.data.train, self.out / "shared/index"))
        self.study = study = dataclasses.replace(study, data=dataclasses.replace(study.data, count=count))
        check_folders(study)
        self.rows, self.base = list(rows(study)), base_row(study)
        self.own, self.uncounted = dict[Row, Work](), dict[Row, str]()
        place = study.cluster if "SLURM_JOB_ID" in os.environ else None
        self.ranks = place.gpus_per_node if place else study.ranks
        self.stopped = False  # by the terminal: no further job of a run is begun

    def count(self) -> None:
        """Counts every row that is not counted yet.

        A row can't be counted while its teacher or its tokenizer is not there, and says so in `uncounted`.
        """
        counted_now, self.uncounted = dict[Row, Work](), {}
        for row in self.rows:
            try:
                counted_now[row] = self.own.get(row) or counted(self.study, row, self.out)
            except ConfigError as error:
                self.uncounted[row] = str(error)
        self.own = counted_now
        assert self.study.data.count
        steps = total_steps(load_row(self.study, self.base, self.out, 0), self.study.data.count)
        self.works = {row: lasting(work, steps) for row, work in self.own.items()}

    def steps(self, row: Row) -> int | None:
        """The steps of a row's runs; None where the baseline is not counted, or a speed not measured, yet."""
        alike = row._replace(equal="steps")
        work, base = self.works[alike], self.works.get(self.base)
        if row.equal == "steps" or alike == self.base:
            return work.steps
        if base is None:
            return None
        if row.equal == "flops":
            return equal_flops(work, base)
        speed, base_speed = self.speed(alike), self.speed(self.base)
        return equal_time(work, speed, base, base_speed) if speed and base_speed else None

    def speed(self, row: Row) -> float | None:
        """Steps a second of a row's first finished run; None where none is finished."""
        for folder in (self.folder(row.folder, seed) for seed in self.study.seeds):
            if (folder / "DONE").exists():
                batch = load_config(folder / "config.yaml").train.global_batch_size
                return trained(folder, self.ranks)["speed"] / batch
        return None

    def same_as(self, row: Row) -> Row:
        """The row whose runs serve for this one: that of equal steps, where it is as long."""
        alike = row._replace(equal="steps")
        return alike if self.steps(row) == self.works[alike].steps else row

    def trainings(self) -> Iterator[tuple[Row, int]]:
        """Yields row and seed of every run that is trained, seed by seed."""
        for seed in self.study.seeds:
            seen = set[Row]()
            for row in (row._replace(equal=equal) for equal in self.study.equal for row in self.own):
                if (own := self.same_as(row)) not in seen:
                    seen.add(own)
                    yield own, seed

    def folder(self, name: str, seed: int) -> Path:
        return self.out / f"{name}_seed{seed}"

    # ---- Commands.

    def shared(self) -> list[Job]:
        """What comes once before all runs: the document's own commands, codebooks, stored ids."""
        jobs, place = [], self.out / "shared"
        for i, line in enumerate(self.study.prepare):
            name, *rest = command = [word.format(**self.images) for word in shlex.split(line)]
            if name not in programs():
                raise ConfigError(f"prepare: there is no program {name}; there are {', '.join(programs())}.")
            done = place / f"prepared_{i}"
            settings = {"command": shlex.join(command)}
            jobs.append(Job(done.name, program(name, *rest), place, done, settings, marked=True))
        for row in self.rows:
            recipe, _ = row_settings(self.study, row.name, {})
            own = ["--config", recipe, *settings_of(self.study, row, self.out, self.study.seeds[0])]
            if codebook := fitted(self.study, row, self.out):
                command = program("fit_codebook", *own, ranks=self.ranks)
                jobs.append(Job(codebook.stem, command, place, codebook, {}))
            if ids := stored(self.study, row, self.out):
                command = program("tokenize_images", *own, f"tokenizer.ids={ids}", ranks=self.ranks)
                jobs.append(Job(ids.name, command, place, ids / "ids.json", {}))
        return list({job.done: job for job in jobs}.values())

    def overrides(self, row: Row, seed: int) -> list[str]:
        """The settings of a run, as the user would write them."""
        steps, ids = self.steps(row), stored(self.study, row, self.out)
        as_the_recipe = steps == self.own[row._replace(equal="steps")].steps
        own = settings_of(self.study, row, self.out, seed, None if as_the_recipe else steps)
        return [*own, *([f"tokenizer.ids={ids}"] if ids else []), f"run_dir={self.folder(row.folder, seed)}"]

    def of_training(self, row: Row, seed: int) -> list[Job]:
        """The training of a run, its export, and what is measured of it."""
        recipe, _ = row_settings(self.study, row.name, {})
        folder, own = self.folder(row.folder, seed), self.overrides(row, seed)
        settings = compared(load_config(recipe, own), MAY_DIFFER)
        engine = ["--deepspeed_config", self.study.engine]
        train = program("pretrain", "--config", recipe, *engine, *own, ranks=self.ranks)
        model = folder / "timm"
        export = program("export_timm", folder, model, "--layer_scale", "keep")
        return [
            Job("pretrain", train, folder, folder / "DONE", settings, Config),
            Job("export", export, folder, model / "model.safetensors", {}),
            *self.probes(folder, ["--model", model]),
            *self.finetuning(folder, model, seed, []),
        ]

    def probes(
        self, folder: Path, model: Sequence[object], settings: dict[str, object] | None = None
    ) -> Iterator[Job]:
        """Yields k-NN and linear of the model that the words name; features are computed once.

        settings: what makes that model what it is, where no training has recorded it.
        """
        images = {split: str(self.images[split]) for split in ("train", "val")}
        data = [*options(images), "--features", folder / "features.safetensors"]
        for name in ("knn", "linear"):
            asked, done = getattr(self.study.measure, name), folder / f"{name}.json"
            if asked is not None:
                command = program("evaluate", name, *model, *data, "--out", done, *options(asked))
                yield Job(name, command, folder, done, {**images, **(settings or {}), **asked})

    def finetuning(self, folder: Path, model: Path, seed: int, more: list[str]) -> Iterator[Job]:
        """Yields the fine-tuning of a folder of weights."""
        finetune, run_dir = self.study.measure.finetune, folder / "finetuned"
        if finetune is None:
            return
        own = [*self.finetune_settings(), *more, f"model.path={model}", f"seed={seed}", f"run_dir={run_dir}"]
        settings = compared(load_config(finetune.recipe, own, FinetuneConfig), MAY_DIFFER)
        rest = ["--config", finetune.recipe, "--deepspeed_config", self.study.engine, *own]
        command = program("finetune", *rest, ranks=self.ranks)
        yield Job("finetune", command, folder, run_dir / "results.json", settings, FinetuneConfig)

    def finetune_settings(self) -> list[str]:
        """The settings of every fine-tuning."""
        finetune = self.study.measure.finetune
        assert finetune
        train = self.labelled() if finetune.labels else self.images["train"]
        return [*words(finetune.settings), f"data.train={train}", f"data.val={self.images['val']}"]

    def labelled(self) -> Path:
        """The folder of the images that fine-tuning has labels of."""
        assert self.study.measure.finetune
        return self.out / "images" / f"labels_{self.study.measure.finetune.labels}"

    def untrained(self) -> Iterator[tuple[str, int, list[Job]]]:
        """Yields the rows that are not trained, with a seed: fresh weights, and the baseline's teacher."""
        for seed in self.study.seeds if self.study.untrained is not None else []:
            folder, model = self.folder("untrained", seed), self.folder(self.base.folder, seed) / "timm"
            fresh = ["--model", model, "--untrained", "--seed", seed]
            more = [*words(self.study.untrained or {}), "model.untrained=true"]
            jobs = [*self.probes(folder, fresh), *self.finetuning(folder, model, seed, more)]
            yield "untrained", seed, jobs
        if self.study.teacher:
            (recipe, _), seed = row_settings(self.study, self.base.name, {}), self.study.seeds[0]
            teacher = ["--teacher", recipe, *settings_of(self.study, self.base, self.out, seed)]
            tower = flatten(
                {"teacher": dataclasses.asdict(load_row(self.study, self.base, self.out, 0).teacher)}
            )
            del tower["teacher.shard"], tower["teacher.ahead"]  # they change no feature
            yield "teacher", seed, list(self.probes(self.folder("teacher", seed), teacher, tower))

    # ---- Running.

    def link(self) -> None:
        """Links the images that are asked for.

        Raises:
            ConfigError: there are too few, or those that are linked are others.
        """
        data, finetune = self.study.data, self.study.measure.finetune
        for split in ("train", "val"):
            if number := getattr(data, f"{split}_images"):
                subset(getattr(data, split), number, Path(self.images[split]))
        if finetune and finetune.labels:
            subset(data.train, finetune.labels, self.labelled())

    def prepare(self) -> None:
        """Does what all runs share.

        Raises:
            ConfigError: a command of it has failed, without which there is nothing to compare.
        """
        for job in self.shared():
            try:
                run(job)
            except Failed as failed:
                raise ConfigError(f"What all runs share, {job.name}, has failed: {failed}") from failed

    def named(self) -> dict[str, tuple[Row, int] | None]:
        """Row and seed of each run by the name of its folder; None of what is not trained."""
        every = [
            (row._replace(equal=equal), seed)
            for row in self.rows
            for equal in self.study.equal
            for seed in self.study.seeds
        ]
        runs = {self.folder(row.folder, seed).name: (row, seed) for row, seed in every}
        return runs | {self.folder(name, seed).name: None for name, seed, _ in self.untrained()}

    def alone(self, only: str) -> str:
        """Does what is missing of one run; gives the reason where it fails.

        Raises:
            ConfigError: its row is not counted, or its length not known.
        """
        if found := self.named()[only]:
            row, seed = found
            if reason := self.uncounted.get(row._replace(equal="steps")):
                raise ConfigError(f"{only}: {reason}")
            row = self.same_as(row)
            if self.steps(row) is None:
                raise ConfigError(f"{only}: the speed of its run of equal steps is not known.")
            return self.work_off(self.folder(row.folder, seed), self.of_training(row, seed))
        jobs = {self.folder(name, seed).name: own for name, seed, own in self.untrained()}[only]
        return self.work_off(self.out / only, jobs)

    def outcomes(self, go: bool = True) -> Iterator[Outcome]:
        """Yields what each run has come to, for each group of columns that it belongs to.

        go: what is missing of it is done first, `at_once` runs side by side.
        """
        with ThreadPoolExecutor(self.study.at_once) as pool:
            try:
                yield from self.of_trained(pool if go else None)
                every = [(name, self.folder(name, seed), jobs) for name, seed, jobs in self.untrained()]
                done = [pool.submit(self.work_off, folder, jobs) for _, folder, jobs in every if go]
                for i, (name, folder, _) in enumerate(every):
                    failed, figures = done[i].result() if go else "", measured(folder)
                    yield from (Outcome(name, equal, figures, failed) for equal in self.study.equal)
            except KeyboardInterrupt:
                self.stopped = True
                pool.shutdown(cancel_futures=True)
                raise

    def of_trained(self, pool: ThreadPoolExecutor | None) -> Iterator[Outcome]:
        """Yields the outcomes of the rows that are trained; pool: what does them first."""
        for row, seed, work in self.ahead(pool):
            folder, steps = self.folder(row.folder, seed), self.steps(row)
            if steps is None:
                reason = f"{folder.name}: the speed of its run of equal steps is not known"
                yield Outcome(row.title, row.equal, {}, reason if pool else "")
                continue
            failed = work.result() if work else ""
            figures = measured(folder)
            if (folder / "DONE").exists():
                one = self.works[row._replace(equal="steps")]
                figures = trained(folder, self.ranks) | {"flops": lasting(one, steps).flops} | figures
            for equal in self.study.equal:
                if self.same_as(row._replace(equal=equal)) == row:
                    yield Outcome(row.title, equal, figures, failed)
        for row, reason in self.uncounted.items():
            yield Outcome(row.title, self.study.equal[0], {}, reason)

    def ahead(self, pool: ThreadPoolExecutor | None) -> Iterator[tuple[Row, int, Future[str] | None]]:
        """Yields row and seed of every training with its work, begun a few runs ahead of the one yielded.

        One at a time is begun only when it is asked for, since its length may need those before it.
        """
        begun = deque[tuple[Row, int, Future[str] | None]]()
        for row, seed in self.trainings():
            work, folder = None, self.folder(row.folder, seed)
            if pool and self.steps(row) is not None:
                work = pool.submit(self.work_off, folder, self.of_training(row, seed))
            begun.append((row, seed, work))
            if len(begun) >= 2 * self.study.at_once - 1:
                yield begun.popleft()
        yield from begun

    def work_off(self, folder: Path, jobs: list[Job]) -> str:
        """Does the jobs of a run that are not done. Where one fails, none follows: gives the reason."""
        for job in jobs:
            try:
                run(job)
            except Failed as failed:
                print(reason := f"{folder.name}, {job.name}: {failed}", file=sys.stderr, flush=True)
                return reason
            if self.stopped:
                break
        return ""
