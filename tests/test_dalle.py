"""DALL-E's encoder against a slow twin, its published names, and what is refused."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from images import photos, write
from safetensors.torch import save_file
from torch.nn import functional

from mapet_ds.config.rules import check_method
from mapet_ds.config.sections import Config, ModelConfig, TokenizerConfig
from mapet_ds.data.batch import View
from mapet_ds.data.index import open_index
from mapet_ds.data.loader import Loader
from mapet_ds.errors import ConfigError
from mapet_ds.targets import dalle
from mapet_ds.targets.dalle import WIDTH, DallE, encoder
from mapet_ds.targets.tokenizer import build_tokenizer
from mapet_ds.training.command_line import check_tokenizer_file

CPU = torch.device("cpu")


def published_shapes(width, codes):
    """Names and shapes of OpenAI's encoder, as its release lists them: width 256, 8192 codes."""
    shapes = {"blocks.input.w": (width, 3, 7, 7), "blocks.input.b": (width,)}
    for group, block in itertools.product((1, 2, 3, 4), (1, 2)):
        outputs = width * (1, 2, 4, 8)[group - 1]
        inputs = outputs // 2 if (group > 1 and block == 1) else outputs
        place, hidden = f"blocks.group_{group}.block_{block}.", outputs // 4
        convolutions = {
            "res_path.conv_1": (hidden, inputs, 3, 3), "res_path.conv_2": (hidden, hidden, 3, 3),
            "res_path.conv_3": (hidden, hidden, 3, 3), "res_path.conv_4": (outputs, hidden, 1, 1),
        }  # fmt: skip
        if inputs != outputs:
            convolutions["id_path"] = (outputs, inputs, 1, 1)
        for name, shape in convolutions.items():
            shapes |= {f"{place}{name}.w": shape, f"{place}{name}.b": shape[:1]}
    return shapes | {"blocks.output.conv.w": (codes, 8 * width, 1, 1), "blocks.output.conv.b": (codes,)}


def random_encoder(width=16, codes=50):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (2 / math.prod(shape[1:])) ** 0.5
        if len(shape) == 4
        else torch.randn(shape, generator=generator) / 20
        for name, shape in published_shapes(width, codes).items()
    }


def twin(tensors, pixels):
    """Logits [B, codes, T / 8, T / 8] in float64 of pixels of 0 .. 1, by functions alone."""
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def convolution(x, name):
        w = t[f"{name}.w"]
        x = functional.pad(x, [w.shape[-1] // 2] * 4)
        patches = functional.unfold(x, w.shape[-1])
        side = math.isqrt(patches.shape[-1])
        return (w.flatten(1) @ patches + t[f"{name}.b"][:, None]).unflatten(-1, (side, side))

    x = convolution(0.8 * pixels.double() + 0.1, "blocks.input")
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            place = f"blocks.group_{group}.block_{block}"
            y = x
            for i in (1, 2, 3, 4):
                y = convolution(y.clamp(min=0), f"{place}.res_path.conv_{i}")
            same = f"{place}.id_path.w" not in t
            x = (x if same else convolution(x, f"{place}.id_path")) + y / 64
        if group < 4:
            x = x.unflatten(-1, (-1, 2)).amax(-1).unflatten(-2, (-1, 2)).amax(-2)
    return convolution(x.clamp(min=0), "blocks.output.conv")


def settings(path, codes=50, **changes):
    tokenizer = TokenizerConfig(name="dalle", path=str(path), vocab_size=codes)
    return dataclasses.replace(
        Config(tokenizer=tokenizer, model=ModelConfig(img_size=32, patch_size=8)), **changes
    )


def pixels():
    """Cells of one colour each, and noise."""
    generator = torch.Generator().manual_seed(1)
    cells = torch.rand(3, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return 0.7 * cells + 0.3 * torch.rand(3, 3, 32, 32, generator=generator)


@pytest.fixture(scope="module")
def tensors():
    """Weights whose codes are all equally likely."""
    tensors = random_encoder()
    tensors["blocks.output.conv.b"] -= twin(tensors, pixels()).mean((0, 2, 3)).float()
    return tensors


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("dalle") / "encoder.safetensors"
    save_file(tensors, path)
    return path


def test_ids_are_the_twins(tensors, file, monkeypatch):
    monkeypatch.setattr(dalle, "IMAGES", 2)
    tokenizer = build_tokenizer(settings(file), CPU)
    assert (tokenizer.view.size, tokenizer.vocab_size) == (32, 50)
    mean, std = (torch.tensor(each)[:, None, None] for each in (tokenizer.view.mean, tokenizer.view.std))
    with torch.autocast("cpu", torch.bfloat16):
        ids = tokenizer((pixels() - mean) / std)  # two forwards
    assert (ids.shape, ids.dtype, ids.requires_grad) == ((3, 16), torch.long, False)
    logits = twin(tensors, pixels()).flatten(2).transpose(1, 2)
    best = logits.topk(2).values
    clear = best[..., 0] - best[..., 1] > 1e-4
    assert clear.double().mean() > 0.95
    assert torch.equal(ids[clear], logits.argmax(-1)[clear])
    assert len(ids.unique()) > 8  # so that a wrong forward would show


def test_names_and_sizes_are_the_published_ones():
    with torch.device("meta"):
        blocks = encoder(WIDTH, 8192)
    ours = {f"blocks.{name}": tuple(tensor.shape) for name, tensor in blocks.state_dict().items()}
    assert ours == published_shapes(256, 8192)
    assert sum(math.prod(shape) for shape in ours.values()) == 53_786_240


def test_the_loader_maps_pixels_as_published(file, tmp_path):
    """0.1 .. 0.9, of the student's own crop at 8 pixels a patch."""
    tokenizer = build_tokenizer(settings(file), CPU)
    config = settings(file)
    train = dataclasses.replace(config.train, global_batch_size=2, micro_batch_size=2)
    data = dataclasses.replace(config.data, device="cpu", color_jitter=0.0)
    index = open_index(str(write(tmp_path / "images", photos(2))), tmp_path / "index")
    views = {}
    for name, view in (("ours", tokenizer.view), ("plain", View(32, (0, 0, 0), (1, 1, 1)))):
        config = dataclasses.replace(config, train=train, data=data)
        loader = Loader(config, index, student=False, teacher=view, rank=0, world_size=1, local_rank=0)
        views[name] = next(loader).teacher_images
        loader.close()
    torch.testing.assert_close(views["ours"], 0.8 * views["plain"] + 0.1, rtol=0, atol=1e-5)


def test_it_is_frozen_and_known_by_its_weights(tensors, file, tmp_path):
    tokenizer = DallE(settings(file), CPU)
    assert not tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())
    torch.save({"model": {f"encoder.{name}": t for name, t in tensors.items()}}, tmp_path / "nested.pth")
    assert DallE(settings(tmp_path / "nested.pth"), CPU).identity == tokenizer.identity
    save_file(tensors | {"blocks.input.b": tensors["blocks.input.b"] + 1e-3}, tmp_path / "other.safetensors")
    assert DallE(settings(tmp_path / "other.safetensors"), CPU).identity != tokenizer.identity


def test_another_architecture_is_refused_by_name(tensors, tmp_path):
    cases = {
        "1 tensors differ, e.g. blocks.group_2.block_1.id_path.b is missing":
            {n: t for n, t in tensors.items() if n != "blocks.group_2.block_1.id_path.b"},
        "2 tensors differ, e.g. blocks.input.w is missing; blocks.output.conv.w is missing":
            {"visual.proj": torch.zeros(2, 2)},
        "e.g. blocks.group_1.block_3.w is not in the model":
            tensors | {"blocks.group_1.block_3.w": torch.zeros(1)},
        "blocks.input.w is (16, 3), not 4-d": tensors | {"blocks.input.w": torch.zeros(16, 3)},
        "18 channels, no multiple of 4": random_encoder(18),
    }  # fmt: skip
    for number, (sentence, changed) in enumerate(cases.items()):
        path = tmp_path / f"{number}.safetensors"
        save_file(changed, path)
        with pytest.raises(ConfigError) as raised:
            build_tokenizer(settings(path), CPU)
        assert f"tokenizer.path = {path} is not the encoder of DALL-E's dVAE" in str(raised.value)
        assert sentence in str(raised.value) and "docs/extending.md" in str(raised.value)


def test_a_pickled_module_is_never_run(tmp_path):
    """OpenAI's file is one: the sentence says what it holds and where the conversion is told."""
    torch.save(torch.nn.Sequential(torch.nn.ReLU()), tmp_path / "encoder.pkl")
    with pytest.raises(ConfigError, match="it holds torch.nn.modules.container.Sequential.*extending.md"):
        build_tokenizer(settings(tmp_path / "encoder.pkl"), CPU)


def test_a_wrong_number_of_ids_or_no_file_is_a_sentence(file, tmp_path):
    with pytest.raises(ConfigError, match="dalle has 50 ids.*Set tokenizer.vocab_size=50"):
        build_tokenizer(settings(file, codes=8192), CPU)
    with pytest.raises(ConfigError, match=r"tokenizer.path is empty: .*dalle tokenizer reads; docs/extend"):
        check_tokenizer_file(TokenizerConfig(name="dalle"))
    check_method(settings(tmp_path / "none"))  # the settings alone are sound


def test_the_lines_that_convert_openais_file_do_so(tensors, file, tmp_path, monkeypatch):
    """Those of docs/extending.md, on a module that is pickled whole as OpenAI's is."""
    text = (Path(__file__).parent.parent / "docs/extending.md").read_text()
    lines = text.split("<!-- convert -->\n```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        module = DallE.__new__(DallE)
        torch.nn.Module.__init__(module)
        module.blocks = encoder(16, 50)
    module.load_state_dict(tensors, assign=True)
    torch.save(module, "encoder.pkl")
    exec(lines)
    one, two = (
        build_tokenizer(settings(path), CPU).identity for path in ("dalle.safetensors", "dalle.safetensors")
    )
    assert one == two
