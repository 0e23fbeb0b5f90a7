"""Faults for minutes on end, by the user's own commands: `make drill` and docs/reliability.md's table."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
import torch
from forked import ENVIRONMENT, start
from line import IMAGES, by_deepspeed, command, losses, make_line, pretrain, steps
from safetensors.torch import load_file

from mapet_ds.config.sections import REPOSITORY
from mapet_ds.training.checkpoint import checkpoint_folders, newest

pytestmark = pytest.mark.drill
EPOCHS = 125
STEPS = -(-EPOCHS * IMAGES // 8)
EVERY = 20
SETTINGS = [
    f"train.epochs={EPOCHS}",
    f"checkpoint.every_steps={EVERY}",
    "log.images_every_steps=0",
    "data.workers=1",
]
KILLS = [
    "rank", "torchrun", "deepspeed", "deepspeed.launcher.launch", "while starting", "while saving",
    "SIGTERM to torchrun", "SIGUSR1 to torchrun", "SIGINT to torchrun", "SIGTERM to deepspeed",
    "SIGUSR1 to a rank",
] * 2  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_line(tmp_path_factory.mktemp("drill"))


@pytest.fixture(scope="module")
def straight(recipe):
    done = pretrain(recipe, 2, f"run_dir={recipe.parent}/straight", *SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe.parent / "straight"


def launch(recipe, run_dir, launcher, log):
    more = [f"run_dir={run_dir}", *SETTINGS]
    words = by_deepspeed(recipe, *more) if launcher == "deepspeed" else command(recipe, 2, *more)
    return subprocess.Popen(words, cwd=REPOSITORY, env=ENVIRONMENT, stdout=log, stderr=log)


def whole_checkpoints(run_dir):
    return [int(path.name.removeprefix("step_")) for path in checkpoint_folders(run_dir)]


def wait_until_due(kind, chance, run_dir, process):
    """The moment of a kill: some steps on, or while a checkpoint is written, or at any time of the start."""
    if kind == "while starting":
        time.sleep(chance.uniform(0, 8))
        return
    target = (
        steps(run_dir) + chance.randrange(1, 2 * EVERY) if steps(run_dir) else chance.randrange(1, 2 * EVERY)
    )
    folder, first = run_dir / "checkpoints", time.monotonic()
    while process.poll() is None and time.monotonic() - first < 120:
        if (
            kind == "while saving"
            and folder.exists()
            and any(folder.glob(".step_*.partial"))
            and steps(run_dir) >= target
        ):
            return
        if kind != "while saving" and steps(run_dir) >= target:
            return
        time.sleep(0.0005 if kind == "while saving" else 0.005)
    raise AssertionError(f"{kind}: its moment did not come")


def strike(kind, process, family):
    """Send the signal to whom it is meant for."""
    number = getattr(signal, kind.split()[0]) if kind.startswith("SIG") else signal.SIGKILL
    ranks = [
        each for each in family if "mapet_ds/pretrain.py" in (words := each.cmdline()) and "--config" in words
    ]
    if "rank" in kind or kind.startswith("while"):
        ranks = [each for each in ranks if each.environ().get("RANK") == "1"] or [psutil.Process(process.pid)]
        ranks[-1].send_signal(number)
    elif kind == "deepspeed.launcher.launch":
        next(each for each in family if kind in each.cmdline()).send_signal(number)
    else:
        process.send_signal(number)


def test_killed_again_and_again_it_is_the_same_run(recipe, straight):
    """At least 20 kills; then every loss and weight is the uninterrupted run's, bit for bit."""
    run_dir, chance, rows = recipe.parent / "killed", random.Random(7), []
    log_path = recipe.parent / "killed.log"
    for kind in KILLS:
        with log_path.open("w") as log:
            process = launch(recipe, run_dir, "deepspeed" if "deepspeed" in kind else "torchrun", log)
            wait_until_due(kind, chance, run_dir, process)
            assert process.poll() is None, f"{kind}: {log_path.read_text()[-2000:]}"
            family = psutil.Process(process.pid).children(recursive=True)
            whole = whole_checkpoints(run_dir)
            strike(kind, process, family)
            struck, before = time.monotonic(), steps(run_dir)
            code = process.wait(timeout=60)
            _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive, f"{kind}: {alive}"
        assert code != 0 or "deepspeed" in kind or kind == "SIGUSR1 to a rank", kind
        saved = newest(run_dir).run["step"] if whole_checkpoints(run_dir) else 0
        assert saved >= max(whole, default=0), f"{kind}: a checkpoint that was on disk is lost"
        assert steps(run_dir) - saved < 2 * EVERY, f"{kind}: the next checkpoint waits for the one before"
        if kind.startswith("SIG"):
            assert saved == steps(run_dir) >= before, f"{kind}: an orderly signal saves where it is"
        rows.append((kind, before, steps(run_dir) - saved, round(time.monotonic() - struck, 1), code))
    done = pretrain(recipe, 2, f"run_dir={run_dir}", *SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    print("\nkill, at step, steps lost, seconds until all were gone, exit code", *rows, sep="\n")
    assert list(losses(run_dir)) == list(range(1, STEPS + 1))
    assert losses(run_dir) == losses(straight)
    for name in ("model", "optimizer"):
        found, expected = (
            load_file(newest(each).path / f"{name}.safetensors") for each in (run_dir, straight)
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_other_numbers_of_ranks_see_the_same_run(recipe, straight, stage):
    run_dir = recipe.parent / f"elastic{stage}"
    for ranks, micro, last in ((2, 4, 31), (1, 2, 62), (4, 1, 93), (2, 2, 124)):
        done = pretrain(
            recipe, ranks, f"run_dir={run_dir}", *SETTINGS, f"train.micro_batch_size={micro}",
            f"train.stop_at_step={last}",
            engine=f"ds_configs/zero{stage}_cpu.json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    expected = {step: loss for step, loss in losses(straight).items() if step <= 124}
    assert losses(run_dir) == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")
def test_a_full_disk_costs_checkpoints_and_not_the_run(recipe, straight, tmp_path):
    run_dir = tmp_path / "small"
    run_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(run_dir)], check=True)
    try:
        words = [f"run_dir={run_dir}", *SETTINGS, "train.stop_at_step=60"]
        process = subprocess.Popen(
            command(recipe, 2, *words), cwd=REPOSITORY, env=ENVIRONMENT, text=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        while steps(run_dir) < 25:
            assert process.poll() is None
            time.sleep(0.01)
        with (run_dir / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        _, stderr = process.communicate(timeout=200)
        assert process.returncode != 0
        assert "NO CHECKPOINT of step 40 could be written" in stderr
        assert newest(run_dir, report=lambda _: None).run["step"] == 20
        (run_dir / "filler").unlink()
        done = pretrain(recipe, 2, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        assert newest(run_dir).run["step"] == 60
        assert losses(run_dir) == {step: loss for step, loss in losses(straight).items() if step <= 60}
    finally:
        subprocess.run(["umount", "--lazy", str(run_dir)], check=True)


def test_bad_images_at_five_percent(recipe, straight, tmp_path):
    """The good ones keep order and crops; just the bad are listed, also after a resume and with workers."""
    import images

    data = tmp_path / "data"
    shutil.copytree(recipe.parent / "train", data)
    bad = {**images.bad_by_structure(), **images.bad_by_decoding()}
    images.write(data / "bad", bad)
    os.symlink("loop.jpg", data / "bad/loop.jpg")
    os.symlink("/nowhere", data / "bad/missing.jpg")
    listed = sorted([*bad, "loop.jpg", "missing.jpg"])
    for number in range(20 * len(listed) - len(listed) - IMAGES):
        shutil.copy(recipe.parent / "train/a/0.jpg", data / f"a/copy{number}.jpg")
    runs = []
    for workers, pauses in ((0, [None]), (2, [40, None])):
        run_dir = tmp_path / f"run{workers}"
        for pause in pauses:
            more = [
                "train.epochs=1.5",
                f"data.workers={workers}",
                "data.max_bad_share=0.06",
                "data.threads=2",
            ]
            more += [f"train.stop_at_step={pause}"] if pause else []
            done = pretrain(recipe, 2, f"run_dir={run_dir}", f"data.train={data}", *more)
            assert done.returncode == 0, done.stderr[-3000:]
        rows = [line.split("\t") for line in (run_dir / "quarantine.tsv").read_text().splitlines()[1:]]
        assert sorted(os.path.basename(row[1]) for row in rows) == listed
        assert all(row[2] for row in rows)
        runs.append(losses(run_dir))
    assert runs[0] == runs[1]


def test_soak(recipe):
    """3,000 steps and more: memory is flat, no descriptor is lost, nothing is left behind."""
    run_dir = recipe.parent / "soak"
    words = [
        "train.epochs=600",
        "checkpoint.every_steps=500",
        "log.every_steps=20",
        "data.workers=1",
        "data.prefetch=4",
    ]
    process = subprocess.Popen(
        command(recipe, 2, f"run_dir={run_dir}", *words), cwd=REPOSITORY, env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    seen: dict[int, list[tuple[int, int, int]]] = {}
    while process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        for each in family:
            try:
                row = steps(run_dir) * 20, each.memory_info().rss, each.num_fds()
            except psutil.Error:
                continue
            seen.setdefault(each.pid, []).append(row)
        time.sleep(1)
    assert process.returncode == 0
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] >= 3000
    deadline = time.monotonic() + 10
    while left := [pid for pid in seen if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    slopes = []
    for rows in seen.values():
        late = np.array([row for row in rows if row[0] >= 1000], dtype=float)
        if len(late) >= 10:
            slopes.append(np.polyfit(late[:, 0] / 1000, late[:, 1] / 2**20, 1)[0])
            assert late[-1, 2] <= late[0, 2] + 2, "descriptors"
    print("\nMiB per 1,000 steps, each process:", np.round(slopes, 2))
    assert len(slopes) >= 4, "two ranks and their workers"
    assert max(slopes) < 5


def test_two_runs_of_one_command_are_the_same(recipe, straight):
    done = pretrain(recipe, 2, f"run_dir={recipe.parent}/again", *SETTINGS, "train.stop_at_step=60")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(recipe.parent / "again") == {
        step: loss for step, loss in losses(straight).items() if step <= 60
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
def test_a_read_only_run_folder_is_a_sentence(recipe, tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)], check=True)
    try:
        done = start(*command(recipe, 1, f"run_dir={tmp_path}/run"))
        assert done.returncode == 2
        assert re.search("run_dir = .* can't be used: .* may not be written", done.stderr)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
