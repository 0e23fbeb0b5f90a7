"""Published checkpoints against a slow twin that knows them by their own names, and what is refused."""

import argparse
import json
import math
import runpy
import sys

import pytest
import timm
import torch
from forked import start
from safetensors.torch import save_file
from torch.nn import functional

from mapet_ds.config.finetune import ClassifierConfig
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.errors import ConfigError
from mapet_ds.finetuning.classifier import build_model
from mapet_ds.results.features import features
from mapet_ds.results.probe import load_timm
from mapet_ds.results.published import import_weights

TOOL = REPOSITORY / "tools" / "import_weights.py"
WIDTH = {"mapet": 192, "conmim": 384, "saim": 192}
SMALL = {"depth": 2, "patch": 8, "grid": 3}
TRUE = {"mapet": {"depth": 12}, "conmim": {"depth": 12}, "saim": {"width": 768, "depth": 2}}
"""MaPeT's and ConMIM's smallest models, and two of the twelve blocks of SAIM's only one, at 224 px."""


def block_shapes(method, width, heads, grid, finetuned):
    """Names and shapes of one block as published."""
    shapes = {
        "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
        "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    match method:
        case "mapet":
            shapes |= {
                "attn.q.weight": (width, width),
                "attn.q.bias": (width,),
                "ls1.gamma": (width,),
                "ls2.gamma": (width,),
            }
            shapes |= {"attn.kv.weight": (2 * width, width), "attn.kv.bias": (2 * width,)}
        case "saim":
            shapes |= {f"attn.{layer}.weight": (width, width) for layer in "qkv"}
            shapes |= {f"attn.{layer}.bias": (width,) for layer in "qkv"}
        case "conmim":
            shapes |= {
                "attn.qkv.weight": (3 * width, width),
                "attn.q_bias": (width,),
                "attn.v_bias": (width,),
            }
            shapes |= {"gamma_1": (width,), "gamma_2": (width,)}
            if finetuned:
                shapes["attn.relative_position_bias_table"] = ((2 * grid - 1) ** 2 + 3, heads)
                shapes["attn.relative_position_index"] = (grid**2 + 1, grid**2 + 1)
    return shapes


def pretraining_shapes(method, width, patch, grid, blocks):
    """What pre-training has beside the ViT."""
    match method:
        case "mapet":
            return {
                "mask_positional_token": (1, 1, width),
                "decoder.weight": (8192, width),
                "decoder.bias": (8192,),
            }
        case "saim":
            pixels, hidden = 3 * patch**2, 4 * width
            shapes = {f"query_{name}": shape for name, shape in blocks.items()} | {
                "gaussian_blur.weight": (3, 1, 9, 9)
            }
            shapes |= {"prediction_head.fc1.weight": (hidden, width), "prediction_head.fc1.bias": (hidden,)}
            return shapes | {
                "prediction_head.fc2.weight": (pixels, hidden),
                "prediction_head.fc2.bias": (pixels,),
            }
        case "conmim":
            shapes = {"mask_token": (1, 1, width), "lm_head.weight": (8192, width), "lm_head.bias": (8192,)}
            shapes |= {
                "projectors.0.weight": (4096, width),
                "projectors.1.weight": (4096,),
                "projectors.1.running_mean": (4096,),
            }
            shapes |= {"projectors.1.num_batches_tracked": (), "projectors.6.weight": (256, 4096)}
            shapes["rel_pos_bias.relative_position_bias_table"] = ((2 * grid - 1) ** 2 + 3, width // 64)
            return shapes | {"rel_pos_bias.relative_position_index": (grid**2 + 1, grid**2 + 1)}


def checkpoint(method, finetuned, width=None, depth=12, patch=16, grid=14, norm=None):
    """Random tensors by published names; norms and LayerScale around one."""
    width = width or WIDTH[method]
    block = block_shapes(method, width, width // 64, grid, finetuned)
    blocks = {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    shapes = {
        "cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    } | blocks  # fmt: skip
    if method != "conmim":
        shapes["pos_embed"] = (1, grid**2 + 1, width)
    norm = norm or ("fc_norm" if finetuned and method != "saim" else "norm")
    shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    if finetuned:
        shapes |= {"head.weight": (10, width), "head.bias": (10,)}
    else:
        shapes |= pretraining_shapes(method, width, patch, grid, blocks)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        matrix = len(shape) in (2, 4) and "table" not in name
        tensors[name] = noise * (0.8 / math.sqrt(math.prod(shape[1:]))) if matrix else 0.3 * noise
        if "gamma" in name or (name.endswith("weight") and "norm" in name):
            tensors[name] = 1 + 0.3 * noise
        if "index" in name or "num_batches" in name:
            tensors[name] = torch.zeros(shape, dtype=torch.long)
    return tensors


def relative_bias(table, grid):
    """[heads, N, N] added to attention, by the offset of query from key, and the class token's."""
    places = [None, *((y, x) for y in range(grid) for x in range(grid))]
    rows = torch.empty(len(places), len(places), dtype=torch.long)
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            if query and key:
                rows[i, j] = (query[0] - key[0] + grid - 1) * (2 * grid - 1) + query[1] - key[1] + grid - 1
            else:
                rows[i, j] = len(table) - (1 if query is None and key is None else 3 if query is None else 2)
    return table[rows].permute(2, 0, 1)


@torch.no_grad()
def twin(tensors, images):
    """A published model's tokens [B, N, D] after the last block, its head's input [B, D], logits or None."""
    t = {name: tensor.to(images.dtype) for name, tensor in tensors.items()}
    width, _, patch, _ = t["patch_embed.proj.weight"].shape
    grid = images.shape[-1] // patch

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]

    def queries_keys_values(x, attention):
        if f"{attention}.kv.weight" in t:  # MaPeT
            return linear(x, f"{attention}.q"), *linear(x, f"{attention}.kv").split(width, -1)
        if f"{attention}.k.weight" in t:  # SAIM
            return (linear(x, f"{attention}.{layer}") for layer in "qkv")
        q, k, v = (
            x @ rows.T for rows in t[f"{attention}.qkv.weight"].split(width)
        )  # ConMIM: keys have no bias
        return q + t[f"{attention}.q_bias"], k, v + t[f"{attention}.v_bias"]

    pixels = functional.unfold(images, patch, stride=patch).transpose(1, 2)
    x = pixels @ t["patch_embed.proj.weight"].flatten(1).T + t["patch_embed.proj.bias"]
    x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x], 1) + t.get("pos_embed", 0)
    depth = 1 + max(int(name.split(".")[1]) for name in t if name.startswith("blocks."))
    for block in (f"blocks.{i}" for i in range(depth)):
        shared = t.get("rel_pos_bias.relative_position_bias_table")
        table = t.get(f"{block}.attn.relative_position_bias_table", shared)
        bias = torch.zeros(width // 64) if table is None else relative_bias(table, grid)
        q, k, v = queries_keys_values(norm(x, f"{block}.norm1"), f"{block}.attn")
        heads = []
        for head in range(width // 64):
            part = slice(64 * head, 64 * head + 64)
            heads.append((q[..., part] @ k[..., part].mT / 8 + bias[head]).softmax(-1) @ v[..., part])
        scales = [t.get(f"{block}.ls{i}.gamma", t.get(f"{block}.gamma_{i}", 1)) for i in (1, 2)]
        x = x + scales[0] * linear(torch.cat(heads, -1), f"{block}.attn.proj")
        y = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + scales[1] * linear(y * (1 + torch.erf(y / math.sqrt(2))) / 2, f"{block}.mlp.fc2")
    if "fc_norm.weight" in t:
        pooled = norm(x[:, 1:].mean(1), "fc_norm")
    else:
        x = norm(x, "norm")
        pooled = x[:, 0]
    return x, pooled, linear(pooled, "head") if "head.weight" in t else None


def wrapped(method, finetuned, tensors):
    """A checkpoint as each method's training program saves it."""
    args = argparse.Namespace(model="some", epochs=100)
    if method == "mapet":
        return {
            "epoch": 99,
            "arch": "vit",
            "state_dict": tensors,
            "optimizer": {"state": {}},
            "args": args,
            "metric": 1.5,
        }
    if method == "conmim" and finetuned:  # DeepSpeed
        return {
            "module": {f"module.{name}": tensor for name, tensor in tensors.items()},
            "epoch": 99,
            "ds_version": "0.4.0",
        }
    return {
        "model": tensors,
        "optimizer": {"state": {}},
        "epoch": 99,
        "scaler": {"scale": 65536.0},
        "args": args,
    }


@pytest.fixture
def write(tmp_path):
    def write(method="mapet", finetuned=True, change=lambda tensors: tensors, name="published.pth", **size):
        tensors = change(checkpoint(method, finetuned, **(SMALL | size)))
        torch.save(wrapped(method, finetuned, tensors), tmp_path / name)
        return tmp_path / name

    return write


STAGES = pytest.mark.parametrize("finetuned", [False, True], ids=["pre-trained", "fine-tuned"])
EVERY = pytest.mark.parametrize("method", WIDTH)


@pytest.mark.parametrize(
    ("size", "layer_scale", "norm"),
    [("true", "keep", None), ("small", "keep", None), ("small", "fold", None), ("small", "keep", "norm"),
     ("small", "fold", "fc_norm")],
)  # fmt: skip
@STAGES
@EVERY
def test_timm_computes_what_the_published_model_does(tmp_path, method, finetuned, size, layer_scale, norm):
    """norm: the one before the head, of the class token or of the mean; None: the published one."""
    tensors = checkpoint(method, finetuned, norm=norm, **(TRUE[method] if size == "true" else SMALL))
    torch.save(wrapped(method, finetuned, tensors), tmp_path / "published.pth")
    found = import_weights(method, tmp_path / "published.pth", tmp_path / "out", layer_scale)
    model = timm.create_model(f"local-dir:{found.folder}", pretrained=True).double().eval()
    side = model.pretrained_cfg["input_size"][-1]
    assert side == (224 if size == "true" else 24)
    images = torch.randn(
        1 if size == "true" else 3,
        3,
        side,
        side,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(1),
    )
    tokens, pooled, logits = twin(tensors, images)
    assert tokens.std() > 0.3
    close = {"rtol": 0, "atol": 1e-9 if layer_scale == "keep" else 1e-5}
    with torch.no_grad():
        given = model.forward_features(images)
        torch.testing.assert_close(given, tokens, **close)
        torch.testing.assert_close(model.forward_head(given, pre_logits=True), pooled, **close)
        if finetuned:
            torch.testing.assert_close(model(images), logits, **close)
    assert found.num_classes == model.num_classes == (10 if finetuned else 0)
    scales = [name for name in model.state_dict() if "gamma" in name]
    assert bool(scales) == (layer_scale == "keep" and method != "saim")


@EVERY
def test_the_twin_uses_each_tensor_of_the_vit(method):
    tensors = checkpoint(method, False, width=64, **SMALL)
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = twin(tensors, images)[0]
    left_out = {"mapet": 3, "conmim": 9, "saim": 2 * 16 + 5}[method]
    changes = {
        name: torch.linspace(0, 1, tensor.numel()).view(tensor.shape) for name, tensor in tensors.items()
    }
    idle = [
        name
        for name in tensors
        if torch.equal(twin(tensors | {name: tensors[name] + changes[name]}, images)[0], expected)
    ]
    assert len(idle) == left_out
    assert not any(
        name.startswith(("blocks.", "norm.", "patch_embed.", "cls_token", "pos_embed")) for name in idle
    )


SAVED = {
    "bare": lambda t: t,
    "model": lambda t: {"model": t, "epoch": 3},
    "model within module": lambda t: {"module": {"model": t}},
    "prefixes": lambda t: {"model": {f"module.encoder.{name}": tensor for name, tensor in t.items()}},
    "compiled": lambda t: {"state_dict": {f"_orig_mod.module.{name}": tensor for name, tensor in t.items()}},
    "average beside": lambda t: {"model": t, "model_ema": {name: tensor + 1 for name, tensor in t.items()}},
}


@pytest.mark.parametrize("kind", [*SAVED, "safetensors", "moving average"])
def test_kinds_of_files(tmp_path, kind):
    tensors = checkpoint("mapet", True, **SMALL)
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.tar")
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "moving average":
        torch.save(
            {
                "state_dict": {},
                "state_dict_ema": {f"module.{name}": tensor for name, tensor in tensors.items()},
            },
            path,
        )
    else:
        torch.save(SAVED[kind](tensors), path)
    import_weights("mapet", path, tmp_path / "out", "keep", ema=kind == "moving average")
    state = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).state_dict()
    assert torch.equal(state["blocks.1.mlp.fc1.weight"], tensors["blocks.1.mlp.fc1.weight"])
    assert torch.equal(state["head.bias"], tensors["head.bias"])


def test_half_precision_is_written_as_fp32(tmp_path, write):
    path = write(change=lambda t: {name: tensor.half() for name, tensor in t.items()})
    import_weights("mapet", path, tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("method", "size", "crop_pct"),
    [
        ("mapet", {}, 0.9),
        ("conmim", {}, 0.875),
        ("saim", {}, 0.875),
        ("conmim", {"depth": 1, "patch": 16, "grid": 24}, 1.0),
    ],
)
def test_config_says_how_images_are_made(tmp_path, write, method, size, crop_pct):
    import_weights(method, write(method, **size), tmp_path / "out")
    found = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'out'}"))
    assert [*found["mean"], *found["std"]] == [0.485, 0.456, 0.406, 0.229, 0.224, 0.225]
    side = size["patch"] * size["grid"] if size else 24
    assert (tuple(found["input_size"]), found["interpolation"], found["crop_pct"]) == (
        (3, side, side),
        "bicubic",
        crop_pct,
    )
    cfg = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert cfg["num_classes"] == 10
    assert cfg["tag"] == method
    assert "license" not in cfg


@pytest.mark.parametrize(
    ("method", "width", "name", "layer_scale"),
    [("mapet", 192, "vit_tiny_patch16_224", "fold"), ("saim", 384, "vit_small_patch16_224", "fold"),
     ("conmim", 768, "beit_base_patch16_224", "keep")],
)  # fmt: skip
def test_timms_own_name_takes_the_weights(tmp_path, write, method, width, name, layer_scale):
    """Strictly, but for the depth that keeps this test short."""
    path = write(method, finetuned=False, width=width, depth=1, patch=16, grid=14)
    found = import_weights(method, path, tmp_path / "out", layer_scale)
    assert found.architecture == name
    weights = tmp_path / "out" / "model.safetensors"
    timm.create_model(name, checkpoint_path=weights, num_classes=0, depth=1, global_pool="token")


@STAGES
@EVERY
def test_fine_tuning_and_evaluation_take_it(tmp_path, write, method, finetuned):
    import_weights(method, write(method, finetuned), tmp_path / "out", "keep")
    vit, fresh = build_model(
        ClassifierConfig(path=str(tmp_path / "out"), pool="token" if method == "saim" else "avg"), 10
    )
    norm = [] if method == "saim" else ["fc_norm.weight", "fc_norm.bias"]
    assert sorted(fresh) == ([] if finetuned else sorted([*norm, "head.weight", "head.bias"]))
    assert vit(torch.zeros(1, 3, 24, 24)).shape == (1, 10)
    found, _ = features(
        load_timm(tmp_path / "out"), [(torch.randn(2, 3, 24, 24), torch.zeros(2))], torch.device("cpu")
    )
    assert found["mean"].shape == (2, 1, WIDTH[method])


def test_what_is_left_out_is_named(tmp_path, write):
    left_out = {
        "mapet": ["decoder", "mask_positional_token"],
        "saim": ["gaussian_blur", "prediction_head", "query_blocks"],
        "conmim": ["lm_head", "mask_token", "projectors", "relative_position_index"],
    }  # fmt: skip
    for method, names in left_out.items():
        assert import_weights(method, write(method, finetuned=False), tmp_path / "out").dropped == names
        assert import_weights(method, write(method), tmp_path / "out").dropped == names[3:]


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def other(name, *shape):
    return lambda tensors: tensors | {name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("method", "change", "sentence"),
    [
        ("mapet", other("teacher.weight", 3), "1 tensors differ, e.g. teacher.weight is not in the model."),
        ("mapet", other("blocks.0.attn.qkv.weight", 576, 192),
         "blocks.0.attn.qkv.weight is not in the model"),
        ("mapet", without("blocks.1.attn.q.bias"), "1 tensors differ, e.g. blocks.1.attn.q.bias is missing"),
        ("mapet", without("blocks.1.ls2.gamma"), "blocks.1.ls2.gamma is missing"),
        ("mapet", without("head.bias"), "head.bias is missing"),
        ("mapet", without("pos_embed"), "pos_embed is missing"),
        ("mapet", other("pos_embed", 1, 12, 192), r"pos_embed is \(1, 12, 192\), the model's \(1, 10, 192\)"),
        ("mapet", other("pos_embed", 10, 192), "pos_embed is 2-d, not 3-d"),
        ("mapet", other("norm.weight", 192), "norm.weight is not in the model"),
        ("mapet",
         lambda t: other("blocks.0.attn.q.weight", 384, 192)(other("blocks.0.attn.kv.weight", 192, 192)(t)),
         r"blocks.0.attn.kv.weight is \(192, 192\), the model's \(384, 192\); blocks.0.attn.q.weight is"),
        ("saim", without("blocks.0.attn.k.weight"), "blocks.0.attn.k.weight is missing"),
        ("mapet", other("head.weight", 10), "head.weight is 1-d, not 2-d"),
        ("mapet", other("pos_embed", 1, 0, 192), r"pos_embed is \(1, 0, 192\), the model's \(1, 2, 192\)"),
        ("conmim", other("blocks.0.attn.relative_position_bias_table", 0, 6),
         r"table is \(0, 6\), the model's \(4, 6\)"),
        ("saim", other("head.0.running_mean", 192), "head.0.running_mean is not in the model"),
        ("conmim", without("blocks.1.attn.v_bias"), "blocks.1.attn.v_bias is missing"),
        ("conmim", without("blocks.1.gamma_1"), "blocks.1.gamma_1 is missing"),
        ("conmim", other("rel_pos_bias.relative_position_bias_table", 28, 6),
         "rel_pos_bias.relative_position_bias_table is not"),
        ("conmim", other("pos_embed", 1, 10, 384), "pos_embed is not in the model"),
        ("conmim", other("blocks.0.attn.relative_position_bias_table", 30, 6),
         r"table is \(30, 6\), the model's \(28, 6\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, write, method, change, sentence):
    path = write(method, change=change)
    with pytest.raises(ConfigError, match=f"{path} doesn't fit --method {method}: .*{sentence}"):
        import_weights(method, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@STAGES
@EVERY
def test_another_methods_checkpoint_is_told(tmp_path, write, method, finetuned):
    path = write(method, finetuned)
    says = {
        "mapet": "attn.kv.weight is not in",
        "saim": "attn.k.weight is not in",
        "conmim": "pos_embed is missing",
    }[method]
    for wrong in WIDTH.keys() - {method}:
        key = "relative_position_bias_table is missing" if wrong == "conmim" else says
        with pytest.raises(
            ConfigError, match=rf"doesn't fit --method {wrong}: .*{key}.* those of --method {method}\."
        ):
            import_weights(wrong, path, tmp_path / "out")


def test_an_unknown_width_is_refused(tmp_path, write):
    with pytest.raises(ConfigError, match="is of width 320; --method mapet knows 192, 384, 768, 1024"):
        import_weights("mapet", write(width=320), tmp_path / "out")


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


HELD = {
    "list": (
        [1, 2],
        "holds no tensors by name, also not under state_dict, model, module, student, but a list",
    ),
    "empty": ({}, "but nothing"),
    "numbers": ({"epoch": 3, "step": 4}, "but epoch, step"),
    "average only": ({"model_ema": {}, "epoch": 3}, "but model_ema, epoch; --ema takes its moving average"),
}


@pytest.mark.parametrize("kind", HELD)
def test_a_file_without_tensors_is_told(tmp_path, kind):
    held, sentence = HELD[kind]
    torch.save(held, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=sentence):
        import_weights("mapet", tmp_path / "a.pth", tmp_path / "out")


def test_a_moving_average_must_be_there(tmp_path, write):
    with pytest.raises(
        ConfigError,
        match=r"holds no moving average \(state_dict_ema or model_ema or teacher\); leave --ema out",
    ):
        import_weights("mapet", write(), tmp_path / "out", ema=True)


@pytest.mark.parametrize("kind", ["program", "truncated", "text", "safetensors"])
def test_a_damaged_file_is_refused_and_nothing_is_executed(tmp_path, write, kind):
    path = write(name="a.safetensors" if kind == "safetensors" else "a.pth")
    match kind:
        case "program":
            torch.save(
                {"state_dict": checkpoint("mapet", True, **SMALL), "args": Touch(tmp_path / "executed")}, path
            )
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
        case "text" | "safetensors":
            path.write_text("not a checkpoint")
    reason = "it holds (_io|io).open" if kind == "program" else ""
    with pytest.raises(
        ConfigError, match=f"{path} can't be read as plain tensors by name: {reason}"
    ) as error:
        import_weights("mapet", path, tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    assert "weights_only" not in str(error.value)


def test_the_command(tmp_path, write):
    path = write("conmim", finetuned=False)
    command = [sys.executable, TOOL, "--method", "conmim", path, tmp_path / "out", "--layer_scale", "keep"]
    done = start(*command)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert (
        printed[0]
        == f"{tmp_path / 'out' / 'model.safetensors'}: beit_base_patch16_224, no classifier, of {path}"
    )
    assert printed[1] == "left out: lm_head, mask_token, projectors, relative_position_index"
    scope = {}
    exec("\n".join(line.strip() for line in printed[3:]), scope)  # the three lines that it tells the user
    assert scope["model"].num_classes == 0
    assert "Normalize" in repr(scope["transform"])


def test_the_command_says_what_is_wrong(tmp_path, write, monkeypatch, capsys):
    path = write()
    (tmp_path / "a_file").touch()
    for method, given, out, says in (
        ("mapet", "nowhere", "out", "is not a file"),
        ("saim", path.name, "out", "Its keys are those of --method mapet."),
        ("mapet", path.name, "a_file", "a_file can't be written"),
        ("mapet", path.name, "a_file/out", "can't be written"),
    ):  # fmt: skip
        monkeypatch.setattr(
            sys, "argv", [str(TOOL), "--method", method, str(tmp_path / given), str(tmp_path / out)]
        )
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(TOOL), run_name="__main__")  # in this process, without seconds of imports
        assert exit.value.code == 2
        message = capsys.readouterr().err
        assert len(message.splitlines()) == 1 and says in message
