"""Look on while modules run: what torch's operations compute, hold and leave out, with values or without."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from mapet_ds.planning.parts import Parts, Place, in_backward

ATTEND = nn.functional.scaled_dot_product_attention
BIASED = torch.ops.aten._scaled_dot_product_efficient_attention
"""The kernel that a GPU takes where attention adds a bias that is learnt. A CPU has none."""
ATTENTION = BIASED, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = (
    torch.ops.aten._scaled_dot_product_efficient_attention_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
CONVOLUTION = torch.ops.aten.convolution
FREE = ("empty", "new_empty", "_unsafe_view")
"""Beginnings of the names of operations that move nothing, beside views."""
OVERWRITES = {"copy_", "zero_", "fill_"}
"""Operations that do not read what they change."""


class Piece(NamedTuple):
    """A stretch of a storage."""

    storage: int
    """A number that no other storage of the same tally has."""
    offset: int
    size: int
    """Bytes."""


class Operation(NamedTuple):
    """What one of torch's operations computes, reads and writes: a kernel or a few. Views are none."""

    name: str
    place: Place
    phase: str
    """`forward`, `backward`, or `again`: of the forward pass, made anew within the backward pass."""
    precision: str
    """As `_precision` says; empty where there is no product."""
    flops: int
    reads: tuple[Piece, ...]
    writes: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Each operand and result once, whole: what no cache keeps."""
        return sum(piece.size for piece in (*self.reads, *self.writes))


class Tally(TorchDispatchMode):
    """FLOPs of all operations by precision, the peak of the bytes that they make, and what each moves.

    A storage is counted once, from the operation that makes it until it is freed.

    Attributes: flops (by `_precision`), live and peak (bytes), operations (only with parts).
    """

    def __init__(self, *there: Tensor, parts: Parts | None = None) -> None:
        """there: tensors that are not counted. parts: knows where each operation is."""
        super().__init__()
        self.flops = Counter[str]()
        self.parts, self.operations = parts, list[Operation]()
        self.numbers = dict[int, int]()
        self.seen = self.live = self.peak = 0
        for tensor in there:
            self._number(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.namespace == "prim":  # a question to a tensor without values
            return result
        precision, count = "", _flops_of(function.overloadpacket, args, kwargs, result)
        if count:
            precision = _precision(function.overloadpacket, args)
            self.flops[precision] += count
        results = _tensors(result)
        for tensor in results:
            if (storage := tensor.untyped_storage())._cdata not in self.numbers:
                self._number(tensor)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
                self.peak = max(self.peak, self.live)
        name = function.overloadpacket.__name__
        if self.parts and results and not function.is_view and not name.startswith(FREE):
            pieces = _moved(function, name, args, kwargs, results)
            reads, writes = (tuple(map(self._piece, side)) for side in pieces)
            place, phase = self.parts.here(), _phase()
            self.operations.append(Operation(name, place, phase, precision, count, reads, writes))
        return result

    def _number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.numbers:
            self.seen += 1
            self.numbers[storage._cdata] = self.seen
            weakref.finalize(storage, self.numbers.pop, storage._cdata, None)
        return self.numbers[storage._cdata]

    def _piece(self, x: Tensor) -> Piece:
        size = x.element_size()
        return Piece(
            self._number(x),
            size * int(x.storage_offset()),
            min(size * x.numel(), x.untyped_storage().nbytes()),
        )

    def _freed(self, size: int) -> None:
        self.live -= size


def _phase() -> str:
    """The phase of the operation that is being dispatched. A backward pass records no gradient of its own."""
    if not in_backward():
        return "forward"
    return "again" if torch.is_grad_enabled() else "backward"


def _tensors(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _moved(
    function: Any, name: str, args: tuple, kwargs: dict[str, Any], results: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What an operation reads, and what it writes: its results, or what it changes in place."""
    reads, written = [], []
    for i, argument in enumerate(function._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        written += _tensors(value) if changed else []
        reads += [] if changed and name in OVERWRITES else _tensors(value)
    return reads, written or results


def _flops_of(operation: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """Attention's backward pass has twice the forward's products; scores made anew are not counted."""
    if operation in ATTENTION:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if operation in ATTENTION_BACKWARD:
        return 2 * sdpa_flop_count(*(x.shape for x in args[1:4]))
    # What is done in place costs the same.
    operation = getattr(torch.ops.aten, operation.__name__.rstrip("_"), operation)
    return flop_registry[operation](*args, **kwargs, out_val=result) if operation in flop_registry else 0


def _precision(operation: Any, args: tuple) -> str:
    """`half`, `fp32`, `tf32`, or `convolutions` in TF32, by the operands and torch's present switches."""
    if next(x for x in args if isinstance(x, Tensor)).element_size() == 2:
        return "half"
    if operation is CONVOLUTION:
        return "convolutions" if torch.backends.cudnn.allow_tf32 else "fp32"
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *more: Any, **named: Any
) -> Tensor:
    if not isinstance(attn_mask, FakeTensor) or not attn_mask.is_floating_point():
        return ATTEND(q, k, v, attn_mask, *more, **named)
    padded = nn.functional.pad(attn_mask, (0, -k.shape[2] % 8))[..., : k.shape[2]]
    return BIASED(q, k, v, padded.expand(*q.shape[:3], k.shape[2]), torch.is_grad_enabled())[0]


def biased_attention() -> Any:
    """A context in which attention with a bias is a GPU's, also where it is made anew, which no mode sees.

    Lines of the bias are padded to 16 bytes, and each image has a gradient of its own of it.
    """
    return patch.object(nn.functional, "scaled_dot_product_attention", _attend)


class Tables(TorchFunctionMode):
    """Keeps tables real among tensors without values, and counts what the masks among them forbid.

    Tables begin with arange or linspace, and what is made of real tensors alone stays real. A mask without
    values is taken to allow everything.

    Attributes: forbidden (FLOPs of the pairs that attention computes in vain, in the forward pass).
    """

    MADE = (torch.arange, torch.linspace)

    def __init__(self) -> None:
        super().__init__()
        self.forbidden = 0.0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is ATTEND:
            self._note(*args, **kwargs)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        real = function in self.MADE or (tensors and not any(isinstance(x, FakeTensor) for x in tensors))
        with unset_fake_temporarily() if real else contextlib.nullcontext():
            return function(*args, **kwargs)

    def _note(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **_: Any,
    ) -> None:  # fmt: skip
        """The arguments are scaled_dot_product_attention's."""
        share = 1.0
        with unset_fake_temporarily():
            if is_causal:
                share = torch.ones(q.shape[-2], k.shape[-2]).tril().mean().item()
            elif attn_mask is not None and not isinstance(attn_mask, FakeTensor):
                allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf
                share = allowed.float().mean().item()
        self.forbidden += (1 - share) * sdpa_flop_count(q.shape, k.shape, v.shape)
