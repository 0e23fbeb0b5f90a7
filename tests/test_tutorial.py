"""docs/tutorial.md and docs/unlabelled.md, block after block, as a reader would: few photos, few steps."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked import ENVIRONMENT
from images import photos, write

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check, check_labelled
from mapet_ds.config.sections import REPOSITORY, Config


def blocks_of(page):
    """Language and text of each block of a page."""
    return re.findall(r"^```([^\n]+)\n(.*?)^```", (REPOSITORY / "docs" / page).read_text(), re.M | re.S)


BLOCKS = blocks_of("tutorial.md")
SIZES = {"TEACHER_STEPS": "2", "EPOCHS": "14", "FINETUNE_EPOCHS": "2"}
NUMBER = re.compile(r"-?\d[\d.e+-]*")


def script(*languages, blocks=BLOCKS):
    """The blocks of these languages as one bash script; Python by standard input."""
    parts = []
    for language, code in blocks:
        if language in languages:
            parts.append(f"python - <<'END'\n{code}END\n" if language == "python" else code)
    return "set -eo pipefail\ntrap 'jobs -p | xargs -r kill 2> /dev/null || true' EXIT\n" + "\n".join(parts)


def reader_of(folder):
    """Environment of a shell in `folder`, which looks like the repository's root; .venv is this Python."""
    for name in ("mapet_ds", "tools", "ds_configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    return {**ENVIRONMENT, **SIZES, "PHOTOS": str(folder / "photos")}


def start(text, folder, environment):
    words = ["bash", "-c", text]
    return subprocess.run(
        words,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=999,
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """The folder after all blocks for a CPU, and what they printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    jpegs = photos(60)
    write(
        folder / "photos",
        {**jpegs, "class_0/cut.jpg": jpegs["class_0/image_000.jpg"][:500], "class_1/.DS_Store": b"x"},
    )
    done = start(script("sh", "python"), folder, reader_of(folder))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder, done.stdout + done.stderr


def test_what_the_tutorial_leaves(session):
    folder, printed = session
    runs = folder / "runs/mine"
    assert "cut.jpg" in (runs / "unreadable.tsv").read_text()
    links = [path for path in runs.glob("photos/*/*/*") if path.suffix == ".jpg"]
    assert len(links) == 60 and sum("/val/" in str(path) for path in links) == 12
    assert (runs / "mapet/DONE").exists() and (runs / "classifier/DONE").exists()
    lines = [json.loads(line) for line in (runs / "mapet/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [
        10,
        11,
    ] and "Continuing runs/mine/mapet at step 10 of 11" in printed
    assert json.loads((runs / "classifier/results.json").read_text())["val_images"] == 12
    assert "TensorBoard" in (runs / "tensorboard.log").read_text()
    assert len(re.findall(r"^ *\d+\.\d%  class_[012]$", printed, re.M)) == 3, "three classes and their shares"


def test_the_keys_that_it_explains_are_in_the_metrics(session):
    explained = re.findall(r"^\| (`.+?) \|", (REPOSITORY / "docs/tutorial.md").read_text(), re.M)
    names = {name for cell in explained for name in re.findall(r"`([a-z]\w+)`", cell)}
    line = json.loads((session[0] / "runs/mine/mapet/metrics.jsonl").read_text().splitlines()[0])
    assert len(names) > 8 and names <= line.keys()


def shown(blocks=BLOCKS):
    return [line for language, code in blocks if language == "text" for line in code.splitlines()]


def shape(line):
    """A line without what differs between photos: numbers, paths, names of classes."""
    return " ".join(NUMBER.sub("0", re.sub(r"\S*photos/\S+|(?<=%  )\S+", "PHOTO", line)).split())


def test_the_output_that_it_shows_is_what_is_printed(session):
    printed = {shape(line) for line in re.split(r"[\r\n]", session[1])}
    assert len(shown()) > 15
    assert [line for line in shown() if shape(line) not in printed] == []


def test_photos_without_labels(tmp_path):
    blocks = blocks_of("unlabelled.md")
    write(tmp_path / "photos", {path.replace("/", "_"): jpeg for path, jpeg in photos(40).items()})
    done = start(script("sh", blocks=blocks), tmp_path, {**reader_of(tmp_path), "EPOCHS": "4"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    printed = {shape(line) for line in re.split(r"[\r\n]", done.stdout + done.stderr)}
    assert len(shown(blocks)) == 2
    assert [line for line in shown(blocks) if shape(line) not in printed] == []
    assert "Images alike" in (tmp_path / "runs/photos/report.html").read_text()


@pytest.fixture(scope="module")
def gpu_commands(tmp_path_factory):
    """The words of each command for a GPU, from a shell in which they are only written down."""
    folder = tmp_path_factory.mktemp("gpu")
    environment = reader_of(folder)
    shutil.rmtree(folder / ".venv")
    for name in ("python", "deepspeed"):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text('#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@" "" >> words\n')
        program.chmod(0o755)
    done = start(script("sh gpu"), folder, {**environment, "PATH": f"{folder}/bin:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    return [block.split("\n") for block in (folder / "words").read_text().strip().split("\n\n")]


def test_the_settings_for_a_gpu_are_accepted(gpu_commands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/mine/photos/train", "runs/mine/photos/val", "runs/gpu/timm"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "runs/gpu/timm" / name).touch()
    checked = set()
    for words in (words for words in gpu_commands if "--config" in words):
        program = next(word for word in words if word.endswith(".py"))
        overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
        settings, rules = (
            (FinetuneConfig, check_labelled) if program == "tools/finetune.py" else (Config, check)
        )
        config = load_config(REPOSITORY / words[words.index("--config") + 1], overrides, settings)
        if "--deepspeed_config" in words:
            load_deepspeed_config(REPOSITORY / words[words.index("--deepspeed_config") + 1])
            rules(config, 1)
        checked.add(program)
    assert checked == {"tools/fit_codebook.py", "mapet_ds/pretrain.py", "tools/finetune.py", "tools/plan.py"}
