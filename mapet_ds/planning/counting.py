"""What a recipe costs: its modules run on tensors without values, and torch's own counters look on.

Everything is per image unless said otherwise. A FLOP is half a multiply-add, by the formulas of
torch.utils.flop_counter; element-wise work is not counted. No objective, tokenizer or tower is known here by
name: whatever runs is counted. Of a Teacher alone the weights are asked for, which ranks may share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import (
    register_module_forward_pre_hook,
    register_module_parameter_registration_hook,
)
from torch.utils.flop_counter import FlopCounterMode

from mapet_ds.blocks import RelativeBlock, StreamBlock
from mapet_ds.config.sections import Config, TeacherConfig, TokenizerConfig
from mapet_ds.errors import ConfigError
from mapet_ds.methods import build_objective, build_target
from mapet_ds.objectives.objective import Objective
from mapet_ds.planning.parts import Parts
from mapet_ds.planning.roofline import Kernels, kernels
from mapet_ds.planning.tally import Tables, Tally, biased_attention
from mapet_ds.targets.teacher import Teacher, tower_blocks
from mapet_ds.vit import Graph
from mapet_ds.weights import UNREADABLE

CPU = torch.device("cpu")
DTYPES = {2: torch.bfloat16, 4: torch.float32}
MANY = 128
"""Images of the larger of the two batches that memory is counted on."""
T = TypeVar("T")


class Line(NamedTuple):
    """Bytes at the peak for any number of images: a straight line through the peaks of two batches.

    What a loss or an assignment holds at once is bounded (LOGITS, SCORES), so the truth bends once. The line
    misses it by no more than that bound.
    """

    fixed: float
    each: float

    def __call__(self, images: int) -> float:
        return self.fixed + self.each * images


class Student(NamedTuple):
    """Counts of what is trained."""

    parameters: int
    """Number of trainable parameters."""
    constants: int
    """Number of parameters without gradient."""
    forward: float
    """FLOPs of the forward pass."""
    flops: float
    """FLOPs of the forward and the backward pass, nothing recomputed."""
    minimum: float
    """The same with only those pairs of attention that the masks allow."""
    recomputed: float
    """FLOPs that train.grad_checkpointing adds; 0 where it is off."""
    peak: Line
    """Bytes of activations at the peak, in eager mode."""
    kernels: Kernels
    """What a forward and a backward pass launches."""


class Shape(NamedTuple):
    """What a student sees of its target."""

    dim: int
    """Number of token ids, or width of a vector."""
    shape: tuple[int, ...]
    """Shape of one image's target."""
    dtype: torch.dtype


class Target(NamedTuple):
    """Counts of what computes the target."""

    shape: Shape
    view: int | None
    """Side of the images that it is computed from; None: it needs no view of its own."""
    ahead: bool
    """It is computed while the student learns from the batch before."""
    flops: float
    """FLOPs in 16 bits."""
    fp32_flops: float
    """FLOPs in full fp32."""
    tf32_flops: float
    """FLOPs of products in TF32."""
    convolutions: float
    """FLOPs of convolutions in TF32, torch's own choice for a teacher in fp32."""
    sharded: int
    """Bytes of weights that teacher.shard spreads over ranks."""
    whole: int
    """Bytes that every rank holds."""
    follows: int
    """Bytes of those that each update moves towards the student's weights."""
    peak: Line
    """Bytes at the peak of computing it, its result included."""
    output: float
    """Bytes of its result, which the student's pass keeps."""
    kernels: Kernels
    """What computing it launches."""


def _once(count: Callable[..., T]) -> Callable[..., T]:
    """Remembers what `count` gave for equal settings, which can't be hashed but print themselves whole."""
    known: dict[Any, T] = {}

    @functools.wraps(count)
    def remembered(config: Config, *rest: Any) -> T:
        key = (repr(config), *rest)
        if key not in known:
            known[key] = count(config, *rest)
        return known[key]

    return remembered


def _countable(config: Config) -> tuple[Config, int, int]:
    """The settings without what changes no count, and the two batches that are counted.

    The smaller one is the least that the objective allows; the larger one a multiple of it.
    """
    few = next((micro for micro in range(1, config.train.global_batch_size + 1) if config.allows(micro)), 1)
    precision = "bf16" if config.teacher.precision == "auto" else config.teacher.precision
    teacher = dataclasses.replace(config.teacher, precision=precision)
    train = dataclasses.replace(config.train, micro_batch_size=few, compile=False)
    return dataclasses.replace(config, train=train, teacher=teacher), few, few * max(2, MANY // few)


@contextlib.contextmanager
def _movable_modules(mode: FakeTensorMode) -> Iterator[None]:
    """Lets modules be moved that are built here: torch refuses it while the mode remembers a parameter."""
    converter: Any = mode.fake_tensor_converter
    converter.set_tensor_memo = lambda tensor, fake: None
    try:
        yield
    finally:
        del converter.set_tensor_memo


def _line(few: int, peak_of_few: float, many: int, peak_of_many: float) -> Line:
    each = (peak_of_many - peak_of_few) / (many - few)
    return Line(peak_of_few - few * each, each)


def student(config: Config, size: int = 2) -> Student:
    """Counts the configured objective. size: bytes of a number in its forward pass, 2 for bf16.

    Raises:
        ConfigError: the objective or its target can't be built or run.
    """
    goal = shape_of_target(config)

    # That is all a student sees of its target: another teacher needs no other count.
    tokenizer = TokenizerConfig(vocab_size=goal.dim)
    alike = dataclasses.replace(config, teacher=TeacherConfig(), tokenizer=tokenizer)
    return _count_student(*_countable(alike), size, goal)


@_once
def _count_student(config: Config, few: int, many: int, size: int, goal: Shape) -> Student:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _without_values(config, goal.dim, size)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        constants = sum(parameter.numel() for parameter in model.parameters()) - trainable
        for parameter in model.parameters():
            if parameter.requires_grad:  # the engine takes each gradient as it is made, and counts it itself
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

        # FLOPs, from a batch so small that no loss makes anything anew
        batches = [_noughts(config, images, goal) for images in (few, many)]
        kept, forward, forbidden = _learn(model, *batches[0])
        flops, smaller = kept.flops.total(), kept

        # Bytes, from both.
        if config.train.grad_checkpointing:
            model.vit.set_grad_checkpointing(True)
            smaller, _, _ = _learn(model, *batches[0])
        parts = Parts()
        with parts.watching(model):
            larger, _, _ = _learn(model, *batches[1], parts)
    return Student(
        parameters=trainable,
        constants=constants,
        forward=forward / few,
        flops=flops / few,
        minimum=(flops - 3 * forbidden) / few,
        recomputed=(smaller.flops.total() - flops) / few,
        peak=_line(few, smaller.peak, many, larger.peak),
        kernels=kernels(larger.operations, many),
    )


def _without_values(config: Config, dim: int, size: int) -> Objective:
    """The objective with shapes for parameters and real tables."""

    def without_values(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(without_values)
    try:
        with unset_fake_temporarily():
            model = build_objective(config, dim).to(DTYPES[size])
    finally:
        handle.remove()
    return model._apply(lambda x: torch.empty_like(x, device=CPU) if x.is_meta else x)


def _noughts(config: Config, images: int, goal: Shape) -> tuple[Tensor, Tensor]:
    """A batch of views and targets; what they hold changes no count."""
    side = config.model.img_size
    return torch.zeros(images, 3, side, side), torch.zeros(images, *goal.shape, dtype=goal.dtype)


def modules(config: Config) -> dict[str, float]:
    """FLOPs of a forward and a backward pass by module, each with all that is inside it.

    A module's name begins with its objective's class; "Global" is the whole.

    Raises:
        ConfigError: the objective or its target can't be built or run.
    """
    goal, (plain, few, _) = shape_of_target(config), _countable(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, batch = _without_values(plain, goal.dim, 2), _noughts(plain, few, goal)
        with unset_fake_temporarily():
            draw = model.draw(0, 0, few)
        # As plain products, because torch has no formula for attention's kernel on a CPU.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(*batch, draw).loss.backward()
    return {name: sum(counts.values()) / few for name, counts in counter.get_flop_counts().items()}


def _learn(
    model: Objective, views: Tensor, targets: Tensor, parts: Parts | None = None
) -> tuple[Tally, int, float]:
    """A forward and a backward pass; FLOPs of the forward pass, and those of them that its masks forbid."""
    with unset_fake_temporarily():
        draw = model.draw(0, 0, len(views))
    tally = Tally(*model.parameters(), *model.buffers(), views, targets, parts=parts)
    tables = Tables()
    with biased_attention(), tables, tally:
        loss = model(views, targets, draw).loss
        forward, forbidden = tally.flops.total(), tables.forbidden
        loss.backward()
    return tally, forward, forbidden


def target(config: Config) -> Target:
    """Counts the configured objective's target as a GPU computes it; teacher.precision = auto is bf16 there.

    Raises:
        ConfigError: the target can't be built, or needs values to run.
    """
    return _count_target(*_countable(config))


def shape_of_target(config: Config) -> Shape:
    """What the configured objective predicts; only where it is no token ids the target has to be built.

    Raises:
        ConfigError: as `target` does.
    """
    if config.method.predicts_ids:
        return Shape(config.tokenizer.vocab_size, (config.num_patches,), torch.long)
    return target(config).shape


@_once
def _count_target(config: Config, few: int, many: int) -> Target:
    called = dict[nn.Module, None]()
    handle = register_module_forward_pre_hook(lambda module, _: called.setdefault(module))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            with _movable_modules(mode), Tables(), Tally() as building:
                goal = build_target(config, CPU)
                gc.collect()
            smaller, made = _teach(goal, config, few)
            teachers = [module for module in called if isinstance(module, Teacher)]
            graphs = [block for teacher in teachers for block in tower_blocks(teacher.visual)]
            compiled = (StreamBlock, RelativeBlock, Graph)
            graphs += [module for module in called if isinstance(module, compiled)]
            parts = Parts()
            with parts.inside((block, "target", True) for block in graphs), parts("target"):
                larger, _ = _teach(goal, config, many, parts)
            follows = sum(tensor.nbytes for tensor in goal.state_dict().values())
    except UNREADABLE as error:
        raise ConfigError(
            f"What the target of objective = {config.objective} costs can't be counted, because it needs "
            f"more than the shapes of tensors: {type(error).__name__} {error} Where it is a tokenizer's, "
            "plan with tokenizer.ids=FOLDER: ids that are looked up cost nothing."
        ) from error
    finally:
        handle.remove()
    sharded = sum(teacher.local_bytes for teacher in teachers)
    return Target(
        shape=Shape(goal.dim, tuple(made.shape[1:]), made.dtype),
        view=goal.teacher_view and goal.teacher_view.size,
        ahead=goal.ahead,
        flops=smaller.flops["half"] / few,
        fp32_flops=smaller.flops["fp32"] / few,
        tf32_flops=smaller.flops["tf32"] / few,
        convolutions=smaller.flops["convolutions"] / few,
        sharded=sharded,
        whole=building.live - sharded,
        follows=follows,
        peak=_line(few, smaller.peak, many, larger.peak),
        output=made.nbytes / few,
        kernels=kernels(larger.operations, many),
    )


def _teach(goal: Any, config: Config, images: int, parts: Parts | None = None) -> tuple[Tally, Tensor]:
    """The target of so many images."""
    sides = (config.model.img_size, goal.teacher_view.size if goal.teacher_view else config.model.img_size)
    views = [torch.zeros(images, 3, side, side) for side in sides]
    with biased_attention(), Tally(*views, parts=parts) as tally:
        batch = {"images": views[0], "teacher_images": views[1], "index": range(images), "draw": None}
        made = goal(SimpleNamespace(**batch))
    return tally, made
