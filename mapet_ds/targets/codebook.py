"""k-CLIP's codebook: the K centroids of a k-means on the frozen CLIP's features.

It is one safetensors file that records its provenance, so that another teacher, crop or size is refused.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from mapet_ds.config.sections import DataConfig
from mapet_ds.errors import ConfigError
from mapet_ds.files import whole_file
from mapet_ds.weights import shapes_only

SCORES = 2**26
"""Distances held at once in `assign`: 256 MiB of fp32."""


def source_of(identity: dict[str, str | int], data: DataConfig) -> dict[str, str]:
    """The origin of features, for a codebook's provenance: the teacher's identity and the crops it saw."""
    source = {f"teacher.{key}": str(value) for key, value in identity.items()} | {"data.crop": data.crop}
    if data.crop == "random":
        scale, ratio = str(list(data.crop_scale)), str(list(data.crop_ratio))
        source |= {"data.crop_scale": scale, "data.crop_ratio": ratio}
    return source


def has_tf32(rows: Tensor) -> bool:
    """Whether these rows have 16 bits and lie on a GPU with TF32, several times as fast as fp32."""
    if shapes_only():  # costs are counted as a GPU's
        return rows.element_size() == 2
    return rows.is_cuda and rows.element_size() == 2 and torch.cuda.is_tf32_supported()


def tf32_parts(x: Tensor) -> list[Tensor]:
    """Two fp32 tensors that add up to x: the upper 10 bits of its fraction, and the rest.

    TF32 keeps the first part whole, and of the second all but a 2^-21 of x.
    """
    upper = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return [upper, x - upper]


class Codebook:
    """K centroids [K, C], always fp32, and the provenance they were saved with (text by name)."""

    def __init__(self, centroids: Tensor, provenance: dict[str, Any]) -> None:
        self.centroids = centroids.float().contiguous()
        self.provenance = {key: str(value) for key, value in provenance.items()}
        self._square_norms = self.centroids.square().sum(dim=1)

    @functools.cached_property
    def sha256(self) -> str:
        """The checksum of the centroids' bytes."""
        return hashlib.sha256(self.centroids.cpu().numpy().data).hexdigest()

    def to(self, device: torch.device) -> Codebook:
        """Moves the centroids to the device, as a module does, and returns self."""
        self.centroids, self._square_norms = self.centroids.to(device), self._square_norms.to(device)
        return self

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """Ids of the nearest centroids: [..., C] of any float type -> long [...], on the features' device.

        Distances are Euclidean and as exact as in full fp32, whatever autocast or TF32 are set to: a bf16
        product flips up to a quarter of the ids. Ids equal those of FAISS's IndexFlatL2 outside ties.
        Features of 16 bits on a GPU, which TF32 holds whole, take two products in it, one with each of the
        centroids' `tf32_parts`. Rows are taken in chunks that bound the memory. Does not make the host wait.
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
        """Refuses a codebook of another size, or fitted on other features than this teacher's of these crops.

        Raises:
            ConfigError: naming the first difference, with the codebook's value and the run's.
        """
        wanted = source_of(identity, data) | {"tokenizer.vocab_size": str(vocab_size)}
        # A name may be an alias, or a folder that moved; the checksum covers the architecture.
        del wanted["teacher.name"]
        for key, value in wanted.items():
            recorded = self.provenance.get(key, "not recorded")
            if recorded != value:
                names = self.provenance.get("teacher.name"), identity["name"]
                then, here = (f" (teacher {name})" if key.startswith("teacher.") else "" for name in names)
                raise ConfigError(
                    f"The codebook was fitted with {key} = {recorded[:24]}{then}, but this run has "
                    f"{value[:24]}{here}. Fit one with tools/fit_codebook.py and this recipe, or change the "
                    "recipe."
                )

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: a file of this name is always whole. One rank calls it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as beside:
            metadata = self.provenance | {"sha256": self.sha256}
            save_file({"centroids": self.centroids.cpu()}, beside, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Codebook:
        """The codebook in a file, of which nothing is ever executed.

        Raises:
            ConfigError: no such file, not a codebook, or damaged.
        """
        if not Path(path).is_file():
            raise ConfigError(
                f"tokenizer.path = {str(path)!r} is not a file: tools/fit_codebook.py writes it."
            )
        source = f"tokenizer.path = {path}"
        try:
            with safetensors.safe_open(path, "pt") as file:
                provenance = file.metadata() or {}
                centroids = file.get_tensor("centroids")
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(f"{source} is not a codebook: {error}. Fit it again.") from error
        if centroids.ndim != 2 or centroids.dtype != torch.float32 or "sha256" not in provenance:
            raise ConfigError(f"{source} was not written by tools/fit_codebook.py. Fit it again.")
        recorded = provenance.pop("sha256")
        codebook = cls(centroids, provenance)
        if codebook.sha256 != recorded:
            raise ConfigError(f"{source} is damaged: its checksum is not the recorded one. Fit it again.")
        return codebook
