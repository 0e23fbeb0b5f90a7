"""tools/plan.py by its own command."""

import json
import re
import sys

import pytest
from line import start

from mapet_ds.config.sections import REPOSITORY


def plan(*words, recipe="mapet_vitb16"):
    return start(
        sys.executable, "tools/plan.py", "--config", REPOSITORY / f"mapet_ds/recipes/{recipe}.yaml", *words
    )


def as_json(*words, **options):
    done = plan(*words, "--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_report_says_what_binds_what_helps_and_what_it_rests_on():
    done = plan("--gpu", "h100", "--nodes", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PREDICTED")
    assert re.search(r"^binds +teacher, \d+% of the step$", done.stdout, re.M)
    assert "change: teacher.name=ViT-B-16-quickgelu teacher.img_size=224" in done.stdout
    assert "change: tokenizer.ids=FOLDER" in done.stdout
    assert "ASSUMED, not yet measured" in done.stdout
    assert len(re.findall(r"^ +\d+ +\d+ x \d+", done.stdout, re.M)) == 11


def test_advice_is_better_than_what_it_replaces():
    for words in (
        ["--gpu", "h100"],
        ["--gpu", "a100-80", "--storage_gbyte_s", "0.05"],
        ["--gpu", "h100", "--nodes", "64"],
    ):
        found = as_json(*words)
        assert found["changes"]
        assert min(found["changes"].values()) > found["predicted"]["images_per_second"]


LINE = {
    "hardware": {"gpu": "NVIDIA H100 80GB HBM3"},
    "settings": {"model": "vit_base_patch16_224", "teacher": "RN50x64"},
}


def line(kind, **entries):
    return json.dumps(
        LINE
        | {"settings": LINE["settings"] | {"benchmark": kind, "batch_size": 128, "dtype": "bf16"}}
        | entries
    )


def test_calibration_replaces_what_is_assumed(tmp_path):
    path = tmp_path / "benchmark.json"
    step = line("step", objective="mapet", seconds={"step": {"median": 0.1}})
    milliseconds = {"teacher_bf16": 1.0, "assign_fp32": 1.5, "assign_bf16": 0.5}
    teacher = line("assign", ms_per_image={name: {"median": value} for name, value in milliseconds.items()})
    path.write_text(f"{step}\n{teacher}\n")
    found = as_json("--gpu", "h100", "--calibrate", path)
    seconds = found["predicted"]["step_seconds"]
    assert seconds["student"] == pytest.approx(2 * 0.1)  # two micro-steps of 128
    assert seconds["teacher"] == pytest.approx(0.256, rel=0.05)
    assert seconds["assignment"] == pytest.approx(0.128)
    assert str(path) in "".join(found["assumptions"])
    assert "; the rest ASSUMED" in "".join(found["assumptions"])


def test_a_plan_says_what_it_leaves_out():
    assert "teacher.ahead" not in "".join(as_json("--gpu", "h100")["assumptions"])
    said = "".join(as_json("--gpu", "h100", "teacher.ahead=true")["assumptions"])
    assert "teacher.ahead: the memory of teacher and student at once" in said and "1281167 images" in said


def test_a_measured_run_sets_the_speed_of_the_whole_step(tmp_path):
    path = tmp_path / "train.json"
    measured = {
        "ranks": 2,
        "objective": "mapet",
        "dtype": "torch.bfloat16",
        "images_per_second": {"train": {"median": 600.0}},
    }
    path.write_text(line("train", **measured))
    found = as_json("--gpu", "h100", "--nodes", "1", "--gpus_per_node", "1", "--calibrate", path)
    assert found["predicted"]["images_per_second"] == pytest.approx(300, rel=0.001)


def test_calibration_refuses_what_would_mislead(tmp_path):
    path = tmp_path / "lines.json"
    for text, says in [
        (line("step", hardware={"gpu": None}), "measured on a CPU"),
        (line("step", hardware={"gpu": "NVIDIA A100-SXM4-80GB"}), "not on an H100"),
        (line("step"), "lacks an entry"),
        (line("bad"), "found no line about this recipe"),
        ("no JSON", "does not hold lines"),
        ("[1]", "does not hold lines"),
    ]:
        path.write_text(text)
        refused(plan("--gpu", "h100", "--calibrate", path), says)
    refused(plan("--gpu", "h100", "--calibrate", tmp_path / "absent.json"), "absent.json")


def refused(done, says):
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert says in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "v100"], "--gpu v100 is not known; there are: a100-40"),
        (["--gpu", "h100", "--nodes", "0"], "invalid positive int value: '0'"),
        (["--gpu", "h100", "--link_gbit", "nan"], "invalid positive float"),
        (
            ["--gpu", "h100", "--gpus_per_node", "7"],
            "train.global_batch_size = 2048 can't be divided among 7 GPUs",
        ),
        (["--gpu", "h100", "--engine", "absent.json"], "absent.json can't be read"),
        (["--gpu", "h100", "teacher.img_size=224"], "grid is 7 x 7"),
        (["--gpu", "h100", "objective=mae"], "objective = mae is not known"),
        (["--gpu", "h100", "train.micro_batch_size=100"], "train.micro_batch_size = 100 does not divide"),
    ],
)
def test_mistakes_are_sentences(words, says):
    refused(plan(*words), says)
