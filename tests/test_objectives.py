"""Each objective against its slow twin, and what its paper promises."""

import math

import pytest
import reference
import torch

from mapet_ds.config import Config, MaPeTConfig, ModelConfig, TokenizerConfig
from mapet_ds.objectives import build_objective

VOCAB = 11


def tiny_config(**changes):
    model = ModelConfig(
        name="vit_tiny_patch16_224", img_size=12, patch_size=4, drop_path=0.3, args={"depth": 3, "embed_dim": 24, "num_heads": 2}
    )
    settings = {"model": model, "tokenizer": TokenizerConfig(vocab_size=VOCAB), "mapet": MaPeTConfig(hidden_share=0.67)}
    return Config(**(settings | changes))


def tiny_batch(model, slots=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    size = model.vit.patch_embed.img_size[0]
    images = torch.randn(slots, 3, size, size, generator=generator, dtype=dtype)
    ids = torch.randint(VOCAB, (slots, model.vit.patch_embed.num_patches), generator=generator)
    return images, ids, model.draw(step=5, first_slot=2, slots=slots)


@pytest.fixture
def model():
    model = build_objective(tiny_config()).double()
    for parameter in model.parameters():  # far from init, where masks would hardly matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_mapet_equals_slow_twin_with_gradients(model):
    images, ids, draw = tiny_batch(model)
    assert (draw.keep < 0.3).any(), "stochastic depth must drop something here"
    model(images, ids, draw).loss.backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss = model(images, ids, draw).loss
    model.zero_grad()
    slow = reference.mapet_loss(model, images, ids, draw.order, model.num_visible, draw.keep.double())
    slow.backward()
    assert abs(loss - slow) < 1e-9
    for name, parameter in model.named_parameters():
        assert (fast[name] - parameter.grad).abs().max() < 1e-9, name


def test_mapet_equals_dense_raster_form(model):
    images, ids, draw = tiny_batch(model)
    model.eval()
    masks = reference.DenseMaPeT.masks(draw.order, model.num_visible)
    dense = reference.DenseMaPeT(model)(images, ids, draw.order, masks)
    assert abs(model(images, ids, draw).loss - dense) < 1e-9


def test_mapet_masks_and_counts_at_the_published_size():
    model = build_objective(Config(model=ModelConfig(name="vit_tiny_patch16_224"), tokenizer=TokenizerConfig(vocab_size=8)))
    draw = model.draw(step=3, first_slot=0, slots=2)
    assert draw.mask.sum(1).tolist() == [147, 147]
    assert model.num_visible == 49
    assert (model.attn_mask.sum(1) == 197).all(), "every row sees each position once, as patch or as position token"
    visible = reference.mapet_visible_keys(draw.order[0], 49)
    assert {len(keys) for keys in visible.values()} == {197}
    assert all(len({patch for _, patch in keys}) == 197 for keys in visible.values())


def test_mapet_masks_agree_with_the_table_bit_for_bit(model):
    """The bands of the sorted form, undone into raster order, are the paper's table."""
    draw = model.draw(step=0, first_slot=0, slots=1)
    by_rank = draw.order[0].argsort().tolist()
    first, hidden = by_rank[: model.num_visible], by_rank[model.num_visible :]
    rows = [("x", p) for p in [-1, *first]] + [("m", p) for p in hidden] + [("x", p) for p in hidden]
    rows += [("g", p) for p in hidden]
    table = reference.mapet_visible_keys(draw.order[0], model.num_visible)
    for band in model._bands()[0]:
        for i, row in enumerate(rows[band.rows]):
            keys = rows[band.keys] if band.mask is None else [k for k, on in zip(rows[band.keys], band.mask[i]) if on]
            assert sorted(keys) == sorted(table[row]), row


def test_mapet_does_not_leak(model):
    """The loss at one rank has exactly no gradient at any pixel of its own or a later patch, and some at each earlier one."""
    images, ids, draw = tiny_batch(model, slots=1)
    images.requires_grad_()
    order = draw.order[0]
    grid, patch = 3, 4
    model.eval()
    for patch_index in draw.mask[0].nonzero()[:, 0].tolist():
        alone = ids.clone()
        other = ids.clone()
        other[0, patch_index] = (ids[0, patch_index] + 1) % VOCAB
        # The difference of two losses that differ in one target leaves that target's logits alone.
        difference = model(images, alone, draw).loss - model(images, other, draw).loss
        (gradient,) = torch.autograd.grad(difference, images)
        pixels = gradient[0].unfold(1, patch, patch).unfold(2, patch, patch).abs().amax(dim=(0, 3, 4)).flatten()
        for p in range(grid * grid):
            seen = order[p] < order[patch_index]
            assert (pixels[p] > 0) == seen, (patch_index, p)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vit_tiny_patch16_224", 7_110_272), ("vit_small_patch16_224", 24_829_184), ("vit_base_patch16_224", 92_117_504)],
)
def test_mapet_has_the_published_number_of_parameters(name, parameters):
    model = build_objective(Config(model=ModelConfig(name=name)))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_mapet_loss_at_initialisation_is_ln_k():
    model = build_objective(Config(model=ModelConfig(name="vit_tiny_patch16_224")))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(8192, (2, 196), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(images, ids, model.draw(0, 0, 2)).loss
    assert abs(loss - math.log(8192)) < 0.15


def test_metrics_and_prediction_are_at_the_hidden_patches(model):
    images, ids, draw = tiny_batch(model)
    loss = model(images, ids, draw)
    assert ((loss.prediction >= 0) == draw.mask).all()
    accuracy = (loss.prediction == ids)[draw.mask].double().mean()
    assert abs(accuracy - loss.metrics["token_accuracy"]) < 1e-6
    quarters = [loss.metrics[f"loss_rank_quarter_{i}"] for i in (1, 2, 3, 4)]
    sizes = [len(q) for q in torch.arange(int(draw.mask[0].sum())).tensor_split(4)]
    mean = sum(q * n for q, n in zip(quarters, sizes)) / sum(sizes)
    assert abs(mean - loss.loss) < 1e-9


def test_draws_depend_on_the_slot_alone(model):
    whole, part = model.draw(4, 0, 8), model.draw(4, 5, 2)
    for name in ("mask", "order", "keep"):
        assert torch.equal(getattr(whole, name)[5:7], getattr(part, name)), name


def test_grad_checkpointing_changes_nothing(model):
    images, ids, draw = tiny_batch(model)
    model(images, ids, draw).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.vit.set_grad_checkpointing(True)
    model(images, ids, draw).loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters()))


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    a, b, c = (build_objective(tiny_config(seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.mask_token, c.mask_token)


def test_registers_take_part():
    args = {"depth": 2, "embed_dim": 24, "num_heads": 2, "reg_tokens": 3}
    model = build_objective(tiny_config(model=ModelConfig(name="vit_tiny_patch16_224", img_size=12, patch_size=4, args=args)))
    images, ids, draw = tiny_batch(model, dtype=torch.float32)
    model(images, ids, draw).loss.backward()
    assert model.vit.reg_token.grad.abs().max() > 0
