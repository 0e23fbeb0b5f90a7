"""mapet_ds/cost.py against the real modules: FLOPs and peaks counted on tensors that have shapes only, and on real ones."""

import weakref

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY, TeacherConfig
from mapet_ds.cost import SIZES, student, target, target_dim, tower, vit_of
from mapet_ds.data.batch import Draw
from mapet_ds.errors import ConfigError
from mapet_ds.methods import METHODS, build_objective
from mapet_ds.targets.teacher import Teacher, _build_tower, teacher_model_config

RECIPES = sorted(
    path.stem for path in (REPOSITORY / "mapet_ds/recipes").glob("[!f]*_vitb16.yaml")
)  # not fine-tuning's
HALF = "model.args={depth: 6}"
BYTES = {torch.bfloat16: 2, torch.float32: 4}


@pytest.fixture(autouse=True)
def no_fused_attention():
    """As build_teacher leaves it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


class PeakBytes(TorchDispatchMode):
    """Bytes of all storages that operations make, at their peak, each counted once and until it is freed."""

    def __init__(self, there):
        super().__init__()
        self.known, self.live, self.peak = {tensor.untyped_storage()._cdata for tensor in there}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and (storage := tensor.untyped_storage())._cdata not in self.known
            ):
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
                self.peak = max(self.peak, self.live)
        return result

    def freed(self, key, size):
        self.known.discard(key)
        self.live -= size


def recipe(name, *overrides):
    return load_config(REPOSITORY / f"mapet_ds/recipes/{name}.yaml", overrides)


def batch_of(config, model, batch):
    """A batch of zeros: what it holds changes no count."""
    patches = config.num_patches
    blocks = len(model.vit.blocks) + len(getattr(model, "decoder", []))
    images, mask = (
        torch.zeros(batch, 3, *[config.model.img_size] * 2),
        torch.zeros(batch, patches, dtype=torch.bool),
    )
    order = torch.arange(patches).expand(batch, -1).contiguous()
    ids = torch.zeros(batch, patches, dtype=torch.long)
    goal = ids if config.method.predicts_ids else torch.zeros(batch, patches, target_dim(config))
    return images, goal, Draw(mask, order, torch.ones(batch, 2 * blocks))


def shapes_only(config, dtype=torch.bfloat16):
    with torch.device("meta"):
        model = build_objective(config, target_dim(config)).to(dtype)
    model.vit.set_grad_checkpointing(config.train.grad_checkpointing)
    return model


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_and_flops_are_those_of_the_modules(name):
    config = recipe(name, *([] if name == "mapet_vitb16" else [HALF]))
    model, counted = shapes_only(config), student(config)
    trainable = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    assert counted.parameters == sum(trainable)
    assert counted.constants == sum(parameter.numel() for parameter in model.parameters()) - sum(trainable)
    batch = config.conmim.bn_group if config.objective == "conmim" else 2
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        model.to_empty(device="cpu")
        with FlopCounterMode(display=False) as flops:
            loss = model(*batch_of(config, model, batch)).loss
            forward = flops.get_total_flops()
            loss.backward()
    assert counted.forward == pytest.approx(forward / batch, rel=0.002)
    assert counted.flops == pytest.approx(flops.get_total_flops() / batch, rel=0.002)


def test_every_objective_has_a_recipe():
    assert {recipe(name).objective for name in RECIPES} == set(METHODS)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in RECIPES), ("mapet_vitb16", torch.float32)],
    ids=str,
)
def test_the_peak_of_activations(name, dtype, recompute):
    batch = 64
    config = recipe(
        name, f"train.grad_checkpointing={str(recompute).lower()}", f"train.micro_batch_size={batch}", HALF
    )
    model = shapes_only(config, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        images, goal, draw = batch_of(config, model, batch)
        with PeakBytes([*model.parameters(), *model.buffers(), images, goal, *draw]) as memory:
            model(images, goal, draw).loss.backward()
    assert student(config, BYTES[dtype]).activations(config) == pytest.approx(memory.peak / batch, rel=0.1)


def test_the_peak_of_activations_of_a_real_step():
    small = [
        "model.args={depth: 3, embed_dim: 192, num_heads: 3}",
        "tokenizer.vocab_size=512",
        "train.micro_batch_size=4",
    ]
    config = recipe("mapet_vitb16", *small)
    model = build_objective(config, 512)
    images, goal, draw = batch_of(config, model, 4)
    with PeakBytes([*model.parameters(), *model.buffers(), images, goal, *draw]) as memory:
        model(images, goal, draw).loss.backward()
    assert student(config, 4).activations(config) == pytest.approx(memory.peak / 4, rel=0.1)


def test_figures_that_the_documents_name():
    config = recipe("mapet_vitb16")
    counted, goal = student(config), target(config)
    assert counted.parameters == 92_117_504
    assert round(counted.flops / 1e9) == 246
    assert 1 < counted.flops / counted.minimum < 1.03
    assert round(goal.flops / 1e9) == 507
    assert (goal.fp32_flops, goal.tf32_flops) == (0, 2 * 2 * 196 * 8192 * 4096)
    assert target(config, 4)[1] == 2 * 196 * 8192 * 4096


def test_the_last_block_updates_no_row_that_no_loss_reads():
    """BEiT's loss reads 75 of 197; ConMIM's BatchNorm all."""
    beit, conmim = student(recipe("beit_vitb16")), student(recipe("conmim_vitb16"))
    assert [block.rows for block in beit.blocks] == [197] * 11 + [75]
    assert [block.rows for block in conmim.blocks] == [197] * 12
    for counted in (beit, conmim):
        assert counted.flops == counted.minimum


TOWERS = [
    ("RN50x64", 448, -1, "tokens"), ("RN50", 112, 2, "tokens"), ("ViT-B-16", 224, -1, "projected"),
    ("ViT-B-16-quickgelu", 224, 5, "tokens"), ("ViT-S-16", 224, -1, "normed"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "side", "layer", "features"), TOWERS)
def test_a_teacher(name, side, layer, features):
    config = TeacherConfig(name=name, img_size=side, layer=layer, features=features)
    model = teacher_model_config(name)
    model.setdefault("quick_gelu", False)
    with torch.device("meta"):
        teacher = Teacher(_build_tower(model, side, torch.bfloat16), config, torch.bfloat16)
    if hasattr(teacher.visual, "attnpool"):
        teacher.visual.attnpool = None
    counted = tower(config)
    assert counted.parameters == sum(parameter.numel() for parameter in teacher.parameters())
    assert counted.weights == pytest.approx(teacher.local_bytes, rel=0.001)
    assert counted.dim == teacher.embed_dim
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher.to_empty(device="cpu")
        images = torch.zeros(2, 3, side, side)
        with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
            teacher(images)
        with PeakBytes([*teacher.parameters(), *teacher.buffers(), images]) as memory:
            teacher(images)
    assert counted.flops == pytest.approx(flops.get_total_flops() / 2, rel=0.002)
    assert memory.peak / 2 < 1.1 * counted.working


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_timms(size):
    patch = 14 if size in ("huge", "giant", "gigantic") else 16
    config = recipe("beit_vitb16", f"model.name=vit_{size}_patch{patch}_224", f"model.patch_size={patch}")
    model, sizes = shapes_only(config), vit_of(config.model)
    assert student(config).parameters == sum(parameter.numel() for parameter in model.parameters())
    attention = model.vit.blocks[0].attn
    assert (sizes.depth, sizes.width, sizes.heads) == (
        len(model.vit.blocks),
        model.vit.embed_dim,
        attention.num_heads,
    )


def test_register_tokens():
    config = recipe("beit_vitb16", "model.args={reg_tokens: 4, depth: 2}")
    assert student(config).parameters == sum(
        parameter.numel() for parameter in shapes_only(config).parameters()
    )


@pytest.mark.parametrize(
    "words",
    ["model.name=deit_small_patch16_224", "model.args={qk_norm: true}", "teacher.name=ViT-B-16-SigLIP"],
)
def test_what_can_not_be_counted_is_said(words):
    with pytest.raises(ConfigError, match="can't be counted"):
        config = recipe("mapet_vitb16", words)
        vit_of(config.model), target(config)
