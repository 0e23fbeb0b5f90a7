"""What is wrong with a study, said before anything runs."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import evaluate
import torch
from studies.jobs import change, options
from studies.runs import MAY_DIFFER, Runs

from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check, check_labelled
from mapet_ds.config.study import StudyConfig, row_settings
from mapet_ds.errors import ConfigError
from mapet_ds.planning.study import settings_of


def check_options(study: StudyConfig) -> None:
    """Refuses options of the measurements that tools/evaluate.py does not know.

    Raises:
        ConfigError: with its sentence.
    """
    for name in ("knn", "linear"):
        asked, said = getattr(study.measure, name), io.StringIO()
        words = [name, "--model", "-", "--train", "-", "--val", "-", *options(asked or {})]
        try:
            with contextlib.redirect_stderr(said):
                evaluate.parse(words)
        except SystemExit:
            reason = said.getvalue().strip().rpartition("error: ")[2]
            raise ConfigError(f"measure.{name}: {reason}") from None


def check_rules(runs: Runs) -> None:
    """Refuses settings that contradict each other, of uncounted rows at their recipes' length.

    Raises:
        ConfigError: naming the row and each contradiction.
    """
    if runs.study.at_once > 1 and torch.cuda.is_available():
        raise ConfigError(
            f"at_once = {runs.study.at_once} is for hosts without GPUs; here all runs would take the first "
            "GPU: at_once=1."
        )
    asked = {row: runs.overrides(row, seed) for row, seed in runs.trainings()}
    asked |= {row: settings_of(runs.study, row, runs.out, runs.study.seeds[0]) for row in runs.uncounted}
    for row, own in asked.items():
        recipe, _ = row_settings(runs.study, row.name, {})
        try:
            config = load_config(recipe, [*(made(runs, setting) for setting in own), f"run_dir={runs.out}"])
            check(config, runs.ranks, teacher=not to_come(runs, config.teacher.name))
        except ConfigError as error:
            raise ConfigError(f"runs.{row.name}: {error}") from error
    if finetune := runs.study.measure.finetune:
        name = load_config(runs.study.recipe).model.name  # the weights aren't there yet
        fresh = ["model.untrained=true", f"model.name={name}", f"run_dir={runs.out}"]
        settings = [*runs.finetune_settings(), *fresh]
        try:
            check_labelled(load_config(finetune.recipe, settings, FinetuneConfig), runs.ranks)
        except ConfigError as error:
            raise ConfigError(f"measure.finetune: {error}") from error


def made(runs: Runs, setting: str) -> str:
    """The setting; one of images that `prepare` has yet to make is the study's own images instead."""
    name, _, path = setting.partition("=")
    images = name in ("data.train", "evaluate.train", "evaluate.val")
    return f"{name}={runs.images['train']}" if images and to_come(runs, path) else setting


def to_come(runs: Runs, named: str) -> bool:
    """Whether a setting names something in the study's folder that `prepare` has yet to make."""
    path = named.removeprefix("local-dir:")
    inside = path.startswith(f"{runs.out}/") and not Path(path).exists()
    return inside and not all(job.done.exists() for job in runs.shared() if job.marked)


def check_unchanged(runs: Runs) -> None:
    """Refuses a study in which a run or a measurement that has begun would change.

    Raises:
        ConfigError: naming each setting that differs, with both values.
    """
    jobs = [runs.of_training(row, seed) for row, seed in runs.trainings() if runs.steps(row)]
    jobs += [runs.shared(), *(own for _, _, own in runs.untrained())]
    if lines := [line for own in jobs for job in own for line in change(job, MAY_DIFFER)]:
        cure = "Set them back to go on, remove those folders, or name a new --out."
        raise ConfigError("\n".join(["The study has changed since it began:", *lines, cure]))
