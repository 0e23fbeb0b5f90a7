"""Assignment against FAISS, fitting, and codebook files that must be refused."""

import dataclasses
import os
import pickle

import faiss
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from towers import write_tower

from mapet_ds.config.running import TrainConfig
from mapet_ds.config.sections import Config, DataConfig, ModelConfig, TeacherConfig, TokenizerConfig
from mapet_ds.data.batch import View
from mapet_ds.errors import ConfigError
from mapet_ds.targets.codebook import Codebook, source_of, tf32_parts
from mapet_ds.targets.fitting import chosen_patches, fit, num_points
from mapet_ds.targets.teacher import build_teacher
from mapet_ds.targets.tokenizer import build_tokenizer

SETTINGS = TokenizerConfig(vocab_size=64, iterations=6, redo=2, points_per_centroid=40)
IDENTITY = {"name": "ViT-B-16", "sha256": "a" * 64, "layer": 11, "img_size": 224}


def overlapping_features(points=4000, width=48, mean=0.0):
    """Gaussian features with a decaying spectrum around a common mean: no clusters, many near ties."""
    generator = np.random.default_rng(0)
    scale = np.linspace(1, 0.1, width)
    return (scale * (generator.normal(size=(points, width)) + mean * generator.normal(size=width))).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def codebook():
    return fit(overlapping_features(), SETTINGS, seed=3, source=source_of(IDENTITY, DataConfig()))


def exact_scores(features, centroids):
    """[n, K] squared distances in float64, differences first."""
    return ((features.astype(np.float64)[:, None] - centroids.astype(np.float64)[None]) ** 2).sum(-1)


@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0, 10.0])
def test_assign_is_faiss_outside_ties(mean):
    features = overlapping_features(mean=mean)
    book = fit(features, SETTINGS, seed=0)
    centroids = book.centroids.numpy()
    index = faiss.IndexFlatL2(features.shape[1])
    index.add(centroids)
    ids = book.assign(torch.from_numpy(features)).numpy()
    scores = exact_scores(features, centroids)
    nearest, second = np.sort(scores, axis=1)[:, :2].T
    tie = second - nearest < 1e-6 * (features.astype(np.float64) ** 2).sum(1)  # of fp32 rounding in |x|^2
    assert tie.mean() < 0.01
    assert (ids == index.search(features, 1)[1][:, 0])[~tie].all()
    assert (ids == scores.argmin(1))[~tie].all()
    dropped_norm = (features @ centroids.T).argmax(1)
    assert (dropped_norm != ids).mean() > 0.05  # so the data would show a wrong formula


def test_parts_in_tf32_give_the_ids_of_fp32(monkeypatch):
    """TF32 keeps 10 bits of a fraction, bf16 has 7: a centroid's lower part is rounded, and no id changes."""
    codebook = fit(overlapping_features(mean=3.0), SETTINGS, seed=3)
    upper, lower = tf32_parts(codebook.centroids)
    assert torch.equal(upper + lower, codebook.centroids) and not (upper.view(torch.int32) & 0x1FFF).any()
    assert (lower.abs() < 2**-10 * codebook.centroids.abs()).all() and lower.any()
    features = torch.from_numpy(overlapping_features(mean=3.0)).bfloat16()
    kept = ((lower.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    assert not torch.equal(kept, lower)
    scores = (
        codebook.centroids.double().square().sum(dim=1) - 2 * features.double() @ (upper.double() + kept).T
    )
    nearest, second = scores.topk(2, largest=False).values.T
    tie = second - nearest < 1e-6 * features.double().square().sum(dim=1)
    expected = codebook.assign(features)
    assert tie.float().mean() < 0.01 and torch.equal(scores.argmin(dim=1)[~tie], expected[~tie])
    rough = codebook.centroids.double().square().sum(dim=1) - 2 * features.double() @ upper.double().T
    assert (rough.argmin(dim=1) != expected).any()  # so one part is not enough
    monkeypatch.setattr("mapet_ds.targets.codebook.has_tf32", lambda rows: True)
    assert torch.equal(codebook.assign(features)[~tie], expected[~tie])


def test_assign_keeps_shape_and_ignores_autocast(codebook):
    features = torch.from_numpy(overlapping_features(600, mean=3.0)).view(2, 300, 48)
    expected = codebook.assign(features)
    assert expected.shape == (2, 300)
    assert expected.dtype == torch.long
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook.assign(features), expected)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(codebook.assign(features), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    low = features.bfloat16()
    assert torch.equal(codebook.assign(low), codebook.assign(low.float()))


def test_assign_in_chunks_is_assign_at_once(codebook, monkeypatch):
    features = torch.from_numpy(overlapping_features(1001))
    expected = codebook.assign(features)
    largest = []
    argmin = torch.argmin
    monkeypatch.setattr("mapet_ds.targets.codebook.SCORES", 64 * 100)
    monkeypatch.setattr(
        torch, "argmin", lambda scores, **k: largest.append(scores.numel()) or argmin(scores, **k)
    )
    assert torch.equal(codebook.assign(features), expected)
    assert max(largest) == 64 * 100
    assert codebook.assign(features[:0]).shape == (0,)


def test_fit_is_faiss_kmeans_and_says_what_became_of_the_points(codebook):
    features = overlapping_features()
    kmeans = faiss.Kmeans(48, 64, niter=6, nredo=2, seed=3, max_points_per_centroid=40)
    kmeans.train(features)
    assert np.array_equal(codebook.centroids.numpy(), kmeans.centroids)
    assert fit(features, SETTINGS, seed=3).sha256 == codebook.sha256
    assert fit(features, SETTINGS, seed=4).sha256 != codebook.sha256
    ids = codebook.assign(torch.from_numpy(features)).numpy()
    share = np.bincount(ids, minlength=64) / len(ids)
    told = codebook.provenance
    assert float(told["inertia"]) == pytest.approx(
        exact_scores(features, codebook.centroids.numpy()).min(1).sum(), rel=1e-4
    )
    assert float(told["perplexity"]) == pytest.approx(
        np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()), rel=1e-6
    )
    assert int(told["dead_codes"]) == (share == 0).sum()
    assert {key: told[key] for key in ("seed", "points", "tokenizer.redo", "tokenizer.iterations")} == {
        "seed": "3", "points": "4000", "tokenizer.redo": "2", "tokenizer.iterations": "6",
    }  # fmt: skip
    assert told["faiss"].endswith(f"{faiss.get_num_gpus()} GPU" if faiss.get_num_gpus() else "CPU")


def test_dead_codes_are_counted():
    features = np.repeat(np.eye(8, dtype=np.float32), 50, axis=0)  # eight places for sixteen codes
    told = fit(features, TokenizerConfig(vocab_size=16, iterations=3, redo=1), seed=0).provenance
    assert int(told["dead_codes"]) >= 8
    assert float(told["perplexity"]) <= 8.001


def test_fit_refuses_too_few_points_and_what_is_not_finite():
    with pytest.raises(ConfigError, match="vocab_size = 64, but there are only 63 .* at most 63"):
        fit(overlapping_features(63), SETTINGS, seed=0)
    for value in (np.nan, np.inf):
        features = overlapping_features()
        features[[5, 9], 7] = value
        with pytest.raises(ConfigError, match="2 of 4000 patch features are not finite"):
            fit(features, SETTINGS, seed=0)


def test_save_and_load(codebook, tmp_path):
    path = tmp_path / "new" / "codebook.safetensors"
    codebook.save(path)
    loaded = Codebook.load(path)
    assert torch.equal(loaded.centroids, codebook.centroids)
    assert loaded.sha256 == codebook.sha256
    assert loaded.provenance == codebook.provenance
    assert loaded.provenance["teacher.name"] == "ViT-B-16"
    assert os.listdir(path.parent) == ["codebook.safetensors"]


def test_an_interrupted_save_leaves_the_old_file(codebook, tmp_path, monkeypatch):
    path = tmp_path / "codebook.safetensors"
    codebook.save(path)

    def half(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("mapet_ds.targets.codebook.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        fit(overlapping_features(), SETTINGS, seed=9).save(path)
    assert Codebook.load(path).sha256 == codebook.sha256


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_wrong(path, kind, codebook):
    codebook.save(path)
    whole = path.read_bytes()
    match kind:
        case "pickle":
            path.write_bytes(pickle.dumps(Touch(path.with_name("executed"))))
        case "torch":
            torch.save({"centroids": Touch(path.with_name("executed"))}, path)
        case "truncated":
            path.write_bytes(whole[:-100])
        case "flipped":
            path.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
        case "foreign":
            save_file({"weight": torch.zeros(3, 3)}, path)
        case "no provenance":
            save_file({"centroids": torch.zeros(3, 3)}, path)
        case "fp16":
            save_file({"centroids": torch.zeros(3, 3).half()}, path, metadata={"sha256": "x"})
        case "empty":
            path.write_bytes(b"")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("pickle", "is not a codebook"), ("torch", "is not a codebook"), ("truncated", "is not a codebook"),
        ("empty", "is not a codebook"), ("foreign", "is not a codebook"), ("flipped", "is damaged"),
        ("no provenance", "was not written by"), ("fp16", "was not written by"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_and_never_run(codebook, tmp_path, kind, sentence):
    path = tmp_path / "codebook.safetensors"
    write_wrong(path, kind, codebook)
    with pytest.raises(ConfigError, match=f"{path} {sentence}"):
        Codebook.load(path)
    assert not (tmp_path / "executed").exists()


def test_a_missing_file_names_the_cure(tmp_path):
    with pytest.raises(ConfigError, match="tools/fit_codebook.py writes it"):
        Codebook.load(tmp_path / "none.safetensors")


def test_a_codebook_knows_its_teacher(codebook):
    data = DataConfig()
    codebook.check(IDENTITY, data, 64)
    codebook.check(IDENTITY | {"name": "ViT-B-16-quickgelu"}, data, 64)  # an alias: the checksum decides
    for change, crops, vocab_size, sentence in [
        (
            {"sha256": "b" * 64, "name": "RN50"},
            data,
            64,
            r"sha256 = aaa.*\(teacher ViT-B-16\).* bbb.*\(teacher RN50\)",
        ),
        ({"layer": 10}, data, 64, r"layer = 11 .* run has 10"),
        ({"img_size": 448}, data, 64, r"img_size = 224 .* run has 448"),
        ({}, DataConfig(crop="random"), 64, r"data.crop = center, .* run has random"),
        ({}, data, 65, r"vocab_size = 64, .* run has 65"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            codebook.check(IDENTITY | change, crops, vocab_size)
    with pytest.raises(ConfigError, match="teacher.sha256 = not recorded"):
        Codebook(codebook.centroids, {}).check(IDENTITY, data, 64)


def test_random_crops_are_recorded_and_compared(codebook):
    data = DataConfig(crop="random", crop_scale=(0.4, 1.0))
    source = source_of(IDENTITY, data) | {"tokenizer.vocab_size": 64}
    assert source["data.crop_scale"] == "[0.4, 1.0]"
    Codebook(codebook.centroids, source).check(IDENTITY, data, 64)
    with pytest.raises(ConfigError, match=r"crop_scale = \[0.4, 1.0\], .* run has \[0.2, 1.0\]"):
        Codebook(codebook.centroids, source).check(IDENTITY, DataConfig(crop="random"), 64)


def test_kclip_is_the_codebook_on_the_teachers_features(tmp_path):
    config = Config(
        model=ModelConfig(img_size=64),
        teacher=TeacherConfig(name=f"local-dir:{write_tower(tmp_path / 'vit', 'vit')}", img_size=64),
        tokenizer=TokenizerConfig(path=str(tmp_path / "codebook.safetensors"), vocab_size=20),
    )
    teacher = build_teacher(config.teacher, torch.device("cpu"))
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = teacher(images).flatten(0, 1)
    source = source_of(teacher.identity, config.data) | {"tokenizer.vocab_size": 20}
    book = Codebook(features[5:25], source)
    book.save(config.tokenizer.path)
    tokenizer = build_tokenizer(config, torch.device("cpu"))
    ids = tokenizer(images)
    assert ids.shape == (3, 16)
    assert torch.equal(ids.flatten()[5:25], torch.arange(20))
    assert tokenizer.vocab_size == 20
    compiled = build_tokenizer(
        dataclasses.replace(config, train=TrainConfig(compile=True)), torch.device("cpu")
    ).teacher
    for tower, own in (tokenizer.teacher, False), (compiled, True):
        assert all(("forward" in vars(block)) == own for block in tower.visual.transformer.resblocks)
    assert tokenizer.view == View(64, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    assert tokenizer.identity == {
        "teacher": teacher.identity,
        "codebook": book.sha256,
        "dtype": "torch.float32",
    }
    for change, sentence in [
        ({"path": ""}, "is not a file: tools/fit_codebook.py writes it"),
        ({"vocab_size": 21}, "vocab_size = 20, .* run has 21"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            changed = dataclasses.replace(config.tokenizer, **change)
            build_tokenizer(dataclasses.replace(config, tokenizer=changed), torch.device("cpu"))
    with pytest.raises(ConfigError, match="features are 4 x 4, the student's patches 2 x 2"):
        build_tokenizer(dataclasses.replace(config, model=ModelConfig(img_size=32)), torch.device("cpu"))


def sampled(config, images, micro):
    """(image, patch) by place, put together from micro-batches, the last of which runs past the end."""
    points = {}
    for first in range(0, images, micro):
        start, image, patch = chosen_patches(config, images, first, micro)
        points |= {
            start + i: (first + int(a), int(b)) for i, (a, b) in enumerate(zip(image, patch, strict=True))
        }
    assert sorted(points) == list(range(len(points)))
    return [points[place] for place in sorted(points)]


@pytest.mark.parametrize(("vocab_size", "per_centroid"), [(64, 3), (7, 1), (64, 20), (64, 512)])
def test_the_sample_covers_the_set_evenly_without_repetition(vocab_size, per_centroid):
    tokenizer = TokenizerConfig(vocab_size=vocab_size, points_per_centroid=per_centroid)
    config = Config(tokenizer=tokenizer, model=ModelConfig(img_size=64), seed=5)
    images = 101
    points = sampled(config, images, micro=8)
    assert points == sampled(config, images, micro=3)
    wanted = min(images * 16, vocab_size * per_centroid)
    assert len(points) == len(set(points)) == wanted == num_points(images, config)
    counts = np.bincount([image for image, _ in points], minlength=images)
    assert counts.max() - counts.min() <= 1
    patches = np.bincount([patch for _, patch in points], minlength=16)
    assert patches.max() < 2 * max(patches.mean(), 4)
    if wanted < images * 16:
        assert points != sampled(
            Config(tokenizer=tokenizer, model=ModelConfig(img_size=64), seed=6), images, micro=8
        )


def test_too_few_images_are_refused_before_any_work():
    config = Config(model=ModelConfig(img_size=64), tokenizer=TokenizerConfig(vocab_size=100))
    with pytest.raises(ConfigError, match="vocab_size = 100, but 6 images have only 96 patches"):
        num_points(6, config)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_assignment_on_a_gpu_is_the_cpus(codebook):
    features = torch.from_numpy(overlapping_features())
    expected = codebook.assign(features)
    torch.set_float32_matmul_precision("medium")  # TF32 must not reach it
    try:
        found = Codebook(codebook.centroids.clone(), {}).to(torch.device("cuda")).assign(features.cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (found.cpu() == expected).float().mean() > 0.9995


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("width", [48, 4096])
def test_assignment_of_bf16_on_a_gpu_is_exact_outside_ties(width):
    features = torch.from_numpy(overlapping_features(width=width, mean=3.0)).bfloat16()
    centroids = torch.from_numpy(overlapping_features(512, width=width, mean=3.0)) * 0.9
    found = Codebook(centroids, {}).to(torch.device("cuda")).assign(features.cuda()).cpu()
    scores = centroids.double().square().sum(dim=1) - 2 * features.double() @ centroids.double().T
    nearest, second = scores.topk(2, largest=False).values.T
    tie = second - nearest < 2e-6 * features.double().square().sum(dim=1)
    assert tie.float().mean() < 0.05 and torch.equal(found[~tie], scores.argmin(dim=1)[~tie])


@pytest.mark.gpu
@pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="FAISS sees no GPU")
def test_kmeans_on_a_gpu_is_as_good_as_on_a_cpu(monkeypatch):
    features = overlapping_features(20000)
    on_gpu = fit(features, SETTINGS, seed=3).provenance
    assert on_gpu["faiss"].endswith("GPU")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    on_cpu = fit(features, SETTINGS, seed=3).provenance
    assert float(on_gpu["inertia"]) == pytest.approx(float(on_cpu["inertia"]), rel=0.01)
