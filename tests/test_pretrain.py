"""pretrain.py by the user's own commands: launchers, exact resume, orderly stops, mistakes as sentences."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from forked import ENVIRONMENT, start
from line import IMAGES, by_deepspeed, command, losses, make_line, pretrain
from safetensors.torch import load_file

from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_line(tmp_path_factory.mktemp("line"))


@pytest.fixture(scope="module")
def straight(recipe):
    """The uninterrupted run on two ranks, by the deepspeed launcher."""
    run_dir = recipe.parent / "straight"
    done = start(*by_deepspeed(recipe, f"run_dir={run_dir}"))
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


def weights(run_dir):
    return load_file(max((run_dir / "checkpoints").iterdir()) / "model.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_everything_in_its_folder(recipe, straight):
    assert (straight / "DONE").read_text() == "12 steps\n"
    assert list(losses(straight)) == list(range(1, 13))
    written = load_config(straight / "config.yaml")
    assert written == load_config(recipe, [f"run_dir={straight}"])
    environment = json.loads((straight / "environment.json").read_text())
    assert environment["versions"].keys() >= {"torch", "deepspeed", "timm"}
    assert "mapet_ds/pretrain.py" in environment["command"][0]
    assert len(environment["git"]["commit"]) in (0, 40)
    assert len(list((straight / "checkpoints").iterdir())) == 2
    last = json.loads((straight / "metrics.jsonl").read_text().splitlines()[-1])
    assert last.keys() >= {
        "loss",
        "token_accuracy",
        "grad_norm",
        "lr",
        "codebook_perplexity",
        "images_per_second",
    }
    assert last["epoch"] == pytest.approx(12 * 8 / IMAGES)


def test_killed_and_started_again_is_the_same_run(recipe, straight):
    """The second time with targets computed ahead: losses, what is told about ids, and weights."""
    run_dir = recipe.parent / "killed"
    words = command(recipe, 2, f"run_dir={run_dir}")
    process = subprocess.Popen(
        words,
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run_dir / "DONE").exists()
    done = pretrain(recipe, 2, f"run_dir={run_dir}", "teacher.ahead=true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Continuing" in done.stdout
    assert losses(run_dir) == losses(straight)
    told = [
        [json.loads(line)["codebook_perplexity"] for line in (run / "metrics.jsonl").open()]
        for run in (run_dir, straight)
    ]
    assert told[0] == told[1]
    assert_same_weights(run_dir, straight)


def test_other_numbers_of_ranks_see_the_same_samples(recipe, straight, monkeypatch):
    """2 -> 1 -> 4 ranks, ZeRO-2 -> 3 -> 1, other micro-batches, past an epoch's end (step 5.6)."""
    monkeypatch.setitem(
        ENVIRONMENT, "TORCH_COMPILE_DISABLE", "1"
    )  # what would be compiled is said all the same
    run_dir = recipe.parent / "elastic"
    for ranks, micro, stage, last in ((2, 4, 2, 3), (1, 4, 3, 8), (4, 1, 1, 12)):
        done = pretrain(
            recipe, ranks, f"run_dir={run_dir}", f"train.micro_batch_size={micro}",
            f"train.stop_at_step={last}",
            "train.compile=true", engine=f"ds_configs/zero{stage}_cpu.json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("torch.compile can't trace: the student is not compiled" in done.stdout) == (stage == 3)
    assert losses(run_dir) == pytest.approx(losses(straight), rel=1e-4)
    assert (run_dir / "DONE").exists()


@pytest.mark.parametrize("ask", ["STOP", "SIGTERM"])
def test_an_orderly_stop_saves_where_it_is(recipe, straight, ask):
    run_dir = recipe.parent / f"asked_{ask}"
    words = command(recipe, 2, f"run_dir={run_dir}", "checkpoint.every_steps=1000")
    process = subprocess.Popen(
        words, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if ask == "STOP":
        (run_dir / "STOP").touch()
    else:
        process.terminate()
    says = process.communicate(timeout=60)[0]
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    stopped = json.loads((checkpoint / "run.json").read_text())["step"]
    assert 1 <= stopped <= 12
    assert (
        f"Stopped and saved at step {stopped} of 12: the same command continues {run_dir}." in says
        or stopped == 12
    )
    assert losses(run_dir) == {step: loss for step, loss in losses(straight).items() if step <= stopped}
    if ask == "STOP":
        done = pretrain(recipe, 2, f"run_dir={run_dir}")
        assert done.returncode == 0, done.stderr[-3000:]
        assert losses(run_dir) == losses(straight)


def test_a_plain_process_is_a_launch_of_one(recipe, straight):
    run_dir = recipe.parent / "plain"
    done = pretrain(
        recipe,
        1,
        f"run_dir={run_dir}",
        "train.stop_at_step=4",
        "data.workers=1",
        "train.grad_checkpointing=true",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {step: loss for step, loss in losses(straight).items() if step <= 4}
    assert losses(run_dir) == pytest.approx(expected, rel=1e-4)
    assert not (run_dir / "DONE").exists()


def test_another_run_is_refused_with_both_values(recipe, straight):
    done = pretrain(recipe, 1, f"run_dir={straight}", "seed=7", "optim.lr=0.001")
    assert done.returncode == 2
    assert "seed: 0 in the checkpoint, 7 now" in done.stderr
    assert "optim.lr: 0.002 in the checkpoint, 0.001 now" in done.stderr
    done = pretrain(recipe, 1, f"run_dir={straight}", "resume=never")
    assert done.returncode == 2
    assert "resume is never" in done.stderr


def test_a_finished_run_started_again_changes_nothing(recipe, straight):
    before = losses(straight)
    done = pretrain(recipe, 2, f"run_dir={straight}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Nothing is left to do" in done.stdout and f"python tools/export_timm.py {straight}" in done.stdout
    assert losses(straight) == before
    assert (straight / "DONE").exists()


def test_non_finite_gradients_are_skipped_then_stop_the_run(recipe):
    run_dir = recipe.parent / "explodes"
    done = pretrain(
        recipe, 1, f"run_dir={run_dir}", "optim.lr=1e25", "optim.warmup_epochs=0",
        "train.max_skipped_steps=2", "optim.clip_grad=0"
    )  # fmt: skip
    assert done.returncode == 2
    assert "was skipped" in done.stderr
    assert "not finite in 3 steps in a row" in done.stderr


def test_bad_images_cost_only_themselves(recipe):
    folder = recipe.parent
    for number, path in enumerate(sorted((folder / "train").rglob("*.jpg"))):
        target = folder / "spoilt" / path.relative_to(folder / "train")
        target.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        target.write_bytes(data[: len(data) // 2] if number in (3, 20) else data)
    run_dir = folder / "with_bad"
    words = [f"run_dir={run_dir}", f"data.train={folder}/spoilt", "data.max_bad_share=0.1", "train.epochs=3"]
    done = pretrain(recipe, 2, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    listed = [line.split("\t")[1] for line in (run_dir / "quarantine.tsv").read_text().splitlines()[1:]]
    assert f"2 in all, listed in {run_dir}/quarantine.tsv" in done.stdout
    assert sorted(listed) == sorted(
        str(p) for p in (folder / "spoilt").rglob("*.jpg") if b"\xff\xd9" not in p.read_bytes()[-2:]
    )
    done = pretrain(
        recipe, 1, f"run_dir={folder}/too_bad", f"data.train={folder}/spoilt", "data.max_bad_share=0.02"
    )
    assert done.returncode == 2
    assert "Unreadable images: at least 2 of 45, more than the 1" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["tokenizer.path=''"], "tokenizer.path is empty"),
        (["tokenizer.path=/nowhere/codebook.safetensors"], "/nowhere/codebook.safetensors"),
        (["data.crop=center", "data.flip=0"], "random.*center|center.*random"),
        (["run_dir=/proc/nowhere"], "/proc/nowhere.*can't be written"),
        (["model.name=resnet50"], "plain timm ViT|can't build"),
    ],
)
def test_mistakes_stop_with_a_sentence(recipe, overrides, says):
    done = pretrain(recipe, 1, f"run_dir={recipe.parent}/mistake", *overrides)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    import re

    assert re.search(says, done.stderr), done.stderr
