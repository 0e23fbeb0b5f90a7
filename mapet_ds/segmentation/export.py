"""A segmenter as a program of PyTorch's own, which runs without this package and without timm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mapet_ds.errors import ExportError
from mapet_ds.files import staged
from mapet_ds.segmentation.segmenter import Segmenter

TOLERANCE = 1e-4
"""The largest absolute difference of logits at which an export counts as equal."""


class Program(nn.Module):
    """What is exported: normalised images [B, 3, S, S] -> logits [B, classes, S, S]."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.predict(images)


def export_segmenter(model: Segmenter, description: dict[str, Any], out: Path) -> None:
    """Writes segmenter.pt2, model.safetensors and segmenter.json. For rank 0 only.

    torch.export.load("OUT/segmenter.pt2").module() takes any number of images at a time. Nothing is written
    unless its logits, read back, are the model's own.

    model: on the CPU, fp32. description: what segmenter.json holds beside the side of the images.

    Raises:
        ExportError: they differ by more than TOLERANCE.
    """
    program, generator = Program(model).eval().requires_grad_(False), torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, model.size, model.size, generator=generator)
    with staged(out) as folder, torch.no_grad():
        path = folder / "segmenter.pt2"
        batch = torch.export.Dim("batch", min=1)
        exported = torch.export.export(program, (images,), dynamic_shapes=({0: batch},))
        torch.export.save(exported, path)
        again, one = torch.export.load(path).module(), images[:1]
        difference = max((again(x) - program(x)).abs().max().item() for x in (images, one))
        if not difference <= TOLERANCE:
            raise ExportError(
                f"Nothing was exported: the program's logits differ from the run's own by {difference:.3g}, "
                f"more than {TOLERANCE:g}."
            )
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
                  folder / "model.safetensors")  # fmt: skip
        written = {"size": model.size, **description}
        (folder / "segmenter.json").write_text(json.dumps(written, indent=1) + "\n")
