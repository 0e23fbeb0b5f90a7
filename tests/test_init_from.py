"""A run that begins from weights computes at first what they compute, or says why they don't fit."""

import dataclasses
import shutil

import huggingface_hub
import pytest
import timm
import torch
from line import losses, make_line, pretrain
from safetensors.torch import save_file
from timm.models import save_for_hf

from mapet_ds import weights
from mapet_ds.config.running import flatten
from mapet_ds.config.sections import Config, DataConfig, ModelConfig
from mapet_ds.errors import ConfigError, ResumeError
from mapet_ds.files import checksum
from mapet_ds.methods import build_objective
from mapet_ds.results import init_from
from mapet_ds.results.init_from import begin_from
from mapet_ds.results.published import import_weights
from mapet_ds.training.checkpoint import Checkpoint, check_identity, identity, newest
from mapet_ds.training.command_line import check_files
from mapet_ds.vit import build_vit

DEFAULTS = flatten(Config().to_dict())
TINY = "vit_tiny_patch16_224"
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
RUN = ModelConfig(name=TINY, img_size=32, patch_size=8, args=SMALL)
MEANS = DataConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def write_source(folder, seed=1, name=TINY, **arguments):
    """A timm model of random weights, gammas included, as a folder that timm loads."""
    torch.manual_seed(seed)
    model = timm.create_model(
        name, **{"img_size": 32, "patch_size": 8, "num_classes": 3, **SMALL, **arguments}
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir()
    save_for_hf(model, folder, safe_serialization=True)
    return model


def begin(source, model=RUN, data=MEANS):
    """The ViT of a run that begins from it, and what is said."""
    torch.manual_seed(0)
    model = dataclasses.replace(model, init_from=str(source))
    vit = build_vit(model).eval()
    sha256, notes = begin_from(vit, Config(model=model, data=data))
    assert len(sha256) == 64
    return vit, notes


@torch.no_grad()
def assert_same_function(vit, source, size=32):
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = source.forward_features(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(vit.forward_features(images), expected, atol=2e-5, rtol=0)


def test_of_a_file_of_dinos_the_teachers_backbone_is_taken(tmp_path):
    source = write_source(tmp_path / "source")
    state = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("head.")}
    teacher = {f"backbone.{name}": tensor for name, tensor in state.items()}
    teacher |= {"head.mlp.0.weight": torch.ones(3, 3), "head.last_layer.weight_g": torch.ones(3, 1)}
    student = {f"module.{name}": tensor + 1 for name, tensor in teacher.items()}
    held = {"student": student, "teacher": teacher, "epoch": 3, "optimizer": {"state": {}}}
    torch.save(held, tmp_path / "dino.pth")
    vit, _ = begin(tmp_path / "dino.pth", dataclasses.replace(RUN, layer_scale=None))
    assert_same_function(vit, source)


@pytest.mark.parametrize("kind", ["folder", "safetensors", "pth"])
@pytest.mark.parametrize(
    ("scaled", "layer_scale", "says"),
    [(None, 0.1, ["LayerScale begins at 1, the source has none"]), (0.5, 0.1, []), (None, None, []),
     (0.5, None, ["its LayerScale is folded into the layers before it"])],
)  # fmt: skip
def test_the_function_at_the_start_is_the_sources(tmp_path, kind, scaled, layer_scale, says):
    source = write_source(tmp_path / "source", **({"init_values": scaled} if scaled else {}))
    path = tmp_path / "source"
    if kind == "safetensors":
        path = path / "model.safetensors"
    elif kind == "pth":
        path = tmp_path / "weights.pth"
        torch.save(
            {"state_dict": {f"module.{name}": tensor for name, tensor in source.state_dict().items()}}, path
        )
    vit, notes = begin(path, dataclasses.replace(RUN, layer_scale=layer_scale))
    assert notes == says
    assert_same_function(vit, source)
    gammas = [tensor for name, tensor in vit.state_dict().items() if "gamma" in name]
    assert len(gammas) == (4 if layer_scale else 0)
    assert scaled or all(torch.equal(gamma, torch.ones(32)) for gamma in gammas)


def test_registers_and_other_sizes_go_through_timms_resampling(tmp_path):
    source = write_source(tmp_path / "source", reg_tokens=2)
    model = dataclasses.replace(RUN, img_size=48, patch_size=12, args=SMALL | {"reg_tokens": 2})
    vit, notes = begin(tmp_path / "source", model, DataConfig())
    assert notes[0] == "resampled from 32 px in patches of 8 to 48 px in patches of 12"
    assert notes[1] == "data.mean = [0.485, 0.456, 0.406], but it has learnt with [0.5, 0.5, 0.5]"
    source.set_input_size(48, 12)
    assert_same_function(vit, source, 48)
    wide, _ = begin(
        tmp_path / "source", dataclasses.replace(RUN, img_size=64, args=SMALL | {"reg_tokens": 2})
    )
    file, _ = begin(
        tmp_path / "source/model.safetensors",
        dataclasses.replace(RUN, img_size=64, args=SMALL | {"reg_tokens": 2}),
    )
    assert wide.pos_embed.shape == (1, 3 + 64, 32)
    assert all(torch.equal(tensor, file.state_dict()[name]) for name, tensor in wide.state_dict().items())


def test_a_positions_table_of_an_oblong_grid_is_resampled_as_what_it_is(tmp_path):
    source = write_source(tmp_path / "source", img_size=(16, 64))
    vit, _ = begin(tmp_path / "source")
    source.set_input_size(32)
    assert_same_function(vit, source)


def test_a_fine_tuned_source_lends_all_but_its_head_and_norm(tmp_path):
    source = write_source(tmp_path / "source", global_pool="avg")
    vit, notes = begin(tmp_path / "source")
    assert "norm is fresh, the source normalises the mean" in notes
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = torch.nn.functional.layer_norm(source.forward_features(images), (32,), eps=1e-6)
        torch.testing.assert_close(vit.forward_features(images), expected, atol=2e-5, rtol=0)


def test_every_node_must_begin_from_the_same(tmp_path, monkeypatch):
    write_source(tmp_path / "source")
    monkeypatch.setattr(init_from, "once_per_node", lambda work: (work(), [work(), "another"]))
    assert "the nodes read different weights" in refused(tmp_path / "source")


def refused(source, model=RUN):
    vit = build_vit(model)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    with pytest.raises(ConfigError) as raised:
        begin_from(vit, Config(model=dataclasses.replace(model, init_from=str(source)), data=MEANS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    return str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"embed_dim": 48, "depth": 3},
            f"width 48, blocks 3; model.name = {TINY} has here width 32, blocks 2.",
        ),
        ({"num_heads": 4}, f"heads 4; model.name = {TINY} has here heads 2."),
        ({"act_layer": "quick_gelu"}, "activation QuickGELU"),
        ({"reg_tokens": 2}, "reg_token is not in the model"),
        ({"class_token": False, "global_pool": "avg"}, "cls_token is missing"),
        ({"name": "beit_base_patch16_224"}, "is a Beit, and model.name names a VisionTransformer"),
    ],
)
def test_another_architecture_is_named_with_both_figures(tmp_path, arguments, says):
    write_source(tmp_path / "source", **arguments)
    assert says in refused(tmp_path / "source")


BEIT = "beit_base_patch16_224"
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize(("theirs", "ours"), [(SHARED, SHARED), (SHARED, {}), ({}, {})])
def test_relative_positions_begin_from_either_kind_of_table(tmp_path, kind, theirs, ours):
    """At the source's size, and at another, where timm resamples the tables."""
    source = write_source(tmp_path / "source", name=BEIT, global_pool="token", init_values=0.5, **theirs)
    path = tmp_path / "source" if kind == "folder" else tmp_path / "source/model.safetensors"
    run = dataclasses.replace(RUN, name=BEIT, args=SMALL | ours)
    vit, _ = begin(path, run)
    assert_same_function(vit, source)
    vit, _ = begin(path, dataclasses.replace(run, img_size=48))
    source.set_input_size(48)
    assert_same_function(vit, source, 48)


def test_a_run_with_one_table_takes_equal_ones_and_refuses_others(tmp_path):
    source = write_source(tmp_path / "differ", name=BEIT, global_pool="token")
    run = dataclasses.replace(RUN, name=BEIT, args=SMALL | SHARED)
    assert "relative_position_bias_table is not in the model" in refused(tmp_path / "differ", run)
    for block in source.blocks:
        block.attn.relative_position_bias_table = source.blocks[0].attn.relative_position_bias_table
    equal = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    save_file(equal, tmp_path / "differ/model.safetensors")
    vit, _ = begin(tmp_path / "differ", run)
    assert_same_function(vit, source)
    assert "is a VisionTransformer, and model.name names a Beit" in refused(write_plain(tmp_path), run)


def write_plain(folder):
    write_source(folder / "plain")
    return folder / "plain"


def test_released_beit_v2_weights_go_through_an_import(tmp_path):
    """A small file in the layout that it pre-trains in: one table for all blocks, and heads of its own."""
    timms = {"depth": 2, "embed_dim": 768, "num_heads": 12, "mlp_ratio": 0.25, "global_pool": "token"}
    source = write_source(tmp_path / "source", name=BEIT, init_values=0.5, num_classes=0, **timms, **SHARED)
    released = source.state_dict() | {
        "mask_token": torch.ones(1, 1, 768), "lm_head.weight": torch.ones(8, 768),
        "cls_pt_layers.0.attn.q_bias": torch.ones(768), "cls_pt_layers.0.norm1.weight": torch.ones(768),
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long),
    }  # fmt: skip
    torch.save({"model": released}, tmp_path / "released.pth")
    written = import_weights("beitv2", tmp_path / "released.pth", tmp_path / "out", layer_scale="keep")
    assert written.architecture == "beitv2_base_patch16_224"
    assert written.dropped == ["cls_pt_layers", "lm_head", "mask_token", "relative_position_index"]
    for tables in (SHARED, {}):
        args = {name: timms[name] for name in ("depth", "embed_dim", "num_heads", "mlp_ratio")} | tables
        vit, _ = begin(tmp_path / "out", dataclasses.replace(RUN, name=BEIT, args=args), DataConfig())
        assert_same_function(vit, source)


def test_a_file_is_refused_whole(tmp_path):
    source = write_source(tmp_path / "source", init_values=0.5)
    file = tmp_path / "weights.safetensors"
    state = source.state_dict()
    for wrong, says in (
        ({"blocks.1.mlp.fc2.weight": None}, "blocks.1.mlp.fc2.weight is missing"),
        (
            {"blocks.1.attn.proj.weight": torch.ones(32, 31)},
            "blocks.1.attn.proj.weight is (32, 31), the model's (32, 32)",
        ),
        ({"mystery": torch.ones(1)}, "mystery is not in the model"),
        ({"blocks.2.norm1.weight": torch.ones(32)}, "blocks 3"),
        ({"pos_embed": torch.ones(1, 12, 32)}, "timm can't fit its tensors to the model"),
    ):
        save_file({name: tensor for name, tensor in (state | wrong).items() if tensor is not None}, file)
        assert says in refused(file)
        assert says in refused(file, dataclasses.replace(RUN, layer_scale=None))
    save_file({f"vit.{name}": tensor for name, tensor in state.items()}, file)
    assert "A run's own checkpoint goes through tools/export_timm.py" in refused(file)
    file.write_bytes(b"not tensors")
    assert "can't be read as plain tensors" in refused(file)
    (tmp_path / "source/model.safetensors").write_bytes(b"not tensors")
    assert "can't be read as plain tensors" in refused(tmp_path / "source")


def test_a_tag_of_timm(tmp_path, monkeypatch):
    tag = f"{TINY}.augreg_in21k"
    source = write_source(
        tmp_path / "source",
        depth=12,
        embed_dim=192,
        num_heads=3,
        num_classes=21843,
        img_size=224,
        patch_size=16,
    )
    asked = []
    monkeypatch.setattr(
        weights,
        "hf_hub_download",
        lambda *words: asked.append(words) or tmp_path / "source/model.safetensors",
    )
    vit, _ = begin(f"timm:{tag}", ModelConfig(name=TINY, img_size=64))
    assert asked == [(f"timm/{tag}", "model.safetensors")]
    source.set_input_size(64)
    assert_same_function(vit, source, 64)
    assert "timm has no such weights" in refused("timm:vit_tiny_patch16_224.nobody")


def test_a_tag_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    says = refused(f"timm:{TINY}.augreg_in21k")
    assert "can't be downloaded" in says and "name a local file or folder" in says and "\n" not in says


def test_a_mistaken_path_is_answered_before_torch(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "codebook").touch()
    for source, says in (
        ("", "(empty) is neither"), ("timm:", "timm: is neither"),
        (f"{tmp_path}/none", "none is neither a folder nor a file"),
        (f"{tmp_path}/run", f"lacks config.json and model.safetensors. A run or a checkpoint becomes one by "
         f"python tools/export_timm.py {tmp_path}/run OUT"),
    ):  # fmt: skip
        config = Config(objective="saim", model=ModelConfig(init_from=source), run_dir=str(tmp_path / "run"))
        with pytest.raises(ConfigError) as raised:
            check_files(config)
        assert says in str(raised.value)
        (tmp_path / "run/checkpoints/step_00000001").mkdir()
        check_files(config)  # a run that resumes needs no source
        (tmp_path / "run/checkpoints/step_00000001").rmdir()


def test_saims_fixed_positions_become_the_sources(tmp_path):
    source = write_source(tmp_path / "source")
    config = Config(
        objective="saim", model=dataclasses.replace(RUN, init_from=str(tmp_path / "source")), data=MEANS
    )
    objective = build_objective(config, 192)
    decoder = [tensor.clone() for tensor in objective.decoder.parameters()]
    begin_from(objective.vit, config)
    assert not objective.vit.pos_embed.requires_grad
    assert_same_function(objective.vit.eval(), source)
    assert all(map(torch.equal, objective.decoder.parameters(), decoder))


def test_a_run_begins_from_it_and_resumes_without_it(tmp_path):
    """Student and momentum teacher. A first learning rate of 0 leaves the first weights as they were."""
    recipe, folder = make_line(tmp_path), tmp_path / "source"
    source = write_source(folder, depth=3, init_values=0.5).state_dict()
    words = [f"model.init_from={folder}", "objective=conmim", "optim.warmup_lr=0", "conmim.bn_group=4",
             "conmim.projector_dim=16", "train.spike_factor=null", "checkpoint.every_steps=1"]  # fmt: skip
    done = pretrain(recipe, 2, *words, "train.stop_at_step=1", engine="ds_configs/zero3_cpu.json")
    assert done.returncode == 0, done.stderr[-3000:]
    sha256 = checksum(folder / "model.safetensors")
    assert f"Beginning from {folder}, sha256 {sha256[:12]}; data.mean = " in done.stdout
    first = newest(tmp_path / "run")
    files = [first.load(file) for file in ("model", "target")]
    assert files[0].keys() == files[1].keys() and all(
        torch.equal(files[0][name], files[1][name]) for name in files[0]
    )
    assert {name for name in files[0] if name.startswith("vit.")} == {
        f"vit.{n}" for n in source if not n.startswith("head.")
    }
    assert all(
        torch.equal(files[0][f"vit.{name}"], tensor)
        for name, tensor in source.items()
        if not name.startswith("head.")
    )
    shutil.rmtree(folder)
    done = pretrain(recipe, 1, *words, "train.stop_at_step=3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Beginning" not in done.stdout and list(losses(tmp_path / "run")) == [1, 2, 3]
    assert newest(tmp_path / "run").run["identity"]["init_from.sha256"] == sha256


def test_a_resumed_run_must_have_begun_from_the_same(tmp_path):
    def known(**model):
        return identity(Config(model=ModelConfig(**model)), "data", {})

    then = known(init_from="/a")
    with pytest.raises(ResumeError, match="model.init_from: /a in the checkpoint, nothing now"):
        check_identity(Checkpoint(tmp_path, {"identity": then}), known(), DEFAULTS)
    del (before := known())["model.init_from"]  # a checkpoint from before there was the setting
    check_identity(Checkpoint(tmp_path, {"identity": before}), known(), DEFAULTS)
