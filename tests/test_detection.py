"""Mask R-CNN on an export: its pyramid and weights, boxes in an image's own pixels, the example's loop."""

import json
import re
import runpy
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_export import write_checkpoint
from test_finetune import MODEL
from timm.layers import resample_abs_pos_embed
from torchvision.ops import box_iou

from mapet_ds.config.sections import REPOSITORY
from mapet_ds.detection.mask_rcnn import load_pyramid, mask_rcnn
from mapet_ds.errors import ConfigError
from mapet_ds.results.export import export_timm

SMALL = {
    "width": 32, "rpn_post_nms_top_n_train": 60, "rpn_post_nms_top_n_test": 30,
    "box_batch_size_per_image": 32,
}  # fmt: skip
CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A ViT of random weights, for images of 32 pixels with patches of 8."""
    folder = tmp_path_factory.mktemp("detection")
    write_checkpoint(folder / "pretrained", MODEL)
    export_timm(folder / "pretrained", folder / "timm")
    return folder / "timm"


# The pyramid.


@pytest.mark.parametrize("size", [32, 96])
def test_the_backbone_is_the_export_and_all_of_it_learns(export, size):
    pyramid = load_pyramid(export, size, drop_path=0.0, width=16)
    source = timm.create_model(f"local-dir:{export}", pretrained=True, num_classes=0)
    expected = {name: each for name, each in source.state_dict().items() if not name.startswith("norm.")}
    if size != 32:
        positions = source.pos_embed.detach()
        expected["pos_embed"] = resample_abs_pos_embed(positions, (size // 8,) * 2, num_prefix_tokens=1)
    found = pyramid.vit.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())

    images = torch.randn(2, 3, size, size)
    maps = pyramid(images)
    sides = [size // stride for stride in (2, 4, 8, 16, 32)]
    assert [each.shape for each in maps.values()] == [(2, 16, side, side) for side in sides]
    assert [*maps] == ["0", "1", "2", "3", "pool"]
    if size == 32:
        source.eval()
        (last,) = source.forward_intermediates(images, [2], norm=False, intermediates_only=True)
        assert torch.allclose(pyramid.levels[2](last), maps["2"], atol=1e-5)

    for name in maps:
        pyramid.zero_grad()
        (pyramid(images)[name] ** 2 * torch.arange(1.0, 17)[:, None, None]).sum().backward()
        dead = [n for n, p in pyramid.vit.named_parameters() if p.grad is None or not p.grad.any()]
        assert dead == [], name


def test_a_map_lies_over_its_image(export):
    """What changes in one corner of the last map changes each map there, and nowhere else."""
    pyramid = load_pyramid(export, 96, width=16).eval()
    last = torch.randn(1, 32, 12, 12)
    other = last.clone()
    other[..., :2, 8:] += 1

    def maps(features):
        pyramid.vit.forward_intermediates = lambda *_, **__: [features]
        return pyramid(torch.zeros(1, 3, 96, 96))

    for name, before in maps(last).items():
        changed = (maps(other)[name] != before).any(dim=1)[0]
        side = len(changed)
        rows, columns = changed.any(dim=1).nonzero().flatten(), changed.any(dim=0).nonzero().flatten()
        assert rows.min() == 0 and rows.max() <= side / 6 + 1, name
        assert columns.min() >= 2 * side / 3 - 1 and columns.max() == side - 1, name


def test_what_gives_no_pyramid_is_a_sentence(export, tmp_path):
    with pytest.raises(ConfigError, match="100 pixels is not a multiple of 32, .* patches of 8: take 96"):
        load_pyramid(export, 100)
    with pytest.raises(ConfigError, match="/nowhere is neither a folder nor a file"):
        load_pyramid("/nowhere", 32)
    config = json.loads((export / "config.json").read_text())
    for architecture, arguments, says in (
        (
            "vit_tiny_patch16_224",
            {"patch_size": 14, "depth": 1},
            "patches of 14 pixels, and torchvision pools",
        ),
        ("resnet10t", {}, "timm can't build"),
    ):
        (tmp_path / "config.json").write_text(
            json.dumps(config | {"architecture": architecture, "model_args": arguments})
        )
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(ConfigError, match=says):
            load_pyramid(tmp_path, 112)


# Mask R-CNN.


def scene(height, width, box, colour):
    """A grey image with a coloured rectangle, [left, top, right, bottom], and its target."""
    left, top, right, bottom = box
    image, mask = torch.full((3, height, width), 0.5), torch.zeros(1, height, width, dtype=torch.uint8)
    image[:, top:bottom, left:right] = torch.tensor(([1.0, 0, 0], [0, 1.0, 0])[colour])[:, None, None]
    mask[0, top:bottom, left:right] = 1
    return image, {"boxes": torch.tensor([box]).float(), "labels": torch.tensor([colour + 1]), "masks": mask}


def test_boxes_and_masks_are_found_in_the_images_own_pixels(export):
    """Of a wide image that is halved and one that is doubled, both filled up to 64 x 64 by the model."""
    torch.manual_seed(0)
    scenes = [scene(80, 128, (84, 10, 122, 62), 0), scene(32, 20, (2, 18, 16, 30), 1)]
    images, targets = [image for image, _ in scenes], [target for _, target in scenes]
    model = mask_rcnn(export, 2, 64, 0.0, **SMALL)
    batch, _ = model.transform(images)
    assert batch.tensors.shape == (2, 3, 64, 64) and batch.image_sizes == [(40, 64), (64, 40)]
    grey = (0.5 - torch.tensor(model.transform.image_mean)) / torch.tensor(model.transform.image_std)
    assert torch.allclose(batch.tensors[0, :, 0, 0], grey) and not batch.tensors[0, :, 40:].any()

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(60):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    assert model.transform([torch.zeros(3, 10, 40)])[0].tensors.shape == (1, 3, 64, 64), "whatever its form"
    with torch.no_grad():
        outputs = model(images)
    for image, target, output in zip(images, targets, outputs):
        assert output["labels"][0] == target["labels"][0]
        # A box of another frame, halved or doubled, overlaps less.
        assert box_iou(output["boxes"][:1], target["boxes"]).item() > 0.5
        assert output["masks"].shape[1:] == (1, *image.shape[1:])
        found, true = output["masks"][0, 0] > 0.5, target["masks"][0].bool()
        assert (found & true).sum() / (found | true).sum() > 0.4


# The example.


def write_coco(folder, number, seed):
    """Images of one or two coloured rectangles, the last of none, and COCO's annotations of them.

    The first has a crowd, too.
    """
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(number):
        height, width = ((60, 90), (80, 50))[i % 2]
        pixels = np.full((height, width, 3), 128, np.uint8)
        for k in range(0 if i == number - 1 else 1 + i % 2):
            colour, (w, h) = int(generator.integers(2)), generator.integers(16, 28, 2).tolist()
            x, y = int(generator.integers(width - w)), int(generator.integers(height // 2 - h // 2))
            y += k * (height // 2 - 14)
            h = min(h, height - y)
            pixels[y : y + h, x : x + w] = ([250, 0, 0], [0, 250, 0])[colour]
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append({
                "id": len(annotations) + 1, "image_id": 10 + i, "category_id": CATEGORIES[colour]["id"],
                "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": [corners],
            })  # fmt: skip
        Image.fromarray(pixels).save(folder / f"images/{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": height, "width": width})
    crowd = {"size": [60, 90], "counts": [0, 600, 4800]}
    annotations.append({"id": 99, "image_id": 10, "category_id": 7, "bbox": [0, 0, 10, 60], "area": 600,
                        "iscrowd": 1, "segmentation": crowd})  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "annotations.json").write_text(json.dumps(content))
    return annotations


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("faster_coco_eval", reason="pip install -e '.[detection]'")
    return runpy.run_path(str(REPOSITORY / "examples/detect.py"), run_name="detect")


def test_instances_are_cocos_and_crops_of_them(example, tmp_path):
    annotations = write_coco(tmp_path, 5, 0)
    whole = example["Instances"](tmp_path / "images", tmp_path / "annotations.json")
    for i in range(5):
        image, target = whole[i]
        own = [each for each in annotations if each["image_id"] == 10 + i and not each["iscrowd"]]
        assert len(target["labels"]) == len(own) and ("crowd" not in target)
        assert target["masks"].shape == (len(own), *image.shape[1:])
        for box, label, mask, each in zip(target["boxes"], target["labels"], target["masks"], own):
            x, y, w, h = each["bbox"]
            assert (box - torch.tensor([x, y, x + w, y + h])).abs().max() <= 1, "polygons end within a pixel"
            assert whole.categories[label - 1] == each["category_id"]
            colour = image[:, mask.bool()].mean(dim=1)
            assert colour[label - 1] > 0.9 and colour[2 - label] < 0.1
    crops = example["Instances"](tmp_path / "images", tmp_path / "annotations.json", 64)
    torch.manual_seed(0)
    sizes = set()
    for image, target in (crops[i] for _ in range(8) for i in range(5)):
        assert image.shape == (3, 64, 64) and len(target["masks"]) == len(target["labels"])
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"]):
            rows, columns = (mask.any(dim=d).nonzero().flatten() for d in (1, 0))
            tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert box.tolist() == [int(side) for side in tight]
            inside = image[:, mask.bool()].mean(dim=1)
            sizes.add(int(box[2] - box[0]))
            if min(box[2] - box[0], box[3] - box[1]) > 8:
                assert inside[label - 1] > inside[2 - label] + 0.5
    assert min(sizes) < 8 and max(sizes) > 35, "from a tenth to twice the size"


def test_the_figures_are_cocos(example, tmp_path):
    annotations = write_coco(tmp_path, 6, 1)
    data = example["Instances"](tmp_path / "images", tmp_path / "annotations.json")
    single = [each for each in annotations if not each["iscrowd"]]

    class Sees:
        """A model that finds what is there, moved to the right by some pixels."""

        def __init__(self, moved):
            self.moved = moved

        def eval(self):
            self.places = iter(range(6))

        def __call__(self, images):
            _, target = data[next(self.places)]
            boxes = target["boxes"] + torch.tensor([self.moved, 0, self.moved, 0])
            masks = target["masks"].float().roll(self.moved, dims=2)[:, None]
            return [{"boxes": boxes, "labels": target["labels"], "masks": masks,
                     "scores": torch.ones(len(boxes))}]  # fmt: skip

    found = example["detections"](Sees(0), data, torch.device("cpu"))
    assert len(found) == len(single) and {each["category_id"] for each in found} <= {3, 7}
    assert example["figures"](data, found)["segm_ap"] == pytest.approx(100)
    assert example["figures"](data, found)["bbox_ap"] > 85
    moved = example["figures"](data, example["detections"](Sees(5), data, torch.device("cpu")))
    assert moved["bbox_ap50"] == pytest.approx(100) and moved["segm_ap"] < 60
    assert set(example["figures"](data, []).values()) == {0.0}


def test_the_documented_command_trains_and_is_judged(example, export, tmp_path, monkeypatch, capsys):
    write_coco(tmp_path / "train", 6, 0)
    write_coco(tmp_path / "val", 3, 1)
    text = (REPOSITORY / "docs/detection.md").read_text()
    words = re.search(r"^python (examples/detect.py .*?)^```", text, re.M | re.S)[1].replace("\\\n", " ")
    for there, here in (
        ("/runs/b16/timm", export), ("/runs/b16_coco", tmp_path / "out"),
        ("/data/coco/train2017", tmp_path / "train/images"), ("/data/coco/val2017", tmp_path / "val/images"),
        ("/data/coco/annotations/instances_train2017.json", tmp_path / "train/annotations.json"),
        ("/data/coco/annotations/instances_val2017.json", tmp_path / "val/annotations.json"),
    ):  # fmt: skip
        words = words.replace(there, str(here))
    few = ["--size", "64", "--epochs", "2", "--workers", "0", "--batch", "3", "--settings", json.dumps(SMALL)]
    monkeypatch.setattr(sys, "argv", [*words.split(), *few])
    assert example["main"]() == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and all(0 < line["loss"] < 20 for line in lines)
    assert all(0 <= line[name] <= 100 for line in lines for name in ("bbox_ap", "segm_ap50"))
    found = json.loads((tmp_path / "out/detections.json").read_text())
    assert all({"image_id", "category_id", "bbox", "score", "segmentation"} == each.keys() for each in found)

    # The documented lines take the weights.
    lines = re.search(r"^```python\n(.*?)^```", text, re.M | re.S)[1]
    lines = lines.replace("/runs/b16/timm", str(export)).replace("/runs/b16_coco", str(tmp_path / "out"))
    lines = lines.replace('"street.jpg"', f'"{tmp_path}/val/images/0.png"').replace("80)", "2, 64, **SMALL)")
    names = {"SMALL": SMALL}
    exec(lines, names)
    assert names["output"]["masks"].shape[1:] == (1, 60, 90)

    content = json.loads((tmp_path / "val/annotations.json").read_text())
    content["categories"] = content["categories"][:1]
    (tmp_path / "val/annotations.json").write_text(json.dumps(content))
    assert example["main"]() == 2 and "has other categories than" in capsys.readouterr().err
