"""What a run leaves to look at: its records, and what its newest checkpoint makes of a sample of its own images.

One process, on a GPU where it sees one, without DeepSpeed. The sample is what step 0 drew: the same images, crops and
permutations at every checkpoint, and in every run of equal data, seed, batch and crop. Nothing is written into the run's folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.utils import AttentionExtract
from torch import Tensor
from tqdm import tqdm

from mapet_ds.config.sections import Config, flatten
from mapet_ds.data.batch import Batch, Draw
from mapet_ds.data.index import Index, open_index
from mapet_ds.data.loader import Loader
from mapet_ds.errors import DataError, ExportError, ResumeError
from mapet_ds.launch import use_gpu
from mapet_ds.methods import build_objective, build_target
from mapet_ds.objectives.objective import Objective
from mapet_ds.results.export import read_vit
from mapet_ds.targets.kclip import KClip
from mapet_ds.targets.target import Target
from mapet_ds.training.checkpoint import Checkpoint, newest
from mapet_ds.vit import build_vit, take_rows


class Trained(NamedTuple):
    """A run's newest checkpoint and the images it learns from."""

    checkpoint: Checkpoint
    config: Config
    """The run's, for one process that loads them where they lie now."""
    vit: dict[str, Tensor]
    index: Index
    device: torch.device


def open_trained(folder: Path) -> Trained | None:
    """None where the run has no checkpoint yet.

    Raises:
        ResumeError: every checkpoint is damaged.
        ExportError: it is none of pre-training.
        DataError: the images are not where they were.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        return None
    if "objective" not in checkpoint.run["config"]:
        raise DataError(
            "This is shown of runs of pre-training; what fine-tuning has measured is among the curves."
        )
    config, vit = read_vit(checkpoint)
    root, cache = config.data.train, folder / "index"
    if (
        cache / "index.json"
    ).is_file():  # relative paths start where the run was started: the index knows the whole one
        root = json.loads((cache / "index.json").read_text())["root"]
    elif not Path(root, "index", "index.json").is_file():
        raise DataError(f"{cache}, the list of the run's images, is gone.")
    index = open_index(root, cache)
    if index.fingerprint != checkpoint.run["identity"]["data.fingerprint"]:
        raise DataError(f"{root} holds other images than those of the run.")
    micro = getattr(config.method, "bn_group", math.gcd(config.train.global_batch_size, 32))
    config = dataclasses.replace(
        config, run_dir=str(folder), data=dataclasses.replace(config.data, train=root, workers=0, device="auto"),
        train=dataclasses.replace(config.train, micro_batch_size=micro, compile=False),
    )  # fmt: skip
    return Trained(checkpoint, config, vit, index, torch.device("cuda" if use_gpu() else "cpu"))


def _batches(trained: Trained, images: int, target: Target | None) -> Iterator[Batch]:
    """The micro-batches of at least `images` first samples of the run, none of them twice."""
    config, micro = trained.config, trained.config.train.micro_batch_size
    loader = Loader(
        config, trained.index, student=True, teacher=target and target.teacher_view, rank=0, world_size=1, local_rank=0
    )  # fmt: skip
    for _ in tqdm(range(-(-min(images, len(trained.index)) // micro)), "images", unit="batch", disable=None):
        yield next(loader).to(trained.device)
    loader.close()


def _pixels(images: Tensor, config: Config) -> Tensor:
    """Normalised images [B, 3, S, S] as uint8 [B, S, S, 3]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.data.mean, config.data.std))
    return ((images.float().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, 3)


@torch.no_grad()
def attention(trained: Trained, images: int) -> tuple[Tensor, Tensor]:
    """The student's views of the run's first images, uint8 [n, S, S, 3], and what the last block of the ViT to export attends
    to in them: float [n, heads, L], each head's weights of the patches, mean over the queries of all patches.

    The class token isn't asked: in the last block no loss of pre-training reaches its query.
    """
    vit = build_vit(trained.config.model)
    vit.load_state_dict(trained.vit)
    last = vit.blocks[-1].attn
    last.fused_attn = False  # so that the weights pass through attn_drop, where timm picks them up
    extract = AttentionExtract(
        vit.to(trained.device), [f"blocks.{len(vit.blocks) - 1}.attn.attn_drop"], method="hook"
    )
    views, maps = [], []
    for batch in _batches(trained, images, None):
        (weights,) = extract(batch.images).values()
        maps.append(weights[:, :, vit.num_prefix_tokens :, vit.num_prefix_tokens :].mean(dim=2).cpu())
        views.append(_pixels(batch.images, trained.config))
    return torch.cat(views)[:images], torch.cat(maps)[:images]


class Sample(NamedTuple):
    """What the run makes of n of its images, on the CPU, patches in raster order; None where it doesn't apply."""

    index: Tensor
    """long [n], place in the data set."""
    views: Tensor
    """uint8 [n, S, S, 3], the student's."""
    mask: Tensor
    """bool [n, L], True = hidden, hence predicted."""
    order: Tensor | None = None
    """long [n, L], rank of each patch in its permutation."""
    ids: Tensor | None = None
    """long [n, L], the target."""
    code_distance: Tensor | None = None
    """float [n, L], of the teacher's feature from the centroid of its id; k-CLIP's only."""
    prediction: Tensor | None = None
    """long [n, L], the likeliest id; -1 where none is predicted."""
    top5: Tensor | None = None
    """bool [n, L], the id is among the five likeliest."""
    hit: Tensor | None = None
    """bool [n, L], the id is the likeliest; of ConMIM: the patch finds its own place."""
    distance: Tensor | None = None
    """float [n, L], 1 - cosine of a predicted vector and its target; NaN where none is predicted."""


def _per_patch(objective: Objective, images: Tensor, target: Tensor, draw: Draw) -> dict[str, Tensor]:
    """The fields of a Sample that are predictions. The host waits for the GPU."""
    if hasattr(objective, "project"):  # ConMIM: of each patch's own place among all
        queries = objective.project(images, draw.mask)
        own = torch.arange(target.shape[1], device=target.device)
        hit = ((queries @ target.transpose(1, 2)).argmax(dim=-1) == own) & draw.mask
        return {
            "hit": hit,
            "distance": (1 - F.cosine_similarity(queries, target, dim=-1)).where(draw.mask, math.nan),
        }
    rows: list[Tensor] = []
    hook = objective.head.register_forward_hook(lambda module, inputs, output: rows.append(output.float()))
    loss = objective(images, target, draw)
    hook.remove()
    outputs, num_patches = torch.cat(rows), target.shape[1]
    rank = torch.arange(num_patches, device=target.device) if draw.order is None else draw.order
    patch = (rank + num_patches * ~draw.mask).argsort(dim=1)[
        :, : outputs.shape[1]
    ]  # the head's rows: hidden ones, by rank
    hidden = draw.mask.gather(1, patch)

    def everywhere(values: Tensor, empty: float) -> Tensor:
        whole = torch.full(target.shape[:2], empty, dtype=values.dtype, device=values.device)
        return whole.scatter(1, patch, values.where(hidden, empty))

    if target.is_floating_point():
        return {
            "distance": everywhere(
                1 - F.cosine_similarity(outputs, take_rows(target, patch).float(), dim=-1), math.nan
            )
        }
    likeliest = outputs.topk(min(5, outputs.shape[2])).indices
    top5 = everywhere((likeliest == target.gather(1, patch)[:, :, None]).any(dim=-1), False)
    return {"prediction": loss.prediction, "top5": top5, "hit": loss.prediction == target}


def _check_target(checkpoint: Checkpoint, target: Target) -> None:
    """Refuse a teacher or codebook that isn't the run's; its precision, that of the device, may differ."""
    now, then = json.loads(json.dumps(flatten({"target": target.identity}))), checkpoint.run["identity"]
    if other := [k for k in now if not k.endswith("dtype") and now[k] != then.get(k)]:
        raise ResumeError(
            f"What is predicted is not that of the run any more: {', '.join(other)} differ from {checkpoint.path}."
        )


@torch.no_grad()
def take_sample(trained: Trained, images: int) -> Sample:
    """The run's first `images` images, or all there are, as its newest checkpoint predicts them.

    Raises:
        ConfigError, DataError, ResumeError: teacher, codebook, ids or images are gone, or others than the run's.
        ExportError: weights that are not the objective's.
    """
    config, device = trained.config, trained.device
    target = build_target(config, device)
    _check_target(trained.checkpoint, target)
    if state := trained.checkpoint.load("target"):
        target.load_state_dict(state)
    objective = build_objective(config, target.dim)
    try:
        objective.load_state_dict(trained.checkpoint.load("model"))
    except RuntimeError as error:
        raise ExportError(
            f"{trained.checkpoint.path} doesn't hold the weights of its objective: {error}"
        ) from error
    objective.to(device).eval()
    tokenizer, found = getattr(target, "tokenizer", None), defaultdict(list)
    for batch in _batches(trained, images, target):
        fields = {"index": batch.index, "views": _pixels(batch.images, config)}
        draw = objective.draw(*batch.place, len(batch.index)).to(device)
        if isinstance(tokenizer, KClip):
            features = tokenizer.teacher(batch.teacher_images)
            wanted = tokenizer.codebook.assign(features)
            fields["code_distance"] = (features.float() - tokenizer.codebook.centroids[wanted]).norm(dim=-1)
        else:
            wanted = target(batch)
        fields |= {
            "mask": draw.mask,
            "order": draw.order,
            **_per_patch(objective, batch.images, wanted, draw),
        }
        fields["ids"] = None if wanted.is_floating_point() else wanted
        for name, value in fields.items():
            if value is not None:
                found[name].append(value.cpu())
    number = min(images, len(trained.index))
    return Sample(**{name: torch.cat(values)[:number] for name, values in found.items()})


def mean_by_rank(sample: Sample, values: Tensor) -> tuple[list[int], list[float]]:
    """Each predicted rank of the permutations, and the mean of values [n, L] there."""
    rank = sample.order[sample.mask]
    counts = torch.bincount(rank)
    means = torch.bincount(rank, values[sample.mask].double()) / counts
    ranks = counts.nonzero().flatten()
    return ranks.tolist(), means[ranks].tolist()


def mean_by_image(sample: Sample, values: Tensor) -> list[float]:
    """The mean of values [n, L] over each image's predicted patches."""
    return [row[hidden].double().mean().item() for row, hidden in zip(values, sample.mask)]


def code_counts(sample: Sample, vocab_size: int) -> NDArray[np.int64]:
    """How often each token id is the target in the sample; 0 of a dead code."""
    return np.bincount(sample.ids.flatten().numpy(), minlength=vocab_size)


def codes_to_show(counts: NDArray[np.int64], number: int) -> list[int]:
    """Codes from the commonest to the rarest that is in use, evenly spaced."""
    used = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
    return used[np.unique(np.linspace(0, len(used) - 1, number).round().astype(int))].tolist()


def patches_of(sample: Sample, code: int, number: int) -> list[tuple[int, int]]:
    """(image, patch) of a code: the nearest to its centroid first, at most one of an image; in the sample's order where the
    tokenizer gives no distance."""
    image, patch = (sample.ids == code).nonzero(as_tuple=True)
    if sample.code_distance is not None:
        nearest = sample.code_distance[image, patch].argsort(stable=True)
        image, patch = image[nearest], patch[nearest]
    first = {}
    for place in zip(image.tolist(), patch.tolist()):
        first.setdefault(place[0], place)
    return list(first.values())[:number]


def surroundings(view: Tensor, patch: int, patch_size: int) -> NDArray[np.uint8]:
    """The patch amid its neighbours, which are darkened: [3 P, 3 P, 3] of a view [S, S, 3]; black beyond its border."""
    padded = np.pad(view.numpy(), ((patch_size, patch_size), (patch_size, patch_size), (0, 0)))
    row, column = (patch_size * i for i in divmod(patch, view.shape[0] // patch_size))
    tile = padded[row : row + 3 * patch_size, column : column + 3 * patch_size].astype(float)
    light = np.full((3 * patch_size, 3 * patch_size, 1), 0.45)
    light[patch_size : 2 * patch_size, patch_size : 2 * patch_size] = 1
    return (tile * light).astype(np.uint8)


def relative_name(index: Index, i: int) -> str:
    """A sample's path below the data set's folder."""
    return os.path.relpath(index.path(i), index.root)
