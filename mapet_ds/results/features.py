"""Features of images by a frozen ViT: mean patch tokens and class tokens of any blocks, from one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mapet_ds.config.sections import Config
from mapet_ds.data.index import Images
from mapet_ds.data.labelled import Bad, EvaluationBatches, report_unreadable, served
from mapet_ds.launch import Ranks

Features = NDArray[np.float32]
"""[n, D], a row for each image."""
Labels = NDArray[np.int64]
"""[n], the class of each image."""
Vectors = dict[str, NDArray[np.float32]]
"""By kind, [n, blocks, D]: "token", the class token, and "mean", that of the patch tokens; after the norm."""
FEATURES: dict[str, tuple[str, ...]] = {"mean": ("mean",), "token": ("token",), "both": ("token", "mean")}
"""What can be judged, and the vectors that are joined for it in this order."""
WORDS = {"mean": "mean of the patches", "token": "class token", "both": "class token and mean of the patches"}
"""The same for a reader."""


def kinds_of(model: Any) -> tuple[str, ...]:
    """The vectors that a model gives. A teacher, a tokenizer and a ViT without class token give the mean."""
    has_token = model.num_prefix_tokens and getattr(model, "cls_token", None) is not None
    return FEATURES["both" if has_token else "mean"]


def judged_feature(model: Any) -> str:
    """The feature that is judged where none is named: that of the objective which an export bears as its tag.

    The mean, where a model bears none.
    """
    settings, tag = Config(), model.pretrained_cfg.get("tag")
    return getattr(settings, tag).feature if tag in settings.objectives else "mean"


def chosen(vectors: Vectors, feature: str, blocks: Sequence[int]) -> Features:
    """One feature of FEATURES, [n, D']: its vectors of these places among the blocks, joined."""
    parts = [vectors[kind][:, place] for kind in FEATURES[feature] for place in blocks]
    return np.concatenate(parts, axis=1)


def _tokens(model: Any, images: Tensor, layers: Sequence[int] | None) -> list[Tensor]:
    """The tokens [B, N, D] after the final norm of each of these blocks; None: of the last."""
    if layers is None or list(layers) == [len(model.blocks) - 1]:
        return [model.forward_features(images)]
    outputs = model.forward_intermediates(
        images, list(layers), return_prefix_tokens=bool(model.num_prefix_tokens), norm=True, stop_early=True,
        output_fmt="NLC", intermediates_only=True,
    )  # fmt: skip
    if not model.num_prefix_tokens:
        return outputs
    return [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]


@torch.no_grad()
def patch_tokens(model: Any, images: Tensor, layer: int | None = None) -> Tensor:
    """The patch tokens [B, L, D] after the final norm, in fp32, of this block or the last."""
    (tokens,) = _tokens(model, images, None if layer is None else [layer])
    return tokens[:, model.num_prefix_tokens :].float()


@torch.inference_mode()
def features(
    model: Any, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device,
    layers: Sequence[int] | None = None, kinds: Sequence[str] = ("mean",),
) -> tuple[Vectors, Labels]:  # fmt: skip
    """The vectors of these kinds and the labels [n], in the loader's order.

    model: a timm ViT. Neither its class token nor registers are part of the mean.
    layers: ascending numbers of blocks, whose outputs go through the final norm; None: the last block.
    The host waits for the GPU.
    """
    model = model.to(device).eval()
    collected: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    labels = []
    for images, label in loader:
        outputs = _tokens(model, images.to(device, non_blocking=True), layers)
        for kind in kinds:
            first = model.num_prefix_tokens
            pooled = [tokens[:, 0] if kind == "token" else tokens[:, first:].mean(1) for tokens in outputs]
            collected[kind].append(torch.stack(pooled, dim=1).float().cpu())
        labels.append(label)
    return {kind: torch.cat(parts).numpy() for kind, parts in collected.items()}, torch.cat(labels).numpy()


def labelled_features(
    config: Any, model: Any, images: Images, transform: Callable[[Image.Image], Tensor], ranks: Ranks,
    doing: Callable[[str], Any], layers: Sequence[int] | None = None, kinds: Sequence[str] = ("mean",),
    start_method: str = "spawn", section: str = "data.",
) -> tuple[Vectors, Labels]:  # fmt: skip
    """The vectors and labels of the readable images in their order, on rank 0; empty elsewhere.

    Every rank must call it, and computes those of its share.

    config: gives train.micro_batch_size, data.workers, data.max_bad_share and data.exif_orientation.
    doing: called with a phrase before each batch.
    layers, kinds: as for `features`. start_method: as for `served`. section: as for `check_bad`.

    Raises:
        DataError: more than data.max_bad_share of the images are unreadable.
    """
    bad, dataset = Bad(), EvaluationBatches(config, images, transform, ranks.rank, ranks.world_size)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        numbers = range(len(dataset))
        made = served(dataset, numbers, config.data.workers, ranks, start_method)
        for number, batch in enumerate(made):
            doing(f"evaluating batch {number} of {len(dataset)}")
            bad.extend(batch.bad)
            yield batch.images, batch.label

    vectors, labels = features(model, batches(), ranks.device, layers, kinds)
    report_unreadable(config, images, bad, ranks, section)

    labels = in_order(labels, ranks)
    every = {kind: in_order(each, ranks)[labels >= 0] for kind, each in vectors.items()}
    return every, labels[labels >= 0]


def in_order(share: NDArray[Any], ranks: Ranks) -> NDArray[Any]:
    """The rows of all images in their order, on rank 0; none elsewhere. Every rank must call it.

    share: this rank's rows: image i is in the share of rank i % world_size, and all are equally long.
    """
    own = torch.from_numpy(share)
    parts = [torch.empty_like(own) for _ in range(ranks.world_size)] if ranks.rank == 0 else None
    dist.gather(own, parts, group=ranks.control)
    return (torch.stack(parts, dim=1).flatten(0, 1) if parts else own[:0]).numpy()


def unit_length(features: Features) -> Features:
    """Rows [n, D] divided by their lengths."""
    return F.normalize(torch.from_numpy(features), dim=1).numpy()
