"""Each objective against its slow twin, and what its paper promises."""

import dataclasses
import math

import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from mapet_ds.config.rules import _method_rules
from mapet_ds.config.sections import (
    BEiTConfig,
    CAEConfig,
    Config,
    ConMIMConfig,
    MAEConfig,
    MaPeTConfig,
    ModelConfig,
    MVPConfig,
    SAIMConfig,
    TokenizerConfig,
)  # fmt: skip
from mapet_ds.data.batch import Batch
from mapet_ds.draws import Place, block_masks, cell_masks
from mapet_ds.errors import ConfigError
from mapet_ds.methods import METHODS, build_objective
from mapet_ds.objectives import objective as objective_module
from mapet_ds.vit import Graph, build_vit, compile_blocks, embed, run_blocks

VOCAB = 11
GROUP = 2
TINY = {"depth": 3, "embed_dim": 24, "num_heads": 2}
DIMS = {"mapet": VOCAB, "beit": VOCAB, "mvp": 10, "saim": 48, "conmim": 12, "mae": 48, "cae": VOCAB}
SEES_BY_ORDER = {"mapet", "saim"}


def tiny_config(objective="mapet", **changes):
    model = ModelConfig(name="vit_tiny_patch16_224", img_size=16, patch_size=4, drop_path=0.3, args=TINY)
    settings = {
        "objective": objective, "model": model, "tokenizer": TokenizerConfig(vocab_size=VOCAB),
        "mapet": MaPeTConfig(hidden_share=0.67), "beit": BEiTConfig(hidden_share=0.5),
        "mvp": MVPConfig(hidden_share=0.5),
        "saim": SAIMConfig(query_depth=3),
        "conmim": ConMIMConfig(hidden_share=0.5, projector_dim=16, bn_group=GROUP),
        "cae": CAEConfig(regressor_depth=2, decoder_depth=2),
        "mae": MAEConfig(hidden_share=0.67, decoder_depth=2, decoder_width=16, decoder_heads=2),
    }  # fmt: skip
    return Config(**(settings | changes))


def tiny_batch(model, slots=4, dtype=torch.float64):
    """Images, the target of the model's objective, and a draw."""
    generator, name = torch.Generator().manual_seed(1), type(model).__name__.lower()
    size = model.vit.patch_embed.img_size[0]
    images = torch.randn(slots, 3, size, size, generator=generator, dtype=dtype)
    shape = slots, model.vit.patch_embed.num_patches
    if name in ("mapet", "beit", "cae"):
        target = torch.randint(VOCAB, shape, generator=generator)
    else:
        target = torch.randn(*shape, DIMS[name], generator=generator, dtype=dtype)
        target = F.normalize(target, dim=-1) if name == "conmim" else target
    return images, target, model.draw(step=5, first_slot=2, slots=slots)


def far_from_init(model):
    for parameter in model.parameters():  # where masks would hardly matter
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(params=METHODS)
def any_model(request):
    return far_from_init(build_objective(tiny_config(request.param), DIMS[request.param]).double())


@pytest.fixture
def model():
    return far_from_init(build_objective(tiny_config(), VOCAB).double())


def slow_loss(model, images, target, draw):
    name = type(model).__name__.lower()
    if name == "mapet":
        return reference.mapet_loss(model, images, target, draw, num_visible=5, num_predicted=11)
    if name == "conmim":
        return reference.conmim_loss(model, images, target, draw, GROUP, 0.1)
    return getattr(reference, f"{name}_loss")(model, images, target, draw)


def test_equals_its_slow_twin_with_gradients(any_model):
    images, target, draw = tiny_batch(any_model)
    assert (draw.keep < 0.3).any(), "stochastic depth must drop something here"
    loss = any_model(images, target, draw).loss
    loss.backward()
    fast = {name: p.grad.clone() for name, p in any_model.named_parameters() if p.requires_grad}
    any_model.zero_grad()
    slow = slow_loss(any_model, images, target, draw)
    slow.backward()
    assert abs(loss - slow) < 1e-9
    for name, gradient in fast.items():
        assert (gradient - any_model.get_parameter(name).grad).abs().max() < 1e-9, name


def test_draws_depend_on_the_slot_alone(any_model):
    whole, part = any_model.draw(4, 0, 8), any_model.draw(4, 5, 2)
    for name in ("mask", "order", "keep"):
        if getattr(whole, name) is not None:
            assert torch.equal(getattr(whole, name)[5:7], getattr(part, name)), name
    assert (whole.order is not None) == (type(any_model).__name__.lower() in SEES_BY_ORDER)
    assert len({tuple(row) for row in whole.mask.tolist()}) > 1 or whole.mask.all()


def test_a_loss_is_the_mean_of_its_parts(any_model):
    """No split of a batch, in whole BatchNorm groups, changes the loss."""
    images, target, draw = tiny_batch(any_model)
    parts = []
    for part in (slice(0, 2), slice(2, 4)):
        piece = type(draw)(*(x if x is None else x[part] for x in draw))
        parts.append(any_model(images[part], target[part], piece).loss)
    assert abs(torch.stack(parts).mean() - any_model(images, target, draw).loss) < 1e-12


@pytest.mark.parametrize("name", ["mapet", "beit"])
def test_logits_in_groups_of_images_change_nothing(name, monkeypatch):
    """What is held at once is bounded; losses and gradients are those of one piece."""
    model = build_objective(tiny_config(name), VOCAB).double()
    far_from_init(model)
    images, target, draw = tiny_batch(model)
    held = []
    model.head.register_forward_hook(lambda head, rows, logits: held.append(logits.numel()))
    found = []
    for most in (2**26, max(1, 3 * model.head.out_features)):
        monkeypatch.setattr(objective_module, "LOGITS", most)
        model.zero_grad()
        held.clear()
        loss = model(images, target, draw)
        loss.loss.backward()
        found.append((loss, [p.grad.clone() for p in model.parameters()], list(held)))
    (whole, whole_grads, once), (parts, part_grads, often) = found
    assert len(once) == 1 and len(often) == 2 * len(images) and max(often) == once[0] / len(images)
    assert torch.equal(whole.prediction, parts.prediction) and abs(whole.loss - parts.loss) < 1e-12
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(whole_grads, part_grads, strict=True))


@pytest.mark.parametrize("name", ["mapet", "beit"])
def test_a_compiled_loss_is_that_of_uneven_groups(name, monkeypatch):
    """Groups of three images and of one are two graphs, each of which the backward pass finds again."""
    model = far_from_init(build_objective(tiny_config(name), VOCAB).double())
    images, target, draw = tiny_batch(model)
    plain = model(images, target, draw)
    plain.loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    rows = []
    handle = model.head.register_forward_hook(lambda head, x, logits: rows.append(logits.shape[:2]))
    model(images, target, draw)
    monkeypatch.setattr(objective_module, "LOGITS", 3 * rows[0][1] * VOCAB)
    torch.compiler.reset()
    model.loss.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    loss = model(images, target, draw)
    loss.loss.backward()
    handle.remove()
    assert [len(group) for group in torch.arange(len(images)).split(3)] == [3, 1] == [n for n, _ in rows[1:3]]
    assert torch.equal(plain.prediction, loss.prediction) and abs(plain.loss - loss.loss) < 1e-12
    assert all((a - p.grad).abs().max() < 1e-12 for a, p in zip(expected, model.parameters(), strict=True))


def test_grad_checkpointing_changes_nothing(any_model):
    images, target, draw = tiny_batch(any_model)
    trained = [p for p in any_model.parameters() if p.requires_grad]
    any_model(images, target, draw).loss.backward()
    plain = [p.grad.clone() for p in trained]
    any_model.zero_grad()
    any_model.vit.set_grad_checkpointing(True)
    any_model(images, target, draw).loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, trained, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_compiled_blocks_change_nothing_kept_or_recomputed(name, monkeypatch):
    """As torch.compile traces and differentiates them; aot_eager runs PyTorch's kernels, uncompiled.

    Four blocks have four rates of stochastic depth: a graph that knew of the rate would fail when recomputed.
    """
    config = tiny_config(name, saim=SAIMConfig(query_depth=4))
    deep = dataclasses.replace(config.model, args=TINY | {"depth": 4})
    model = far_from_init(build_objective(dataclasses.replace(config, model=deep), DIMS[name]).double())
    images, target, draw = tiny_batch(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = model(images, target, draw).loss
    plain.backward()
    expected = [p.grad.clone() for p in trained]
    torch.compiler.reset()  # it compiles one function no more than eight times, whichever objective's
    counters.clear()
    whole = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: whole(self, backend="aot_eager", fullgraph=True, **options),
    )
    compile_blocks(model)
    for recompute in (True, False):
        model.zero_grad()
        model.vit.set_grad_checkpointing(recompute)
        compiled = model(images, target, draw).loss
        compiled.backward()
        assert abs(plain - compiled) < 1e-12
        assert all((a - p.grad).abs().max() < 1e-12 for a, p in zip(expected, trained, strict=True))
    most = 3 + sum(isinstance(module, Graph) for module in model.modules())
    most += name == "cae"  # its encoder runs without gradient, too
    assert counters["stats"]["unique_graphs"] <= most, "a graph for each kind of block, not for each block"


@pytest.mark.parametrize("name", METHODS)
def test_it_runs_with_weights_in_bf16_and_buffers_in_fp32(name):
    """As DeepSpeed casts a module: its parameters alone."""
    model = build_objective(tiny_config(name), DIMS[name])
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    images, target, draw = tiny_batch(model, dtype=torch.bfloat16)
    loss = model(images, target, draw).loss
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_weights_and_another_does_not(name):
    a, b, c = (build_objective(tiny_config(name, seed=seed), DIMS[name]) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.vit.blocks[0].attn.qkv.weight, c.vit.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("name", ["beit", "mvp", "conmim"])
def test_hidden_patches_do_not_reach_the_loss_and_differ_from_one_another(name):
    """Already at the first step: the mask token is one vector, and positions tell hidden patches apart."""
    model = build_objective(tiny_config(name), DIMS[name]).double().eval()
    images, target, draw = tiny_batch(model)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(model(images, target, draw).loss, images)
    pixels = gradient.unfold(2, 4, 4).unfold(3, 4, 4).abs().amax(dim=(1, 4, 5)).flatten(1)
    assert (pixels[draw.mask] == 0).all()
    assert (pixels[~draw.mask] > 0).all()
    rows = reference.masked_rows(model, images[0], draw.mask[0])[1:][draw.mask[0]]
    assert torch.cdist(rows, rows).fill_diagonal_(1).min() > 1e-3


@pytest.mark.parametrize("name", ["beit", "mvp", "conmim"])
def test_variable_masks_are_a_mean_per_image(name):
    """Images with fewer hidden patches than others weigh the same."""
    model = far_from_init(build_objective(tiny_config(name), DIMS[name]).double())
    images, target, draw = tiny_batch(model)
    mask = draw.mask.clone()
    for row, patch in ((0, 0), (2, 1)):
        mask[row, mask[row].nonzero()[patch]] = False
    draw = draw._replace(mask=mask)
    assert abs(model(images, target, draw).loss - slow_loss(model, images, target, draw)) < 1e-9


# ---- relative positions


SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
"""timm's arguments for one table for all blocks, as BEiT pre-trains."""


def relative_model(name, args=SHARED, **changes):
    """An objective whose student is timm's BEiT."""
    config = tiny_config(name, **changes)
    model = dataclasses.replace(config.model, name="beit_base_patch16_224", args=TINY | args)
    return build_objective(dataclasses.replace(config, model=model), DIMS[name])


@pytest.mark.parametrize("args", [SHARED, {}], ids=["shared", "own"])
@pytest.mark.parametrize("name", ["beit", "mvp", "conmim"])
def test_relative_positions_equal_a_twin_that_looks_each_pair_up(name, args):
    """With gradients, recomputed, and as torch.compile traces and differentiates the blocks."""
    centre = dataclasses.replace(tiny_config().conmim, centre=False)
    model = far_from_init(relative_model(name, args, conmim=centre).double())
    images, target, draw = tiny_batch(model, slots=2)
    assert (draw.keep < 0.3).any()
    slow = slow_loss(model, images, target, draw)
    slow.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    torch.compiler.reset()
    for prepare in (lambda: None, lambda: model.vit.set_grad_checkpointing(True), lambda: compiled(model)):
        prepare()
        model.zero_grad()
        loss = model(images, target, draw).loss
        loss.backward()
        assert abs(loss - slow) < 1e-9
        assert all((a - p.grad).abs().max() < 1e-9 for a, p in zip(expected, model.parameters(), strict=True))


def compiled(model):
    for block in model.vit.blocks:
        block.compile(backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    "args", [SHARED, {}, SHARED | {"use_abs_pos_emb": True}], ids=["shared", "own", "both"]
)
def test_a_relative_student_without_a_mask_is_timms_own(args):
    vit = far_from_init(relative_model("beit", args)).vit.eval()
    timms = timm.create_model(
        "beit_base_patch16_224", img_size=16, patch_size=4, init_values=0.1, num_classes=0,
        global_pool="token", **TINY, **args,
    ).eval()  # fmt: skip
    timms.load_state_dict(vit.state_dict())
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = timms.forward_features(images)
        rows = torch.cat(embed(vit, images)[:2], dim=1)
        for found in (vit.forward_features(images), run_blocks(vit, rows, None)):
            assert (found - wanted).abs().max() < 1e-6 and wanted.std() > 0.1
        last, seen = vit.blocks[-1].attn, []  # as the report looks at the weights of attention
        last.fused_attn = False
        last.attn_drop.register_forward_hook(lambda module, given, weights: seen.append(weights))
        assert (vit.forward_features(images) - wanted).abs().max() < 1e-6
    assert seen[0].shape == (2, last.num_heads, 17, 17)


@pytest.mark.parametrize("name", ["beit", "mvp", "conmim"])
def test_hidden_patches_do_not_reach_a_relative_students_loss(name):
    model = far_from_init(relative_model(name).double()).eval()
    images, target, draw = tiny_batch(model)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(model(images, target, draw).loss, images)
    pixels = gradient.unfold(2, 4, 4).unfold(3, 4, 4).abs().amax(dim=(1, 4, 5)).flatten(1)
    assert torch.equal(pixels > 0, ~draw.mask)
    bf16 = relative_model(name)  # as DeepSpeed casts a module: its parameters alone
    for parameter in bf16.parameters():
        parameter.data = parameter.data.bfloat16()
    bf16(*tiny_batch(bf16, dtype=torch.bfloat16)).loss.backward()
    assert bf16.vit.rel_pos_bias.relative_position_bias_table.grad.isfinite().all()


def test_other_objectives_refuse_relative_positions_and_say_why():
    for name in METHODS:
        config = Config(objective=name, model=ModelConfig(name="beit_base_patch16_224"))
        refusals = [s for s in _method_rules(config) if "has relative positions" in s]
        assert len(refusals) == (name not in ("beit", "mvp", "conmim")), name
        assert all(s.endswith("or one of beit, mvp, conmim.") for s in refusals)
    assert not ModelConfig(name="beit3_base_patch16_224").relative
    for args, says in (
        ({"use_rel_pos_bias": False}, "nor a timm BEiT with positions"),
        ({"use_shared_rel_pos_bias": True}, "can't be exported together"),
        ({"attn_drop_rate": 0.1}, "no attn_drop_rate"),
        ({"proj_drop_rate": 0.1}, "no proj_drop_rate"),
    ):
        with pytest.raises(ConfigError, match=says):
            relative_model("beit", args)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_the_spread_of_initial_weights(name):
    """Cut at one deviation, and divided once by sqrt(2 l), whoever does it otherwise."""
    model = ModelConfig(name=name, args=TINY | {"embed_dim": 192, "num_heads": 3})
    for init, most, deviation in (("beit", 0.02, 0.0108), ("timm", 2.0, 0.02)):
        conmim = ConMIMConfig(init=init, projector_dim=256)
        vit = (whole := build_objective(Config(objective="conmim", model=model, conmim=conmim), 256)).vit
        assert vit.blocks[0].attn.qkv.weight.abs().max() <= most
        for depth, block in enumerate(vit.blocks, start=1):
            for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                assert weight.std().item() * math.sqrt(2 * depth) == pytest.approx(deviation, rel=0.03)
        assert whole.projector[0].weight.std().item() == pytest.approx(deviation, rel=0.03)
        assert whole.mask_token.std().item() == pytest.approx(deviation, rel=0.25)
        if init == "beit":
            assert vit.patch_embed.proj.weight.std().item() == pytest.approx(deviation, rel=0.03)
            assert vit.cls_token.std().item() == pytest.approx(deviation, rel=0.25)


# ---- MaPeT


def test_mapet_equals_dense_raster_form(model):
    images, ids, draw = tiny_batch(model)
    model.eval()
    masks = reference.DenseMaPeT.masks(draw.order, model.num_visible)
    dense = reference.DenseMaPeT(model)(images, ids, draw.order, masks)
    assert abs(model(images, ids, draw).loss - dense) < 1e-9


def test_mapet_masks_and_counts_at_the_published_size():
    model = build_objective(Config(model=ModelConfig(name="vit_tiny_patch16_224")), 8)
    draw = model.draw(step=3, first_slot=0, slots=2)
    assert draw.mask.sum(1).tolist() == [147, 147]
    assert model.num_visible == 49
    assert (model.attn_mask.sum(1) == 197).all(), (
        "every row sees each position once, as patch or as position token"
    )
    visible = reference.mapet_visible_keys(draw.order[0], 49)
    assert {len(keys) for keys in visible.values()} == {197}
    assert all(len({patch for _, patch in keys}) == 197 for keys in visible.values())


ABLATIONS = {
    "published": ({}, 5, 11, True),
    "no_position_tokens": ({"position_tokens": False}, 5, 11, False),
    "raster_order": ({"permute": False}, 5, 11, True),
    "all_predicted": ({"hidden_share": 1.0}, 0, 16, True),
    "last_predicted": ({"predicted_share": 0.25}, 5, 4, True),
    "all_but_permutation": ({"position_tokens": False, "permute": False, "hidden_share": 1.0}, 0, 16, False),
    "xlnet": ({"position_tokens": False, "hidden_share": 1.0, "predicted_share": 0.25}, 0, 4, False),
}
"""Settings of MaPeT; then, of 16 patches: always visible, predicted; and whether positions are keys."""


@pytest.fixture(params=ABLATIONS)
def ablated(request):
    """A model with settings of MaPeT, and what they mean."""
    changes, *meaning = ABLATIONS[request.param]
    section = MaPeTConfig(**{"hidden_share": 0.67, **changes})
    return far_from_init(build_objective(tiny_config(mapet=section), VOCAB).double()), *meaning


def test_each_ablation_equals_its_slow_twin_with_gradients(ablated):
    model, *meaning = ablated
    images, ids, draw = tiny_batch(model, slots=2)
    found = model(images, ids, draw)
    found.loss.backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    slow = reference.mapet_loss(model, images, ids, draw, *meaning)
    slow.backward()
    assert abs(found.loss - slow) < 1e-9
    assert all(
        (gradient - model.get_parameter(name).grad).abs().max() < 1e-9 for name, gradient in fast.items()
    )
    assert ((found.prediction >= 0) == draw.mask).all() and draw.mask.sum(dim=1).tolist() == [meaning[1]] * 2


def test_mapet_masks_agree_with_the_table_bit_for_bit(ablated):
    """The bands of the sorted form, undone into raster order, are the paper's table."""
    model, num_visible, num_predicted, position_tokens = ablated
    draw = model.draw(step=0, first_slot=0, slots=1)
    by_rank = draw.order[0].argsort().tolist()
    first, hidden = by_rank[:num_visible], by_rank[num_visible:]
    rows = [("m", p) for p in hidden if position_tokens] + [("x", p) for p in [-1, *first, *hidden]]
    rows += [("g", p) for p in by_rank[-num_predicted:]]
    table = reference.mapet_visible_keys(draw.order[0], num_visible, position_tokens)
    for bands in model._bands():
        for band in bands:
            for i, row in enumerate(rows[band.rows]):
                keys = (
                    rows[band.keys]
                    if band.mask is None
                    else [k for k, on in zip(rows[band.keys], band.mask[i], strict=True) if on]
                )
                assert sorted(keys) == sorted(table[row]), row
        assert bands[-1].rows.stop == len(rows)


def test_mapet_does_not_leak(ablated):
    """The loss at a rank has no gradient at a pixel of its own or a later patch, some at each earlier one."""
    model, *_ = ablated
    images, ids, draw = tiny_batch(model, slots=1)
    images.requires_grad_()
    order = draw.order[0]
    assert (order == torch.arange(16)).all() == (not model.permute)
    model.eval()
    for patch_index in draw.mask[0].nonzero()[:, 0].tolist():
        other = ids.clone()
        other[0, patch_index] = (ids[0, patch_index] + 1) % VOCAB
        # The difference of two losses that differ in one target leaves that target's logits alone.
        difference = model(images, ids, draw).loss - model(images, other, draw).loss
        (gradient,) = torch.autograd.grad(difference, images)
        pixels = gradient[0].unfold(1, 4, 4).unfold(2, 4, 4).abs().amax(dim=(0, 3, 4)).flatten()
        assert ((pixels > 0) == (order < order[patch_index])).all(), patch_index


@pytest.mark.parametrize(("position_tokens", "changed"), [(True, 11), (False, 1)])
def test_without_position_tokens_no_row_knows_of_patches_after_it(position_tokens, changed):
    """Another position of the last patch changes every prediction, or that patch's alone."""
    section = MaPeTConfig(hidden_share=0.67, position_tokens=position_tokens)
    model = far_from_init(build_objective(tiny_config(mapet=section), VOCAB).double()).eval()
    images, ids, draw = tiny_batch(model, slots=1)
    logits = []
    model.head.register_forward_hook(lambda head, rows, out: logits.append(out[0]))
    model(images, ids, draw)
    with torch.no_grad():
        model.vit.pos_embed[0, 1 + draw.order[0].argmax()] += 1
    model(images, ids, draw)
    assert (logits[0] != logits[1]).any(dim=1).sum() == changed


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_tiny_patch16_224", 7_110_272),
        ("vit_small_patch16_224", 24_829_184),
        ("vit_base_patch16_224", 92_117_504),
    ],
)
def test_mapet_has_the_published_number_of_parameters(name, parameters):
    model = build_objective(Config(model=ModelConfig(name=name)), 8192)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["mapet", "beit"])
def test_loss_at_initialisation_is_ln_k(name):
    model = build_objective(Config(objective=name, model=ModelConfig(name="vit_tiny_patch16_224")), 8192)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(8192, (2, 196), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(images, ids, model.draw(0, 0, 2)).loss
    assert abs(loss - math.log(8192)) < 0.15


@pytest.mark.parametrize("name", ["mapet", "beit", "cae"])
def test_metrics_and_prediction_are_at_the_hidden_patches(name):
    model = far_from_init(build_objective(tiny_config(name), VOCAB).double())
    images, ids, draw = tiny_batch(model)
    loss = model(images, ids, draw)
    assert ((loss.prediction >= 0) == draw.mask).all()
    right = [(loss.prediction == ids)[i][draw.mask[i]].double().mean() for i in range(len(ids))]
    assert abs(torch.stack(right).mean() - loss.metrics["token_accuracy"]) < 1e-6


@pytest.mark.parametrize("name", ["mapet", "saim"])
def test_quarters_of_the_ranks_make_up_the_loss(name):
    model = far_from_init(build_objective(tiny_config(name), DIMS[name]).double())
    images, target, draw = tiny_batch(model)
    loss = model(images, target, draw)
    sizes = [len(q) for q in torch.arange(int(draw.mask[0].sum())).tensor_split(4)]
    mean = sum(loss.metrics[f"loss_rank_quarter_{i}"] * n for i, n in enumerate(sizes, start=1)) / sum(sizes)
    assert abs(mean - loss.loss) < 1e-9


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "vit_base_patch16_22"}, "close: vit_base_patch16_224"),
        ({"name": "resnet50"}, "resnet50"),
        ({"args": {"num_heads": 5}}, "AssertionError dim should be divisible"),
        ({"args": {"num_heads": 0}}, "num_heads.: 0"),
        ({"args": {"class_token": False}}, "class_token"),
        ({"args": {"depth": 0}}, "depth"),
        ({"args": {"depht": 1}}, "depht"),
    ],
)
def test_what_is_no_student_is_a_sentence(changes, says):
    with pytest.raises(ConfigError, match=says) as caught:
        build_vit(ModelConfig(**{"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8} | changes))
    assert str(caught.value).startswith(("model.name = ", "timm can't build model.name = "))


def test_registers_take_part():
    args = TINY | {"reg_tokens": 3}
    changes = {"model": ModelConfig(name="vit_tiny_patch16_224", img_size=16, patch_size=4, args=args)}
    for name in ("mapet", "beit", "mvp", "conmim", "mae", "cae"):
        model = build_objective(tiny_config(name, **changes), DIMS[name])
        model(*tiny_batch(model, dtype=torch.float32)).loss.backward()
        assert model.vit.reg_token.grad.abs().max() > 0, name
    with pytest.raises(ConfigError, match="saim takes no register tokens"):
        build_objective(tiny_config("saim", **changes), DIMS["saim"])


# ---- block masks


def test_block_masks_are_within_the_published_bounds():
    masks = block_masks(0, 0, 0, 500, 14, 75, 16, exact=False)
    counts = masks.sum(axis=1)
    assert counts.max() == 75 and counts.min() >= 60 and 73 < counts.mean() < 75
    share = masks.mean(axis=0).reshape(14, 14)
    assert 0.01 < share.min() < share.max() < 0.9, "every patch has its turn, corners seldom"
    grids = masks.reshape(-1, 14, 14)
    same = (grids[:, :, 1:] == grids[:, :, :-1]).mean()
    assert same > 0.8, "neighbours hide together"
    assert block_masks(0, 0, 0, 500, 14, 6, 16, exact=False).any(axis=1).all(), (
        "where no rectangle fits, one patch"
    )
    exact = block_masks(0, 0, 0, 500, 14, 75, 16, exact=True)
    assert (exact.sum(axis=1) == 75).all() and (exact | ~masks).all(), "the same blocks, filled up"


# ---- ConMIM


def test_conmim_hides_148_of_196_in_whole_cells():
    masks = cell_masks(0, 3, 5, 50, 14, 2, 0.75)
    assert (masks.sum(axis=1) == 148).all()
    cells = masks.reshape(-1, 7, 2, 7, 2)
    assert (cells == cells[:, :, :1, :, :1]).all()


@pytest.fixture(scope="module")
def conmim_at_start():
    """Student and teacher of the published grid as they start, and a group of images."""
    config = Config(
        objective="conmim", model=ModelConfig(name="vit_tiny_patch16_224", args={"depth": 4}),
        conmim=ConMIMConfig(bn_group=16, projector_dim=256),
    )  # fmt: skip
    images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return build_objective(config, 256), build_objective(config, 256), images


def test_conmim_loss_at_initialisation_is_near_ln_196(conmim_at_start):
    student, teacher, images = conmim_at_start
    with torch.no_grad():
        keys, queries = teacher.project(images), student.project(images)
        loss = student(images, keys, student.draw(0, 0, 16)).loss
    assert torch.equal(queries, keys), "student and teacher start as one"
    assert (queries @ keys.transpose(1, 2)).argmax(-1).eq(torch.arange(196)).all(), (
        "where all is seen, all is found"
    )
    assert abs(loss - math.log(196)) < 0.4


def test_conmim_can_not_answer_by_position_alone(conmim_at_start):
    """Of images that hardly differ, keys keep what differs: it points elsewhere in each image."""
    _, teacher, images = conmim_at_start
    with torch.no_grad():
        same = images[:1].expand(16, -1, -1, -1)
        centred = teacher.project(same + 0.001 * images)
        common = centred.mean(dim=0).norm(dim=-1)
    assert common.max() < 0.6, "directions of a position average out over its images"
    last = teacher.projector[-1]
    last.centre = False
    with torch.no_grad():
        uncentred = teacher.project(same + 0.001 * images).mean(dim=0).norm(dim=-1)
    last.centre = True
    assert uncentred.min() > 0.9, "without it they are all the same"


# ---- SAIM


def test_saim_changes_exactly_the_predictions_of_higher_rank():
    """Another patch at one rank changes every later prediction and none before, nor its own."""
    model = far_from_init(build_objective(tiny_config("saim"), DIMS["saim"]).double()).eval()
    images, _, draw = tiny_batch(model, slots=1)
    with torch.no_grad():
        before, by_rank = model.streams(images, draw)
        for rank, patch in enumerate(by_rank[0].tolist()):
            row, column = divmod(patch, 4)
            changed = images.clone()
            changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
            after, _ = model.streams(changed, draw)
            differs = (after != before).any(dim=-1)[0]
            assert differs.tolist() == [r > rank for r in range(16)]


def test_saim_is_the_published_size_and_its_positions_stay():
    model = build_objective(Config(objective="saim", model=ModelConfig(drop_path=0.0, layer_scale=None)), 768)
    parts = {
        name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("vit", "decoder", "head")
    }
    assert {name: round(n / 1e6, 1) for name, n in parts.items()} == {
        "vit": 85.8,
        "decoder": 85.1,
        "head": 4.7,
    }
    assert not model.vit.pos_embed.requires_grad
    assert (model.vit.pos_embed[0, 0] == 0).all() and model.vit.pos_embed[0, 1:].std() > 0.5


@pytest.mark.parametrize(("changes", "says"), [({"query_depth": 2}, "does not divide")])
def test_saim_refuses_what_can_not_be(changes, says):
    with pytest.raises(ConfigError, match=says):
        build_objective(tiny_config("saim", saim=SAIMConfig(**changes)), 48)


def test_saims_shallow_decoder_has_the_first_rates_of_the_encoder():
    config = tiny_config("saim", saim=SAIMConfig(query_depth=2))
    deep = dataclasses.replace(config.model, args=TINY | {"depth": 4})
    model = build_objective(dataclasses.replace(config, model=deep), 48)
    rates = [
        [getattr(b.drop_path1, "drop_prob", 0.0) for b in bs] for bs in (model.vit.blocks, model.decoder)
    ]
    assert rates[1] == pytest.approx(rates[0][:2]) and rates[1][1] == pytest.approx(0.1)


@pytest.mark.parametrize("loss", ["l1", "cosine"])
def test_saim_and_mvp_have_other_losses(loss):
    model = far_from_init(
        build_objective(tiny_config("saim", saim=SAIMConfig(loss=loss)), 48).double()
    ).eval()
    images, target, draw = tiny_batch(model)
    g, by_rank = model.streams(images, draw)
    found = model.head(model.vit.norm(g))
    wanted = torch.stack([t[r] for t, r in zip(target, by_rank)])
    expected = (found - wanted).abs().mean()
    if loss == "cosine":
        expected = (
            (found / found.norm(dim=-1, keepdim=True) - wanted / wanted.norm(dim=-1, keepdim=True))
            .square()
            .sum(-1)
            .mean()
        )
    assert abs(model(images, target, draw).loss - expected) < 1e-9
    model = far_from_init(
        build_objective(tiny_config("mvp", mvp=MVPConfig(hidden_share=0.5, loss="smooth_l1")), 10).double()
    )
    images, target, draw = tiny_batch(model)
    scaled = model(images, 3 * target + 1, draw).loss
    assert abs(scaled - model(images, target, draw).loss) < 1e-4, "the target's own scale is gone"


# ---- MAE


@pytest.fixture
def mae():
    return far_from_init(build_objective(tiny_config("mae"), DIMS["mae"]).double()).eval()


def test_maes_encoder_is_timms_forward_on_the_visible_rows(mae):
    images, _, draw = tiny_batch(mae)
    timms = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, init_values=0.1, **TINY)
    timms = timms.double().eval()
    timms.load_state_dict(mae.vit.state_dict(), strict=False)
    rows = timms._pos_embed(timms.patch_embed(images))
    shown = F.pad(~draw.mask, (1, 0), value=True)
    wanted = timms.norm(timms.blocks(rows[shown].view(len(images), -1, rows.shape[2])))
    found, order = mae.encode(images, draw)
    assert found.shape[1] == 1 + 16 - 11 and (found - wanted).abs().max() < 1e-9
    assert torch.equal(torch.zeros_like(draw.mask).scatter(1, order[:, 5:], True), draw.mask)


def test_maes_encoder_sees_nothing_of_hidden_patches(mae):
    """Nor does the loss, but through its target; each visible patch reaches both."""
    images, target, draw = tiny_batch(mae)
    images.requires_grad_()
    for output in (mae.encode(images, draw)[0].square().sum(), mae(images, target, draw).loss):
        (gradient,) = torch.autograd.grad(output, images)
        pixels = gradient.unfold(2, 4, 4).unfold(3, 4, 4).abs().amax(dim=(1, 4, 5)).flatten(1)
        assert torch.equal(pixels > 0, ~draw.mask)


def test_mae_is_the_published_size_and_starts_at_the_spread_of_its_target():
    """Pixels have variance 1 in each patch. What an untrained head adds to it goes with the head."""
    config = Config(objective="mae", model=ModelConfig(drop_path=0.0, layer_scale=None, args={"depth": 2}))
    model = build_objective(config, 768)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.vit.blocks[0], model.decoder[0])]
    assert sizes == [7_087_872, 3_152_384] and len(model.decoder) == 8
    assert not model.vit.pos_embed.requires_grad and (model.vit.pos_embed[0, 0] == 0).all()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    batch = Batch(images=images, teacher_images=None, index=torch.arange(2), place=Place(0, 0))
    target, draw = METHODS["mae"][1](config, torch.device("cpu"))(batch), model.draw(0, 0, 2)
    assert draw.mask.sum(dim=1).tolist() == [147, 147]
    heads = []
    model.head.register_forward_hook(lambda head, rows, out: heads.append(out.square().mean()))
    with torch.no_grad():
        loss = model(images, target, draw).loss
        assert abs(loss - 1 - heads[0]) < 0.02
        model.head.weight.zero_()
        assert abs(model(images, target, draw).loss - 1) < 0.01


# ---- CAE


def test_caes_encoder_is_timms_forward_on_each_part():
    model = far_from_init(build_objective(tiny_config("cae"), VOCAB).double()).eval()
    images, _, draw = tiny_batch(model)
    timms = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, init_values=0.1, **TINY)
    timms = timms.double().eval()
    timms.load_state_dict(model.vit.state_dict(), strict=False)
    rows = timms._pos_embed(timms.patch_embed(images))
    seen, wanted, *_ = model.encode(images, draw)
    for found, mask in ((seen, ~draw.mask), (wanted, draw.mask)):
        part = rows[F.pad(mask, (1, 0), value=True)].view(len(images), 9, -1)
        assert (found - timms.norm(timms.blocks(part))[:, 1:]).abs().max() < 1e-9
    assert seen.requires_grad and not wanted.requires_grad


def test_caes_predictions_and_gradients_know_nothing_of_hidden_patches():
    model = far_from_init(build_objective(tiny_config("cae"), VOCAB).double()).eval()
    images, ids, draw = tiny_batch(model)
    logits = []
    model.head.register_forward_hook(lambda head, rows, out: logits.append(out))
    images.requires_grad_()
    for output in (
        model.encode(images, draw)[0].square().sum(),
        model(images, ids, draw).loss,
        logits[0].sum(),
    ):
        (gradient,) = torch.autograd.grad(output, images, retain_graph=True)
        pixels = gradient.unfold(2, 4, 4).unfold(3, 4, 4).abs().amax(dim=(1, 4, 5)).flatten(1)
        assert torch.equal(pixels > 0, ~draw.mask)


def test_cae_is_the_published_size_and_its_ids_start_at_ln_k():
    model = build_objective(Config(objective="cae", model=ModelConfig(name="vit_tiny_patch16_224")), 8192)
    assert (len(model.regressor), len(model.decoder), model.num_hidden) == (4, 4, 98)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ids, draw = torch.randint(8192, (2, 196)), model.draw(0, 0, 2)
    assert draw.mask.sum(dim=1).tolist() == [98, 98]
    with torch.no_grad():
        found = model(images, ids, draw)
    assert abs(found.loss - 2 * found.metrics["alignment"] - math.log(8192)) < 0.15


TOKEN_AT_THE_END = {
    "mapet": "missing", "beit": "missing", "mvp": "missing", "cae": "unread", "saim": "read", "mae": "read",
    "conmim": "read",
}  # fmt: skip
"""Whether the last block has a row of the class token, and whether a loss reads it there (docs/faq.md)."""


def test_how_far_a_loss_reaches_the_class_token(any_model):
    """Patches attend to it, so its parameter always learns; its own last row is another matter."""
    images, target, draw = tiny_batch(any_model)
    outputs = []

    def keep(module, inputs, output):
        if output.requires_grad:
            output.retain_grad()
            outputs.append(output)

    any_model.vit.blocks[-1].register_forward_hook(keep)
    any_model(images, target, draw).loss.backward()
    assert any_model.vit.cls_token.grad.abs().max() > 1e-6
    (output,) = outputs
    expected = TOKEN_AT_THE_END[type(any_model).__name__.lower()]
    if expected == "missing":
        assert output.shape[1] == draw.mask.sum(1).max(), "rows of predicted patches alone"
    else:
        assert (output.grad[:, 0].abs().max() > 0) == (expected == "read")
        assert output.grad[:, 1:].abs().max() > 0
