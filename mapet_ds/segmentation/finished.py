"""A finished run judged on another data set: settings, checked before torch is imported, and figures."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import folder_rules, refuse_broken
from mapet_ds.config.segment import SegmentationConfig
from mapet_ds.errors import ConfigError
from mapet_ds.files import checksum, write_whole

if TYPE_CHECKING:
    from mapet_ds.launch import Ranks
    from mapet_ds.segmentation.segmenter import Segmenter

TAKEN = (
    "data.val", "data.val_masks", "data.release", "data.classes", "data.num_classes", "data.void_id",
    "data.reduce_zero_label", "data.short_side", "data.long_side", "data.workers", "data.max_bad_share",
    "evaluate.mode", "evaluate.stride", "evaluate.flip", "model.path",
)  # fmt: skip
"""The settings that may differ from the run's."""
OF_ANOTHER_SET = ("data.val_masks=", "data.classes=", "data.num_classes=null")
"""What is not the run's any more where data.val or data.release is given."""


def evaluation_settings(run: Path, overrides: Sequence[str]) -> SegmentationConfig:
    """The settings of a finished run with others on top, for its segmenter to be judged by.

    data.train is data.val. Every rank may call it.

    Raises:
        ConfigError: it is no finished run of segmentation, or a setting can't be taken or doesn't fit.
    """
    if not all((run / name).is_file() for name in ("config.yaml", "segmenter/segmenter.json")):
        raise ConfigError(
            f"--evaluate {run}: there is no config.yaml or {run / 'segmenter'}. Name the run_dir of a run of "
            "segmentation that is done; its own command continues one that is not."
        )
    keys = [override.partition("=")[0] for override in overrides]
    if others := [key for key in keys if key not in TAKEN]:
        raise ConfigError(f"{others[0]} can't differ from the run's. These can: {', '.join(TAKEN)}.")
    fresh = OF_ANOTHER_SET if {"data.val", "data.release"} & {*keys} else ()
    config = load_config(run / "config.yaml", [*fresh, *overrides], SegmentationConfig)

    # Neither the images that it has learnt from nor the weights that it began from need be there.
    val = config.data
    config = dataclasses.replace(
        config, run_dir=str(run), model=dataclasses.replace(config.model, untrained=True),
        data=dataclasses.replace(val, train="", train_masks=""),
    )  # fmt: skip
    refuse_broken(chain(folder_rules("data.val", val.val), config.rules()))
    data = dataclasses.replace(val, train=val.val, train_masks=val.val_masks)
    return dataclasses.replace(config, data=data)


def open_segmenter(config: SegmentationConfig, classes: int) -> Segmenter:
    """The segmenter that a run has left, in evaluation mode, on the CPU.

    Raises:
        ConfigError: its weights are not those of the ViT that model.path describes.
    """
    from mapet_ds.segmentation.segmenter import Segmenter
    from mapet_ds.weights import mismatches, read_tensors, shapes

    path = Path(config.run_dir, "segmenter/model.safetensors")
    model, state = Segmenter(config, classes), read_tensors(path, str(path))
    if wrong := mismatches(shapes(model.state_dict()), shapes(state)):
        raise ConfigError(
            f"{path} is not of the ViT that model.path = {config.model.path} describes: {len(wrong)} tensors "
            f"differ, e.g. {wrong[0]}. Name the folder that the run began from."
        )
    model.load_state_dict(state)
    return model.eval()


def evaluate_finished(config: SegmentationConfig, ranks: Ranks) -> dict[str, Any]:
    """The figures of a finished run's segmenter on data.val. Every rank must call it.

    Raises:
        UserError: images, masks or classes that don't fit.
    """
    from tqdm import tqdm

    from mapet_ds.data.index import open_index
    from mapet_ds.segmentation.evaluation import Predictor
    from mapet_ds.segmentation.judging import Judging
    from mapet_ds.segmentation.masks import known_classes, open_masks

    folder = Path(config.run_dir, "segmenter")
    about = json.loads((folder / "segmenter.json").read_text())
    classes = ranks.from_first(lambda: known_classes(config.data, about["classes"]))
    with tempfile.TemporaryDirectory() as cache:
        index = ranks.first_then_all(lambda: open_index(config.data.images_of("val"), Path(cache)))
        masks = open_masks(config.data, "val", index, classes, ranks)
        model = open_segmenter(config, len(classes.names)).to(ranks.device)
        judging = Judging(config, index, masks, (about["mean"], about["std"]), ranks)
        predict = Predictor(model, config.evaluate, config.train.micro_batch_size)
        share, quiet = len(range(ranks.rank, len(index), ranks.world_size)), None if ranks.rank == 0 else True
        with tqdm(desc="data.val", total=share, unit="image", disable=quiet) as bar:

            def count(_: str) -> None:
                bar.update()

            judged = judging(predict, count)
    by_class = judged.by_class(classes.names)
    size = {"short_side": config.data.short_side, "long_side": config.data.long_side}
    return judged.means() | {
        "classes": by_class,
        "absent": [name for name, values in by_class.items() if not values["pixels"]],
        "run": config.run_dir,
        "segmenter": checksum(folder / "model.safetensors"),
        "val": str(index.root),
        "val_masks": masks.folder,
        "masks": masks.fingerprint,
        "evaluate": dataclasses.asdict(config.evaluate) | size,
    }


def report(figures: dict[str, Any], out: Path | None) -> None:
    """Prints the figures, and writes them as JSON where `out` names a file. For rank 0 only."""
    for name, values in figures["classes"].items():
        iou = "none" if values["iou"] is None else f"{values['iou']:.2f} %"
        print(f"{name:24} IoU {iou:>8}, {values['pixels']} pixels")
    means = f"mIoU {figures['val_miou']:.2f} %, class accuracy {figures['val_class_accuracy']:.2f} %"
    pixels = f"pixel accuracy {figures['val_pixel_accuracy']:.2f} %"
    print(f"{means}, {pixels} of {figures['val_images']} images", flush=True)
    if out:
        write_whole(out, json.dumps(figures, indent=1) + "\n")
