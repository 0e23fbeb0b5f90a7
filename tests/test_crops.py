"""Own-crop recognition: what finds what, and the program on images without labels."""

import json
import sys

import numpy as np
import pytest
import timm
import torch
from forked import TORCHRUN, start
from PIL import Image
from timm.models import save_for_hf

from mapet_ds.config.sections import REPOSITORY
from mapet_ds.results.crops import crop_transform, found_again

EVALUATE = REPOSITORY / "tools" / "evaluate.py"
NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def test_a_row_counts_where_the_most_similar_one_is_its_own():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 16)).astype(np.float32)
    assert found_again(rows, 3 * rows) == 100
    assert found_again(rows, np.roll(rows, 1, axis=0)) == 0
    mixed = rows.copy()
    mixed[:10] = np.roll(rows[:10], 1, axis=0)
    assert found_again(rows, mixed) == 80
    assert found_again(np.ones_like(rows), np.ones_like(rows)) == 2  # a collapse: as by chance


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)  # fresh weights are those of seed 0
    size = {"input_size": (3, 32, 32)}
    return timm.create_model(NAME, num_classes=0, pretrained_cfg_overlay=size, **ARGS).eval()


def test_a_crop_is_of_the_image_and_the_view_alone(model):
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    image, other = Image.fromarray(noise), Image.fromarray(noise[::-1].copy())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = crop_transform(model, 1)(image)
    assert torch.equal(state, torch.get_rng_state()) and first.shape == (3, 32, 32)
    torch.manual_seed(2)
    assert torch.equal(first, crop_transform(model, 1)(image))
    assert not torch.equal(first, crop_transform(model, 2)(image))
    assert not torch.equal(first.flip(1), crop_transform(model, 1)(other))


@pytest.fixture(scope="module")
def export(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("crops")
    save_for_hf(model, folder / "timm", model_args=ARGS, safe_serialization=True)
    rng = np.random.default_rng(0)
    for i in range(23):  # one colour each, so that fresh weights find some, and two ranks share unevenly
        place = folder / "photos" / f"year_{i % 2}" / f"{i:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        grain = rng.integers(0, 40, (32, 32, 3)) + rng.integers(0, 215, 3)
        Image.fromarray(grain.astype(np.uint8)).save(place)
    return folder


def crops(folder, *words, ranks=1):
    torchrun = [*TORCHRUN, f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = ["crops", "--model", folder / "timm", "--images", folder / "photos", "--workers", "0", *words]
    return start(sys.executable, *torchrun, EVALUATE, *command)


def test_photos_without_labels_are_judged_beside_fresh_weights(export):
    done = crops(export, "--out", export / "one.json")
    assert done.returncode == 0, done.stderr
    trained, untrained = done.stdout.splitlines()
    assert "; trained weights; 23 images)" in trained and "; untrained weights; 23 images)" in untrained
    figures = json.loads((export / "one.json").read_text())
    assert figures["trained"]["chance_percent"] == pytest.approx(100 / 23)
    assert figures["trained"]["own_crop_percent"] > 2 * figures["trained"]["chance_percent"]
    assert figures["trained"] != figures["untrained"]

    again = crops(export, "--json", ranks=2)
    assert again.returncode == 0, again.stderr
    two = json.loads(again.stdout)
    for weights in ("trained", "untrained"):
        assert two[weights] == pytest.approx(figures[weights], rel=1e-5)


def test_unreadable_photos_are_left_out_and_counted(export, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for image in (export / "photos").rglob("*.png"):
        (photos / image.name).symlink_to(image)
    (photos / "cut.png").write_bytes((photos / "00.png").read_bytes()[:300])
    done = crops(export, "--images", photos, "--json", "--max_images", 100)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["trained"]
    assert (figures["images"], figures["unreadable"]) == (23, 1)
    assert "left out of the evaluation: 1 of 24" in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--images", "nowhere"], "nowhere"),
        (["--max_images", "1"], "--max_images"),
        (["--model", "nowhere"], "--model nowhere is neither a folder"),
    ],
)
def test_mistakes_end_with_a_sentence(export, words, sentence):
    done = crops(export, *words)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
