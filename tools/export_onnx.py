"""Write a timm model as one ONNX graph: `python tools/export_onnx.py FOLDER OUT.onnx`.

FOLDER is what export_timm.py, import_weights.py or finetune.py (RUN/timm) wrote. The graph takes `images`
[B, 3, S, S], normalised as config.json says, for any B. It gives `features` [B, N, D], the tokens after the
final norm, class token first; `embedding` [B, D], what a classifier sees; and `logits` [B, classes], where
there is a classifier. All are float32, also of an --fp16 graph.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from mapet_ds.errors import ConfigError
from mapet_ds.files import staged
from mapet_ds.terminal import answer, option_parser
from mapet_ds.weights import UNREADABLE

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = {False: 1e-4, True: 1e-2}
"""By fp16: the difference of an output to PyTorch's in fp32 up to which a graph counts as equal. fp32: the
largest, absolute; fp16: its root mean square over the output's."""
ONE_FILE = 2**31 - 2**24
"""Bytes of weights that the graph's own file can hold, protobuf's limit less the graph. More lie beside it,
in OUT.onnx.data."""


class Graph(nn.Module):
    """What the exported graph computes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.outputs = ["features", "embedding", *(["logits"] if model.num_classes else [])]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.model.forward_features(images.to(next(self.model.parameters()).dtype))
        outputs = [features, self.model.forward_head(features, pre_logits=True)]
        outputs += [self.model.forward_head(features)] if self.model.num_classes else []
        return tuple(output.float() for output in outputs)


def read_model(folder: Path) -> Any:
    """The timm model of a folder, for evaluation.

    Raises:
        ConfigError: a package or the folder is missing, or timm can't build it.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        install = "python -m pip install -e '.[onnx]'"
        raise ConfigError(f"ONNX needs {', '.join(missing)}, not installed here: {install}")
    if lacking := [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]:
        parts = " and ".join(lacking)
        raise ConfigError(
            f"{folder} is no timm model: it lacks {parts}. tools/export_timm.py RUN OUT writes one."
        )
    try:
        # exportable: attention as its products, for torch 2.14's exporter fails at the fused one of a BEiT
        return timm.create_model(f"local-dir:{folder}", pretrained=True, exportable=True).eval()
    except UNREADABLE as error:
        raise ConfigError(f"timm can't build {folder}: {type(error).__name__} {error}") from error


@torch.no_grad()
def differences(path: Path, graph: Graph, size: int, fp16: bool) -> dict[str, float]:
    """By output, onnxruntime's largest difference to PyTorch's of one random image and of three.

    It is measured as TOLERANCE says, and infinite where shapes differ.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator, largest = torch.Generator().manual_seed(0), dict.fromkeys(graph.outputs, 0.0)
    for batch in (1, 3):
        images = torch.randn(batch, 3, size, size, generator=generator)
        given: Any = session.run(graph.outputs, {"images": images.numpy()})
        for name, output, expected in zip(graph.outputs, given, graph(images), strict=True):
            error, expected = output - expected.numpy(), expected.numpy()
            difference = np.sqrt(np.mean(error**2) / np.mean(expected**2)) if fp16 else np.abs(error).max()
            difference = float(difference) if output.shape == expected.shape else np.inf
            largest[name] = max(largest[name], difference)
    return largest


def export_onnx(folder: Path, out: Path, fp16: bool) -> dict[str, float]:
    """Writes the graph; gives its differences to PyTorch's, by output.

    Raises:
        ConfigError: no model there, one that can't become a graph, or a graph that computes something else
            than TOLERANCE allows. Nothing is written then.
    """
    model = read_model(folder)
    size = model.pretrained_cfg["input_size"][-1]
    weights = sum(p.numel() * (2 if fp16 else 4) for p in model.parameters())
    with staged(out.absolute().parent) as beside:
        graph, images = Graph(model.half() if fp16 else model).eval(), torch.zeros(2, 3, size, size)
        try:
            torch.onnx.export(
                graph, (images,), beside / out.name, dynamo=True, input_names=["images"],
                output_names=graph.outputs, dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                external_data=weights > ONE_FILE, verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).partition("\n")[0]
            exporter = f"PyTorch's exporter can't turn {folder} into ONNX"
            raise ConfigError(f"Nothing was written: {exporter}: {reason}") from error
        found = differences(beside / out.name, Graph(read_model(folder)), size, fp16)
        if not max(found.values()) <= TOLERANCE[fp16]:
            by = ", ".join(f"{name} {difference:.3g}" for name, difference in found.items())
            raise ConfigError(f"Nothing was written: onnxruntime's outputs differ from PyTorch's by {by}.")
    return found


def export(arguments: argparse.Namespace) -> None:
    """Writes the graph, and says how near its outputs are."""
    found = export_onnx(arguments.folder, arguments.out, arguments.fp16)
    kind = "relative" if arguments.fp16 else "largest"
    print(f"{arguments.out}: {kind} difference of onnxruntime's outputs to PyTorch's in fp32:")
    for name, difference in found.items():
        print(f"  {name} {difference:.3g}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("folder", type=Path, help="of config.json and model.safetensors")
    parser.add_argument("out", type=Path, metavar="OUT.onnx")
    parser.add_argument("--fp16", action="store_true", help="weights and computation in half precision")
    return parser.parse_args(argv)


if __name__ == "__main__":
    words = parse(sys.argv[1:])
    sys.exit(answer(lambda: export(words), writes=words.out))
