"""The frozen teacher against open_clip's own model, from every kind of file, whole and spread over ranks."""

import json
import pickle
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from forked import TORCHRUN, start
from safetensors.torch import load_file, save_file
from teacher_worker import CASES, gpu_bytes, images, settings
from towers import SIZE, VISION, know_tiny_models, model_config, whole_model, write_tower

from mapet_ds.config.sections import TeacherConfig
from mapet_ds.errors import ConfigError
from mapet_ds.targets.codebook import Codebook
from mapet_ds.targets.teacher import build_teacher, teacher_mean_std

CPU = torch.device("cpu")
LAYERS = {"vit": 3, "resnet": 5, "timm": 6, "relpos": 9}
SAFETENSORS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    for kind in VISION:
        write_tower(folder / kind, kind)
    state = {f"module.{k}": v for k, v in load_file(folder / "vit" / SAFETENSORS).items()}
    torch.save({"epoch": 3, "state_dict": state}, folder / "vit.pt")
    return folder


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    know_tiny_models(monkeypatch.setattr)


def build(towers, kind, **changes):
    config = {"name": f"local-dir:{towers}/{kind}", "img_size": SIZE[kind], "precision": "fp32"} | changes
    return build_teacher(TeacherConfig(**config), CPU)


def named(path, kind="vit", **changes):
    return build_teacher(TeacherConfig(name=kind, weights=str(path), img_size=SIZE[kind], **changes), CPU)


def layers_of(visual):
    """The modules whose outputs are the layers, and how many class tokens these begin with."""
    if hasattr(visual, "transformer"):
        return list(visual.transformer.resblocks), 1
    if hasattr(visual, "layer4"):
        return [visual.avgpool, visual.layer1, visual.layer2, visual.layer3, visual.layer4], 0
    return list(visual.trunk.blocks), visual.trunk.num_prefix_tokens


def test_a_resnet_computes_in_channels_last_throughout(towers):
    teacher, layouts = build(towers, "resnet"), {}
    for name, module in teacher.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: layouts.update({name: (*inputs, output)})
            )
    teacher(images("resnet"))
    assert len(layouts) > 10
    assert [
        n
        for n, both in layouts.items()
        if not all(x.is_contiguous(memory_format=torch.channels_last) for x in both)
    ] == []


@pytest.mark.parametrize("kind", VISION)
def test_features_of_each_layer_are_those_inside_open_clips_forward(towers, kind):
    model = whole_model(towers / kind)
    modules, prefix = layers_of(model.visual)
    assert len(modules) == LAYERS[kind]
    seen = []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.enable_grad():  # the ordinary attention path
        model.visual(images(kind))
    for layer in {0, 1, len(seen) - 2, len(seen) - 1}:
        expected = seen[layer]
        expected = expected.flatten(2).transpose(1, 2) if expected.ndim == 4 else expected[:, prefix:]
        teacher = build(towers, kind, layer=layer - len(seen) if layer % 2 else layer)
        features = teacher(images(kind))
        assert features.shape == (3, teacher.grid**2, teacher.embed_dim)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
        assert teacher.identity["layer"] == layer


@pytest.mark.parametrize(("kind", "layer"), [("vit", 0), ("resnet", 2), ("timm", 0)])
def test_patches_are_row_major(towers, kind, layer):
    teacher = build(towers, kind, layer=layer)
    cell = SIZE[kind] // teacher.grid
    dark = torch.zeros(1, 3, SIZE[kind], SIZE[kind])
    for row, column in ((0, teacher.grid - 1), (teacher.grid - 1, 0), (1, 2)):
        lit = dark.clone()
        lit[:, :, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 5
        change = (teacher(lit) - teacher(dark)).norm(dim=-1)[0]
        brightest = divmod(change.argmax().item(), teacher.grid)
        reach = 1 if kind == "resnet" else 0  # of its convolutions
        assert max(abs(brightest[0] - row), abs(brightest[1] - column)) <= reach


@pytest.mark.parametrize("layer", [3, -4, 40])
def test_a_layer_that_is_not_there_is_refused(towers, layer):
    with pytest.raises(ConfigError, match=rf"teacher.layer = {layer}, but .* has 3 layers: choose -3 .. -1"):
        build(towers, "vit", layer=layer)


def test_a_teacher_stays_frozen_whatever_is_around_it(towers):
    teacher = build(towers, "resnet")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    expected = teacher(images("resnet"))
    wrapped = torch.nn.Sequential(teacher).train()
    with torch.autocast("cpu", torch.bfloat16):
        features = wrapped(images("resnet").requires_grad_())
    assert not any(module.training for module in teacher.modules())
    assert not features.requires_grad
    assert not features.is_inference()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(features, expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_bf16_targets_do_not_depend_on_the_gradient_mode(towers):
    teacher = build(towers, "vit", precision="bf16")
    features = teacher(images("vit"))
    teacher.visual.requires_grad_(True)
    trained = teacher.visual.forward_intermediates(images("vit").bfloat16(), indices=[2], output_fmt="NLC")
    assert features.dtype == torch.bfloat16
    assert torch.equal(features, trained["image_intermediates"][0])


@pytest.mark.parametrize("kind", VISION)
def test_bf16_is_near_fp32_and_norms_stay_in_fp32(towers, kind):
    exact, fast = build(towers, kind), build(towers, kind, precision="bf16")
    error = (fast(images(kind)).float() - exact(images(kind))).norm() / exact(images(kind)).norm()
    assert 0 < error < 0.03
    assert fast.local_bytes < 0.6 * exact.local_bytes
    assert fast.identity == exact.identity
    norms = [
        m
        for m in fast.modules()
        if isinstance(m, (torch.nn.BatchNorm2d, open_clip.transformer.LayerNormFp32))
    ]
    assert bool(norms) == (kind in ("vit", "resnet"))
    assert all(norm.weight.dtype == torch.float32 for norm in norms)


def test_every_kind_of_file_is_the_same_teacher(towers, tmp_path):
    state = load_file(towers / "vit" / SAFETENSORS)
    torch.save(state, tmp_path / "plain.pt")
    save_file(
        {name: tensor for name, tensor in state.items() if name.startswith("visual.")},
        tmp_path / "tower.safetensors",
    )
    expected = build(towers, "vit")
    for path in (
        towers / "vit.pt",
        tmp_path / "plain.pt",
        tmp_path / "tower.safetensors",
        towers / "vit" / SAFETENSORS,
    ):
        teacher = named(path)
        assert teacher.identity["sha256"] == expected.identity["sha256"]
        assert torch.equal(teacher(images("vit")), expected(images("vit")))
    assert expected.identity["name"] == "local-dir"
    moved = (towers / "vit").rename(towers / "elsewhere")
    assert (
        build_teacher(TeacherConfig(name=f"local-dir:{moved}", img_size=64), CPU).identity
        == expected.identity
    )
    moved.rename(towers / "vit")


def test_the_checksum_tells_weights_and_architectures_apart(towers, tmp_path):
    other = write_tower(tmp_path / "other", "vit", seed=1)
    heads = model_config("vit")
    heads["vision_cfg"]["head_width"] = 16  # the same tensors, other features
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "open_clip_config.json").write_text(json.dumps({"model_cfg": heads}))
    save_file(load_file(towers / "vit" / SAFETENSORS), tmp_path / "heads" / SAFETENSORS)
    folders = (towers / "vit", other, tmp_path / "heads")
    shas = {build(towers, "vit", name=f"local-dir:{folder}").identity["sha256"] for folder in folders}
    assert len(shas) == 3


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_wrong(path, kind, towers):
    """Files that are no teacher of these tests' ViT."""
    state = load_file(towers / "vit" / SAFETENSORS)
    whole = (towers / "vit" / SAFETENSORS).read_bytes()
    match kind:
        case "torchscript":
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
        case "pickle":
            path.write_bytes(pickle.dumps({"visual.proj": Touch(path.with_name("executed"))}))
        case "torch pickle":
            torch.save({"visual.proj": Touch(path.with_name("executed"))}, path)
        case "list":
            torch.save([1, 2], path)
        case "html":
            path.write_text("<html>404</html>")
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "other model":
            save_file(load_file(towers / "resnet" / SAFETENSORS), path)
        case "wider":
            save_file(state | {"visual.proj": torch.zeros(64, 65)}, path)
        case "text only":
            save_file(
                {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}, path
            )
        case "missing":
            save_file({name: tensor for name, tensor in state.items() if name != "visual.proj"}, path)


@pytest.mark.parametrize(
    ("kind", "suffix", "sentence"),
    [
        ("torchscript", ".pt", "TorchScript archive.*Name the tag"),
        ("pickle", ".pt", "can't be read as plain tensors"),
        ("torch pickle", ".pt", "can't be read as plain tensors"),
        ("list", ".pt", "holds no tensors by name"),
        ("html", ".pt", "can't be read as plain tensors"),
        ("html", ".safetensors", "can't be read as plain tensors"),
        ("truncated", ".safetensors", "can't be read as plain tensors"),
        (
            "other model",
            ".safetensors",
            "does not fit teacher.name = vit at 64 px: .* differ, e.g. visual.* is not in",
        ),
        ("wider", ".safetensors", r"visual.proj is \(64, 65\), the model's \(64, 64\)"),
        ("text only", ".safetensors", "holds no image tower"),
        ("missing", ".safetensors", "1 tensors differ, e.g. visual.proj is missing"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:FutureWarning", "ignore:Detected pickle protocol:UserWarning"
)
def test_a_wrong_file_is_answered_by_a_sentence_and_never_run(towers, tmp_path, kind, suffix, sentence):
    path = tmp_path / f"weights{suffix}"
    write_wrong(path, kind, towers)
    with pytest.raises(ConfigError, match=sentence) as raised:
        named(path)
    assert str(path) in str(raised.value)
    assert not (tmp_path / "executed").exists()


def test_random_weights_only_when_named(towers):
    for weights in ("", "openai", "/nowhere/weights.safetensors"):
        with pytest.raises(
            ConfigError, match="neither a file nor a tag of vit .*`random` must be asked for by name"
        ):
            named(weights)
    first, second = named("random"), named("random", precision="bf16")
    assert first.identity == second.identity
    assert first.identity["sha256"] != build(towers, "vit").identity["sha256"]


def test_a_folder_without_weights_is_refused(towers, tmp_path):
    write_tower(tmp_path / "vit", "vit").joinpath(SAFETENSORS).unlink()
    with pytest.raises(ConfigError, match=f"there is no {tmp_path}/vit/{SAFETENSORS}"):
        build(tmp_path, "vit")


@pytest.mark.parametrize(("kind", "size"), [("vit", 96), ("timm", 96), ("resnet", 192)])
def test_another_image_size_is_what_open_clip_makes_of_it(towers, kind, size):
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    teacher = build(towers, kind, img_size=size)
    if kind == "resnet":
        visual = whole_model(towers / kind).visual
        expected = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
        expected = expected.flatten(2).transpose(1, 2)
    else:
        model = whole_model(towers / kind, force_image_size=size)
        expected = model.visual.forward_intermediates(pixels, indices=1, output_fmt="NLC")[
            "image_intermediates"
        ][0]
    assert teacher.grid == size // (32 if kind == "resnet" else 16)
    assert teacher.identity["img_size"] == size
    torch.testing.assert_close(teacher(pixels), expected.detach(), rtol=1e-5, atol=1e-5)


def test_quick_gelu_comes_from_the_tag_and_a_file_is_asked_about(towers, monkeypatch, caplog):
    tag = {"url": "there", "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    downloads = []
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "vit", {"openai": tag})
    monkeypatch.setattr(
        open_clip, "download_pretrained", lambda cfg: downloads.append(cfg) or str(towers / "vit.pt")
    )
    monkeypatch.setattr(open_clip, "list_models", lambda: ["vit", "vit-quickgelu"])
    tagged = named("openai")
    assert downloads == [tag]
    assert not caplog.records
    file = named(towers / "vit.pt")
    assert "set teacher.name=vit-quickgelu" in caplog.text
    assert not torch.equal(tagged(images("vit")), file(images("vit")))
    assert tagged.identity["sha256"] != file.identity["sha256"]
    model = open_clip.CLIP(
        **{k: v for k, v in model_config("vit").items() if k != "custom_text"}, quick_gelu=True
    )
    model.load_state_dict(load_file(towers / "vit" / SAFETENSORS))
    expected = model.visual.forward_intermediates(images("vit"), indices=1, output_fmt="NLC")[
        "image_intermediates"
    ][0]
    torch.testing.assert_close(tagged(images("vit")), expected.detach(), rtol=1e-5, atol=1e-5)
    assert teacher_mean_std(TeacherConfig(name="vit", weights="openai")) == (tag["mean"], tag["std"])


def test_a_failed_download_is_a_sentence(monkeypatch):
    def fail(cfg):
        raise FileNotFoundError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(ConfigError, match="weights openai of RN50x64 can't be downloaded: no route to host"):
        build_teacher(TeacherConfig(), CPU)


def test_mean_and_std(towers):
    openai = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    assert teacher_mean_std(TeacherConfig()) == openai
    assert teacher_mean_std(TeacherConfig(name=f"local-dir:{towers}/vit")) == (
        (0.5, 0.4, 0.3),
        (0.2, 0.25, 0.3),
    )
    siglip = TeacherConfig(name="ViT-B-16-SigLIP", weights="my.safetensors")
    assert teacher_mean_std(siglip) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert teacher_mean_std(TeacherConfig(name="ViT-B-16", weights="random")) == openai


def test_a_file_of_a_tower_whose_tags_differ_in_colours_is_asked_about_once(caplog):
    file = TeacherConfig(name="ViT-L-14", weights="my.safetensors")
    for _ in range(2):
        assert teacher_mean_std(file)[0] == open_clip.OPENAI_DATASET_MEAN
    assert len(caplog.records) == 1 and "teacher.name=local-dir:FOLDER" in caplog.text
    teacher_mean_std(TeacherConfig(name="ViT-L-14", weights="laion2b_s32b_b82k"))
    teacher_mean_std(TeacherConfig(name="ViT-L-14", weights="random"))
    assert len(caplog.records) == 1


def test_a_grid_that_is_not_the_students_is_refused(towers):
    teacher = build(towers, "vit")
    teacher.check_grid(4)
    with pytest.raises(ConfigError, match="features are 4 x 4, the student's patches 7 x 7"):
        teacher.check_grid(7)


def run_sharded(towers, out, device, ranks=2):
    worker = Path(__file__).with_name("teacher_worker.py")
    command = [sys.executable, *TORCHRUN, f"--nproc_per_node={ranks}", worker, towers, out, device]
    done = start(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def sharded(towers, tmp_path_factory):
    """What two ranks saw, and the folder they wrote to."""
    out = tmp_path_factory.mktemp("sharded")
    return run_sharded(towers, out, "cpu"), out


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_sharded_teacher_gives_the_bits_of_the_whole_one(towers, sharded, case):
    results = [result[case] for result in sharded[0]]
    whole = build_teacher(settings(towers, case), CPU)
    expected = whole(images(case[0].removesuffix(".pt")))
    book = Codebook(expected.flatten(0, 1)[::3], {})
    for features, identity, local_bytes, _, _ in results:
        assert all(torch.equal(f, expected) for f in features)
        assert all(torch.equal(book.assign(f), book.assign(expected)) for f in features)
        assert identity == whole.identity
        assert (
            local_bytes <= (0.62 if case[2] != "none" else 1) * whole.local_bytes
        )  # statistics and tables stay whole
    assert sum(result[2] for result in results) >= whole.local_bytes
    read = results[1][3]  # by the second rank: the first reads all, for the checksum
    if case[2] != "none" and read is not None:
        assert read < 0.62 * sum(tensor.numel() for tensor in whole.state_dict().values())


def test_a_compiled_teacher_gives_the_same_features(towers, sharded):
    """One graph for a transformer's blocks, one for each of four stages; sharded like the eager one."""
    for result in sharded[0]:
        for case, (features, graphs, local_bytes) in result["compiled"].items():
            expected = build_teacher(settings(towers, case), CPU)(images(case[0]))
            assert all((f - expected).norm() < 1e-6 * expected.norm() for f in features)
            assert graphs == {"vit": 1, "resnet": 4}[case[0]]
            assert local_bytes == result[case][2]


def test_one_rank_a_node_downloads_and_its_failure_is_everybodys(towers, sharded):
    results, out = sharded
    assert (out / "calls").read_text() == "rank 0\n" * 2
    for result in results:
        assert result["download"]["good"] == named(towers / "vit.pt").identity
        assert "weights bad of vit can't be downloaded: no route to host" in result["download"]["bad"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", VISION)
def test_bf16_on_a_gpu_is_near_fp32_on_a_cpu(towers, kind):
    config = TeacherConfig(name=f"local-dir:{towers}/{kind}", img_size=SIZE[kind])
    fast = build_teacher(config, torch.device("cuda", 0))
    features = fast(images(kind).cuda())
    assert features.dtype == torch.bfloat16
    exact = build(towers, kind)(images(kind))
    assert (features.cpu().float() - exact).norm() / exact.norm() < 0.03
    assert fast.identity == build(towers, kind).identity


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sharded_on_two_gpus_is_the_whole_one_and_half_the_memory(towers, tmp_path):
    results = run_sharded(towers, tmp_path, "cuda")
    device, whole = torch.device("cuda", 0), None
    for case in CASES:
        del whole
        before = gpu_bytes(device)
        whole = build_teacher(settings(towers, case), device)
        allocated = gpu_bytes(device) - before
        expected = whole(images(case[0].removesuffix(".pt")).cuda()).cpu()
        for features, *_, mine in (result[case] for result in results):
            assert all(torch.equal(f, expected) for f in features), case
            assert mine < (0.65 if case[2] != "none" else 1.01) * allocated, case
