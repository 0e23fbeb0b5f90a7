"""Fine-tuning's parts: batches that no split changes, mixing, layers' rates, weights and classes that fit."""

import random
import runpy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from line import write_classes
from PIL import Image
from test_export import write_checkpoint
from test_finetune import MODEL

from mapet_ds.config.finetune import ClassifierConfig, FinetuneConfig
from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_labelled
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.data.batch import Draw
from mapet_ds.data.index import open_index
from mapet_ds.data.labelled import check_classes, served
from mapet_ds.errors import ConfigError, DataError
from mapet_ds.finetuning.classifier import AveragedLabels, Classifier, build_model
from mapet_ds.finetuning.loader import TrainBatches, TrainLoader, train_transform
from mapet_ds.launch import Ranks
from mapet_ds.results.export import export_timm
from mapet_ds.training.engine import set_learning_rate
from mapet_ds.training.optim import layerwise_groups

DATA = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
RANKS = Ranks(0, 0, 1, torch.device("cpu"), None)
RECIPES = sorted((REPOSITORY / "mapet_ds/recipes").glob("finetune_*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes and an exported model."""
    folder = tmp_path_factory.mktemp("classifier")
    write_classes(folder / "train", 21, 0)
    write_classes(folder / "val", 9, 1)
    write_checkpoint(folder / "pretrained", MODEL)
    export_timm(folder / "pretrained", folder / "timm")
    (folder / "described").mkdir()
    shutil.copy(folder / "timm/config.json", folder / "described")
    return folder


@pytest.fixture
def config(folder, tmp_path):
    def build(*overrides, **given):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: {{path: {folder}/timm}}\ndata: {{train: {folder}/train, val: {folder}/val}}\n"
        )
        shared = ["train.global_batch_size=8", "train.micro_batch_size=4", f"run_dir={tmp_path}/run"]
        return load_config(recipe, [*shared, *overrides], FinetuneConfig)

    return build


def nothing_drawn(step, first_slot, slots):
    return Draw(mask=None, order=None, keep=torch.zeros(slots, 0))


def global_batch(config, index, step, world_size):
    """Images, targets and indices of a step by slot, whatever ranks and micro-batches they fall to."""
    slots = {}
    for rank in range(world_size):
        dataset = TrainBatches(config, index, train_transform(config.data, DATA), rank, world_size, ())
        accum = config.grad_accum_steps(world_size)
        for micro in reversed(range(accum)):  # in another order than a run
            batch = dataset[step * accum + micro]
            assert batch.place == config.place(step * accum + micro, rank, world_size)
            first = batch.place.first_slot
            for i, sample in enumerate(zip(batch.images, batch.target, batch.index)):
                slots[first + i] = sample
    return [
        torch.stack(column)
        for column in zip(*(slots[slot] for slot in range(config.train.global_batch_size)))
    ]


def test_a_batch_is_the_same_however_it_is_split(config, folder, tmp_path):
    index = open_index(folder / "train", tmp_path / "index")
    for step in (0, 2):  # the second goes over the epoch's end, 21 images
        whole = global_batch(config("train.micro_batch_size=8"), index, step, 1)
        random.seed(step)  # what others have drawn before changes nothing
        np.random.seed(step)
        torch.manual_seed(step)
        for micro, world_size in ((2, 2), (4, 2), (2, 1)):
            split = global_batch(config(f"train.micro_batch_size={micro}"), index, step, world_size)
            assert all(torch.equal(one, other) for one, other in zip(whole, split)), (micro, world_size)
    other = global_batch(config("seed=1"), index, 0, 1)
    assert not torch.equal(other[0], global_batch(config(), index, 0, 1)[0])


def test_workers_serve_the_same(config, folder, tmp_path):
    index = open_index(folder / "train", tmp_path / "index")
    dataset = TrainBatches(config(), index, train_transform(config().data, DATA), 0, 1, ())
    for batch, own in zip(served(dataset, range(3, 5), 1, RANKS), (dataset[3], dataset[4]), strict=True):
        assert torch.equal(batch.images, own.images) and torch.equal(batch.target, own.target)


def test_too_many_unreadable_images_stop_the_run(config, tmp_path):
    write_classes(tmp_path / "spoilt", 6, 0)
    for path in sorted((tmp_path / "spoilt").rglob("*.png"))[:2]:
        path.write_bytes(path.read_bytes()[:-30])
    index = open_index(tmp_path / "spoilt", tmp_path / "index")
    dataset = TrainBatches(config(), index, train_transform(config().data, DATA), 0, 1, ())
    loader = TrainLoader(dataset, RANKS, 0, nothing_drawn)
    with pytest.raises(DataError, match="^Unreadable images: at least 2 of 6"):
        next(loader)


def test_an_unreadable_image_is_reported_once(config, folder, tmp_path):
    write_classes(tmp_path / "spoilt", 6, 0)
    path = tmp_path / "spoilt/b/001.png"
    path.write_bytes(path.read_bytes()[:-30])
    index = open_index(tmp_path / "spoilt", tmp_path / "index")
    dataset = TrainBatches(config(), index, train_transform(config().data, DATA), 0, 1, ())
    loader = TrainLoader(dataset, RANKS, 0, nothing_drawn)
    served_indices = [int(i) for _ in range(6) for i in next(loader).index]  # four epochs
    (bad,) = loader.new_bad()
    assert index.path(bad[0]) == str(path) and bad[1] == "cut off"
    assert bad[0] not in served_indices and set(served_indices) == set(range(6)) - {bad[0]}
    assert loader.new_bad() == []


def test_neighbours_are_mixed_or_pasted_as_their_targets_say(config, folder, tmp_path):
    index = open_index(folder / "train", tmp_path / "index")
    kinds = {"mixed": 0, "pasted": 0}
    for step in range(4):
        images, target, served = global_batch(config(), index, step, 1)
        plain, _, same = global_batch(config("data.mixup=0", "data.cutmix=0"), index, step, 1)
        assert torch.equal(served, same)
        torch.testing.assert_close(target.sum(1), torch.ones(8))
        for slot in range(8):
            own, partner = (index.label(int(served[i])) for i in (slot, slot ^ 1))
            if own == partner:
                continue
            share = ((target[slot, own] - 0.1 / 3) / 0.9).item()  # label smoothing 0.1 over 3 classes
            assert target[slot, partner].item() == pytest.approx(0.9 * (1 - share) + 0.1 / 3, abs=1e-6)
            a, b = plain[slot], plain[slot ^ 1]
            pasted = ((images[slot] == b) & (a != b)).any(0)
            is_pasted = torch.equal(torch.where(pasted, b, a), images[slot])
            if is_pasted:
                rows, columns = pasted.any(1).sum().item(), pasted.any(0).sum().item()
                assert (1 - share) * 32 * 32 == pytest.approx(rows * columns, abs=0.51)
            else:
                torch.testing.assert_close(images[slot], share * a + (1 - share) * b, atol=1e-5, rtol=0)
            kinds["pasted" if is_pasted else "mixed"] += 1
    assert min(kinds.values()) > 3, kinds


def test_without_mixing_only_labels_are_smoothed(config, folder, tmp_path):
    index = open_index(folder / "train", tmp_path / "index")
    off = config("data.mixup=0", "data.cutmix=0", "train.micro_batch_size=1")
    _, target, served = global_batch(off, index, 0, 1)
    expected = torch.full((8, 3), 0.1 / 3)
    expected[torch.arange(8), [index.label(int(i)) for i in served]] += 0.9
    torch.testing.assert_close(target, expected)


def test_shards_give_the_same_batches_as_the_folder(config, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_shards.py", str(folder / "train"), str(tmp_path / "shards")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "tools/make_shards.py"), run_name="__main__")
    assert ended.value.code == 0
    shards = open_index(tmp_path / "shards", tmp_path / "cache")
    images = open_index(folder / "train", tmp_path / "index")
    check_classes(shards, images)
    one, other = (global_batch(config(), index, 1, 2) for index in (images, shards))
    assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_layers_learn_at_the_rates_of_a_table(config):
    """Three blocks: what lies further from the head learns slower, by 0.7 a layer."""
    given = config("optim.layer_decay=0.7", "optim.weight_decay=0.05")
    classifier = Classifier(given, 3)
    names = {parameter: name for name, parameter in classifier.vit.named_parameters()}
    groups = layerwise_groups(classifier.vit, 0.05, given.optim.layer_decay)
    set_learning_rate(SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups)), 2.0)
    found = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == len(names)
    table = {
        "cls_token": (2 * 0.7**4, 0.0), "pos_embed": (2 * 0.7**4, 0.0),
        "patch_embed.proj.weight": (2 * 0.7**4, 0.05),
        "patch_embed.proj.bias": (2 * 0.7**4, 0.0), "blocks.0.attn.qkv.weight": (2 * 0.7**3, 0.05),
        "blocks.0.norm1.weight": (2 * 0.7**3, 0.0), "blocks.1.mlp.fc1.weight": (2 * 0.7**2, 0.05),
        "blocks.2.mlp.fc2.weight": (2 * 0.7, 0.05), "blocks.2.mlp.fc2.bias": (2 * 0.7, 0.0),
        "fc_norm.weight": (2.0, 0.0),
        "head.weight": (2.0, 0.05), "head.bias": (2.0, 0.0),
    }  # fmt: skip
    for name, (lr, decay) in table.items():
        assert found[name] == (pytest.approx(lr), decay), name


def test_an_image_drops_the_same_paths_in_any_batch(config):
    torch.manual_seed(0)
    classifier = Classifier(config("model.drop_path=0.5"), 3).train()
    images, target = torch.randn(8, 3, 32, 32), torch.full((8, 3), 1 / 3)
    whole = classifier(images, target, classifier.draw(3, 0, 8)).prediction
    part = classifier(images[2:5], target[2:5], classifier.draw(3, 2, 3)).prediction
    torch.testing.assert_close(part, whole[2:5])
    kept = classifier.eval()(images, target).prediction
    assert not torch.allclose(kept, whole, atol=1e-4)
    assert not torch.equal(classifier.train()(images, target, classifier.draw(4, 0, 8)).prediction, whole)


def test_a_moving_average_follows_by_its_momentum(config):
    classifier = Classifier(config(), 3)
    average = AveragedLabels(Classifier(config(), 3), 0.75, 3, {})
    before = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    weights = {name: torch.randn_like(parameter) for name, parameter in classifier.named_parameters()}
    average.after_step(weights.items(), 0.5)
    for name, tensor in average.state_dict().items():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * weights[name])


def test_pre_trained_weights_are_all_in_the_model(folder):
    state = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).state_dict()
    head, norm = {"head.weight", "head.bias"}, {"fc_norm.weight", "fc_norm.bias"}
    for pool, fresh in (("avg", head | norm), ("token", head)):
        vit, found = build_model(ClassifierConfig(path=str(folder / "timm"), pool=pool), 3)
        assert set(found) == fresh
        own = vit.state_dict()
        assert all(torch.equal(own[name], state[name]) for name in own.keys() - fresh)
        assert state.keys() - own.keys() == ({"norm.weight", "norm.bias"} if pool == "avg" else set())
    assert vit.head.weight.std() < 1e-3, "model.head_scale"
    larger, _ = build_model(ClassifierConfig(path=str(folder / "timm"), img_size=64), 3)
    assert larger.pos_embed.shape == (1, 65, 32)
    vit, found = build_model(ClassifierConfig(path=str(folder / "timm/model.safetensors"), untrained=True), 3)
    assert len(found) == len(vit.state_dict())


def test_another_architecture_of_timm_learns_as_well(config, tmp_path):
    """BEiT's own: relative positions in each block, LayerScale, no position table."""
    beit = timm.create_model(
        "beit_base_patch16_224", embed_dim=32, depth=2, num_heads=2, img_size=32, patch_size=8, num_classes=9
    )
    timm.models.save_for_hf(beit, tmp_path / "beit", safe_serialization=True)
    given = config(f"model.path={tmp_path}/beit", "model.drop_path=0.2", "optim.layer_decay=0.5")
    classifier = Classifier(given, 3).train()
    assert torch.equal(
        classifier.vit.blocks[1].attn.relative_position_bias_table,
        beit.blocks[1].attn.relative_position_bias_table,
    )
    assert set(classifier.fresh) == {"head.weight", "head.bias"}
    images, target, draw = torch.randn(4, 3, 32, 32), torch.full((4, 3), 1 / 3), classifier.draw(0, 0, 4)
    assert draw.keep.shape == (4, 2), "the first block drops nothing"
    classifier(images, target, draw).loss.backward()
    groups = layerwise_groups(classifier.vit, 0.05, given.optim.layer_decay)
    assert {group["lr_scale"] for group in groups} == {1, 0.5, 0.25, 0.125}
    table = classifier.vit.blocks[1].attn.relative_position_bias_table
    (own,) = (group for group in groups if any(parameter is table for parameter in group["params"]))
    assert own["weight_decay"] == 0.05
    for parameter in classifier.parameters():  # as DeepSpeed casts a module: its parameters alone
        parameter.data = parameter.data.bfloat16()
    assert classifier(images, target, draw).loss.isfinite()


def test_a_head_for_as_many_classes_is_kept(folder, tmp_path):
    vit, _ = build_model(ClassifierConfig(path=str(folder / "timm")), 3)
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "tuned.pth")
    small = ClassifierConfig(path=str(tmp_path / "tuned.pth"), name=f"local-dir:{folder}/timm")
    again, fresh = build_model(small, 3)
    assert fresh == [] and torch.equal(again.head.weight, vit.head.weight)
    assert build_model(small, 4)[1] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"path": "{}/timm/model.safetensors", "name": "vit_tiny_patch16_224"},
         "is of another architecture than vit_tiny"),
        ({"path": "{}/timm/config.json"}, "config.json can't be read as plain tensors"),
        ({"path": "{}/train"}, "timm can't build local-dir:.*train"),
        ({"name": "vit_tinny", "untrained": True}, "timm can't build vit_tinny"),
        ({"name": "resnet18", "untrained": True}, "ResNet has a state beside its parameters"),
        ({"name": "swin_tiny_patch4_window7_224", "untrained": True, "pool": "token"},
         "timm can't build swin.*model.pool"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(folder, model, says):
    given = {**model, "path": model.get("path", "").format(folder)}
    with pytest.raises(ConfigError, match=says):
        build_model(ClassifierConfig(**given), 3)


@pytest.mark.parametrize(
    ("train", "val", "number", "says"),
    [
        ("abc", "ab", None, "must have the same classes; only in one of them: c"),
        ("abc", "abc", 4, "data.num_classes = 4, but .* has 3 classes"),
        ("abc", "abc", None, "train: class d has no image"),
        ("a", "a", None, "one class only"),
        ("abc", "", None, "data.val: 3 of 3 images have no label, e.g. .*0.png"),
    ],
)
def test_classes_that_do_not_fit_are_refused(config, tmp_path, train, val, number, says):
    for name, classes in (("train", train), ("val", val)):
        write_classes(tmp_path / name, 2 * len(classes), 0, classes) if classes else [
            (tmp_path / name).mkdir(exist_ok=True)
            or Image.new("RGB", (9, 9)).save(tmp_path / name / f"{i}.png")
            for i in range(3)
        ]
    if "class d" in says:
        (tmp_path / "train/d").mkdir()
    folders = [open_index(tmp_path / name, tmp_path / f"index_{name}") for name in ("train", "val")]
    with pytest.raises(DataError, match=says):
        check_classes(*folders, num_classes=number)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.path=", "model.path is empty: name the folder that tools/export_timm.py wrote"),
        ("model.path=/nowhere", "model.path = /nowhere is neither a folder nor a file"),
        ("model.path={}/train", "there is no config.json"),
        ("model.path={}/described", "the weights are missing, .*described/model.safetensors"),
        ("data.val=", "data.val is empty"),
        ("data.val=/nowhere", "data.val = /nowhere is not a folder"),
        ("run_dir={}/val/run", "lies inside data.val"),
        ("train.micro_batch_size=1", "is odd, but images are mixed in pairs"),
        ("data.crop_scale=[0.5, 0.1]", "data.crop_scale"),
        ("model.image_size=4", "is not a knob; did you mean model.img_size"),
        ("objective=beit", "is not a knob"),
        ("optim.layer_decay=2", "optim.layer_decay = 2"),
    ],
)
def test_settings_are_refused_before_anything_starts(config, folder, override, says):
    check_labelled(config(), 2)
    with pytest.raises(ConfigError, match=says):
        check_labelled(config(override.format(folder)), 1)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_complete(path, folder, tmp_path):
    folders = [
        f"data.train={folder}/train",
        f"data.val={folder}/val",
        f"run_dir={tmp_path}/run",
        f"model.path={folder}/timm",
    ]
    config = load_config(path, folders, FinetuneConfig)
    check_labelled(config, 4 if config.data.num_classes else 1)
    train_transform(config.data, DATA)
    head = path.read_text().split("model:\n")[0].replace("\\\n", "")
    assert f"tools/finetune.py --config mapet_ds/recipes/{path.name} " in head, (
        "its command stands at its head"
    )


def test_published_settings():
    def settings(name):
        given = load_config(REPOSITORY / f"mapet_ds/recipes/finetune_{name}.yaml", (), FinetuneConfig)
        optim, train = given.optim, given.train
        return optim.lr, optim.layer_decay, train.epochs, train.global_batch_size, given.model.pool

    assert settings("mapet_vitb16") == (5e-4, 0.65, 100, 512, "avg")
    assert settings("mapet_vits16") == (5e-3, 0.65, 200, 512, "avg")
    assert settings("mapet_vitti16") == (2.5e-4, 1.0, 300, 512, "avg")
    assert settings("conmim_vitb16") == settings("beit_vitb16") == (4e-3, 0.65, 100, 1024, "avg")
    assert settings("mae_vitb16") == (2e-3, 0.65, 100, 1024, "avg")
    assert settings("saim_vitb16") == (2e-3, 0.65, 100, 1024, "token")
