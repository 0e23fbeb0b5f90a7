"""What a notebook does in one process: recipes, objectives, targets, batches, codebooks, pictures, exports.

No launcher is needed, and no process group. `mapet_ds` gives these names, docs/library.md shows their use.
"""

from __future__ import annotations

import atexit
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm.data
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_method
from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Batch, View, unnormalised
from mapet_ds.data.index import Index, open_index
from mapet_ds.data.loader import Loader
from mapet_ds.data.range_cache import RangeCache
from mapet_ds.draws import Place
from mapet_ds.errors import ExportError, ShapeError
from mapet_ds.errors import UserError as UserError
from mapet_ds.launch import Ranks
from mapet_ds.methods import build_objective as build_objective
from mapet_ds.methods import build_target as methods_target
from mapet_ds.objectives.objective import Objective
from mapet_ds.targets import fitting
from mapet_ds.targets.codebook import Codebook, source_of
from mapet_ds.targets.target import Target
from mapet_ds.targets.teacher import build_teacher
from mapet_ds.training import metrics


def load_recipe(recipe: str | Path, *settings: str) -> Config:
    """The settings of a recipe, a file or the name of a shipped one, with `a.b=value` on top.

    Raises:
        UserError: a sentence for each mistake.
    """
    config = load_config(recipe, settings)
    check_method(config)
    return config


def build_target(config: Config, device: str | torch.device = "cpu") -> Target:
    """What the recipe's objective predicts, as a function of a batch. `dim` is what build_objective wants."""
    return methods_target(config, torch.device(device))


def _index(config: Config, cache: str | Path | None) -> Index:
    """The list of the images of data.train, kept in `cache`; None: for as long as this process lives."""
    folder = Path(cache or tempfile.mkdtemp(prefix="mapet_index_"))
    if cache is None:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return open_index(config.data.train, folder, ranges=RangeCache.of(config.data))


def open_loader(
    config: Config, target: Target | None = None, objective: Objective | None = None, step: int = 0,
    cache: str | Path | None = None,
) -> Loader:  # fmt: skip
    """The micro-batches of a run alone on its machine, from a step on, without end. Close it after use.

    target: the one whose second view the batches bring. objective: the one whose draw they bring.
    cache: a folder that keeps the list of images, which is else made anew.

    Raises:
        UserError: data.train can't be read.
    """
    return Loader(
        config, _index(config, cache), student=True,
        teacher=target.teacher_view if target else None, rank=0, world_size=1, local_rank=0,
        first_step=step, draw=objective.draw if objective else None,
    )  # fmt: skip


def make_batch(config: Config, images: Tensor | Sequence[Image.Image], target: Target | None = None) -> Batch:
    """A batch of images of one's own, which target and objective take as they take a loader's.

    Of each image the largest central square is resized to the view of the student, and to that of the target.
    Colours stay as they are.

    images: pictures, or float [B, 3, H, W] in 0 .. 1.

    Raises:
        ShapeError: they are neither.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            given = f"{images.dtype} {list(images.shape)}"
            raise ShapeError(
                f"images are {given}; make_batch takes pictures, or float [B, 3, H, W] in 0 .. 1."
            )
        pictures = [*images]
    else:
        pictures = [
            TF.to_dtype(TF.to_image(image.convert("RGB")), torch.float32, scale=True) for image in images
        ]

    def view_of(view: View) -> Tensor:
        squares = [TF.center_crop(picture, [min(picture.shape[1:])]) for picture in pictures]
        size, bicubic = [view.size, view.size], InterpolationMode.BICUBIC
        views = [TF.resize(square, size, bicubic, antialias=True).clamp(0, 1) for square in squares]
        return TF.normalize(torch.stack(views), [*view.mean], [*view.std])

    student = View(config.model.img_size, config.data.mean, config.data.std)
    second = view_of(target.teacher_view) if target and target.teacher_view else None
    return Batch(view_of(student), second, torch.arange(len(pictures)), Place(0, 0))


def fit_codebook(
    config: Config, device: str | torch.device = "cpu", cache: str | Path | None = None
) -> Codebook:
    """k-CLIP's codebook of the recipe's images, as tools/fit_codebook.py fits it.

    `save(config.tokenizer.path)` writes it where build_target looks for it.

    Raises:
        UserError: images or teacher can't be read, or there are fewer patches than codes.
    """
    ranks = Ranks(0, 0, 1, torch.device(device), None)
    teacher = build_teacher(config.teacher, ranks.device, config.train.compile)
    teacher.check_grid(config.grid)
    features = fitting.sample_features(config, _index(config, cache), teacher, ranks)
    assert features is not None
    return fitting.fit(features, config.tokenizer, config.seed, source_of(teacher.identity, config.data))


def token_image(ids: Tensor, side: int = 224) -> Image.Image:
    """Token ids of one image, long [L] in raster order, as colours; -1, not predicted, is grey.

    Raises:
        ShapeError: they are not the ids of a square grid.
    """
    grid = math.isqrt(len(ids))
    if ids.ndim != 1 or grid**2 != len(ids) or ids.is_floating_point():
        given = f"{ids.dtype} {list(ids.shape)}"
        raise ShapeError(f"ids are {given}; token_image takes those of one image, long [L] of a square grid.")
    colours = (metrics.token_colours(ids.cpu().view(grid, grid)) * 255).byte().numpy()
    return Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST)


def view_image(config: Config, image: Tensor) -> Image.Image:
    """A student's view, normalised [3, S, S], as a picture."""
    return TF.to_pil_image(unnormalised(image, config.data.mean, config.data.std))


def load_export(folder: str | Path) -> tuple[Any, Any]:
    """timm's model of a folder that an export or a fine-tuning wrote, and its evaluation transform.

    Raises:
        ExportError: the folder holds no such model.
    """
    path = Path(folder)
    if missing := [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]:
        raise ExportError(
            f"{folder} is no export: it lacks {' and '.join(missing)}. A run becomes one by python "
            f"tools/export_timm.py RUN OUT; then load_export('OUT')."
        )
    model = timm.create_model(f"local-dir:{path.resolve()}", pretrained=True).eval()
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))
