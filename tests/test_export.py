"""Export: what timm loads by itself is the run's own ViT, or nothing is written."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from forked import start

from mapet_ds.config.sections import REPOSITORY, Config, DataConfig, ModelConfig
from mapet_ds.errors import ExportError, ResumeError
from mapet_ds.files import staged
from mapet_ds.results import export
from mapet_ds.results.export import export_timm
from mapet_ds.training import checkpoint
from mapet_ds.vit import build_vit

TOOL = REPOSITORY / "tools" / "export_timm.py"
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
MODELS = {
    "patch4": ModelConfig(name="vit_tiny_patch16_224", img_size=32, patch_size=4, args=SMALL),
    "registers": ModelConfig(
        name="vit_tiny_patch16_224", img_size=32, patch_size=8, args=SMALL | {"reg_tokens": 3}
    ),
    "no layer scale": ModelConfig(
        name="vit_tiny_patch16_224", img_size=32, patch_size=8, layer_scale=None, args=SMALL
    ),
    "layer scale by name": ModelConfig(
        name="vit_small_patch14_dinov2", img_size=28, patch_size=14, args=SMALL
    ),
    "dropout": ModelConfig(
        name="vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        drop_path=0.5,
        args=SMALL | {"proj_drop_rate": 0.5},
    ),
    "one table": ModelConfig(
        name="beit_base_patch16_224",
        img_size=32,
        patch_size=8,
        args=SMALL | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    "a table each": ModelConfig(name="beit_base_patch16_224", img_size=32, patch_size=8, args=SMALL),
    "plain": ModelConfig(name="vit_tiny_patch16_224"),
}


def write_checkpoint(run_dir: Path, model: ModelConfig, step: int = 1, **data):
    """A checkpoint of random weights, LayerScale included; gives the ViT that it holds."""
    torch.manual_seed(step)
    vit = build_vit(model).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {f"vit.{k}": v for k, v in vit.state_dict().items()} | {"mask_token": torch.ones(1, 1, 32)}
    config = Config(model=model, data=DataConfig(**data)).to_dict()
    checkpoint.save(run_dir, {"step": step, "config": config}, {"model": weights})
    return vit


def plain_arguments(model: ModelConfig) -> dict:
    if model == MODELS["plain"]:
        return {}
    sizes = {"img_size": model.img_size, "patch_size": model.patch_size}
    if model.relative:  # a table in each block, as timm's name tells
        return sizes | SMALL | {"global_pool": "token"}
    return {**sizes, **model.args}


@torch.no_grad()
def assert_same_features(vit, loaded, img_size: int) -> None:
    images = torch.randn(3, 3, img_size, img_size)
    expected = vit.forward_features(images)
    assert expected.std() > 0.1
    found = loaded.eval().forward_features(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded(images), found[:, 0])  # as cards and the printed lines say


@pytest.mark.parametrize("layer_scale", ["fold", "keep"])
@pytest.mark.parametrize("name", MODELS)
def test_timm_loads_the_runs_vit(tmp_path, monkeypatch, name, layer_scale):
    model = MODELS[name]
    vit = write_checkpoint(tmp_path / "run", model)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    exported = export_timm(tmp_path / "run", tmp_path / "deep" / "out", layer_scale)
    assert exported.difference <= 1e-5
    assert sorted(p.name for p in exported.folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]

    from_folder = timm.create_model(f"local-dir:{exported.folder}", pretrained=True)
    assert_same_features(vit, from_folder, model.img_size)
    brings_its_own = "dinov2" in model.name or model.relative
    init_values = 0.0 if layer_scale == "fold" and brings_its_own else None
    if layer_scale == "keep":
        init_values = model.layer_scale
    strictly = timm.create_model(
        model.name,
        checkpoint_path=exported.folder / "model.safetensors",
        num_classes=0,
        init_values=init_values,
        **plain_arguments(model),
    )
    assert_same_features(vit, strictly, model.img_size)
    has_layer_scale = any(".ls1." in k or "gamma_1" in k for k in strictly.state_dict())
    assert has_layer_scale == (layer_scale == "keep" and model.layer_scale is not None)


def test_dropouts_of_the_run_are_off(tmp_path):
    vit = write_checkpoint(tmp_path / "run", MODELS["dropout"])
    exported = export_timm(tmp_path / "run", tmp_path / "out", "keep")
    loaded = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).train()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        loaded.forward_features(images), vit.forward_features(images), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(("crop", "crop_pct"), [("center", 1.0), ("random", 0.9)])
def test_preprocessing_is_the_runs(tmp_path, crop, crop_pct):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    write_checkpoint(tmp_path / "run", MODELS["patch4"], mean=mean, std=std, crop=crop)
    exported = export_timm(tmp_path / "run", tmp_path / "out")
    found = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{exported.folder}"))
    assert found["input_size"] == (3, 32, 32)
    assert (tuple(found["mean"]), tuple(found["std"])) == (mean, std)
    assert (found["interpolation"], found["crop_pct"], found["crop_mode"]) == ("bicubic", crop_pct, "center")
    pretrained_cfg = json.loads((exported.folder / "config.json").read_text())["pretrained_cfg"]
    assert (
        pretrained_cfg["tag"] == "mapet" and "license" not in pretrained_cfg
    )  # not those of timm's own weights


def test_newest_or_named_checkpoint(tmp_path):
    run = tmp_path / "run"
    vits = {step: write_checkpoint(run, MODELS["patch4"], step) for step in (2, 10)}
    named = run / "checkpoints" / "step_00000002"
    for source, step in ((run, 10), (named, 2)):
        exported = export_timm(source, tmp_path / "out")  # the second replaces the first
        assert exported.checkpoint.name == f"step_{step:08d}"
        assert_same_features(
            vits[step], timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), 32
        )


def test_an_export_into_a_folder_touches_nothing_beside_it(tmp_path):
    """It may be a mount, or in a folder that one may not write to."""
    (tmp_path / "new").mkdir()
    with staged(tmp_path / "new") as folder:
        assert [path.name for path in tmp_path.iterdir()] == ["new"] and folder.is_relative_to(
            tmp_path / "new"
        )
        (folder / "a").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


def test_refuses_where_timm_computes_something_else(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "run", MODELS["patch4"])
    fold = export.fold_layer_scale

    def tampered(state):
        folded = fold(state)
        folded["blocks.1.attn.proj.bias"][3] += 1e-3
        return folded

    monkeypatch.setattr(export, "fold_layer_scale", tampered)
    with pytest.raises(ExportError, match="differ from the run's own by"):
        export_timm(tmp_path / "run", tmp_path / "out", "fold")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_refuses_damaged_foreign_and_missing_checkpoints(tmp_path):
    write_checkpoint(tmp_path / "run", MODELS["patch4"])
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ResumeError, match="checksum"):
        export_timm(folder, tmp_path / "out")
    weights.write_bytes(whole)
    run = json.loads((folder / "run.json").read_text())
    run["config"]["model"]["args"]["depth"] = 3
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(ExportError, match=r"doesn't hold the ViT that its run\.json describes"):
        export_timm(folder, tmp_path / "out")
    with pytest.raises(ExportError, match="nothing to export"):
        export_timm(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    vit = write_checkpoint(tmp_path / "run", MODELS["patch4"])
    command = [sys.executable, TOOL, tmp_path / "run", tmp_path / "out", "--layer_scale", "keep"]
    done = start(*command)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert str(tmp_path / "out" / "model.safetensors") in printed[0]
    assert float(printed[1].rsplit(" ", 1)[1]) <= 1e-5
    code = "\n".join(line.strip() for line in printed if line.startswith("  "))
    scope = {"images": torch.randn(1, 3, 32, 32)}
    exec(code, scope)  # the lines that it tells the user
    assert scope["token"].shape == scope["mean"].shape and not torch.equal(scope["token"], scope["mean"])
    assert printed[-1].startswith("tools/evaluate.py judges the mean of the patches unless")
    assert_same_features(vit, scope["model"], 32)
    assert "Normalize" in repr(scope["transform"])


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "run", MODELS["patch4"])
    (tmp_path / "a_file").touch()
    for run, out, says in (
        ("nowhere", "out", "nothing to export"), (".", "out", f"It holds runs: {tmp_path}/run."),
        ("run", "a_file", "a_file can't be written"), ("run", "a_file/out", "can't be written"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path / run), str(tmp_path / out)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(TOOL), run_name="__main__")  # in this process, without seconds of imports
        assert exit.value.code == 2
        message = capsys.readouterr().err
        assert len(message.splitlines()) == 1 and says in message
