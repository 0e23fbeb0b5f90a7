"""What a run reports: the file, TensorBoard and the bar, alone and by two processes."""

import json
import os
import resource
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from mapet_ds.config.running import TrainConfig
from mapet_ds.config.sections import REPOSITORY, Config, DataConfig, LogConfig, ModelConfig
from mapet_ds.launch import Ranks
from mapet_ds.training.metrics import IMAGES_SHOWN, Metrics, token_colours, token_picture


@pytest.fixture
def ranks():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), control=None)
    dist.destroy_process_group()


def make_config(run_dir, accum=2, progress=False) -> Config:
    return Config(
        run_dir=str(run_dir),
        model=ModelConfig(img_size=8, patch_size=4),
        data=DataConfig(mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 1.0)),
        train=TrainConfig(global_batch_size=4 * accum, micro_batch_size=4, epochs=2),
        log=LogConfig(progress=progress),
    )


def read_lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_tensorboard(run_dir) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


def train(metrics: Metrics, first: int, last: int) -> None:
    for step in range(first, last):
        metrics.add({"loss": torch.tensor(1 / (3 + step)), "accuracy": 0.5})
        metrics.add({"loss": torch.tensor(2 / (3 + step)), "accuracy": 1.0})
        metrics.log(step + 1, {"lr": 0.1 * step})


def test_means_over_micro_steps_keep_all_digits(tmp_path, ranks):
    metrics = Metrics(make_config(tmp_path), ranks, total_steps=6, steps_per_epoch=2.5)
    metrics.data_wait(1.0)
    losses = [torch.rand((), requires_grad=True) / 3 for _ in range(4)]
    for loss in losses:
        metrics.add({"loss": loss})
    record = metrics.log(2, {"lr": 1e-3, "grad_norm": torch.tensor(2.5)})
    metrics.close()
    assert record["loss"] == sum(loss.item() for loss in losses) / 4  # in float64, not only nearly
    assert read_lines(tmp_path) == [record]
    assert (record["step"], record["epoch"], record["lr"], record["grad_norm"]) == (2, 0.8, 1e-3, 2.5)
    assert record["images_per_second"] == 2 * 8 / record["seconds"]
    assert record["data_wait_percent"] == pytest.approx(100 * 1.0 / record["seconds"])
    assert "gpu_memory_gib" not in record


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's own writer
def test_lines_that_find_no_room_wait_for_the_next(tmp_path, ranks, capsys):
    metrics = Metrics(make_config(tmp_path), ranks, total_steps=6, steps_per_epoch=2)
    train(metrics, 0, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 9, limits[1]))
    try:
        train(metrics, 1, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert f"NOT WRITTEN yet, {tmp_path}/metrics.jsonl up to step 2" in said
    assert f"NOT WRITTEN, {tmp_path}/tensorboard" in said
    assert [line["step"] for line in read_lines(tmp_path)] == [1]
    train(metrics, 3, 4)
    metrics.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 4]
    assert read_tensorboard(tmp_path).Scalars("loss")[-1].step == 4


def test_meters_start_anew_after_a_log(tmp_path, ranks):
    metrics = Metrics(make_config(tmp_path), ranks, total_steps=6, steps_per_epoch=2)
    metrics.add({"loss": 100.0})
    metrics.data_wait(100.0)
    metrics.log(1, {})
    metrics.add({"loss": 1.0, "rare": 3.0})
    metrics.add({"loss": 2.0})
    record = metrics.log(2, {})
    metrics.close()
    assert (record["loss"], record["rare"], record["data_wait_percent"]) == (1.5, 3.0, 0.0)


def test_add_does_not_read_the_device(tmp_path, ranks):
    metrics = Metrics(make_config(tmp_path), ranks, total_steps=6, steps_per_epoch=2)
    metrics.add({"loss": torch.empty((), device="meta")})  # a tensor without data: reading it would raise
    with pytest.raises(RuntimeError, match="meta"):
        metrics.log(1, {})
    metrics.close()


def test_resume_writes_each_step_once(tmp_path, ranks):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    metrics = Metrics(make_config(whole), ranks, total_steps=6, steps_per_epoch=2)
    train(metrics, 0, 6)
    metrics.close()

    killed = Metrics(make_config(resumed), ranks, total_steps=6, steps_per_epoch=2)
    train(killed, 0, 5)  # and then it dies in the middle of a line, the newest checkpoint being of step 3
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    metrics = Metrics(make_config(resumed), ranks, total_steps=6, steps_per_epoch=2, first_step=3)
    assert [line["step"] for line in read_lines(resumed)] == [1, 2, 3]
    train(metrics, 3, 6)
    metrics.close()
    killed.close()

    expected, found = (
        [(x["step"], x["loss"], x["accuracy"]) for x in read_lines(folder)] for folder in (whole, resumed)
    )
    assert found == expected and [step for step, *_ in found] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in read_tensorboard(resumed).Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_keeps_each_step_once_though_the_clock_goes_back(tmp_path, ranks, monkeypatch):
    """As importers that read the files as they are see it, and as TensorBoard does."""
    config, now = make_config(tmp_path), time.time()
    for first, last, ago in ((0, 4, 0), (2, 5, 5000), (3, 6, 9000)):  # killed after a checkpoint of `first`
        monkeypatch.setattr(time, "time", lambda ago=ago: now - ago)
        metrics = Metrics(config, ranks, total_steps=6, steps_per_epoch=2, first_step=first)
        train(metrics, first, last)
        metrics.show(last, "view_tokens_predicted", torch.full((3, 8, 8), last / 10))
        metrics.close()
    files = sorted((tmp_path / "tensorboard").iterdir())
    raw = [event for path in files for event in EventFileLoader(str(path)).Load()]
    steps = [event.step for event in raw for value in event.summary.value if value.tag == "loss"]
    assert steps == [1, 2, 3, 4, 5, 6] and len(files) == 2
    events = read_tensorboard(tmp_path)
    losses = [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]
    assert losses == [(line["step"], line["loss"]) for line in read_lines(tmp_path)]
    assert [event.step for event in events.Images("view_tokens_predicted")] == [6]


@pytest.mark.parametrize(
    ("damage", "kept"),
    [(lambda data: data[:-7], [1, 2]), (lambda data: data + b"\7" * 40, [1, 2]), (lambda data: b"", [])],
)
def test_damaged_events_are_left_out(tmp_path, ranks, damage, kept):
    metrics = Metrics(make_config(tmp_path), ranks, total_steps=6, steps_per_epoch=2)
    train(metrics, 0, 3)
    metrics.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    metrics = Metrics(make_config(tmp_path), ranks, total_steps=6, steps_per_epoch=2, first_step=2)
    train(metrics, 2, 4)
    metrics.close()
    steps = [event.step for event in read_tensorboard(tmp_path).Scalars("loss")]
    assert steps == [*kept, 3, 4]


def test_tensorboard_scalars(tmp_path, ranks):
    metrics = Metrics(make_config(tmp_path), ranks, total_steps=6, steps_per_epoch=2)
    train(metrics, 0, 2)
    metrics.close()
    events = read_tensorboard(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (1, pytest.approx(0.5)),
        (2, pytest.approx(0.375)),
    ]
    assert {"accuracy", "lr", "epoch", "images_per_second", "data_wait_percent"} <= set(
        events.Tags()["scalars"]
    )


@pytest.mark.parametrize("predicted", [True, False])
def test_tensorboard_images(tmp_path, ranks, predicted):
    config = make_config(tmp_path)
    metrics = Metrics(config, ranks, total_steps=6, steps_per_epoch=2)
    images = IMAGES_SHOWN + 3
    views = torch.zeros(images, 3, 8, 8)
    views[1, :, :, 4:] = 1.0
    target = torch.arange(4 * images).unflatten(0, (images, 4))
    prediction = target + 1000
    prediction[:, 2] = -1
    metrics.show(
        5, "view_tokens_predicted", token_picture(config, views, target, prediction if predicted else None)
    )
    metrics.close()
    (event,) = read_tensorboard(tmp_path).Images("view_tokens_predicted")
    assert event.step == 5
    path = tmp_path / "image.png"
    path.write_bytes(event.encoded_image_string)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    columns = 3 if predicted else 2
    assert picture.shape == (IMAGES_SHOWN * 9 + 1, columns * 9 + 1, 3)

    def cell(row, column, patch):
        top, left = 1 + 9 * row + 4 * (patch // 2), 1 + 9 * column + 4 * (patch % 2)
        pixels = picture[top : top + 4, left : left + 4].reshape(-1, 3)
        assert (pixels == pixels[0]).all()  # one colour a patch
        return pixels[0]

    np.testing.assert_allclose(cell(1, 0, 0), [127.5, 63.75, 0], atol=1)  # 0 is the mean
    np.testing.assert_allclose(cell(1, 0, 1), [255, 191.25, 255], atol=1)  # 1 is a std above
    for patch in range(4):
        np.testing.assert_allclose(cell(1, 1, patch), 255 * token_colours(target[1, patch]).numpy(), atol=1)
        if predicted:
            np.testing.assert_allclose(
                cell(1, 2, patch), 255 * token_colours(prediction[1, patch]).numpy(), atol=1
            )


def test_colours_tell_ids_apart_and_only_the_unpredicted_is_grey():
    colours = (255 * token_colours(torch.arange(-1, 8192))).round().int()
    spread = (colours.amax(1) - colours.amin(1)).tolist()
    assert spread[0] == 0 and min(spread[1:]) > 100
    assert len({tuple(colour) for colour in colours.tolist()}) > 7500
    assert ((colours >= 0) & (colours <= 255)).all()


def test_progress_bar(tmp_path, ranks, capsys):
    metrics = Metrics(
        make_config(tmp_path, progress=True), ranks, total_steps=8, steps_per_epoch=4, first_step=2
    )
    train(metrics, 2, 4)
    metrics.close()
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert "step 4/8" in last and "epoch 1.00/2" in last and "loss 0.2500" in last
    assert "img/s" in last and "data wait 0 %" in last


SCRIPT = """
    import json, os, sys
    import torch, torch.distributed as dist
    from mapet_ds.config.running import TrainConfig
    from mapet_ds.config.sections import Config, ModelConfig, LogConfig
    from mapet_ds.launch import Ranks
    from mapet_ds.training.metrics import Metrics

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    device = torch.device("cpu")
    ranks = Ranks(rank=rank, world_size=2, local_rank=rank, device=device, control=None)
    train = TrainConfig(global_batch_size=16, micro_batch_size=4)
    config = Config(run_dir=sys.argv[1], train=train, log=LogConfig(progress=False))
    metrics = Metrics(config, ranks, total_steps=4, steps_per_epoch=2)
    for micro_step in range(2):
        metrics.add({"loss": torch.tensor(10.0 * rank + micro_step), "accuracy": float(rank)})
    metrics.data_wait(float(rank))
    metrics.show(1, "view_tokens_predicted", torch.zeros(3, 8, 8))
    record = metrics.log(1, {"lr": 0.5})
    metrics.close()
    with open(f"{sys.argv[1]}/rank{rank}.json", "w") as file:
        json.dump(record, file)
    dist.destroy_process_group()
"""


def test_two_ranks_average_and_one_writes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        tmp_path,
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    records = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [(record["loss"], record["accuracy"]) for record in records] == [
        (5.5, 0.5)
    ] * 2  # (0 + 1 + 10 + 11) / 4
    assert records[0]["data_wait_percent"] == records[1]["data_wait_percent"] > 0
    assert records[0]["images_per_second"] == 16 / records[0]["seconds"]
    assert read_lines(tmp_path) == [records[0]]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert read_tensorboard(tmp_path).Scalars("loss")[0].value == 5.5
