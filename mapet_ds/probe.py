"""What frozen features are worth: nearest neighbours and a linear classifier on the mean patch token of a timm ViT."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import faiss
import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.datasets import ImageFolder

from mapet_ds.config import ConfigError
from mapet_ds.index import DataError


def load_timm(path: Path, architecture: str | None = None, untrained: bool = False, seed: int = 0) -> VisionTransformer:
    """A timm ViT for evaluation: a folder of config.json and model.safetensors, or weights and a name.

    untrained: the same architecture with fresh weights drawn from `seed`; no weights are read.

    Raises:
        ConfigError: nothing there to load, or weights that don't fit.
    """
    folder = path.parent if path.is_file() and architecture is None else path
    torch.manual_seed(seed)
    try:
        if (folder / "config.json").is_file():
            if not untrained and not (folder / "model.safetensors").is_file():
                raise ConfigError(f"--model {path}: there are no weights, {folder / 'model.safetensors'} is missing.")
            return timm.create_model(f"local-dir:{folder}", pretrained=not untrained, num_classes=0).eval()
        if not path.is_file():
            raise ConfigError(
                f"--model {path} is neither a folder with config.json and model.safetensors, as "
                "tools/export_timm.py writes it, nor a file of weights."
            )
        if architecture is None:
            raise ConfigError(f"--model {path}: weights alone don't tell the model; add --arch, timm's name for it.")
        checkpoint = None if untrained else path
        return timm.create_model(architecture, checkpoint_path=checkpoint, num_classes=0).eval()
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise ConfigError(f"timm can't load --model {path}: {' '.join(str(error).split())[:500]}") from error


def _read_rgb(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no image that can be read ({error}); tools/check_images.py lists all such.") from error


def labelled_folders(train: Path, val: Path, model: VisionTransformer) -> tuple[ImageFolder, ImageFolder]:
    """Two folders of classes of images, under timm's evaluation transform of the model.

    Raises:
        DataError: a folder that isn't there, an empty class, classes that differ.
    """
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    folders = []
    for root in (train, val):
        try:
            folders.append(ImageFolder(str(root), transform, loader=_read_rgb))
        except OSError as error:
            raise DataError(f"{root} must hold a sub-folder with images for each class. {error}") from error
    differing = sorted(set(folders[0].classes) ^ set(folders[1].classes))
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise DataError(
            f"{train} and {val} must have the same classes; only in one of them: {', '.join(differing[:5])}{more}."
        )
    return folders[0], folders[1]


@torch.inference_mode()
def features(
    model: VisionTransformer, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """[n, D] mean patch tokens after the final norm, of length 1, and [n] labels, in the loader's order.

    Class and register tokens are left out: MaPeT's loss never reaches the class token. The host waits for the
    GPU.
    """
    model = model.to(device).eval()
    collected, labels = [], []
    for images, label in loader:
        patches = model.forward_features(images.to(device, non_blocking=True))[:, model.num_prefix_tokens :]
        collected.append(F.normalize(patches.mean(1), dim=1).float().cpu())
        labels.append(label)
    return torch.cat(collected).numpy(), torch.cat(labels).numpy()


def knn(
    train_features: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    val_features: NDArray[np.float32],
    val_labels: NDArray[np.int64],
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy in percent of a weighted vote: each of the k most similar training images gives its class
    exp(cosine / temperature). Features [n, D] have length 1; the search is exact, on GPUs if there are any.

    Raises:
        DataError: fewer training images than k.

    Source: Wu et al., arXiv 1805.01978, section 3.4, with the values that DINO (arXiv 2104.14294) uses.
    """
    if len(train_features) < k:
        raise DataError(f"k = {k} neighbours can't be found among {len(train_features)} training images; lower --k.")
    index = faiss.IndexFlatIP(train_features.shape[1])
    if faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(train_features)
    cosines, neighbours = index.search(val_features, k)
    votes = np.zeros((len(val_features), int(train_labels.max()) + 1))
    rows = np.arange(len(val_features))[:, None]
    np.add.at(votes, (rows, train_labels[neighbours]), np.exp(cosines.astype(np.float64) / temperature))
    return 100 * float((votes.argmax(1) == val_labels).mean())


def linear(
    train_features: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    val_features: NDArray[np.float32],
    val_labels: NDArray[np.int64],
    penalty: float = 1e-4,
) -> float:
    """Accuracy in percent of a multinomial logistic regression on features [n, D], standardised by the training set's.

    For small sets: solved whole by L-BFGS, in float64 on the CPU, with `penalty` / 2 times the squared weights added to the
    mean cross-entropy; the same figure each time.
    """
    x, y = torch.from_numpy(train_features).double(), torch.from_numpy(train_labels)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / std
    weight = torch.zeros(x.shape[1], int(y.max()) + 1, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(weight.shape[1], dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    with torch.no_grad():
        found = ((torch.from_numpy(val_features).double() - mean) / std @ weight + bias).argmax(1)
    return 100 * float((found == torch.from_numpy(val_labels)).double().mean())
