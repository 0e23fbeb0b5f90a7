"""A sample of a run's own images as its newest checkpoint sees them: predictions, codes, attention maps.

One process computes it, on a GPU where there is one, without DeepSpeed. The sample begins with what step 0
drew: the same images, crops and permutations at every checkpoint, and in every run of equal data, seed, batch
and crop. Nothing is written into the run's folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.utils import AttentionExtract
from torch import Tensor
from tqdm import tqdm

from mapet_ds.config.running import flatten
from mapet_ds.config.sections import Config
from mapet_ds.data.batch import Batch, View, unnormalised
from mapet_ds.data.index import Index
from mapet_ds.data.loader import Loader
from mapet_ds.errors import DataError, ExportError, ResumeError
from mapet_ds.launch import use_gpu
from mapet_ds.methods import build_objective, build_target
from mapet_ds.results.collapse import effective_rank
from mapet_ds.results.export import read_vit
from mapet_ds.results.features import FEATURES, chosen, features, unit_length
from mapet_ds.targets.kclip import KClip
from mapet_ds.targets.target import Target
from mapet_ds.training.checkpoint import Checkpoint, newest
from mapet_ds.vit import build_vit


class Trained(NamedTuple):
    """A run's newest checkpoint and the images that the run learns from."""

    checkpoint: Checkpoint
    config: Config
    """The run's settings, changed so that one process loads the images from where they lie now."""
    vit: dict[str, Tensor]
    """The weights of the ViT to export."""
    index: Index
    device: torch.device


def open_trained(folder: Path) -> Trained | None:
    """The newest checkpoint of a run of pre-training, with its images; None where it has no checkpoint yet.

    Raises:
        ResumeError: every checkpoint is damaged.
        ExportError: the checkpoint's settings are not of this program.
        DataError: the run is not one of pre-training, or its images are not where they were.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        return None
    if "objective" not in checkpoint.run["config"]:
        raise DataError(
            "This is shown of runs of pre-training; what fine-tuning has measured is among the curves."
        )
    config, vit = read_vit(checkpoint)

    # A relative path started where the run was started; the index holds the whole one.
    root, cache = config.data.train, folder / "index"
    if (cache / "index.json").is_file():
        root = json.loads((cache / "index.json").read_text())["root"]
    elif not Path(root, "index", "index.json").is_file():
        raise DataError(f"{cache}, the list of the run's images, is gone.")
    else:
        cache = Path(root, "index")
    index = Index(cache, Path(root))
    if index.fingerprint != checkpoint.run["identity"]["data.fingerprint"]:
        raise DataError(f"{root} holds other images than those of the run.")

    whole = config.train.global_batch_size
    possible = [micro for micro in range(1, whole + 1) if whole % micro == 0 and config.allows(micro)]
    micro = max((micro for micro in possible if micro <= 32), default=possible[0])
    data = dataclasses.replace(config.data, train=index.named, workers=0, device="auto")
    train = dataclasses.replace(config.train, micro_batch_size=micro, compile=False)
    config = dataclasses.replace(config, run_dir=str(folder), data=data, train=train)
    return Trained(checkpoint, config, vit, index, torch.device("cuda" if use_gpu() else "cpu"))


def _batches(trained: Trained, images: int, teacher: View | None) -> Iterator[Batch]:
    """The run's first micro-batches, until they hold `images` images or all there are, none of them twice."""
    config, micro = trained.config, trained.config.train.micro_batch_size
    loader = Loader(config, trained.index, student=True, teacher=teacher, rank=0, world_size=1, local_rank=0)
    for _ in tqdm(range(-(-min(images, len(trained.index)) // micro)), "images", unit="batch", disable=None):
        yield next(loader).to(trained.device)
    loader.close()


def _pixels(images: Tensor, config: Config) -> Tensor:
    """Normalised images [B, 3, S, S] as uint8 [B, S, S, 3]."""
    views = unnormalised(images, config.data.mean, config.data.std)
    return (views * 255).round().to(torch.uint8).movedim(1, 3)


@torch.no_grad()
def look(trained: Trained, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """The student's views of the run's first images, and what the exported ViT makes of them.

    Gives uint8 [n, S, S, 3]; the attention in the last block, float [n, heads, L]: each head's weights of the
    patches as keys, mean over all patches as queries; and the patch tokens after the final norm [n, L, D].
    """
    vit = build_vit(trained.config.model)
    vit.load_state_dict(trained.vit)
    last: Any = vit.blocks[-1].attn
    last.fused_attn = False  # so that the weights pass through attn_drop, where timm picks them up
    name = f"blocks.{len(vit.blocks) - 1}.attn.attn_drop"
    extract = AttentionExtract(vit.to(trained.device), [name], method="hook")
    views, maps, tokens = [], [], []
    vit.norm.register_forward_hook(lambda _, __, rows: tokens.append(rows[:, vit.num_prefix_tokens :].cpu()))
    for batch in _batches(trained, images, None):
        assert batch.images is not None
        (weights,) = extract(batch.images).values()
        maps.append(weights[:, :, vit.num_prefix_tokens :, vit.num_prefix_tokens :].mean(dim=2).cpu())
        views.append(_pixels(batch.images, trained.config))
    return torch.cat(views)[:images], torch.cat(maps)[:images], torch.cat(tokens)[:images]


def principal_colours(patches: Tensor) -> Tensor:
    """The three principal components of patch tokens [n, L, D], over all images: uint8 [n, L, 3].

    A component's sign is such that its largest loading is positive. Its values between the 2nd and the 98th
    percentile span the colours; one without spread is grey.
    """
    rows = patches.flatten(0, 1).double()
    rows = rows - rows.mean(0)
    _, spread, components = torch.linalg.svd(rows, full_matrices=False)
    loadings = components[:3]
    largest = loadings.gather(1, loadings.abs().argmax(dim=1, keepdim=True))
    values = rows @ (loadings * largest.sign()).T
    low, high = values.quantile(torch.tensor([0.02, 0.98], dtype=values.dtype), dim=0)
    share = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    share = F.pad(
        share.where(spread[:3] > 1e-9 * spread[0].clamp(min=1e-9), 0.5), (0, 3 - share.shape[1]), value=0.5
    )
    return (255 * share).round().to(torch.uint8).view(*patches.shape[:2], 3)


class Alike(NamedTuple):
    """A run's first images, and which of them a ViT finds most similar, on the CPU."""

    views: Tensor
    """uint8 [n, S, S, 3], the student's views."""
    nearest: dict[str, Tensor]
    """Of trained and of fresh weights: long [shown, k], the places of the most similar, itself left out."""
    rank: dict[str, float]
    """Of both: the effective rank of the n images' features."""
    most: int
    """What it can be: n, or the features' width."""


def look_alike(trained: Trained, shown: int, among: int) -> Alike:
    """The five images most similar to each of the first `shown`, among a run's first `among`.

    Similar by the cosine of the objective's feature, of the exported ViT and of fresh weights of seed 0.
    """
    feature, device = trained.config.method.feature, trained.device
    batches = [batch.images.cpu() for batch in _batches(trained, among, None) if batch.images is not None]
    images = torch.cat(batches)[: min(among, len(trained.index))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vits = {"trained": build_vit(trained.config.model), "fresh": build_vit(trained.config.model)}
    vits["trained"].load_state_dict(trained.vit)
    nearest, rank, rows = dict[str, Tensor](), dict[str, float](), np.empty((0, 0), np.float32)
    for name, vit in vits.items():
        loader = ((part, torch.zeros(len(part))) for part in images.split(len(batches[0])))
        rows = chosen(features(vit, loader, device, kinds=FEATURES[feature])[0], feature, [0])
        directions = torch.from_numpy(unit_length(rows))
        similar = (directions[:shown] @ directions.T).fill_diagonal_(-2)
        nearest[name] = similar.topk(min(5, len(images) - 1)).indices
        rank[name] = effective_rank(rows)
    return Alike(_pixels(images, trained.config), nearest, rank, min(rows.shape))


class Sample(NamedTuple):
    """n of a run's images and what is predicted for their patches, on the CPU.

    Patches are in raster order. A field is None where it doesn't apply to the objective.
    """

    index: Tensor
    """long [n], place in the data set."""
    views: Tensor
    """uint8 [n, S, S, 3], the student's views."""
    mask: Tensor
    """bool [n, L], True = hidden, hence predicted."""
    order: Tensor | None = None
    """long [n, L], rank of each patch in its permutation."""
    ids: Tensor | None = None
    """long [n, L], the target, where it is token ids."""
    code_distance: Tensor | None = None
    """float [n, L], distance of the teacher's feature from the centroid of its id; k-CLIP's only."""
    prediction: Tensor | None = None
    """long [n, L]; this and the next three are those of Objective.patch_predictions."""
    hit: Tensor | None = None
    """bool [n, L]."""
    top5: Tensor | None = None
    """bool [n, L]."""
    distance: Tensor | None = None
    """float [n, L]."""


def _check_target(checkpoint: Checkpoint, target: Target) -> None:
    """Refuses a teacher or codebook that isn't the run's. Its precision, that of the device, may differ."""
    now, then = json.loads(json.dumps(flatten({"target": target.identity}))), checkpoint.run["identity"]
    if other := [k for k in now if not k.endswith("dtype") and now[k] != then.get(k)]:
        difference = f"{', '.join(other)} differ from {checkpoint.path}"
        raise ResumeError(f"What is predicted is not that of the run any more: {difference}.")


@torch.no_grad()
def take_sample(trained: Trained, images: int) -> Sample:
    """The run's first `images` images, or all there are, as its newest checkpoint predicts them.

    Raises:
        ConfigError, DataError, ResumeError: teacher, codebook, ids or images are gone, or are not the run's.
        ExportError: the checkpoint's weights are not the objective's.
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
        problem = f"{trained.checkpoint.path} doesn't hold the weights of its objective: {error}"
        raise ExportError(problem) from error
    objective.to(device).eval()

    tokenizer, parts = getattr(target, "tokenizer", None), defaultdict(list)
    for batch in _batches(trained, images, target.teacher_view):
        assert batch.images is not None
        draw = objective.draw(*batch.place, len(batch.index)).to(device)
        fields: dict[str, Tensor | None] = {"index": batch.index, "mask": draw.mask, "order": draw.order}
        fields["views"] = _pixels(batch.images, config)
        if isinstance(tokenizer, KClip):
            features = tokenizer.teacher(batch.teacher_images)
            wanted = tokenizer.codebook.assign(features)
            fields["code_distance"] = (features.float() - tokenizer.codebook.centroids[wanted]).norm(dim=-1)
        else:
            wanted = target(batch)
        fields["ids"] = None if wanted.is_floating_point() else wanted
        for name, value in (fields | objective.patch_predictions(batch.images, wanted, draw)).items():
            if value is not None:
                parts[name].append(value.cpu())
    size = min(images, len(trained.index))
    return Sample(**{name: torch.cat(values)[:size] for name, values in parts.items()})


def mean_by_rank(sample: Sample, values: Tensor) -> tuple[list[int], list[float]]:
    """Each predicted rank of the permutations, and the mean of values [n, L] there."""
    assert sample.order is not None
    rank = sample.order[sample.mask]
    counts = torch.bincount(rank)
    means = torch.bincount(rank, values[sample.mask].double()) / counts
    ranks = counts.nonzero().flatten()
    return ranks.tolist(), means[ranks].tolist()


def mean_by_image(sample: Sample, values: Tensor) -> list[float]:
    """The mean of values [n, L] over each image's predicted patches."""
    return [row[hidden].double().mean().item() for row, hidden in zip(values, sample.mask)]


def code_counts(sample: Sample, vocab_size: int) -> NDArray[np.int64]:
    """How often each token id is the target in the sample: [vocab_size], 0 for a dead code."""
    assert sample.ids is not None
    return np.bincount(sample.ids.flatten().numpy(), minlength=vocab_size)


def codes_to_show(counts: NDArray[np.int64], number: int) -> list[int]:
    """At most `number` codes, evenly spaced from the commonest to the rarest that is in use."""
    used = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
    return used[np.unique(np.linspace(0, len(used) - 1, number).round().astype(int))].tolist()


def patches_of(sample: Sample, code: int, number: int) -> list[tuple[int, int]]:
    """At most `number` patches of a code as (image, patch), at most one of an image.

    The nearest to the code's centroid come first, or the sample's first if the tokenizer gives no distance.
    """
    assert sample.ids is not None
    image, patch = (sample.ids == code).nonzero(as_tuple=True)
    if sample.code_distance is not None:
        nearest = sample.code_distance[image, patch].argsort(stable=True)
        image, patch = image[nearest], patch[nearest]
    first = {}
    for place in zip(image.tolist(), patch.tolist()):
        first.setdefault(place[0], place)
    return list(first.values())[:number]


def surroundings(view: Tensor, patch: int, patch_size: int) -> NDArray[np.uint8]:
    """A patch of a view [S, S, 3] amid its darkened neighbours, [3 P, 3 P, 3]; black beyond the border."""
    size = patch_size
    padded = np.pad(view.numpy(), ((size, size), (size, size), (0, 0)))
    row, column = (size * i for i in divmod(patch, view.shape[0] // size))
    light = np.full((3 * size, 3 * size, 1), 0.45)
    light[size : 2 * size, size : 2 * size] = 1
    return (padded[row : row + 3 * size, column : column + 3 * size] * light).astype(np.uint8)


def relative_name(index: Index, i: int) -> str:
    """The path of an index's i-th image below the data set's folder."""
    return os.path.relpath(index.path(i), index.root)
