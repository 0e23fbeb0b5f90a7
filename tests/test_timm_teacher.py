"""Teachers by timm's own names: their features, weights and codebooks against timm's and open_clip's."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from images import photos, write
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from towers import model_config, write_tower

from mapet_ds import weights as weights_module
from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import TeacherConfig
from mapet_ds.config.towers import teacher_model_config
from mapet_ds.data.index import open_index
from mapet_ds.errors import ConfigError
from mapet_ds.targets.codebook import source_of
from mapet_ds.targets.fitting import fit, sample_features
from mapet_ds.targets.kclip import KClip
from mapet_ds.targets.teacher import build_teacher
from mapet_ds.targets.towers import teacher_mean_std

CPU = torch.device("cpu")


def tiny(name, sizes, options):
    sizes |= {"embed_dim": 64, "depth": 3, "num_heads": 2}
    return build_model_with_cfg(VisionTransformer, name, False, **sizes | options)


@register_model
def tiny_siglip_patch16(pretrained=False, **options):
    """No class token; attention pools the patches."""
    return tiny("tiny_siglip_patch16", {"img_size": 64, "class_token": False, "global_pool": "map"}, options)


@register_model
def tiny_dinov2_patch14(pretrained=False, **options):
    """LayerScale, registers, positions of the patches alone."""
    sizes = {"img_size": 70, "patch_size": 14, "init_values": 0.1, "reg_tokens": 4, "no_embed_class": True}
    return tiny("tiny_dinov2_patch14", sizes, options)


def far_from_initial(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module", params=["tiny_siglip_patch16", "tiny_dinov2_patch14", "test_vit"])
def published(request, tmp_path_factory):
    """A timm model with its classifier, and its file."""
    model = far_from_initial(timm.create_model(request.param, num_classes=7))
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(model.state_dict(), path)
    return request.param, model, path


def settings(name, path, size, **changes):
    return TeacherConfig(name=f"timm:{name}", weights=str(path), img_size=size, precision="fp32", **changes)


def side(name, grid=4):
    return grid * (14 if "14" in name else 16)


@pytest.mark.parametrize("features", ["tokens", "normed"])
def test_features_are_those_of_timm(published, features):
    name, model, path = published
    size = side(name)
    model.set_input_size((size, size))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    seen = []
    handle = model.blocks[-1].register_forward_hook(lambda *each: seen.append(each[-1]))
    tokens = model.forward_features(images) if features == "normed" else (model(images), seen[0])[1]
    handle.remove()
    teacher = build_teacher(settings(name, path, size, features=features), CPU)
    assert (teacher.grid, teacher.embed_dim, teacher.identity["name"]) == (4, 64, f"timm:{name}")
    expected = tokens[:, model.num_prefix_tokens :]
    torch.testing.assert_close(teacher(images), expected, rtol=1e-5, atol=1e-5)
    assert not [n for n, _ in teacher.named_parameters() if "head" in n]


def test_features_and_ids_are_those_of_the_same_weights_in_open_clip(tmp_path):
    """A tower of timm's within open_clip, and the file of its trunk alone."""
    folder = write_tower(tmp_path / "timm", "timm")
    inside = build_teacher(TeacherConfig(name=f"local-dir:{folder}", img_size=64, precision="fp32"), CPU)
    trunk = {n.removeprefix("visual.trunk."): t.clone() for n, t in inside.state_dict().items()}
    trunk |= {f"norm.{n}": trunk.pop(f"fc_norm.{n}") for n in ("weight", "bias")}  # open_clip pools the mean
    size = timm.create_model("test_vit").pos_embed.shape[1]
    assert trunk["pos_embed"].shape[1] != size  # resampled, so the file is of another size than timm's
    save_file(trunk, tmp_path / "trunk.safetensors")
    alone = build_teacher(settings("test_vit", tmp_path / "trunk.safetensors", 64), CPU)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(alone(images), inside(images))
    book = fit(inside(images).flatten(0, 1).numpy(), tokenizer(8), seed=0)
    assert torch.equal(book.assign(alone(images)), book.assign(inside(images)))
    assert alone.identity["sha256"] != inside.identity["sha256"]  # the names differ, and so do codebooks


def tokenizer(codes, path=""):
    words = [f"tokenizer.vocab_size={codes}", "tokenizer.points_per_centroid=20", "tokenizer.iterations=3"]
    return load_config("mapet_vitb16", [*words, f"tokenizer.path={path}"]).tokenizer


@pytest.mark.parametrize("name", ["tiny_siglip_patch16", "tiny_dinov2_patch14", "ViT"])
def test_a_codebook_is_fitted_and_read_with_each(name, tmp_path, alone):
    words = [f"data.train={write(tmp_path / 'images', photos(9))}", "data.device=cpu", "data.workers=0"]
    words += ["model.img_size=32", "model.patch_size=8", "train.micro_batch_size=4", "log.progress=false"]
    words += ["train.compile=false", f"teacher.img_size={side(name)}"]
    if name == "ViT":  # open_clip's own, as ViT-B/16 is
        words += [f"teacher.name=local-dir:{write_tower(tmp_path / 'vit', 'vit')}"]
    else:
        save_file(far_from_initial(timm.create_model(name)).state_dict(), tmp_path / "model.safetensors")
        words += [f"teacher.name=timm:{name}", f"teacher.weights={tmp_path}/model.safetensors"]
    config = load_config("mapet_vitb16", words)
    config = dataclasses.replace(config, tokenizer=tokenizer(8, tmp_path / "codebook.safetensors"))
    index = open_index(config.data.train, tmp_path / "index")
    teacher = build_teacher(config.teacher, CPU)
    features = sample_features(config, index, teacher, alone)
    assert features.shape == (9 * 16, 64) and np.isfinite(features).all()
    book = fit(features, config.tokenizer, 0, source_of(teacher.identity, config.data))
    book.save(config.tokenizer.path)
    kclip = KClip(config, CPU)
    images = torch.randn(2, 3, side(name), side(name))
    assert torch.equal(kclip(images), book.assign(teacher(images)))
    other = dataclasses.replace(config.teacher, layer=0)
    with pytest.raises(ConfigError, match="fitted with teacher.layer = 2"):
        KClip(dataclasses.replace(config, teacher=other), CPU)


def test_a_file_of_another_programs_names_is_read_as_timm_reads_it(tmp_path):
    """DINOv2's own file has a mask token, which timm leaves out."""
    model = far_from_initial(timm.create_model("tiny_dinov2_patch14", num_classes=0))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = model.state_dict()
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 64)
    position = torch.zeros(1, 1, 64)  # that of the class token, which timm adds to the token itself
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    torch.save(state, tmp_path / "published.pth")
    images = torch.randn(1, 3, 56, 56)
    one, two = (
        build_teacher(settings("tiny_dinov2_patch14", tmp_path / name, 56), CPU)(images)
        for name in ("model.safetensors", "published.pth")
    )
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_mistakes_are_sentences(published, tmp_path):
    name, _, path = published

    def refused(**changes):
        with pytest.raises(ConfigError) as raised:
            build_teacher(dataclasses.replace(settings(name, path, side(name)), **changes), CPU)
        return str(raised.value)

    assert "timm:vit_bse_patch16 is not a model of timm's; close:" in refused(name="timm:vit_bse_patch16")
    assert "a ResNet: only ViTs" in refused(name="timm:resnet18")
    assert "set teacher" not in refused(weights="openai") and "neither a file nor a tag of timm:" in refused(
        weights="openai"
    )
    assert "teacher.layer = 9" in refused(layer=9)
    assert "has no proj" in refused(features="projected")
    save_file({"cls_token": torch.zeros(1, 1, 64)}, tmp_path / "few.safetensors")
    says = refused(weights=str(tmp_path / "few.safetensors"))
    assert "does not fit teacher.name = timm:" in says and "is missing" in says
    with pytest.raises(ConfigError, match="teacher.name=timm:vit teacher.weights=lvd142m"):
        teacher_model_config("timm:vit.lvd142m")
    with pytest.raises(ConfigError, match=f"patches 7 x 7: .* Set teacher.img_size={side(name, 7)},"):
        build_teacher(settings(name, path, side(name)), CPU).check_grid(7)


def test_a_tag_gives_weights_and_colours(monkeypatch, tmp_path):
    model = far_from_initial(timm.create_model("test_vit"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(
        weights_module,
        "hf_hub_download",
        lambda *words: asked.append(words) or tmp_path / "model.safetensors",
    )
    tagged = settings("test_vit", "r160_in1k", 160)
    assert build_teacher(tagged, CPU).grid == 10
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    dino = TeacherConfig(name="timm:vit_base_patch14_dinov2", weights="lvd142m")
    assert teacher_mean_std(dino) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert teacher_mean_std(tagged) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    differing = TeacherConfig(name="timm:vit_base_patch16_224", weights="my.safetensors")
    assert teacher_mean_std(differing)[0] == timm.get_pretrained_cfg("vit_base_patch16_224").mean


def test_random_weights_are_asked_for_by_name():
    teacher = build_teacher(settings("test_vit", "random", 160), CPU)
    assert teacher(torch.zeros(1, 3, 160, 160)).shape == (1, 100, 64)


def test_open_clips_towers_are_what_they_were():
    """A timm tower within open_clip still has open_clip's pooling and projection."""
    assert model_config("timm")["vision_cfg"]["timm_pool"] == "avg"
    assert "timm_alone" not in teacher_model_config("ViT-B-16-SigLIP")
