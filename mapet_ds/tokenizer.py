"""Tokenizers, which turn an image into one id per patch; looked up here by name.

k-CLIP is here: the nearest of K centroids found by k-means on the frozen CLIP's features. Its codebook is one safetensors
file that carries where it came from, so that another teacher, crop or size is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import pkgutil
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import safetensors
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from mapet_ds import draws
from mapet_ds.config import Config, ConfigError, DataConfig, TokenizerConfig
from mapet_ds.data import Loader, View
from mapet_ds.index import Index
from mapet_ds.launch import Ranks, shapes_only
from mapet_ds.teacher import Teacher, build_teacher, teacher_mean_std

logger = logging.getLogger(__name__)
SCORES = 2**26
"""Distances held at once in `assign`: 256 MiB of fp32."""
TOKENIZERS = {
    # name: factory, called with the config and the device
    "kclip": "mapet_ds.tokenizer:KClip",
    "vqkd": "mapet_ds.vqkd:VQKD",
}


class Tokenizer(Protocol):
    """Images to one id per patch of the student, without gradient."""

    view: View
    """The images it wants."""
    vocab_size: int
    identity: dict[str, Any]
    """What a checkpoint must find unchanged at resume."""

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, T, T] normalised images -> long ids [B, L] in 0 .. vocab_size - 1, patches row by row from the top left."""


def build_tokenizer(config: Config, device: torch.device) -> Tokenizer:
    """The tokenizer that tokenizer.name names, on `device`. Every rank must call it.

    Raises:
        ConfigError: no such name or factory, or another number of ids than tokenizer.vocab_size.
    """
    name = config.tokenizer.name
    if name not in TOKENIZERS and ":" not in name:
        raise ConfigError(
            f"tokenizer.name = {name} is not known; there are: {', '.join(TOKENIZERS)}, or name your own as "
            "package.module:factory."
        )
    try:
        factory = pkgutil.resolve_name(TOKENIZERS.get(name, name))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"tokenizer.name = {name} can't be resolved: {error}. Its module must be installed or on PYTHONPATH."
        ) from error
    if not callable(factory):
        raise ConfigError(f"tokenizer.name = {name} is a {type(factory).__name__}, not a factory(config, device).")
    tokenizer = factory(config, device)
    if tokenizer.vocab_size != config.tokenizer.vocab_size:
        raise ConfigError(
            f"The tokenizer {name} has {tokenizer.vocab_size} ids, tokenizer.vocab_size is {config.tokenizer.vocab_size}. "
            f"Set tokenizer.vocab_size={tokenizer.vocab_size}."
        )
    return tokenizer


def source_of(identity: dict[str, str | int], data: DataConfig) -> dict[str, str]:
    """Where features come from, for a codebook's provenance: the teacher's identity and the crops it saw."""
    source = {f"teacher.{key}": str(value) for key, value in identity.items()} | {"data.crop": data.crop}
    if data.crop == "random":
        source |= {"data.crop_scale": str(list(data.crop_scale)), "data.crop_ratio": str(list(data.crop_ratio))}
    return source


def has_tf32(rows: Tensor) -> bool:
    """Whether these rows lie in 16 bits on a GPU whose tensor cores multiply in TF32, several times as fast as in fp32."""
    return rows.element_size() == 2 and (shapes_only() or (rows.is_cuda and torch.cuda.is_tf32_supported()))


def tf32_parts(x: Tensor) -> list[Tensor]:
    """Two fp32 tensors that add up to x: its upper 10 bits of the fraction, which TF32 keeps, and the rest, of which it keeps
    all but a 2^-21 of x."""
    upper = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return [upper, x - upper]


class Codebook:
    """K centroids [K, C], always fp32, and the provenance they were saved with (text by name)."""

    def __init__(self, centroids: Tensor, provenance: dict[str, Any]) -> None:
        self.centroids = centroids.float().contiguous()
        self.provenance = {key: str(value) for key, value in provenance.items()}
        self.sha256 = "" if shapes_only() else hashlib.sha256(self.centroids.cpu().numpy().data).hexdigest()
        self._square_norms = self.centroids.square().sum(dim=1)

    def to(self, device: torch.device) -> Codebook:
        """Move the centroids to the device, as a module does; returns itself."""
        self.centroids, self._square_norms = self.centroids.to(device), self._square_norms.to(device)
        return self

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """Ids of the nearest centroids: [..., C] of any float type -> long [...], on the features' device.

        Euclidean, as in full fp32 whatever autocast or TF32 say (a bf16 product flips up to a quarter of the ids); equal to
        FAISS's IndexFlatL2 outside ties. Features of 16 bits on a GPU take two products in TF32, which has room for all their
        bits, over parts of the centroids that it has room for. Rows are taken in chunks that bound the memory. Does not make the
        host wait.
        """
        rows = features.reshape(-1, features.shape[-1])
        ids = torch.empty(len(rows), dtype=torch.long, device=rows.device)
        chunk = max(1, SCORES // len(self.centroids))
        first, *rest = tf32_parts(self.centroids) if has_tf32(rows) else [self.centroids]
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if rest else "highest")
        try:
            with torch.autocast(rows.device.type, enabled=False):
                for start in range(0, len(rows), chunk):
                    x = rows[start : start + chunk].float()
                    scores = torch.addmm(self._square_norms, x, first.T, alpha=-2)  # |c|^2 - 2 x.c
                    for part in rest:
                        scores.addmm_(x, part.T, alpha=-2)
                    torch.argmin(scores, dim=1, out=ids[start : start + chunk])
        finally:
            torch.set_float32_matmul_precision(precision)
        return ids.view(features.shape[:-1])

    def check(self, identity: dict[str, str | int], data: DataConfig, vocab_size: int) -> None:
        """Refuse a codebook that was not fitted on this teacher's features of these crops, or is of another size.

        Raises:
            ConfigError: naming what the codebook says and what the run says.
        """
        wanted = source_of(identity, data) | {"tokenizer.vocab_size": vocab_size}
        del wanted["teacher.name"]  # the checksum covers the architecture; a name may be an alias, a folder may move
        for key, value in wanted.items():
            found = self.provenance.get(key, "not recorded")
            if found != str(value):
                names = self.provenance.get("teacher.name"), identity["name"]
                then, here = (f" (teacher {name})" if key.startswith("teacher.") else "" for name in names)
                raise ConfigError(
                    f"The codebook was fitted with {key} = {found[:24]}{then}, but this run has {str(value)[:24]}{here}. "
                    "Fit one with tools/fit_codebook.py and this recipe, or change the recipe."
                )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, beside its place first: a file of this name is always whole. One rank calls it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.partial")
        save_file({"centroids": self.centroids.cpu()}, beside, metadata=self.provenance | {"sha256": self.sha256})
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Codebook:
        """Read a codebook; nothing in the file is ever executed.

        Raises:
            ConfigError: no such file, not a codebook, or damaged.
        """
        if not Path(path).is_file():
            raise ConfigError(f"tokenizer.path = {str(path)!r} is not a file: tools/fit_codebook.py writes it.")
        try:
            with safetensors.safe_open(path, "pt") as file:
                provenance = file.metadata() or {}
                centroids = file.get_tensor("centroids")
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(f"tokenizer.path = {path} is not a codebook: {error}. Fit it again.") from error
        if centroids.ndim != 2 or centroids.dtype != torch.float32 or "sha256" not in provenance:
            raise ConfigError(f"tokenizer.path = {path} was not written by tools/fit_codebook.py. Fit it again.")
        recorded = provenance.pop("sha256")
        codebook = cls(centroids, provenance)
        if codebook.sha256 != recorded:
            raise ConfigError(f"tokenizer.path = {path} is damaged: its checksum is not the recorded one. Fit it again.")
        return codebook


class KClip:
    """A `Tokenizer`: the nearest centroid of each of the teacher's patch features. Every rank must build and call it.

    Raises:
        ConfigError: no codebook, or one of another teacher, crop mode or size.

    Source: MaPeT (arXiv 2306.07346), k-CLIP.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        whole = not shapes_only()
        if whole:
            self.codebook = Codebook.load(config.tokenizer.path)
        self.teacher = build_teacher(config.teacher, device, config.train.compile)
        self.teacher.check_grid(config.grid)
        if whole:
            self.codebook.check(self.teacher.identity, config.data, config.tokenizer.vocab_size)
        else:
            self.codebook = Codebook(torch.empty(config.tokenizer.vocab_size, self.teacher.embed_dim), {})
        self.codebook.to(device)
        self.view = View(config.teacher.img_size, *teacher_mean_std(config.teacher))
        self.vocab_size = len(self.codebook.centroids)
        teacher = self.teacher
        self.identity = {"teacher": teacher.identity, "codebook": self.codebook.sha256, "dtype": str(teacher.dtype)}

    def __call__(self, images: Tensor) -> Tensor:
        return self.codebook.assign(self.teacher(images))


def fit(features: NDArray[np.float32], config: TokenizerConfig, seed: int, source: dict[str, str] | None = None) -> Codebook:
    """Euclidean k-means by FAISS on [n, C] features: on all GPUs it sees, else on the CPU. One process calls it.

    The provenance gets `source`, the settings, where it ran, and how the points use the centroids. Same points in the same
    order on a CPU -> same bits.

    Raises:
        ConfigError: fewer points than centroids, or features that are not finite.

    Source: MaPeT (arXiv 2306.07346), k-CLIP.
    """
    points, embed_dim = features.shape
    if points < config.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size = {config.vocab_size}, but there are only {points} patch features to cluster: use more "
            f"images or set tokenizer.vocab_size to at most {points}."
        )
    finite = np.isfinite(np.einsum("ij->i", features))  # one number a row: no mask of the whole size
    if not finite.all():
        raise ConfigError(
            f"{points - int(finite.sum())} of {points} patch features are not finite: the teacher's weights are damaged, or "
            "its precision is too low (try teacher.precision=fp32)."
        )
    gpus = faiss.get_num_gpus()
    kmeans = faiss.Kmeans(
        embed_dim, config.vocab_size, niter=config.iterations, nredo=config.redo, seed=seed, gpu=gpus,
        max_points_per_centroid=config.points_per_centroid, min_points_per_centroid=1,
    )  # fmt: skip
    kmeans.train(features)
    distances, ids = kmeans.assign(features)
    usage = np.bincount(ids, minlength=config.vocab_size) / points
    used = usage[usage > 0]
    provenance = (source or {}) | {
        "tokenizer.vocab_size": config.vocab_size,
        "tokenizer.iterations": config.iterations,
        "tokenizer.redo": config.redo,
        "tokenizer.points_per_centroid": config.points_per_centroid,
        "seed": seed,
        "points": points,
        "inertia": float(distances.sum(dtype=np.float64)),
        "dead_codes": config.vocab_size - len(used),
        "perplexity": float(np.exp(-(used * np.log(used)).sum())),
        "faiss": f"{faiss.__version__} on {f'{gpus} GPU' if gpus else 'CPU'}",
    }
    return Codebook(torch.from_numpy(kmeans.centroids.copy()), provenance)


def num_points(images: int, config: Config) -> int:
    """Features the codebook of this recipe is fitted on: points_per_centroid for each code, or all that there are.

    Raises:
        ConfigError: fewer than codes.
    """
    available, wanted = images * config.num_patches, config.tokenizer.vocab_size * config.tokenizer.points_per_centroid
    if available < config.tokenizer.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size = {config.tokenizer.vocab_size}, but {images} images have only {available} patches: use "
            f"more images or set tokenizer.vocab_size to at most {available}."
        )
    return min(available, wanted)


def chosen_patches(
    config: Config, images: int, first: int, slots: int
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """Which patches of `slots` consecutive images, from place `first` of the epoch on, the codebook is fitted on.

    Every image gives equally many, up to rounding; which ones is drawn by its place. Images past the end of the epoch give
    none. Returns the place of the first of these points among all, and for each point the image (0 .. slots - 1) and patch.
    """
    ends = np.minimum(np.arange(first, first + slots + 1), images) * num_points(images, config) // images
    numbers = draws.uniforms(config.seed, draws.Purpose.CODEBOOK, 0, first, slots, config.num_patches)
    image, place = np.nonzero(np.arange(config.num_patches) < np.diff(ends)[:, None])
    return int(ends[0]), image, np.argsort(numbers, axis=1, kind="stable")[image, place]


def sample_features(config: Config, index: Index, teacher: Teacher, ranks: Ranks) -> NDArray[np.float32] | None:
    """[n, C] features of the keyed sample of patches of the whole set, on rank 0; None elsewhere. Every rank must call it.

    The pass is one step whose global batch is the whole set: places, crops and patches don't depend on the ranks.
    """
    micro, images = config.train.micro_batch_size, len(index)
    micro_steps = -(-images // (micro * ranks.world_size))
    train = dataclasses.replace(config.train, global_batch_size=micro_steps * micro * ranks.world_size)
    loader = Loader(
        dataclasses.replace(config, train=train), index, student=False, rank=ranks.rank, world_size=ranks.world_size,
        local_rank=ranks.local_rank, teacher=View(config.teacher.img_size, *teacher_mean_std(config.teacher)),
    )  # fmt: skip
    on_first = ranks.rank == 0
    features = np.empty((num_points(images, config), teacher.embed_dim), np.float32) if on_first else None
    for micro_step in tqdm(range(micro_steps), "features", disable=not (on_first and config.log.progress), unit="batch"):
        dense = teacher(next(loader).teacher_images.to(ranks.device))
        for bad, reason in loader.new_bad():
            logger.warning("Unreadable, and replaced by the next of the order: %s (%s)", index.path(bad), reason)
        slot = draws.first_slot(micro_step, ranks.rank, ranks.world_size, micro)
        start, image, patch = chosen_patches(config, images, slot, micro)
        points = dense[torch.from_numpy(image), torch.from_numpy(patch)].float().cpu().numpy()
        pieces = [None] * ranks.world_size if on_first else None
        dist.gather_object((start, points), pieces, group=ranks.control)
        for first, piece in pieces or ():
            features[first : first + len(piece)] = piece
    loader.close()
    return features
