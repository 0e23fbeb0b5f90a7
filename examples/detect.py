"""Train Mask R-CNN on a ViT of a timm folder, on images with COCO's annotations, on one GPU or on a CPU.

    python examples/detect.py --model /runs/b16/timm --out /runs/b16_coco
        --train /data/coco/train2017 --train_json /data/coco/annotations/instances_train2017.json
        --val /data/coco/val2017 --val_json /data/coco/annotations/instances_val2017.json

Each epoch ends with COCO's figures on the validation images and with a file of weights. It needs
`pip install 'mapet_ds[detection]'`. docs/detection.md says what it leaves out.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import faster_coco_eval
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import v2

from mapet_ds.detection.mask_rcnn import mask_rcnn
from mapet_ds.errors import DataError, RunError
from mapet_ds.files import write_whole
from mapet_ds.terminal import answer
from mapet_ds.training.optim import layerwise_groups, parameter_groups

faster_coco_eval.init_as_pycocotools()  # torchvision imports it by that name


class Instances(Dataset):
    """Images with the boxes, labels and masks of their instances. Crowds are left out.

    size: the side of a random square crop after a resize by 0.1 to 2; None: images as they are.
    """

    def __init__(self, images: Path, annotations: Path, size: int | None = None) -> None:
        source = CocoDetection(images, str(annotations))
        self.coco, self.ids, self.categories = source.coco, source.ids, sorted(source.coco.cats)
        self.samples = wrap_dataset_for_transforms_v2(source, {"masks", "labels", "iscrowd"})
        crop: list[v2.Transform] = []
        if size:
            grey = {tv_tensors.Image: [124, 116, 104], "others": 0}
            crop = [v2.RandomHorizontalFlip(), v2.ScaleJitter((size, size), (0.1, 2.0))]
            crop += [v2.RandomCrop((size, size), pad_if_needed=True, fill=grey)]
        floats = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
        self.transform = v2.Compose([v2.ToImage(), *crop, floats])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """An image, float [3, h, w] in [0, 1], and boxes [n, 4], labels [n] and masks [n, h, w]."""
        image, target = self.samples[i]
        single = [not crowd for crowd in target.get("iscrowd", ())]
        masks = torch.zeros(0, image.height, image.width, dtype=torch.uint8)
        labels = torch.zeros(0, dtype=torch.long)
        if any(single):
            masks = target["masks"][single]
            labels = torch.tensor([self.categories.index(c) + 1 for c in target["labels"][single].tolist()])
        image, masks = self.transform(image, tv_tensors.Mask(masks))

        # What the crop has left of each, and its box.
        left = masks.flatten(1).bool().any(dim=1)
        image, masks, labels = image.as_subclass(Tensor), masks.as_subclass(Tensor)[left], labels[left]
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        return image, {"boxes": boxes, "labels": labels, "masks": masks}


def optimizer_of(model: Any, lr: float, layer_decay: float, steps: int) -> tuple[Any, Any]:
    """AdamW with rates that fall from block to block of the ViT, and ViTDet's schedule."""
    fresh = nn.ModuleList([model.backbone.levels, model.rpn, model.roi_heads])
    groups = layerwise_groups(model.backbone.vit, 0.1, layer_decay) + parameter_groups(fresh, 0.1)
    groups = [{**group, "lr": lr * group.get("lr_scale", 1.0)} for group in groups]
    warmup, falls = min(250, steps // 4), (0.889 * steps, 0.963 * steps)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / (warmup + 1)) * 0.1 ** sum(step >= fall for fall in falls)

    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    return optimizer, LambdaLR(optimizer, factor)


def side_by_side(batch: list[tuple[Tensor, Any]]) -> tuple[Any, ...]:
    """A batch as images and targets, which are of different sizes."""
    return tuple(zip(*batch))


def train_epoch(model: Any, loader: DataLoader, optimizer: Any, schedule: Any, device: torch.device) -> float:
    """Learns from all images once; gives the mean loss.

    Raises:
        RunError: a loss is not finite.
    """
    model.train()
    total = 0.0
    for images, targets in loader:
        images = [image.to(device) for image in images]
        targets = [{name: each.to(device) for name, each in target.items()} for target in targets]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = sum(model(images, targets).values())
        if not loss.isfinite():
            raise RunError("The loss is not finite: lower --lr.")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def detections(model: Any, data: Instances, device: torch.device) -> list[dict[str, Any]]:
    """What the model finds in each image, in COCO's format of results."""
    model.eval()
    found = []
    for i, image_id in enumerate(data.ids):
        (output,) = model([data[i][0].to(device)])
        output = {name: values.cpu() for name, values in output.items()}
        boxes = box_convert(output["boxes"], "xyxy", "xywh").tolist()
        masks = (output["masks"][:, 0] > 0.5).numpy().astype(np.uint8)
        for box, label, score, mask in zip(
            boxes, output["labels"].tolist(), output["scores"].tolist(), masks
        ):
            code = faster_coco_eval.mask.encode(np.asfortranarray(mask))
            segmentation = {"size": code["size"], "counts": code["counts"].decode()}
            found.append({"image_id": image_id, "category_id": data.categories[label - 1], "bbox": box,
                          "score": score, "segmentation": segmentation})  # fmt: skip
    return found


def figures(data: Instances, found: list[dict[str, Any]]) -> dict[str, float]:
    """COCO's AP and AP at an overlap of a half, of boxes and of masks, in percent."""
    if not found:
        return {f"{kind}_{name}": 0.0 for kind in ("bbox", "segm") for name in ("ap", "ap50")}
    results = {}
    for kind in ("bbox", "segm"):
        own = data.coco.loadRes(copy.deepcopy(found))  # it changes what it is given
        judged = faster_coco_eval.COCOeval_faster(data.coco, own, kind)
        judged.run()
        results |= {f"{kind}_ap": 100 * judged.stats[0], f"{kind}_ap50": 100 * judged.stats[1]}
    return {name: float(value) for name, value in results.items()}


def detect(arguments: argparse.Namespace) -> None:
    """Trains, evaluates each epoch, and writes OUT/metrics.jsonl, OUT/model.pt and OUT/detections.json."""
    torch.manual_seed(arguments.seed)
    device, out = torch.device("cuda" if torch.cuda.is_available() else "cpu"), arguments.out
    for path in (arguments.train_json, arguments.val_json):
        if not path.is_file():
            raise DataError(f"{path} is no file of annotations.")
    train = Instances(arguments.train, arguments.train_json, arguments.size)
    val = Instances(arguments.val, arguments.val_json)
    if train.categories != val.categories:
        raise DataError(f"{arguments.val_json} has other categories than {arguments.train_json}.")
    model = mask_rcnn(
        arguments.model, len(train.categories), arguments.size, arguments.drop_path, **arguments.settings
    )
    workers = {"num_workers": arguments.workers, "collate_fn": side_by_side}
    loader = DataLoader(train, arguments.batch, shuffle=True, **workers)
    steps = arguments.epochs * len(loader)
    optimizer, schedule = optimizer_of(model.to(device), arguments.lr, arguments.layer_decay, steps)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for epoch in range(1, arguments.epochs + 1):
        loss = train_epoch(model, loader, optimizer, schedule, device)
        found = detections(model, val, device)
        lines.append({"epoch": epoch, "loss": loss, **figures(val, found)})
        print(json.dumps(lines[-1]), flush=True)
        write_whole(out / "metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
        write_whole(out / "detections.json", json.dumps(found))
        torch.save(model.state_dict(), out / "model.pt")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "train", "train_json", "val", "val_json", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, value in {"epochs": 100, "batch": 4, "size": 1024, "workers": 4, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    for name, value in {"lr": 1e-4, "layer_decay": 0.7, "drop_path": 0.1}.items():
        parser.add_argument(f"--{name}", type=float, default=value, help=f"default {value}")
    own = {"type": json.loads, "default": {}, "metavar": "JSON"}
    parser.add_argument("--settings", **own, help="torchvision's own of Mask R-CNN")
    arguments = parser.parse_args()
    return answer(lambda: detect(arguments))


if __name__ == "__main__":
    sys.exit(main())
