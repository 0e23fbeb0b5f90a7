"""Write a timm model as one ONNX graph: `python tools/export_onnx.py FOLDER OUT.onnx`.

FOLDER is what export_timm.py, import_weights.py or finetune.py (RUN/timm) wrote. The graph takes `images` [B, 3, S, S], normalised
as config.json says, for any B, and gives `features` [B, N, D], the tokens after the final norm, class token first;
`embedding` [B, D], what a classifier sees; and `logits` [B, classes], where there is one. All float32, also of an --fp16 graph.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from mapet_ds.errors import ConfigError
from mapet_ds.files import staged
from mapet_ds.weights import UNREADABLE

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = {False: 1e-4, True: 1e-2}
"""By fp16: the difference of an output to PyTorch's in fp32 up to which a graph counts as equal. fp32: the largest, absolute;
fp16: its root mean square over the output's."""
ONE_FILE = 2**31 - 2**24
"""Bytes of weights that the graph's own file can hold, protobuf's limit less the graph; more lie beside, in OUT.onnx.data."""


class Graph(nn.Module):
    """What the exported graph computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outputs = ["features", "embedding", *(["logits"] if model.num_classes else [])]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.model.forward_features(images.to(next(self.model.parameters()).dtype))
        outputs = [features, self.model.forward_head(features, pre_logits=True)]
        outputs += [self.model.forward_head(features)] if self.model.num_classes else []
        return tuple(output.float() for output in outputs)


def read_model(folder: Path) -> nn.Module:
    """The timm model of a folder, for evaluation.

    Raises:
        ConfigError: a package or the folder is missing, or timm can't build it.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"ONNX needs {', '.join(missing)}, not installed here: python -m pip install -e '.[onnx]'"
        )
    if lacking := [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]:
        raise ConfigError(
            f"{folder} is no timm model: it lacks {' and '.join(lacking)}. tools/export_timm.py RUN OUT writes one."
        )
    try:
        # exportable: attention as its products, for torch 2.14's exporter fails at the fused one of a BEiT
        return timm.create_model(f"local-dir:{folder}", pretrained=True, exportable=True).eval()
    except UNREADABLE as error:
        raise ConfigError(f"timm can't build {folder}: {type(error).__name__} {error}") from error


@torch.no_grad()
def differences(path: Path, graph: Graph, size: int, fp16: bool) -> dict[str, float]:
    """By output, onnxruntime's largest difference to PyTorch's, of one random image and of three; as TOLERANCE measures it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator, found = torch.Generator().manual_seed(0), dict.fromkeys(graph.outputs, 0.0)
    for batch in (1, 3):
        images = torch.randn(batch, 3, size, size, generator=generator)
        given = session.run(graph.outputs, {"images": images.numpy()})
        for name, output, expected in zip(graph.outputs, given, graph(images), strict=True):
            error, expected = output - expected.numpy(), expected.numpy()
            difference = np.sqrt(np.mean(error**2) / np.mean(expected**2)) if fp16 else np.abs(error).max()
            found[name] = max(found[name], float(difference)) if output.shape == expected.shape else np.inf
    return found


def export_onnx(folder: Path, out: Path, fp16: bool) -> dict[str, float]:
    """Write the graph; its differences to PyTorch's, by output. Nothing is written where one is beyond TOLERANCE.

    Raises:
        ConfigError: no model there, or a graph that computes something else.
    """
    model = read_model(folder)
    size = model.pretrained_cfg["input_size"][-1]
    bytes_of_weights = sum(p.numel() * (2 if fp16 else 4) for p in model.parameters())
    with staged(out.absolute().parent) as beside:
        graph = Graph(model.half() if fp16 else model).eval()
        torch.onnx.export(
            graph,
            (torch.zeros(2, 3, size, size),),
            beside / out.name,
            dynamo=True,
            input_names=["images"],
            output_names=graph.outputs,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=bytes_of_weights > ONE_FILE,
            verbose=False,
        )
        found = differences(beside / out.name, Graph(read_model(folder)), size, fp16)
        if not max(found.values()) <= TOLERANCE[fp16]:
            told = ", ".join(f"{name} {difference:.3g}" for name, difference in found.items())
            raise ConfigError(f"Nothing was written: onnxruntime's outputs differ from PyTorch's by {told}.")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of config.json and model.safetensors")
    parser.add_argument("out", type=Path, metavar="OUT.onnx")
    parser.add_argument("--fp16", action="store_true", help="weights and computation in half precision")
    arguments = parser.parse_args()
    try:
        found = export_onnx(arguments.folder, arguments.out, arguments.fp16)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except torch.onnx.OnnxExporterError as error:
        says = str(error.__cause__ or error).partition("\n")[0]
        print(
            f"Nothing was written: PyTorch's exporter can't turn {arguments.folder} into ONNX: {says}",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        print(f"Nothing was written: {arguments.out} can't be: {error}.", file=sys.stderr)
        return 2
    kind = "relative" if arguments.fp16 else "largest"
    print(f"{arguments.out}: {kind} difference of onnxruntime's outputs to PyTorch's in fp32:")
    for name, difference in found.items():
        print(f"  {name} {difference:.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
