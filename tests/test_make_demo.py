"""The demo's images and teacher, by the whole program in seconds; and a demo that is interrupted."""

import importlib.util
import os
import signal
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from mapet_ds.config.sections import REPOSITORY

spec = importlib.util.spec_from_file_location("make_demo", REPOSITORY / "tools/make_demo.py")
make_demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_demo)


@pytest.fixture
def run(monkeypatch):
    """The program with 16 + 8 images and a teacher of 2 steps; gives its exit code."""
    small = {**make_demo.SETTINGS, "images": {"train": 16, "val": 8}, "teacher_steps": 2, "batch_size": 8}

    def main(out, *more, **settings):
        monkeypatch.setattr(make_demo, "SETTINGS", {**small, **settings})
        monkeypatch.setattr(sys, "argv", ["make_demo.py", str(out), *map(str, more)])
        return make_demo.main()

    return main


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_images_captions_and_teacher(run, tmp_path, capsys):
    assert run(tmp_path / "a") == 0
    lines = [line.split("\t") for line in (tmp_path / "a/captions.tsv").read_text().splitlines()]
    assert len(lines) == 24
    for path, caption in lines:
        split, label, _ = path.split("/")
        assert label in caption.split()
        with Image.open(tmp_path / "a" / path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert min(image.size) >= 80
            assert max(image.size) <= 200
    for split in ("train", "val"):
        assert {path.split("/")[1] for path, _ in lines if path.startswith(split)} == set(make_demo.PATTERNS)
    assert "of val/, of 8 captions (12.5 % by chance)" in capsys.readouterr().out
    teacher = open_clip.create_model(f"local-dir:{tmp_path}/a/teacher", require_pretrained=True).eval()
    trained = make_demo.train_teacher(
        make_demo.load_views([tmp_path / "a" / path for path, _ in lines[:16]], make_demo.IMG_SIZE + 8),
        [caption for _, caption in lines[:16]],
    )  # the settings' two steps again: the weights in the folder are those of the training, bit for bit
    for name, tensor in trained.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], tensor), name


def test_a_teacher_of_ones_own_images(run, tmp_path, capsys):
    assert run(tmp_path / "rendered") == 0
    assert run(tmp_path / "own", "--images", tmp_path / "rendered", "--teacher_steps", 3) == 0
    assert "24 images of 8 classes" in capsys.readouterr().out
    assert not (tmp_path / "own/train").exists()
    captions = make_demo.photo_captions(tmp_path / "rendered/train")
    assert len(captions) == 16 and set(captions.values()) == {
        f"a photo of a {name}" for name in make_demo.PATTERNS
    }
    open_clip.create_model(f"local-dir:{tmp_path}/own/teacher", require_pretrained=True)


def test_images_of_ones_own_that_are_none(run, tmp_path, capsys):
    assert run(tmp_path / "none", "--images", tmp_path / "nowhere") == 2
    assert "no sub-folders with images" in capsys.readouterr().err
    assert run(tmp_path / "rendered") == 0
    (tmp_path / "rendered/train/dots/.DS_Store").write_text("what a file manager leaves behind")
    assert run(tmp_path / "own", "--images", tmp_path / "rendered") == 0
    (tmp_path / "rendered/val/dots/cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert run(tmp_path / "cut", "--images", tmp_path / "rendered") == 2
    error = capsys.readouterr().err
    assert "val/dots/cut.jpg can't be read" in error and error.count("\n") == 1


def test_the_same_again_and_never_over_something_else(run, tmp_path, capsys):
    assert run(tmp_path / "a") == 0
    assert run(tmp_path / "b") == 0
    before = files(tmp_path / "a")
    assert before == files(tmp_path / "b")
    capsys.readouterr()
    assert run(tmp_path / "a") == 0
    assert "already" in capsys.readouterr().out
    assert run(tmp_path / "a", seed=1) == 2
    assert "remove it" in capsys.readouterr().err
    assert files(tmp_path / "a") == before


def test_what_is_stopped_midway_leaves_nothing_and_begins_anew(run, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setattr(make_demo, "save_teacher", interrupt)
        run(tmp_path / "a")
    assert not any(tmp_path.iterdir())
    assert run(tmp_path / "a") == 0
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert run(tmp_path / "link") == 0 and files(tmp_path / "empty") == files(tmp_path / "a")
    (tmp_path / "file").touch()
    assert run(tmp_path / "file/b") == 2
    assert "file/b can't be written: " in capsys.readouterr().err


@pytest.mark.parametrize("pattern", make_demo.PATTERNS)
def test_mean_colours_do_not_tell_the_class(pattern):
    """A picture's mean mixes two random colours: it varies more within a class than between classes."""
    means = {
        name: np.array(
            [np.asarray(make_demo.render(np.random.default_rng(i), name)[0]).mean((0, 1)) for i in range(60)]
        )
        for name in (pattern, *make_demo.PATTERNS)
    }
    centre = np.mean([mean.mean(0) for mean in means.values()], axis=0)
    assert np.linalg.norm(means[pattern].mean(0) - centre) < 0.3 * np.linalg.norm(means[pattern].std(0))


def test_an_interrupted_command_has_its_last_word():
    """As Ctrl-C at a terminal: the signal goes to the demo and to the command that it runs."""
    saves = (
        "import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(print('saved'))); "
        "print('ready', flush=True); signal.pause()"
    )
    demo = "import sys; sys.path.insert(0, 'tools'); import demo; "
    demo += f"demo.run('A command', sys.executable, '-c', {saves!r})"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", demo], cwd=REPOSITORY, start_new_session=True, **pipes
    ) as process:
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("saved\n", "Stopped: the same command continues the demo.\n", 1)
