"""mapet_ds/planning/roofline.py: bytes, kernels and bounds of modules that are counted by hand."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.planning.counting import student, target
from mapet_ds.planning.parts import GRADIENTS, UNEXPLAINED, Parts, Place
from mapet_ds.planning.roofline import FORMS, GPUS, Rates, kernels, works
from mapet_ds.planning.tally import Tally

PLACES = (("layer", 1), ("rest", 0), (UNEXPLAINED, 0), (GRADIENTS, 0))
RATES = Rates({"fp32": 1e12, "half": 4e12, "tf32": 2e12, "convolutions": 2e12}, 1e9)


def listened(work, *there, graph=False):
    """The operations of a piece of work."""
    parts = Parts()
    with Tally(*there, parts=parts) as tally:
        parts.enter("work", graph)
        work()
        parts.leave()
    return tally.operations


def moved(counts):
    return sum(count * work.bytes for work, count in counts.items())


def test_what_operations_move_by_hand():
    """A product, an addition in place, a copy, a constant; a view moves nothing."""
    x, weight, out = torch.ones(10, 20), torch.ones(20, 30), torch.ones(10, 30)

    def work():
        y = x @ weight
        y.add_(out)
        out.copy_(y.view(30, 10).T.reshape(300).view(10, 30))
        torch.zeros(7)

    found = {
        op.name: (sum(p.size for p in op.reads), sum(p.size for p in op.writes)) for op in listened(work)
    }
    assert found == {
        "mm": (4 * (200 + 600), 4 * 300), "add_": (4 * 600, 4 * 300), "clone": (4 * 300, 4 * 300),
        "copy_": (4 * 300, 4 * 300), "zeros": (0, 4 * 7),
    }  # fmt: skip


def test_an_expanded_tensor_is_read_once():
    row = torch.ones(1, 8)
    (add,) = listened(lambda: row.expand(100, 8) + 1)
    assert [piece.size for piece in add.reads] == [4 * 8] and add.bytes == 4 * (8 + 800)


def chain():
    """x (100) -> y, z -> product with 100 x 5 -> sum; y is read before the product and after."""
    x, weight = torch.ones(1, 100), torch.ones(100, 5)

    def work():
        y = x * 2
        z = y.exp() + 1
        w = z @ weight
        return (w.sum() + y).square()

    return listened(work, graph=True)


def test_what_a_compiler_makes_one_kernel():
    """Before the product x is read, y and z written; after it w and y read, the result written."""
    operations = chain()
    assert [op.name for op in operations] == ["mul", "exp", "add", "mm", "sum", "add", "pow"]
    eager, compiled = works(operations, "eager"), works(operations, "compiled")
    product = 4 * (100 + 500 + 5)
    assert eager.total() == 7
    assert moved(eager) == product + 4 * (6 * 100 + (5 + 1) + (1 + 100 + 100) + 200)
    assert compiled.total() == 3
    assert sorted(work.bytes for work in compiled) == sorted([product, 4 * 300, 4 * (5 + 100 + 100)])
    assert works(operations, "whole") == compiled


def test_a_block_is_a_graph_and_nothing_is_fused_across_its_border():
    x = torch.ones(50)
    first, second = nn.ReLU(), nn.ReLU()
    parts = Parts()
    with parts.inside([(first, "first", True), (second, "second", True)]), Tally(parts=parts) as tally:
        second(first(x) * 1)
    counts = {form: works(tally.operations, form) for form in FORMS}
    assert {form: count.total() for form, count in counts.items()} == {"eager": 3, "compiled": 3, "whole": 1}
    assert moved(counts["whole"]) == 4 * 100 and moved(counts["compiled"]) == 4 * 300


def test_the_backward_pass_belongs_to_the_module_that_made_it():
    layer, rest = nn.Linear(8, 8), nn.Linear(8, 8)
    x = torch.ones(3, 8, requires_grad=True)
    parts = Parts()
    with parts.inside([(layer, "layer", True)]), Tally(*layer.parameters(), parts=parts) as tally:
        with parts("rest"):
            loss = rest(layer(x)).sum()
        loss.backward()
    at = {name: [op.name for op in tally.operations if op.place == Place(*name)] for name in PLACES}
    assert at["layer", 1] == ["addmm", "mm", "mm", "sum"]
    assert at["rest", 0] == ["addmm", "sum", "mm", "mm", "sum"]
    assert sum(map(len, at.values())) == len(tally.operations)


def test_a_kernel_is_bound_by_its_products_or_by_its_bytes():
    """2 x 64 x 64 x 64 FLOPs at 1 TFLOP/s are shorter than 3 x 4 x 64 x 64 bytes at 1 GB/s."""
    x = torch.ones(64, 64)
    operations = listened(lambda: x @ x + x)
    found = kernels(operations, images=2).seconds("eager", RATES)
    assert found == {
        "products": pytest.approx(3 * 4 * 64**2 / 1e9 / 2),
        "moves": pytest.approx(3 * 4 * 64**2 / 1e9 / 2),
    }
    fast = RATES._replace(memory=1e15)
    assert kernels(operations, images=2).seconds("eager", fast)["products"] == pytest.approx(
        2 * 64**3 / 1e12 / 2
    )


def test_what_is_made_anew_is_told_apart():
    """A checkpoint repeats its product, and not the activation, whose result nothing needs."""
    layer, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.ones(3, 8, requires_grad=True)
    parts = Parts()
    with Tally(*layer.parameters(), parts=parts) as tally, parts("all"):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    names = {
        phase: [op.name for op in tally.operations if op.phase == phase] for phase in ("forward", "again")
    }
    assert names == {"forward": ["addmm", "gelu", "sum", "ones_like"], "again": ["addmm"]}
    assert [op.name for op in tally.operations if op.flops and op.phase == "backward"] == ["mm", "mm"]


@pytest.fixture(scope="module")
def counted():
    config = load_config(REPOSITORY / "mapet_ds/recipes/mapet_vitb16.yaml", ["model.args={depth: 3}"])
    return student(config), target(config)


def test_parts_make_up_the_whole(counted):
    """By kind and by part, in each form; a form computes as much as another and moves no more."""
    gpu = GPUS["h100"]
    for made in (part.kernels for part in counted):
        flops, size = [], []
        for form in FORMS:
            works, whole = made.counts[form], sum(made.seconds(form, gpu.rates).values())
            assert whole == pytest.approx(sum(made.seconds(form, gpu.rates, "part").values()))
            flops.append(sum(count * work.flops for work, count in works.items()) / made.images)
            size.append(moved(works))
            assert whole >= max(
                flops[-1] / gpu.rates.flops["half"], size[-1] / made.images / gpu.rates.memory
            )
        assert len(set(flops)) == 1 and size == sorted(size, reverse=True)


def test_flops_are_those_that_are_counted_elsewhere(counted):
    """But for the head's product, which the loss of many images makes anew."""
    model, goal = counted
    works = model.kernels.counts["eager"]
    flops = sum(count * work.flops for work, count in works.items()) / model.kernels.images
    assert flops == pytest.approx(model.flops + 2 * 147 * 768 * 8192)
    works = goal.kernels.counts["eager"]
    flops = sum(count * work.flops for work, count in works.items()) / goal.kernels.images
    assert flops == pytest.approx(goal.flops + goal.tf32_flops)
