"""Numbers that go wrong and ranks that hang: undone, passed over, named."""

import json
import re
import signal
import socket
import subprocess
import time

import psutil
import pytest
import torch
from forked import ENVIRONMENT, start
from line import by_deepspeed, command, make_line, pretrain, steps
from safetensors.torch import load_file

from mapet_ds.config.sections import REPOSITORY
from mapet_ds.training.checkpoint import checkpoint_folders, newest


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_line(tmp_path_factory.mktemp("faults"))


def faulty(recipe, run_dir, fault, rank, first, last, *overrides, ranks=2):
    """The user's command with a fault of faulty_pretrain.py in it."""
    words = command(recipe, ranks, f"run_dir={run_dir}", *overrides)
    place = words.index("mapet_ds/pretrain.py")
    fault = f"FAULT={fault} {rank} {first} {last}"
    return ["env", fault, *words[:place], "tests/faulty_pretrain.py", *words[place + 1 :]]


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_step_without_a_number_is_left_out_on_all_ranks(recipe):
    run_dir = recipe.parent / "nan"
    done = start(*faulty(recipe, run_dir, "nan", 1, 5, 5))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Step 5 had a non-finite gradient and was skipped." in done.stderr
    assert newest(run_dir).run["skipped"] == [5]
    assert [line["step"] for line in lines(run_dir) if not line["loss"] < 10] == [6]
    assert (run_dir / "DONE").exists()


def test_a_jump_of_the_loss_is_undone_and_its_samples_passed_over(recipe):
    """The run is then the one that has passed over them from the start, bit for bit.

    The cause may lie in step 8: the checkpoint of step 9 is not taken.
    """
    jumped, told = recipe.parent / "jumped", recipe.parent / "told"
    done = start(*faulty(recipe, jumped, "jump", 1, 9, 9))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "before step 10. The run passes over steps 8 to 9, from the checkpoint of step 6 on." in done.stderr
    )
    (rollback,) = json.loads((jumped / "rollbacks.json").read_text())
    assert (rollback["first"], rollback["last"]) == (8, 10)
    assert rollback["loss"] > 10 * rollback["usual"]
    told.mkdir()
    (told / "rollbacks.json").write_text((jumped / "rollbacks.json").read_text())
    done = pretrain(recipe, 2, f"run_dir={told}", "teacher.ahead=true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert newest(jumped).run["skipped"] == newest(told).run["skipped"] == [8, 9]
    found, expected = (
        [(line["step"], line.get("loss")) for line in lines(run_dir)] for run_dir in (jumped, told)
    )
    assert found == expected
    assert [step for step, loss in found if loss is None] == [9, 10]
    weights = [load_file(newest(run_dir).path / "model.safetensors") for run_dir in (jumped, told)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_loss_that_goes_on_jumping_stops_the_run(recipe):
    run_dir = recipe.parent / "unstable"
    done = start(*faulty(recipe, run_dir, "jump", 0, 8, 99, "train.max_rollbacks=1", ranks=1))
    assert done.returncode == 2, done.stderr[-3000:]
    assert "The loss has jumped 2 times" in done.stderr
    assert "Traceback" not in done.stderr
    assert newest(run_dir).run["step"] <= 9


@pytest.mark.drill
def test_a_jump_before_the_first_checkpoint_is_passed_over_by_the_next_start(recipe):
    words = faulty(recipe, recipe.parent / "early", "jump", 0, 7, 7, "checkpoint.every_steps=1000", ranks=1)
    done = start(*words)
    assert done.returncode == 2
    assert (
        "no checkpoint is from before. The same command begins anew and passes over steps 6 to 7."
        in done.stderr
    )
    done = start(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert newest(recipe.parent / "early").run["skipped"] == [6, 7]


@pytest.mark.drill
@pytest.mark.parametrize(("pause", "first"), [(None, 10), (11, 11)])
def test_windows_of_several_steps_are_passed_over_whole(recipe, pause, first):
    """A pause begins a window of its own, and leaves a checkpoint."""
    run_dir = recipe.parent / f"windows_{pause}"
    more = ["log.every_steps=2", "checkpoint.every_steps=4", "train.epochs=8"]
    if pause:
        done = start(
            *faulty(recipe, run_dir, "jump", 0, 13, 13, *more, f"train.stop_at_step={pause}", ranks=1)
        )
        assert done.returncode == 0, done.stderr[-3000:]
    done = start(*faulty(recipe, run_dir, "jump", 0, 13, 13, *more, ranks=1))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        f"The run passes over steps {first} to 13, from the checkpoint of step {pause or 8} on."
        in done.stderr
    )
    assert newest(run_dir).run["skipped"] == list(range(first, 14))


def test_a_slow_save_holds_up_neither_training_nor_the_watchdog(recipe):
    """The disk takes ten seconds for the checkpoint of step 6; the next, of step 12, waits for it."""
    run_dir = recipe.parent / "slow"
    words = faulty(
        recipe, run_dir, "slow", 0, 6, 6, "train.hang_seconds=4", "checkpoint.every_steps=6", "train.epochs=3"
    )
    process = subprocess.Popen(
        words, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (run_dir / "checkpoints/step_00000006").exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        before = steps(run_dir)
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr[-3000:]
    assert before == 12
    assert (run_dir / "DONE").exists()


@pytest.mark.drill
def test_a_stop_on_a_busy_disk_loses_no_step(recipe):
    """A checkpoint takes twenty seconds to be flushed, and torchrun kills its ranks 30 s after its signal."""
    run_dir = recipe.parent / "busy"
    settings = "checkpoint.every_steps=5", "train.epochs=200"
    process = subprocess.Popen(
        faulty(recipe, run_dir, "busy", 0, 5, 10**6, *settings), cwd=REPOSITORY, env=ENVIRONMENT
    )
    while steps(run_dir) < 7:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) != 0
    assert newest(run_dir).run["step"] == steps(run_dir) >= 7


def test_a_save_that_fails_is_said_and_the_run_goes_on(recipe):
    run_dir = recipe.parent / "full"
    done = start(*faulty(recipe, run_dir, "full", 0, 3, 6))
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall("NO CHECKPOINT of step (.) could be written", done.stderr) == ["3", "6"]
    assert [path.name for path in checkpoint_folders(run_dir)] == ["step_00000012", "step_00000009"]


def hang(words, run_dir, then=lambda process: None, rank="1"):
    """Start, wait for step 4, do `then` to a rank; gives exit code, standard error and the ranks' ids."""
    process = subprocess.Popen(
        words, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while steps(run_dir) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    then(
        next(
            each
            for each in family
            if each.environ().get("RANK") == rank and "pretrain" in " ".join(each.cmdline())
        )
    )
    _, stderr = process.communicate(timeout=120)
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    return process.returncode, stderr, [each.pid for each in gone]


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [("torchrun", 1), *(pytest.param("deepspeed", rank, marks=pytest.mark.drill) for rank in (0, 1))],
)
def test_a_stopped_rank_is_named(recipe, launcher, rank):
    """Rank 0 keeps the store of a launch by deepspeed: its silence is the store's."""
    run_dir = recipe.parent / f"stopped_{launcher}{rank}"
    more = [f"run_dir={run_dir}", "train.hang_seconds=8", "train.epochs=50"]
    words = by_deepspeed(recipe, *more) if launcher == "deepspeed" else command(recipe, 2, *more)
    stopped = []

    def stop(rank):
        stopped.append(rank.pid)
        rank.send_signal(signal.SIGSTOP)

    code, stderr, _ = hang(words, run_dir, stop, str(rank))
    assert code != 0
    one = f"rank {rank} (process {stopped[0]} on {socket.gethostname()}) does not answer"
    assert (
        one if rank else "rank 0 or the launcher, one of which keeps the launch's store, does not answer"
    ) in stderr
    assert "the same command continues from it" in stderr


@pytest.mark.drill
def test_a_killed_loader_worker_costs_a_micro_batch_done_again(recipe):
    def kill_worker(rank):
        next(
            child for child in rank.children(recursive=True) if "spawn_main" in " ".join(child.cmdline())
        ).kill()

    found = []
    for name, then in (("undisturbed", lambda rank: None), ("worker", kill_worker)):
        words = command(recipe, 2, f"run_dir={recipe.parent / name}", "data.workers=1", "train.epochs=9")
        code, stderr, _ = hang(words, recipe.parent / name, then)
        assert code == 0
        found.append([(line["step"], line["loss"]) for line in lines(recipe.parent / name)])
    assert "is done again on the CPU" in stderr
    assert found[0] == found[1]


@pytest.mark.drill
@pytest.mark.parametrize("readable", [True, False])
def test_ranks_without_launcher_end_while_one_stands_still(recipe, readable):
    """torchrun's agent keeps the store: with it gone, nobody can be asked, nor perhaps be told."""
    run_dir = recipe.parent / f"orphans_{readable}"
    words = command(recipe, 2, f"run_dir={run_dir}", "train.epochs=200")
    process = subprocess.Popen(
        words, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 200
    while steps(run_dir) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    still = next(
        each
        for each in family
        if each.environ().get("RANK") == "1" and "pretrain" in " ".join(each.cmdline())
    )
    still.send_signal(signal.SIGSTOP)
    if not readable:
        process.stderr.close()
    process.kill()
    _, alive = psutil.wait_procs([each for each in family if each != still], timeout=60)
    assert not alive
    still.send_signal(signal.SIGCONT)
    _, alive = psutil.wait_procs([still], timeout=60)
    assert not alive


@pytest.mark.drill
def test_a_rank_whose_images_do_not_come_is_named(recipe):
    run_dir = recipe.parent / "stuck"
    code, stderr, _ = hang(faulty(recipe, run_dir, "stuck", 1, 6, 6, "train.hang_seconds=4"), run_dir)
    assert code != 0
    assert "is behind: waiting for the images of step 6 for" in stderr
