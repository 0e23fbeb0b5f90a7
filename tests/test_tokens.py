"""The table of tokenizers: use of ids and histograms against numpy, and the program on folders of images."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from images import photos, write
from PIL import Image
from towers import write_tower

from mapet_ds.config.sections import REPOSITORY, Config, TeacherConfig, TokenizerConfig
from mapet_ds.data.batch import View
from mapet_ds.errors import ConfigError
from mapet_ds.results.features import unit_length
from mapet_ds.results.probe import knn, linear
from mapet_ds.results.tokens import Histograms, described, usage
from mapet_ds.targets.codebook import Codebook, source_of
from mapet_ds.targets.teacher import build_teacher


class Given:
    """A tokenizer whose ids are the images' first values."""

    view, vocab_size = View(8, (0.5, 0.5, 0.5), (1, 1, 1)), 6

    def __call__(self, images):
        return images[:, 0].flatten(1).long()


def test_a_histogram_is_the_share_of_each_id():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, (7, 2, 4))
    images = torch.from_numpy(ids)[:, None].expand(-1, 3, -1, -1).float()
    found = Histograms(Given()).forward_features(images)
    expected = [np.bincount(row.ravel(), minlength=6) / 8 for row in ids]
    np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=0, atol=1e-7)
    with pytest.raises(ConfigError, match="gives ids of 0 .. 9; it has 0 .. 5"):
        Histograms(Given()).forward_features(torch.arange(10.0).expand(1, 3, 1, 10))


def test_usage_is_that_of_all_ids_together():
    counts = np.array([[4, 0, 3, 1, 0], [0, 0, 1, 7, 0]])
    found = usage((counts / 8).astype(np.float32))
    share = counts.sum(0)[[0, 2, 3]] / 16
    assert (found["ids"], found["used"], found["dead"]) == (5, 3, 2)
    assert found["entropy_bits"] == pytest.approx(-(share * np.log2(share)).sum())
    assert found["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert usage(np.full((3, 4), 0.25, np.float32))["perplexity"] == pytest.approx(4)
    alone = usage(np.eye(4, dtype=np.float32)[:1])
    assert (alone["perplexity"], alone["entropy_bits"], alone["dead"]) == (1, 0, 3)


def test_a_tokenizer_in_words():
    def words(name, teacher, weights="openai", layer=-1):
        teacher = TeacherConfig(name=teacher, weights=weights, layer=layer)
        return described(Config(tokenizer=TokenizerConfig(name=name), teacher=teacher))

    assert words("kclip", "RN50x64") == "kclip of RN50x64 openai"
    assert words("kclip", "local-dir:/runs/teacher/", layer=2) == "kclip of teacher layer 2"
    assert words("kclip", "timm:vit_x", "/data/dino.pth") == "kclip of timm:vit_x dino.pth"
    assert words("dalle", "RN50x64") == "dalle"


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Folders of images, one of which is damaged, a teacher and its codebook, and words that name them."""
    folder = tmp_path_factory.mktemp("tokens")
    write(folder / "train", photos(40, classes=2))
    write(
        folder / "val", {name.replace("image", "other"): data for name, data in photos(12, classes=2).items()}
    )
    (folder / "train/class_0/damaged.jpg").write_bytes(b"\xff\xd8\xff no image")
    for number, path in enumerate(sorted((folder / "val").rglob("*.jpg"))):  # other pixels than in train/
        Image.open(path).rotate(5 + number).save(path)
    write_tower(folder / "vit", "vit")
    teacher = TeacherConfig(name=f"local-dir:{folder}/vit", img_size=64)
    built = build_teacher(teacher, torch.device("cpu"))
    config = Config(teacher=teacher)
    centroids = built(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))).flatten(0, 1)[
        ::2
    ]
    source = source_of(built.identity, config.data) | {"tokenizer.vocab_size": "32"}
    Codebook(centroids, source).save(folder / "codebook")
    (folder / "grey_levels_of_tests.py").write_text(GREY)
    words = ["mapet_vitb16", "model.img_size=32", "model.patch_size=8"]
    kclip = [*words, f"teacher.name={teacher.name}", "teacher.img_size=64", "tokenizer.vocab_size=32"]
    return folder, {
        "kclip": [*kclip, f"tokenizer.path={folder}/codebook"],
        "grey": [*words, "tokenizer.name=grey_levels_of_tests:Grey", "tokenizer.vocab_size=16"],
    }


GREY = """
import torch.nn.functional as F
from mapet_ds.data.batch import View

class Grey:
    vocab_size, identity = 16, {}
    view = View(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(self, config, device):
        pass

    def __call__(self, images):
        return (F.avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1) * 16).long().clamp(0, 15)
"""


@pytest.fixture
def run(line, monkeypatch, capsys):
    def evaluate(*words):
        monkeypatch.syspath_prepend(line[0])
        monkeypatch.syspath_prepend(REPOSITORY / "tools")  # as Python does for a script
        folders = ["--train", line[0] / "train", "--val", line[0] / "val", "--workers", "0"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "tokenizer", *map(str, [*words, *folders])])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "tools/evaluate.py"), run_name="__main__")
        return ended.value.code, capsys.readouterr()

    return evaluate


def grey_histograms(folder):
    """Histograms and labels of the readable images, by PIL and numpy."""
    rows, labels = [], []
    for path in sorted(folder.rglob("image_*.jpg" if folder.name == "train" else "other_*.jpg")):
        image = Image.open(path)
        scale = 32 / min(image.size)
        width, height = (max(32, int(round(side * scale, 6))) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - 32) / 2), round((height - 32) / 2)
        pixels = np.asarray(image.crop((left, top, left + 32, top + 32)), np.float32) / 255
        ids = (pixels.mean(2).reshape(4, 8, 4, 8).mean((1, 3)) * 16).astype(int).clip(0, 15)
        rows.append(np.bincount(ids.ravel(), minlength=16) / 16)
        labels.append(int(path.parent.name[-1]))
    return np.array(rows, np.float32), np.array(labels)


def test_the_table_is_that_of_numpy_and_the_probes(run, line):
    folder, words = line
    out = folder / "table.json"
    options = ("--max_bad_share", "0.1", "--k", "5", "--solver", "lbfgs", "--out", out)
    both = ("--tokenizer", *words["kclip"], "--tokenizer", *words["grey"])
    code, printed = run(*both, *options)
    assert code == 0, printed.err
    kclip, grey = json.loads(out.read_text())
    lines = printed.out.splitlines()
    assert lines[0].split()[:5] == ["tokenizer", "ids", "used", "dead", "perplexity"]
    assert lines[1].startswith("kclip of vit ") and lines[2].startswith("grey_levels_of_tests:Grey ")
    assert "of 40 training and 12 validation images, 2 classes; 1 unreadable" in printed.out
    assert "damaged.jpg" in printed.out + printed.err

    train, val = (grey_histograms(folder / name) for name in ("train", "val"))
    expected = usage(np.concatenate([train[0], val[0]]))
    assert 1 < expected["perplexity"] < 16
    for name, figure in expected.items():
        assert grey[name] == pytest.approx(figure, rel=1e-3), name
    directions = unit_length(train[0]), train[1], unit_length(val[0]), val[1]
    assert grey["knn_accuracy_percent"] == pytest.approx(knn(*directions, k=5))
    assert grey["linear_accuracy_percent"] == pytest.approx(linear(*directions), abs=9)  # an image or none
    assert kclip["ids"] == 32 and 0 < kclip["used"] <= 32
    assert kclip["settings"] == words["kclip"]
    code, printed = run("--tokenizer", *words["grey"], *options[:-2], "--max_images", "10", "--json")
    (row,) = json.loads(printed.out)
    assert (row["train_images"] + row["train_unreadable"], row["val_images"]) == (10, 10)


def test_mistakes_are_answered(run, line):
    words = line[1]
    for given, says in (
        ([*words["kclip"], "tokenizer.path=/nowhere"], "tokenizer.path = /nowhere is not a file"),
        ([*words["kclip"], "teacher.img_size=128"], "teacher's grid is 8 x 8"),
        ([*words["kclip"], "teacher.layer=1"], "The codebook was fitted with teacher.layer = 2"),
        ([*words["grey"], "tokenizer.vocab_size=17"], "has 16 ids, tokenizer.vocab_size is 17"),
        (["no_such_recipe"], "no_such_recipe"),
    ):
        code, printed = run("--tokenizer", *given)
        assert code == 2 and says in printed.err, printed.err
    code, printed = run("--tokenizer", *words["grey"], "--max_bad_share", "0")
    assert code == 2 and "max_bad_share" in printed.err
