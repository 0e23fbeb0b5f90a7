"""VQ-KD against a slow twin on checkpoints with published names; what is refused; tokenizers of one's own."""

import argparse
import dataclasses
import gzip
import math

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from mapet_ds.config.sections import Config, ModelConfig, TokenizerConfig
from mapet_ds.data.batch import Batch, View
from mapet_ds.draws import Place
from mapet_ds.errors import ConfigError
from mapet_ds.targets.token_ids import TokenIds
from mapet_ds.targets.tokenizer import build_tokenizer
from mapet_ds.targets.vqkd import VQKD

CPU = torch.device("cpu")
TINY = {"width": 128, "depth": 2, "hidden": 256, "patch": 8, "grid": 4, "codes": 50, "dim": 8}
PUBLISHED = {"width": 768, "depth": 12, "hidden": 3072, "patch": 16, "grid": 14, "codes": 8192, "dim": 32}


def vit_shapes(prefix, width, depth, hidden, patch, grid, channels=3):
    """Names and shapes of one ViT of a published checkpoint."""
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, grid**2 + 1, width),
        "patch_embed.proj.weight": (width, channels, patch, patch), "patch_embed.proj.bias": (width,),
        "fc_norm.weight": (width,), "fc_norm.bias": (width,),
    }  # fmt: skip
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.{name}": shape
            for name, shape in {
                "norm1.weight": (width,), "norm1.bias": (width,), "attn.q_bias": (width,),
                "attn.v_bias": (width,),
                "attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width),
                "attn.proj.bias": (width,),
                "norm2.weight": (width,), "norm2.bias": (width,), "mlp.fc1.weight": (hidden, width),
                "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,),
            }.items()
        }  # fmt: skip
    return {prefix + name: shape for name, shape in shapes.items()}


def random_checkpoint(width, depth, hidden, patch, grid, codes, dim, seed=0):
    """All tensors of a training checkpoint: encoder, codes, and what the tokenizer must leave alone."""
    shapes = vit_shapes("encoder.", width, depth, hidden, patch, grid)
    shapes |= {
        "encode_task_layer.0.weight": (width, width), "encode_task_layer.0.bias": (width,),
        "encode_task_layer.2.weight": (dim, width), "encode_task_layer.2.bias": (dim,),
        "quantize.embedding.weight": (codes, dim),
    }  # fmt: skip
    shapes |= vit_shapes("decoder.", width, 1, hidden, 1, grid, channels=dim)
    shapes |= {
        "decode_task_layer.0.weight": (width, width), "decode_task_layer.2.weight": (512, width),
        "quantize.cluster_size": (codes,),
        "quantize.embedding.cluster_size": (codes,), "quantize.embedding.embed_avg": (codes, dim),
        "quantize.embedding.initted": (1,), "teacher_model.visual.proj": (width, 512),
        "scaling_layer.shift": (1, 3, 1, 1),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        fan_in = 25 if "bias" in name else math.prod(shape[1:]) if len(shape) in (2, 4) else 1
        tensors[name] = torch.randn(shape, generator=generator) / math.sqrt(fan_in)
        if "norm" in name and name.endswith("weight"):
            tensors[name] += 1
    tensors["quantize.embedding.weight"] = functional.normalize(tensors["quantize.embedding.weight"], dim=-1)
    return tensors


def twin_distances(tensors, images, size):
    """[B, L, K] squared distances in float64, by matrix products alone."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    width, heads = size["width"], size["width"] // 64

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * t[f"encoder.{name}.weight"] + t[f"encoder.{name}.bias"]

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    p, g = size["patch"], size["grid"]
    patches = images.double().view(-1, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(-1, g * g, 3 * p * p)
    x = patches @ t["encoder.patch_embed.proj.weight"].flatten(1).T + t["encoder.patch_embed.proj.bias"]
    x = torch.cat([t["encoder.cls_token"].expand(len(x), 1, width), x], dim=1) + t["encoder.pos_embed"]
    for i in range(size["depth"]):
        y, block = norm(x, f"blocks.{i}.norm1"), f"encoder.blocks.{i}."
        q, k, v = (y @ w.T for w in t[block + "attn.qkv.weight"].split(width))
        q, v = q + t[block + "attn.q_bias"], v + t[block + "attn.v_bias"]
        out = []
        for head in range(heads):
            part = slice(64 * head, 64 * head + 64)
            attention = (q[..., part] @ k[..., part].transpose(1, 2) / 8).softmax(-1)
            out.append(attention @ v[..., part])
        x = x + linear(torch.cat(out, dim=-1), block + "attn.proj")
        y = linear(norm(x, f"blocks.{i}.norm2"), block + "mlp.fc1")
        x = x + linear(y * (1 + torch.erf(y / math.sqrt(2))) / 2, block + "mlp.fc2")
    x = linear(norm(x[:, 1:], "fc_norm"), "encode_task_layer.0").tanh()
    z = linear(x, "encode_task_layer.2")
    z = z / z.norm(dim=-1, keepdim=True)
    return torch.stack([(z - code).square().sum(-1) for code in t["quantize.embedding.weight"]], dim=-1)


def settings(path, size, **changes):
    tokenizer = TokenizerConfig(name="vqkd", path=str(path), vocab_size=size["codes"])
    model = ModelConfig(img_size=size["grid"] * size["patch"], patch_size=size["patch"])
    return dataclasses.replace(Config(tokenizer=tokenizer, model=model), **changes)


def write(path, tensors, **beside):
    torch.save({"model": tensors, **beside}, path)
    return path


@pytest.fixture(scope="module")
def tiny():
    return random_checkpoint(**TINY)


@pytest.mark.parametrize("size", [TINY, PUBLISHED], ids=["tiny", "published"])
def test_ids_are_the_twins(size, tmp_path):
    tensors = random_checkpoint(**size)
    path = write(
        tmp_path / "vqkd.pth",
        tensors,
        epoch=99,
        args=argparse.Namespace(model="vqkd"),
        optimizer={"state": {}},
    )
    tokenizer = build_tokenizer(settings(path, size), CPU)
    side = size["grid"] * size["patch"]
    assert tokenizer.view == View(side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert tokenizer.vocab_size == size["codes"]
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        ids = tokenizer(images)
    assert ids.shape == (2, size["grid"] ** 2)
    assert ids.dtype == torch.long
    assert not ids.requires_grad
    scores = twin_distances(tensors, images, size)
    nearest, second = scores.topk(2, largest=False).values.unbind(-1)
    clear = second - nearest > 1e-4
    assert clear.double().mean() > 0.9
    assert torch.equal(ids[clear], scores.argmin(-1)[clear])
    assert len(ids.unique()) > 15  # so that a wrong forward would show


def test_codes_are_taken_as_stored_and_points_normalised(tiny, tmp_path):
    """A longer code wins where Euclid says so; the size of the points means nothing."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = build_tokenizer(settings(write(tmp_path / "a.pth", tiny), TINY), CPU)(images)
    scaled = tiny | {
        name: 7 * tiny[name] for name in ("encode_task_layer.2.weight", "encode_task_layer.2.bias")
    }
    assert torch.equal(
        build_tokenizer(settings(write(tmp_path / "b.pth", scaled), TINY), CPU)(images), expected
    )
    longer = tiny | {
        "quantize.embedding.weight": tiny["quantize.embedding.weight"] * torch.linspace(0.5, 2, 50)[:, None]
    }
    ids = build_tokenizer(settings(write(tmp_path / "c.pth", longer), TINY), CPU)(images)
    assert torch.equal(ids, twin_distances(longer, images, TINY).argmin(-1))
    assert not torch.equal(ids, expected)


def test_identity_is_of_the_used_weights(tiny, tmp_path):
    used = {
        name: t
        for name, t in tiny.items()
        if not name.startswith(("decode", "teacher", "scaling", "quantize.cluster"))
    }
    save_file(used, tmp_path / "small.safetensors")
    paths = [write(tmp_path / "all.pth", tiny), tmp_path / "small.safetensors"]
    torch.save({"state_dict": used}, tmp_path / "named.pth")
    torch.save(used, tmp_path / "bare.pth")
    paths += [tmp_path / "named.pth", tmp_path / "bare.pth"]
    identities = [build_tokenizer(settings(path, TINY), CPU).identity for path in paths]
    assert identities[0]["name"] == "vqkd"
    assert len(identities[0]["sha256"]) == 64
    assert all(identity == identities[0] for identity in identities)
    for name in ("encoder.blocks.1.attn.v_bias", "quantize.embedding.weight"):
        other = write(tmp_path / "other.pth", tiny | {name: tiny[name] + 1e-3})
        assert build_tokenizer(settings(other, TINY), CPU).identity != identities[0]


def test_it_is_frozen(tiny, tmp_path):
    tokenizer = VQKD(settings(write(tmp_path / "a.pth", tiny), TINY), CPU)
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert not tokenizer.training


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            without("encoder.blocks.1.attn.q_bias"),
            "1 tensors differ, e.g. encoder.blocks.1.attn.q_bias is missing",
        ),
        (without("encoder.pos_embed"), "encoder.pos_embed is missing"),
        (without("quantize.embedding.weight"), "quantize.embedding.weight is missing"),
        (without("encode_task_layer.0.bias"), "encode_task_layer.0.bias is missing"),
        (
            lambda t: t | {"encoder.fc_norm.bias": torch.zeros(3)},
            r"fc_norm.bias is \(3,\), the model's \(128,\)",
        ),
        (
            lambda t: t | {"quantize.embedding.weight": torch.zeros(50, 9)},
            r"task_layer.2.* is .8,.*, the model's .9,",
        ),
        (
            lambda t: t | {"quantize.embedding.weight": torch.zeros(50)},
            r"quantize.embedding.weight is \(50,\), not 2-d",
        ),
        (
            lambda t: t | {"encoder.blocks.0.gamma_1": torch.zeros(128)},
            "encoder.blocks.0.gamma_1 is not in the model",
        ),
        (
            lambda t: t | {"encoder.pos_embed": torch.zeros(1, 18, 128)},
            r"pos_embed is \(1, 18, 128\), the model's \(1, 17,",
        ),
        (
            lambda t: {"encoder.norm": torch.zeros(3)},
            "5 tensors differ, e.g. encode_task_layer.2.weight is missing",
        ),
    ],
)
def test_another_architecture_is_refused_by_name(tiny, tmp_path, change, sentence):
    path = write(tmp_path / "vqkd.pth", change(tiny))
    with pytest.raises(
        ConfigError, match=f"tokenizer.path = {path} is not a checkpoint of VQ-KD.*{sentence}"
    ):
        build_tokenizer(settings(path, TINY), CPU)


def test_a_width_that_heads_do_not_divide_is_refused(tmp_path):
    size = TINY | {"width": 96}
    with pytest.raises(ConfigError, match="width 96 is no multiple of 64"):
        build_tokenizer(settings(write(tmp_path / "vqkd.pth", random_checkpoint(**size)), size), CPU)


def test_another_grid_or_number_of_ids_is_refused(tiny, tmp_path):
    path = write(tmp_path / "vqkd.pth", tiny)
    with pytest.raises(
        ConfigError, match="gives 4 x 4 ids of an image of 32 px, but the student's patches are 8 x 8"
    ):
        build_tokenizer(settings(path, TINY, model=ModelConfig(img_size=64, patch_size=8)), CPU)
    with pytest.raises(
        ConfigError, match="vqkd has 50 ids, tokenizer.vocab_size is 51. Set tokenizer.vocab_size=50"
    ):
        build_tokenizer(settings(path, TINY | {"codes": 51}), CPU)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["program", "truncated", "text", "gzip", "empty", "safetensors", "list"])
def test_a_wrong_file_is_refused_and_never_run(tiny, tmp_path, kind):
    path = tmp_path / ("vqkd.safetensors" if kind == "safetensors" else "vqkd.pth")
    match kind:
        case "program":
            write(path, tiny, args=Touch(tmp_path / "executed"))
        case "truncated":
            path.write_bytes(write(path, tiny).read_bytes()[:-1000])
        case "text" | "safetensors":
            path.write_text("not a checkpoint")
        case "gzip":
            path.write_bytes(gzip.compress(b"not a checkpoint", mtime=0))
        case "empty":
            path.write_bytes(b"")
        case "list":
            torch.save([1, 2], path)
    with pytest.raises(
        ConfigError, match=f"tokenizer.path = {path} (can't be read as plain|holds no) tensors"
    ):
        build_tokenizer(settings(path, TINY), CPU)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("path", ["", "/nowhere/vqkd.pth"])
def test_a_missing_file_is_named(path):
    with pytest.raises(ConfigError, match=rf"tokenizer.path = {path or r'.empty.'} is not a file"):
        build_tokenizer(settings(path, TINY), CPU)


PLUG_IN = """
import torch
from mapet_ds.data.batch import View

class Bright:
    def __init__(self, config, device):
        self.view = View(config.grid, (0, 0, 0), (1, 1, 1))
        self.vocab_size, self.identity = 10, {"name": "bright"}

    def __call__(self, images):
        return images.mean(1).flatten(1).long()

number = 3
"""


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    (tmp_path / "brightness.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, codes=10: settings("", TINY, tokenizer=TokenizerConfig(name=name, vocab_size=codes))


def test_a_tokenizer_of_ones_own(plug_in):
    target = TokenIds(plug_in("brightness:Bright"), CPU)
    assert target.teacher_view.size == 4
    assert target.dim == 10
    assert target.identity == {"name": "bright"}
    images = (
        torch.arange(10.0)[[0, 0, 0, 0, 9, 9, 9, 9, 5, 5, 5, 5, 5, 5, 5, 5]]
        .view(1, 1, 4, 4)
        .expand(2, 3, 4, 4)
    )
    ids = target(Batch(None, images, torch.zeros(2), Place(0, 0)))
    assert torch.equal(ids, images[:, 0].flatten(1).long())
    target.note(ids)
    assert target.counts.tolist() == [8, 0, 0, 0, 0, 16, 0, 0, 0, 8]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "vq-kd",
            "tokenizer.name = vq-kd is not known; there are: kclip, vqkd, dalle, "
            "or name your own as package.module:factory",
        ),
        (
            "no_such_module:Bright",
            "no_such_module:Bright can't be resolved: No module named 'no_such_module'",
        ),
        ("brightness:Dark", "brightness:Dark can't be resolved: module 'brightness' has no attribute 'Dark'"),
        ("brightness:9", "brightness:9 can't be resolved"),
        ("brightness:number", r"brightness:number is a int, not a factory\(config, device\)"),
    ],
)
def test_unknown_names_are_refused(plug_in, name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_tokenizer(plug_in(name), CPU)


def test_a_plug_ins_number_of_ids_is_checked(plug_in):
    with pytest.raises(ConfigError, match="brightness:Bright has 10 ids, tokenizer.vocab_size is 8192"):
        build_tokenizer(plug_in("brightness:Bright", 8192), CPU)
