"""The loader: pixels, exact order at any split, bad images, storage faults; and data sets' programs."""

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import images
import numpy as np
import pytest
import torch
from forked import start
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import RandomResizedCrop

from mapet_ds.config.finetune import FinetuneConfig, LabelledDataConfig
from mapet_ds.config.objectives import StrongViewConfig
from mapet_ds.config.running import TrainConfig
from mapet_ds.config.sections import REPOSITORY, Config, DataConfig, ModelConfig
from mapet_ds.data.batch import Batch, Draw, View
from mapet_ds.data.index import Index, open_index
from mapet_ds.data.labelled import EvaluationBatches
from mapet_ds.data.loader import ALONE_LIMIT, Loader
from mapet_ds.data.samples import (
    CROP_NUMBERS,
    NEVER,
    SOLARIZE_FROM,
    STRONG_NUMBERS,
    UNBLURRED,
    SampleSource,
    central_square,
    doubts,
    random_crop,
    strong_values,
)  # fmt: skip
from mapet_ds.errors import ConfigError, DataError
from mapet_ds.finetuning.loader import TrainBatches

TEACHER = View(64, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
STRONG = TEACHER._replace(strong=True)
RANDOM = {"crop": "random", "flip": 0.5}


def settings(batch: int, micro: int | None = None, side: int = 48, **data: object) -> Config:
    data = {"device": "cpu", "threads": 1, "max_bad_share": 1.0, **data}
    return Config(
        model=ModelConfig(img_size=side, patch_size=16),
        data=DataConfig(**data),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=micro or batch),
    )


def load(
    config: Config, index: Index, steps: int, rank: int = 0, world_size: int = 1, **options: object
) -> list[Batch]:
    """All micro-batches of a rank in so many steps."""
    options = {"student": True, "teacher": TEACHER, **options}
    loader = Loader(config, index, rank=rank, world_size=world_size, local_rank=0, **options)
    batches = list(itertools.islice(loader, steps * config.grad_accum_steps(world_size)))
    loader.close()
    return batches


def global_batches(
    config: Config, index: Index, steps: int, world_size: int, **options: object
) -> list[Batch]:
    """The batches of all ranks put together in the order of their slots, one per step."""
    ranks = [load(config, index, steps, rank, world_size, **options) for rank in range(world_size)]
    micro = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    parts = config.grad_accum_steps(world_size) * world_size
    return [joined(micro[i : i + parts]) for i in range(0, len(micro), parts)]


def joined(parts: list[Batch]) -> Batch:
    columns = zip(*((part.images, part.teacher_images, part.index) for part in parts), strict=True)
    return Batch(*map(torch.cat, columns), place=parts[0].place)


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.place == other.place
        for name in ("images", "teacher_images", "index"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def make_index(folder: Path, files: dict[str, bytes]) -> Index:
    return open_index(str(images.write(folder / "data", files)), folder / "index")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Index:
    return make_index(tmp_path_factory.mktemp("photos"), images.photos(23))


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    return start(sys.executable, REPOSITORY / "tools" / name, *arguments)


# ---- order


@pytest.mark.parametrize(("micro", "world_size", "workers"), [(4, 1, 0), (3, 2, 0), (2, 3, 0), (6, 1, 2)])
def test_no_split_changes_a_batch(photos, micro, world_size, workers):
    whole = global_batches(settings(12, **RANDOM), photos, 4, 1)
    split = global_batches(settings(12, micro, workers=workers, **RANDOM), photos, 4, world_size)
    assert_same(split, whole)


def test_each_image_comes_once_an_epoch(photos):
    batches = load(settings(10), photos, 7, teacher=None)
    order = torch.cat([batch.index for batch in batches])
    for epoch in range(3):
        assert sorted(order[23 * epoch : 23 * (epoch + 1)].tolist()) == list(range(23))
    assert order[:23].tolist() != order[23:46].tolist()
    assert order.dtype == torch.long
    other_seed = dataclasses.replace(settings(10), seed=1)
    assert load(other_seed, photos, 1, teacher=None)[0].index.tolist() != order[:10].tolist()


def test_a_batch_brings_its_place_and_its_draw(photos):
    """Drawn ahead by a thread, whatever the step it begins at; the main thread draws nothing."""
    threads = set()

    def draw(step: int, first_slot: int, slots: int) -> Draw:
        threads.add(threading.current_thread().name)
        keep = torch.full((slots, 1), float(100 * step + first_slot))
        return Draw(mask=None, order=None, keep=keep)

    config = settings(12, 3)
    for first_step in (0, 3):
        batches = load(config, photos, 2, rank=1, world_size=2, first_step=first_step, draw=draw)
        places = [(first_step, 3), (first_step, 9), (first_step + 1, 3), (first_step + 1, 9)]
        assert [batch.place for batch in batches] == places
        assert [batch.draw.keep.tolist() for batch in batches] == [
            [[100.0 * step + slot]] * 3 for step, slot in places
        ]
    assert len(threads) == 1 and threading.main_thread().name not in threads
    assert load(config, photos, 1)[0].draw is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_loader_continues_exactly(photos, workers):
    config = settings(10, 5, **RANDOM)
    whole = load(config, photos, 6)
    resumed = load(settings(10, 5, workers=workers, **RANDOM), photos, 2, first_step=4)
    assert_same(resumed, whole[8:])


def test_epochs_shorter_than_a_batch(tmp_path):
    index = make_index(tmp_path, images.photos(3))
    order = torch.cat([batch.index for batch in load(settings(8), index, 3)]).tolist()
    assert all(sorted(order[i : i + 3]) == [0, 1, 2] for i in range(0, 24, 3))


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Index:
    files = {f"{i:03d}.jpg": images.encode(images.picture(20, 16, i), "JPEG") for i in range(700)}
    return make_index(tmp_path_factory.mktemp("many"), files)


def test_no_split_changes_a_windowed_order(many):
    config = settings(60, shuffle_window=256)
    source = SampleSource(config, many, 0, 1)
    whole = [[source.sample(step, slot).index for slot in range(60)] for step in range(30)]
    served = list(itertools.chain(*whole))
    assert served == [source.order(n) for n in range(1800)]
    assert all(sorted(served[start : start + 700]) == list(range(700)) for start in (0, 700))
    assert served != [SampleSource(settings(60), many, 0, 1).order(n) for n in range(1800)]
    for world_size, micro in ((2, 10), (3, 5)):
        accum, config = 60 // (world_size * micro), settings(60, micro, shuffle_window=256)
        ranks = [SampleSource(config, many, rank, world_size) for rank in range(world_size)]
        for step in (29, 4, 11):  # in any order, as when resumed
            parts = [(ranks[rank], step * accum + k) for k in range(accum) for rank in range(world_size)]
            assert [source.sample(k, i).index for source, k in parts for i in range(micro)] == whole[step]
    split = global_batches(settings(60, 15, workers=1, shuffle_window=256), many, 1, 2, first_step=11)
    assert split[0].index.tolist() == whole[11]


def test_a_bad_image_of_a_windowed_order_is_replaced_by_the_next_of_it(many):
    source = SampleSource(settings(60, shuffle_window=256), many, 0, 1)
    bad = {
        source.order(n) for n in (5, 6, 255, 699)
    }  # two in a row, the last of a window, the last of the epoch
    replacing = SampleSource(source.config, many, 0, 1, bad=bad)
    for n, tries in ((5, 2), (6, 1), (255, 1), (699, 1)):
        due = 0 if n == 699 else n + tries
        found = replacing.sample(*divmod(n, 60))
        assert (found.index, found.passed_over) == (source.order(due), tries)


def test_views_are_those_asked_for(photos):
    config = settings(4)
    both = load(config, photos, 1)[0]
    assert both.images.shape == (4, 3, 48, 48) and both.teacher_images.shape == (4, 3, 64, 64)
    assert both.images.dtype == both.teacher_images.dtype == torch.float32
    student = load(config, photos, 1, teacher=None)[0]
    teacher = load(config, photos, 1, student=False)[0]
    assert student.teacher_images is None and torch.equal(student.images, both.images)
    assert teacher.images is None and torch.equal(teacher.teacher_images, both.teacher_images)


def test_batches_kept_are_not_overwritten(photos):
    config = settings(8, **RANDOM)
    loader = Loader(config, photos, student=True, teacher=TEACHER, rank=0, world_size=1, local_rank=0)
    kept = [next(loader) for _ in range(8)]
    copies = [joined([batch]) for batch in kept]
    for _ in range(8):
        next(loader)
    loader.close()
    assert_same(kept, copies)


# ---- pixels

# Mean absolute difference to Pillow's decode, crop and bicubic resize, of 255. Measured: at most 0.22, and
# 1.1 for dithered black and white. The decoded pixels are equal; Pillow rounds and clips between its two
# resize passes, DALI does not.
TOLERANCE = 0.3
TOLERANCE_BILEVEL = 1.5


def reference(image: Image.Image, crop: tuple, side: int) -> np.ndarray:
    top, left, height, width, flip = crop
    view = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view, np.float32)


def pixels(view: torch.Tensor, mean: tuple, std: tuple) -> np.ndarray:
    return (
        ((view * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]) * 255)
        .permute(1, 2, 0)
        .numpy()
    )


@pytest.mark.parametrize("crop", ["center", "random"])
def test_every_format_gives_pillows_pixels(tmp_path, crop):
    files = images.good_images()
    index = make_index(tmp_path, files)
    data = {"color_jitter": 0.0, "crop": crop, "flip": 0.5 if crop == "random" else 0.0, "max_bad_share": 0.0}
    config = settings(len(files), **data)
    batch = load(config, index, 1)[0]
    source = SampleSource(config, index, 0, 1)
    assert sorted(batch.index.tolist()) == list(range(len(files)))
    differences = {}
    for place, i in enumerate(batch.index.tolist()):
        name = Path(index.path(i)).name
        sample, image = source.sample(0, place), images.as_rgb(files[name])
        for view, side, mean, std in (
            (batch.images, 48, config.data.mean, config.data.std), (batch.teacher_images, *TEACHER[:3]),
        ):  # fmt: skip
            difference = np.abs(pixels(view[place], mean, std) - reference(image, sample.crop, side)).mean()
            differences[name] = max(difference, differences.get(name, 0))
    assert differences.pop("bilevel.png") < TOLERANCE_BILEVEL
    assert {name: d for name, d in differences.items() if d > TOLERANCE} == {}


SAME_SIZE = {name: data for name, data in images.good_images().items() if not name.startswith("one_")}
PILLOW_CUTS = {"colour16.png", "grey_alpha16.png"}
"""Of 16 bits of colour or transparent grey Pillow reads 8, where DALI rounds."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Program to orientation's rule to name to the central square of each image, uint8 [120, 120, 3]."""
    files = {f"class_0/{name}": data for name, data in SAME_SIZE.items()}
    index = make_index(tmp_path_factory.mktemp("seen"), files)
    names, number = [Path(index.path(i)).name for i in range(len(index))], len(index)

    def square(image: Image.Image) -> torch.Tensor:
        width, height = image.size
        left, top = (width - 120) // 2, (height - 120) // 2
        return torch.from_numpy(np.array(image.crop((left, top, left + 120, top + 120))))

    found = {}
    for rule, upright in (("stored", False), ("upright", True)):
        data = {"color_jitter": 0.0, "exif_orientation": upright, "mean": (0.0,) * 3, "std": (1.0,) * 3}
        config = settings(number, side=120, **data)
        config = dataclasses.replace(config, model=ModelConfig(img_size=120, patch_size=8))
        batch = load(config, index, 1, teacher=None)[0]
        views = (batch.images.movedim(1, 3) * 255).round().byte().numpy()
        found["training", rule] = {
            names[i]: view for i, view in zip(batch.index.tolist(), views, strict=True)
        }

        evaluated = EvaluationBatches(config, index, square, 0, 1).batch(0)
        assert evaluated.bad == []
        found["evaluation", rule] = dict(zip(names, evaluated.images.numpy(), strict=True))

        plain = {"mixup": 0.0, "cutmix": 0.0, "exif_orientation": upright}
        finetuning = FinetuneConfig(
            data=LabelledDataConfig(**plain),
            train=TrainConfig(global_batch_size=number, micro_batch_size=number),
        )
        tuned = TrainBatches(finetuning, index, square, 0, 1, ()).batch(0)
        found["fine-tuning", rule] = {
            names[i]: image for i, image in zip(tuned.index.tolist(), tuned.images.numpy(), strict=True)
        }
    return found


@pytest.mark.parametrize("rule", ["stored", "upright"])
@pytest.mark.parametrize("name", SAME_SIZE)
def test_every_program_sees_the_same_pixels(seen, name, rule):
    """Pre-training, its report and token ids decode by DALI; evaluation and fine-tuning by Pillow."""
    image = images.as_rgb(SAME_SIZE[name])
    if rule == "upright" and name.startswith("exif."):
        image = image.rotate(180 if name == "exif.tif" else 270, expand=True)
    width, height = image.size
    left, top = (width - 120) // 2, (height - 120) // 2
    expected = np.asarray(image.crop((left, top, left + 120, top + 120))).astype(int)
    for program in ("training", "evaluation", "fine-tuning"):
        difference = np.abs(seen[program, rule][name].astype(int) - expected).max()
        assert difference <= (1 if name in PILLOW_CUTS else 0), program


def test_orientation_is_ignored(tmp_path):
    plain, turned = (
        images.encode(images.picture(), "JPEG"),
        images.encode(images.picture(), "JPEG", exif=images.rotated()),
    )
    assert plain != turned
    batch = load(settings(2, color_jitter=0.0), make_index(tmp_path, {"a.jpg": plain, "b.jpg": turned}), 1)[0]
    assert torch.equal(batch.images[0], batch.images[1])


def test_jitter_is_the_students_alone_and_does_what_it_says(photos):
    plain = load(settings(16, color_jitter=0.0), photos, 1)[0]
    config = settings(16, color_jitter=0.4)
    jittered = load(config, photos, 1)[0]
    assert torch.equal(plain.teacher_images, jittered.teacher_images)
    source = SampleSource(config, photos, 0, 1)
    mean, std = config.data.mean, config.data.std
    factors = np.stack([source.sample(0, place).jitter for place in range(16)])
    assert factors.min() >= 0.6 and factors.max() <= 1.4 and factors.std(axis=0).min() > 0.1
    for place, (brightness, contrast, saturation) in enumerate(factors):
        image = pixels(plain.images[place], mean, std)
        grey = image @ np.array([0.299, 0.587, 0.114])
        expected = grey[..., None] + saturation * (image - grey[..., None])
        expected = brightness * (128 + contrast * (expected - 128))
        difference = np.abs(pixels(jittered.images[place], mean, std) - expected.clip(0, 255))
        assert difference.mean() < 1.5, "rounding, and DALI's own luma weights"


def test_views_show_the_same_place(tmp_path):
    """Red tells the column and green the row: both views must agree, and with the crop's own geometry."""
    rows, columns = np.mgrid[0:240, 0:320]
    field = np.stack([columns * 255 / 319, rows * 255 / 239, 0 * rows], -1).astype(np.uint8)
    index = make_index(tmp_path, {f"{i}.png": images.encode(Image.fromarray(field), "PNG") for i in range(6)})
    config = settings(24, color_jitter=0.0, **RANDOM)
    batch = load(config, index, 1)[0]
    source = SampleSource(config, index, 0, 1)
    crops = [source.sample(0, place).crop for place in range(24)]
    assert {crop.flip for crop in crops} == {False, True}
    for place, crop in enumerate(crops):
        at = (np.arange(3) + 0.5) / 3  # a 3 x 3 grid of patches
        x = crop.left + crop.width * (1 - at if crop.flip else at)
        y = crop.top + crop.height * at
        for view, side, mean, std in (
            (batch.images, 48, config.data.mean, config.data.std), (batch.teacher_images, *TEACHER[:3]),
        ):  # fmt: skip
            image = pixels(view[place], mean, std)
            rows = np.array_split(image, 3)
            patches = np.stack([[cell.mean((0, 1)) for cell in np.array_split(row, 3, 1)] for row in rows])
            np.testing.assert_allclose(patches[..., 0], np.tile(x * 255 / 320, (3, 1)), atol=2.5)
            np.testing.assert_allclose(patches[..., 1], np.tile(y[:, None] * 255 / 240, (1, 3)), atol=2.5)


def test_central_square_is_torchvisions():
    for width, height in ((500, 375), (375, 500), (333, 500), (64, 64), (1, 9)):
        crop = central_square(width, height)
        expected = RandomResizedCrop.get_params(torch.empty(3, height, width), (1.0, 1.0), (1.0, 1.0))
        assert crop == (*expected, False)


def test_random_crops_are_distributed_as_torchvisions():
    numbers = np.random.default_rng(0).random((4000, CROP_NUMBERS))
    data = DataConfig(crop="random", flip=0.3)
    ours = np.array([random_crop(300, 200, row, data) for row in numbers], float)
    torch.manual_seed(0)
    empty = torch.empty(3, 200, 300)
    theirs = np.array([RandomResizedCrop.get_params(empty, [0.2, 1], [3 / 4, 4 / 3]) for _ in numbers], float)
    for k in range(4):
        both = np.concatenate([ours[:, k], theirs[:, k]])
        below = [np.searchsorted(np.sort(values[:, k]), both, "right") for values in (ours, theirs)]
        assert np.abs(below[0] - below[1]).max() / 4000 < 0.044, "two-sample Kolmogorov-Smirnov, p = 1e-3"
    assert abs(ours[:, 4].mean() - 0.3) < 0.03
    assert (ours[:, 0] + ours[:, 2]).max() <= 200 and (ours[:, 1] + ours[:, 3]).max() <= 300


@pytest.mark.parametrize(("width", "height"), [(1, 1), (4000, 3), (3, 4000)])
def test_random_crop_falls_back_inside_the_image(width, height):
    for row in np.random.default_rng(1).random((50, CROP_NUMBERS)):
        top, left, h, w, _ = random_crop(width, height, row, DataConfig(crop="random"))
        assert h >= 1 and w >= 1 and top + h <= height and left + w <= width


# ---- the strong view

# Tolerances are mean absolute differences, of 255. Measured: at most 0.26 to the twin of the jitter, 0.17 to
# Pillow's grey, 0.26 to the Gaussian and 0.75 to Pillow's GaussianBlur, which is three boxes and differs most
# near the borders.

PLAIN = {"jitter_share": 0.0, "grey_share": 0.0, "blur_share": 0.0, "solarize_share": 0.0}


def strong_and_plain(
    index: Index, number: int = 16, **strong: object
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each image the strong view's pixels, the plain view's, and the six values that were drawn."""
    config = settings(number, strong=StrongViewConfig(**PLAIN | strong), **RANDOM)
    changed, plain = (
        load(config, index, 1, teacher=teacher)[0].teacher_images for teacher in (STRONG, TEACHER)
    )
    source = SampleSource(config, index, 0, 1, strong=True)
    shown = ([pixels(image, *TEACHER[1:3]) for image in images] for images in (changed, plain))
    return [(*both, source.sample(0, place).strong) for place, both in enumerate(zip(*shown, strict=True))]


def twist(image: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """One matrix in YIQ, then contrast about middle grey."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    cos, sin = saturation * np.cos(np.radians(hue)), saturation * np.sin(np.radians(hue))
    matrix = np.linalg.inv(to_yiq) @ np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]]) @ to_yiq
    return (brightness * (128 + contrast * (image @ matrix.T - 128))).clip(0, 255)


def test_a_strong_view_that_changes_nothing_is_the_plain_one(photos):
    config = settings(16, strong=StrongViewConfig(**PLAIN), **RANDOM)
    plain, strong = (load(config, photos, 2, teacher=teacher) for teacher in (TEACHER, STRONG))
    assert_same(strong, plain)


def test_strong_jitter_is_a_turn_and_three_factors(photos):
    for strong, plain, values in strong_and_plain(photos, jitter_share=1.0):
        assert np.all(np.abs(values[:3] - 1) <= (0.4, 0.4, 0.2)) and abs(values[3]) <= 36
        assert values[4:].tolist() == [np.float32(UNBLURRED), NEVER]
        assert np.abs(strong - twist(plain, *values[:4])).mean() < 0.5, (
            "rounding, and constants of three digits"
        )
        assert np.abs(strong - plain).mean() > 2


def test_strong_grey_is_pillows(photos):
    for jitter_share in (0.0, 1.0):
        for strong, plain, values in strong_and_plain(photos, grey_share=1.0, jitter_share=jitter_share):
            assert values[2:4].tolist() == [0, 0] and (values[:2].tolist() == [1, 1]) == (jitter_share == 0)
            assert np.ptp(strong, axis=-1).max() < 1.5, "one grey level, where DALI's constants round apart"
            grey = np.asarray(Image.fromarray(plain.round().astype(np.uint8)).convert("L"), float)[..., None]
            expected = values[0] * (128 + values[1] * (grey - 128))
            assert np.abs(strong - expected.clip(0, 255)).mean() < 1


def test_strong_blur_is_a_gaussian_and_nearly_pillows(photos):
    sigmas = []
    for strong, plain, values in strong_and_plain(photos, blur_share=1.0):
        sigmas.append(values[4])
        radius = int(np.ceil(3 * values[4]))
        window = np.exp(-0.5 * (np.arange(-radius, radius + 1) / values[4]) ** 2)
        expected = plain
        for axis in (0, 1):  # what lies beyond the border is mirrored, the border's own pixel not repeated
            padded = np.pad(
                expected, [(radius, radius) if k == axis else (0, 0) for k in range(3)], "reflect"
            )
            expected = np.apply_along_axis(np.convolve, axis, padded, window / window.sum(), "valid")
        assert np.abs(strong - expected).mean() < 0.5, "rounding"
        pillows = Image.fromarray(plain.round().astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(float(values[4]))
        )
        assert np.abs(strong - np.asarray(pillows, float)).mean() < 1.5
    assert 0.1 <= min(sigmas) < 0.5 and 1.6 < max(sigmas) <= 2


def test_strong_solarize_is_pillows(photos):
    for strong, plain, values in strong_and_plain(photos, solarize_share=1.0):
        assert values[5] == SOLARIZE_FROM
        expected = ImageOps.solarize(Image.fromarray(plain.round().astype(np.uint8)))
        np.testing.assert_allclose(strong, np.asarray(expected, float), atol=1e-3)


def test_strong_blur_comes_between_jitter_and_solarize(photos):
    every = {"jitter_share": 1.0, "blur_share": 1.0, "solarize_share": 1.0}
    for solarized, (blurred, _, _) in zip(
        strong_and_plain(photos, **every),
        strong_and_plain(photos, **every | {"solarize_share": 0.0}),
        strict=True,
    ):
        expected = ImageOps.solarize(Image.fromarray(blurred.round().astype(np.uint8)))
        np.testing.assert_allclose(solarized[0], np.asarray(expected, float), atol=1e-3)


def test_published_shares_of_the_strong_view():
    values = strong_values(np.random.default_rng(0).random((20_000, STRONG_NUMBERS)), StrongViewConfig())
    assert values.shape == (20_000, 6) and values.dtype == np.float32
    jittered, grey = values[:, 0] != 1, values[:, 2] == 0
    blurred, solarized = values[:, 4] != np.float32(UNBLURRED), values[:, 5] == SOLARIZE_FROM
    events = np.stack([jittered, grey, blurred, solarized])
    np.testing.assert_allclose(
        events.mean(axis=1), (0.8, 0.2, 0.1, 0.2), atol=0.014, err_msg="five standard deviations"
    )
    assert np.abs(np.corrcoef(events) - np.eye(4)).max() < 0.035
    assert (
        not values[grey, 3].any()
        and (values[~jittered, :2] == 1).all()
        and (values[~solarized, 5] == NEVER).all()
    )
    for column, low, high, rows in (
        (0, 0.6, 1.4, jittered), (1, 0.6, 1.4, jittered), (2, 0.8, 1.2, jittered & ~grey),
        (3, -36, 36, jittered & ~grey),
        (4, 0.1, 2.0, blurred),
    ):  # fmt: skip
        counts = np.histogram(values[rows, column], bins=10, range=(low, high))[0]
        assert counts.sum() == rows.sum(), "all within the range"
        assert ((counts - rows.sum() / 10) ** 2 / (rows.sum() / 10)).sum() < 40, (
            "9 degrees of freedom: p = 8e-6"
        )


@pytest.mark.parametrize(("micro", "world_size", "workers"), [(3, 2, 0), (2, 3, 0), (6, 1, 2)])
def test_no_split_changes_a_strong_batch(photos, micro, world_size, workers):
    strong = StrongViewConfig(blur_share=0.5)
    whole = global_batches(settings(12, strong=strong, **RANDOM), photos, 2, 1, teacher=STRONG)
    config = settings(12, micro, workers=workers, strong=strong, **RANDOM)
    assert_same(global_batches(config, photos, 2, world_size, teacher=STRONG), whole)


def test_a_resumed_strong_view_continues_exactly(photos):
    config = settings(12, 6, **RANDOM)
    assert_same(
        load(config, photos, 1, teacher=STRONG, first_step=1), load(config, photos, 2, teacher=STRONG)[2:]
    )


@pytest.mark.parametrize("color_jitter", [0.0, 0.4])
def test_a_strong_view_leaves_the_students_alone(photos, color_jitter):
    config = settings(12, color_jitter=color_jitter, **RANDOM)
    strong, plain = (load(config, photos, 2, teacher=teacher) for teacher in (STRONG, TEACHER))
    for one, other in zip(strong, plain, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.index, other.index)
        assert not torch.equal(one.teacher_images, other.teacher_images)
    alone = load(config, photos, 2, teacher=STRONG, student=False)
    assert all(
        torch.equal(one.teacher_images, other.teacher_images)
        for one, other in zip(strong, alone, strict=True)
    )


def test_a_strong_view_shows_the_students_crop_and_flip(photos):
    """Both views have one size and, but for the blur, one colour: the same pixels but near edges."""
    blurred = StrongViewConfig(**PLAIN | {"blur_share": 1.0, "blur_sigma": (0.6, 0.6)})
    config = settings(23, side=64, color_jitter=0.0, strong=blurred, **RANDOM)
    batch = load(config, photos, 1, teacher=STRONG)[0]
    student = [pixels(image, config.data.mean, config.data.std) for image in batch.images]
    teacher = [pixels(image, *STRONG[1:3]) for image in batch.teacher_images]
    source = SampleSource(config, photos, 0, 1)
    assert {source.sample(0, place).crop.flip for place in range(23)} == {False, True}
    for one, other in zip(student, teacher, strict=True):
        same, turned = (np.abs(view - other).mean() for view in (one, one[:, ::-1]))
        assert 0 < same < turned / 3


# ---- unreadable images


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[Index, Index, set[str]]:
    """A data set with many bad images, the same with good ones in their places, and the names of the bad."""
    bad = {
        f"class_1/{name}": data
        for name, data in {**images.bad_by_structure(), **images.bad_by_decoding()}.items()
    }
    good = images.photos(60)
    replaced = {name: images.encode(images.picture(seed=77), "JPEG") for name in bad}
    folder = tmp_path_factory.mktemp("damaged")
    index = make_index(folder / "bad", {**good, **bad})
    (Path(index.root) / "class_0/image_000.jpg").unlink()
    return index, make_index(folder / "good", {**good, **replaced}), {*bad, "class_0/image_000.jpg"}


def test_bad_images_cost_nothing_but_themselves(damaged):
    index, good, bad_names = damaged
    config = settings(17, **RANDOM)
    steps = -(-len(index) // 17)
    loader = Loader(config, index, student=True, teacher=TEACHER, rank=0, world_size=1, local_rank=0)
    found, batches = [], []
    for _ in range(steps):
        batches.append(next(loader))
        found += loader.new_bad()
    loader.close()
    assert loader.new_bad() == []
    names = {os.path.relpath(index.path(i), index.root) for i, _ in found}
    assert names == bad_names and len(found) == len(names)
    assert all(reason and "\n" not in reason for _, reason in found)
    bad = {i for i, _ in found}
    order = SampleSource(config, index, 0, 1).order
    reference_batches = load(config, good, steps)
    replaced = 0
    served, expected = (torch.cat([b.index for b in run]).tolist() for run in (batches, reference_batches))
    for n, (got, due) in enumerate(zip(served, expected, strict=True)):
        step, slot = divmod(n, 17)
        if due in bad:
            replaced += 1
            assert got == next(i for tries in range(1, 99) if (i := order.after(n, tries)) not in bad)
        else:
            assert got == due
            assert torch.equal(batches[step].images[slot], reference_batches[step].images[slot])
            assert torch.equal(
                batches[step].teacher_images[slot], reference_batches[step].teacher_images[slot]
            )
    assert replaced >= 10
    assert_same(load(config, index, steps, bad=bad), batches)
    assert_same(
        global_batches(settings(16, 4, **RANDOM), index, 2, 2), load(settings(16, **RANDOM), index, 2)
    )


def test_bad_images_found_by_a_worker_are_reported(tmp_path):
    index = make_index(tmp_path, images.photos(6) | {"class_0/a.jpg": b"<html>", **images.bad_by_decoding()})
    loader = Loader(
        settings(10, workers=1), index, student=True, teacher=None, rank=0, world_size=1, local_rank=0
    )
    next(loader)
    assert sorted(Path(index.path(i)).name for i, _ in loader.new_bad()) == [
        "a.jpg",
        *sorted(images.bad_by_decoding()),
    ]
    loader.close()


def test_known_bad_images_are_not_read(damaged, monkeypatch):
    index, _, bad_names = damaged
    bad = {i for i in range(len(index)) if os.path.relpath(index.path(i), index.root) in bad_names}
    read, real = [], Index.read
    monkeypatch.setattr(Index, "read", lambda self, i: read.append(i) or real(self, i))
    loader = Loader(
        settings(len(index)), index, student=True, teacher=None, rank=0, world_size=1, local_rank=0, bad=bad
    )
    next(loader)
    assert loader.new_bad() == []
    loader.close()
    assert read and not bad & set(read)


@pytest.mark.parametrize("kind", ["structure", "decoding"])
def test_too_many_bad_images_stop_the_run(tmp_path, kind):
    files = images.bad_by_structure() if kind == "structure" else images.bad_by_decoding()
    index = make_index(
        tmp_path, images.photos(10) | {f"class_0/{name}": files[name] for name in list(files)[:3]}
    )
    with pytest.raises(
        DataError, match=r"at least 3 of 13, more than the 2 .*max_bad_share = 0\.15.*class_0/"
    ) as caught:
        load(settings(13, max_bad_share=0.15), index, 2)
    assert "\n" not in str(caught.value)
    load(settings(13, max_bad_share=0.25), index, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_a_sentence(tmp_path, workers):
    index = make_index(tmp_path, {f"{i}.jpg": b"<html>" for i in range(5)})
    with pytest.raises(DataError, match="at least 5 of 5"):
        load(settings(4, workers=workers), index, 1)


def test_one_too_many_in_a_large_batch_is_a_sentence_not_a_crash(tmp_path):
    """Amid a batch of 32, bytes that are no image make DALI 2.4.0 fail in its own memory."""
    index = make_index(tmp_path, {**images.photos(39), "note.jpg": b"nothing to decode"})
    with pytest.raises(DataError, match="1 of 40"):
        load(settings(32, workers=0, max_bad_share=0.0), index, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_storage_fault_stops_the_run(tmp_path, workers):
    index = make_index(tmp_path, images.photos(8))
    loader = Loader(
        settings(4, workers=workers), index, student=True, teacher=None, rank=0, world_size=1, local_rank=0
    )
    next(loader)
    shutil.move(index.root, tmp_path / "elsewhere")
    with pytest.raises(DataError, match="gone or no longer mounted"):
        for _ in range(8):
            next(loader)
    loader.close()


def test_a_passing_storage_fault_is_got_over(tmp_path, monkeypatch, caplog):
    """The reader gives up once, in DALI's hands; when the loader asks again the storage is back."""
    index = make_index(tmp_path, images.photos(8))
    expected = load(settings(4), index, 3)
    real, failures = Index.read, iter([DataError("The storage fails.")])

    def read(self, i):
        if failure := next(failures, None):
            raise failure
        return real(self, i)

    monkeypatch.setattr(Index, "read", read)
    assert_same(load(settings(4), index, 3), expected)
    assert "Micro-batch 0 is done again on the CPU" in caplog.text


def test_a_decoder_that_never_works_stops_the_run(photos, monkeypatch):
    class Broken:
        def run(self):
            raise RuntimeError("no decoder")

    real = Loader._pipeline_of  # the one that prefetches nothing is the CPU's, which steps in
    monkeypatch.setattr(
        Loader,
        "_pipeline_of",
        lambda self, *a, **k: real(self, *a, **k) if k.get("prefetch") == 1 else Broken(),
    )
    loader = Loader(settings(4), photos, student=True, teacher=None, rank=0, world_size=1, local_rank=0)
    batches = list(itertools.islice(loader, ALONE_LIMIT))
    assert len(batches) == ALONE_LIMIT
    with pytest.raises(
        DataError, match=f"{ALONE_LIMIT + 1} micro-batches in a row.*no decoder.*data.device=cpu"
    ):
        next(loader)
    loader.close()


def test_a_gpu_asked_for_must_be_there(photos, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"data\.device = gpu"):
        load(settings(4, device="gpu"), photos, 1)


def test_doubts_about_the_images_are_said(tmp_path):
    index = make_index(tmp_path / "few", images.photos(6))
    assert list(doubts(settings(6), index)) == []
    (doubt,) = doubts(settings(15), index)
    assert "has 6 images: each comes 2.5 times in a step" in doubt

    split = {f"{part}/{name}": data for part in ("train", "val") for name, data in images.photos(4).items()}
    index = make_index(tmp_path / "split", split)
    (doubt,) = doubts(settings(6), index)
    assert (
        f"holds the folders train and val: the run learns from all of them. data.train={index.root}/train"
        in doubt
    )
    classes = {name.replace("val/", "bus/"): data for name, data in split.items()}
    assert list(doubts(settings(6), make_index(tmp_path / "classes", classes))) == []


# ---- programs


@pytest.mark.slow
def test_shards_are_the_folder(photos, tmp_path):
    source, out = str(photos.root), tmp_path / "shards"
    made = run_tool("make_shards.py", source, out, "--shard_images", 7)
    assert made.returncode == 0, made.stderr
    assert f"{out}: images 23, classes 3, shards 4." in made.stdout
    shards = open_index(str(out), tmp_path / "unused")
    assert not (tmp_path / "unused").exists() and shards.classes == photos.classes
    assert [(shards.read(i), shards.label(i)) for i in range(23)] == [
        (photos.read(i), photos.label(i)) for i in range(23)
    ]
    config = settings(12, 6, **RANDOM)
    assert_same(load(config, shards, 4), load(config, photos, 4))
    shutil.rmtree(out / "index")
    again = open_index(str(out), tmp_path / "rebuilt")
    assert [again.label(i) for i in range(23)] == [photos.label(i) for i in range(23)]
    assert again.fingerprint == shards.fingerprint

    assert run_tool("make_shards.py", source, tmp_path / "second", "--shard_images", 7).returncode == 0
    for path in out.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    moved = shutil.move(tmp_path / "second", tmp_path / "moved")
    assert open_index(str(moved), tmp_path / "unused").read(5) == photos.read(5)


@pytest.mark.slow
def test_shards_in_random_order_hold_the_same_images(photos, tmp_path):
    assert (
        run_tool(
            "make_shards.py", photos.root, tmp_path / "out", "--shuffle_seed", 3, "--shard_images", 7
        ).returncode
        == 0
    )
    shards = open_index(str(tmp_path / "out"), tmp_path / "unused")
    packed, listed = ([(index.read(i), index.label(i)) for i in range(23)] for index in (shards, photos))
    assert packed != listed and sorted(packed) == sorted(listed) and shards.classes == photos.classes
    assert len({label for _, label in packed[:7]}) > 1, "the first shard holds more than the first class"
    refused = run_tool("make_shards.py", photos.root, tmp_path / "no", "--shuffle_seed", -1)
    assert refused.returncode == 2 and "--shuffle_seed: -1 must be at least 0" in refused.stderr


@pytest.mark.slow
def test_shards_overwrite_nothing(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    for out, words in ((tmp_path / "out", "is there already"), (Path(photos.root) / "inside", "lies inside")):
        refused = run_tool("make_shards.py", photos.root, out)
        assert refused.returncode == 2 and words in refused.stderr and "Traceback" not in refused.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]
    nowhere = run_tool("make_shards.py", photos.root, tmp_path / "out/precious/shards")
    assert nowhere.returncode == 2 and "Traceback" not in nowhere.stderr
    assert "shards can't be written" in nowhere.stderr


@pytest.mark.slow
def test_shards_stay_below_their_size(photos, tmp_path):
    size = max(len(photos.read(i)) for i in range(23)) * 3
    assert (
        run_tool("make_shards.py", photos.root, tmp_path / "out", "--shard_size_mib", size / 2**20).returncode
        == 0
    )
    shards = list((tmp_path / "out").glob("*.tar"))
    assert 23 / 3 / 2 < len(shards) < 23
    assert max(path.stat().st_size for path in shards) < size + 3 * 2048 + 20 * 512 + 10240


@pytest.mark.slow
@pytest.mark.parametrize("decode", [False, True])
def test_check_images_lists_the_bad(damaged, decode):
    index, _, bad_names = damaged
    checked = run_tool("check_images.py", index.root, "--jobs", 1, *(["--decode"] if decode else []))
    assert checked.returncode == 1, checked.stderr
    rows = [line.split("\t") for line in checked.stdout.splitlines()]
    only_decoding = {f"class_1/{name}" for name in images.bad_by_decoding()}
    expected = bad_names - {
        "class_0/image_000.jpg"
    }  # deleted since, so not in the index that the program makes
    assert {os.path.relpath(path, index.root) for path, _ in rows} == expected - (
        set() if decode else only_decoding
    )
    assert all(reason for _, reason in rows) and "100%" in checked.stderr


@pytest.mark.slow
def test_check_images_ends_well_or_with_a_sentence(photos, tmp_path):
    good = run_tool("check_images.py", photos.root, "--jobs", 2)
    assert (good.returncode, good.stdout) == (0, "") and "0 of 23" in good.stderr
    nothing = run_tool("check_images.py", tmp_path)
    assert (
        nothing.returncode == 2 and "holds no image" in nothing.stderr and "Traceback" not in nothing.stderr
    )


def test_the_decoder_is_told_to_upsample_chroma_as_the_cpu_does(photos):
    """Only a GPU's decoder has another way, so that a CPU shows no difference."""
    loader = Loader(settings(4), photos, student=True, teacher=None, rank=0, world_size=1, local_rank=0)
    graph = loader._pipeline.serialize()
    loader.close()
    assert b"jpeg_fancy_upsampling" in graph


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares GPU decoding with CPU decoding")
def test_gpu_decoding_gives_the_cpus_pixels(tmp_path):
    files = images.good_images() | images.photos(16) | images.bad_by_structure() | images.bad_by_decoding()
    index = make_index(tmp_path, files)
    cpu = load(settings(16, color_jitter=0.0, **RANDOM), index, 5)
    gpu = load(settings(16, color_jitter=0.0, **RANDOM, device="gpu"), index, 5)
    for one, other in zip(cpu, gpu, strict=True):
        assert torch.equal(one.index, other.index) and other.images.is_cuda and not other.index.is_cuda
        for a, b in ((one.images, other.images), (one.teacher_images, other.teacher_images)):
            difference = (a - b.cpu()).abs().mean(dim=(1, 2, 3)) * 255 * 0.225
            assert difference.max() < 2.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the GPU's strong view with the CPU's")
def test_gpu_gives_the_cpus_strong_view(photos):
    strong = StrongViewConfig(blur_share=0.5, solarize_share=0.0)
    cpu, gpu = (
        load(settings(16, strong=strong, **RANDOM, device=at), photos, 3, teacher=STRONG)
        for at in ("cpu", "gpu")
    )
    for one, other in zip(cpu, gpu, strict=True):
        assert other.teacher_images.is_cuda
        difference = (one.teacher_images - other.teacher_images.cpu()).abs().mean(dim=(1, 2, 3)) * 255 * 0.27
        assert difference.max() < 3.0
    inverted = settings(
        16, strong=StrongViewConfig(**PLAIN | {"solarize_share": 1.0}), **RANDOM, device="gpu"
    )
    solarized, plain = (
        load(inverted, photos, 1, teacher=teacher)[0].teacher_images.cpu() for teacher in (STRONG, TEACHER)
    )
    for one, other in zip(solarized, plain, strict=True):
        expected = ImageOps.solarize(Image.fromarray(pixels(other, *TEACHER[1:3]).round().astype(np.uint8)))
        # The GPU's colour twist, here by nothing, may round a pixel to its neighbour.
        np.testing.assert_allclose(pixels(one, *TEACHER[1:3]), np.asarray(expected, float), atol=1 + 1e-3)
