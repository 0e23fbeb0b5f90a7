"""What is to be predicted for each patch, against slow twins; nothing in it has a gradient."""

import dataclasses
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from test_objectives import tiny_config
from towers import write_tower

from mapet_ds.config.objectives import SAIMConfig
from mapet_ds.config.sections import TeacherConfig, TokenizerConfig
from mapet_ds.data.batch import Batch, View
from mapet_ds.draws import Place
from mapet_ds.errors import ConfigError
from mapet_ds.methods import METHODS, build_objective, build_target
from mapet_ds.targets.features import Pixels, TeacherFeatures
from mapet_ds.targets.momentum import MomentumTeacher
from mapet_ds.targets.target import begin

CPU = torch.device("cpu")


def batch(size=16, teacher=16, slots=4):
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(slots, 3, side, side, generator=generator) for side in (size, teacher)]
    return Batch(*views, torch.arange(slots), Place(0, 0))


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers") / "vit"
    write_tower(folder, "vit")
    return folder


@pytest.mark.parametrize("blur", [True, False])
def test_pixels_equal_their_slow_twin(blur):
    target = Pixels(tiny_config("saim"), CPU, blur)
    images = batch().images
    found = target(batch())
    assert found.shape == (4, 16, 48) and target.dim == 48
    padded = F.pad(images.double(), (4, 4, 4, 4))
    offsets = range(-4, 5)
    weights = {(i, j): math.exp(-(i * i + j * j) / 2) for i in offsets for j in offsets}
    blurred = sum(w * padded[:, :, 4 + i : 20 + i, 4 + j : 20 + j] for (i, j), w in weights.items()) / sum(
        weights.values()
    )
    blurred = blurred if blur else images.double()
    for patch in range(16):
        row, column = divmod(patch, 4)
        values = torch.stack(
            [blurred[:, :, 4 * row + y, 4 * column + x] for y in range(4) for x in range(4)], dim=1
        )
        values = values.flatten(1)
        mean = values.mean(1, keepdim=True)
        variance = ((values - mean) ** 2).sum(1, keepdim=True) / 47
        assert (found[:, patch] - (values - mean) / (variance + 1e-6).sqrt()).abs().max() < 1e-4


@pytest.mark.parametrize("features", ["tokens", "normed", "projected"])
def test_features_are_open_clips_own_patch_tokens(tower, features):
    """Projected ones have a cosine of 1 with open_clip's own tokens after ln_post and projection."""
    teacher = TeacherConfig(name=f"local-dir:{tower}", img_size=64, features=features)
    config = tiny_config("mvp", teacher=teacher)
    target = build_target(config, CPU)
    assert isinstance(target, TeacherFeatures)
    images = batch(teacher=64)
    found = target(images)
    visual = open_clip.create_model(f"local-dir:{tower}", pretrained=True).eval().visual
    with torch.no_grad():
        tokens = visual.transformer(visual._embeds(images.teacher_images))[:, 1:]
        if features != "tokens":
            tokens = visual.ln_post(tokens)
        if features == "projected":
            tokens = tokens @ visual.proj
    assert found.shape == tokens.shape and target.dim == tokens.shape[-1]
    assert (1 - F.cosine_similarity(found, tokens, dim=-1)).abs().max() < 1e-5
    assert not found.requires_grad
    assert target.identity["teacher"]["features"] == features


def test_features_after_a_norm_need_a_vit(tmp_path):
    write_tower(tmp_path / "resnet", "resnet")
    teacher = TeacherConfig(name=f"local-dir:{tmp_path}/resnet", img_size=64, features="projected")
    with pytest.raises(ConfigError, match="teacher.features = projected.*has no proj"):
        build_target(tiny_config("mvp", teacher=teacher), CPU)


def test_saim_may_take_features(tower):
    teacher = TeacherConfig(name=f"local-dir:{tower}", img_size=64)
    config = tiny_config("saim", teacher=teacher, saim=SAIMConfig(target="features", loss="cosine"))
    target = build_target(config, CPU)
    assert isinstance(target, TeacherFeatures)
    images = batch(teacher=64)
    model = build_objective(config, target.dim)
    loss = model(images.images, target(images), model.draw(0, 0, 4)).loss
    assert 1 < loss < 3, "two random directions: about 2"


@pytest.mark.parametrize("objective", METHODS)
def test_only_what_the_student_does_not_change_is_begun_ahead(tower, objective):
    teacher = TeacherConfig(name=f"local-dir:{tower}", img_size=64, ahead=True)
    config = tiny_config(
        objective, teacher=teacher, tokenizer=TokenizerConfig(name=f"{__name__}:Zeros", vocab_size=11)
    )
    target = build_target(config, CPU)
    assert target.ahead == (objective in ("mapet", "beit", "mvp", "cae"))
    images = batch(teacher=target.teacher_view.size if target.teacher_view else 16)
    assert torch.equal(begin(target, images, None)(), target(images))


class Zeros:
    """A tokenizer of one's own."""

    view, vocab_size, identity = View(16, (0.5,) * 3, (0.5,) * 3), 11, {}

    def __init__(self, config, device):
        pass

    def __call__(self, images):
        return torch.zeros(len(images), 16, dtype=torch.long, device=images.device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_stream_of_its_own_the_target_is_the_same(tower):
    """While the other stream is busy, and takes memory as soon as it is given back."""
    device = torch.device("cuda", 0)
    config = tiny_config("mvp", teacher=TeacherConfig(name=f"local-dir:{tower}", img_size=64, ahead=True))
    target, stream, matrix = (
        build_target(config, device),
        torch.cuda.Stream(),
        torch.randn(4096, 4096, device=device),
    )
    expected = target(batch(teacher=64).to(device))
    for _ in range(50):
        take = begin(target, batch(teacher=64).to(device), stream)
        for _ in range(5):
            matrix = torch.tanh(matrix @ matrix)
            torch.full((4, 3, 64, 64), float("nan"), device=device)
        found = take()
        assert torch.equal(found, expected)


def conmim():
    config = tiny_config("conmim", seed=3)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, drop_path=0.0))


def test_the_momentum_teacher_starts_as_the_student_and_follows_it():
    config = conmim()
    target = MomentumTeacher(config, CPU)
    student = build_objective(config, target.dim)
    keys = target(batch())
    with torch.no_grad():
        assert torch.equal(keys, student.project(batch().teacher_images))
    assert not keys.requires_grad and not any(p.requires_grad for p in target.model.parameters())
    assert (keys.norm(dim=-1) - 1).abs().max() < 1e-5
    before = {name: p.clone() for name, p in target.model.named_parameters()}
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter)
    target.after_step(student.named_parameters(), 0.25)
    m = 1 - 0.004 * (1 + math.cos(math.pi / 4)) / 2
    for name, parameter in target.model.named_parameters():
        expected = m * before[name] + (1 - m) * student.get_parameter(name)
        assert (parameter - expected).abs().max() < 1e-6, name


def test_the_momentum_teacher_may_have_stochastic_depth_by_draws_of_its_own():
    config = tiny_config("conmim")
    config = dataclasses.replace(config, conmim=dataclasses.replace(config.conmim, teacher_drop_path=True))
    target, student = MomentumTeacher(config, CPU), build_objective(config, 256)
    draw = student.draw(step=5, first_slot=2, slots=4)
    blocks = len(student.vit.blocks)
    assert draw.keep.shape[1] == 4 * blocks
    views = batch()._replace(draw=draw)
    views = views._replace(teacher_images=views.teacher_images[:1].expand(4, -1, -1, -1))
    with torch.no_grad():
        expected = student.project(views.teacher_images, keep=draw.keep[:, 2 * blocks :])
    assert torch.equal(target(views), expected)
    assert not torch.equal(target(views), target(views._replace(draw=None)))
    assert student(views.teacher_images, expected, draw).loss.isfinite()


def test_momentum_rises_from_its_setting_to_one():
    target = MomentumTeacher(conmim(), CPU)
    rise = [target.momentum_at(progress / 100) for progress in range(101)]
    assert rise[0] == pytest.approx(0.996) and rise[-1] == 1 and rise == sorted(rise)


def test_the_momentum_teacher_survives_a_checkpoint():
    one, other = MomentumTeacher(conmim(), CPU), MomentumTeacher(dataclasses.replace(conmim(), seed=9), CPU)
    assert not torch.equal(one(batch()), other(batch()))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(batch()), other(batch()))


def test_the_teacher_is_shown_the_strong_view():
    view = MomentumTeacher(conmim(), CPU).teacher_view
    assert view.strong and view.size == 16
