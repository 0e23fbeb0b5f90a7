"""Look on while modules run: what torch's operations compute, hold and leave out, with values or without."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
CONVOLUTION = torch.ops.aten.convolution


class Tally(TorchDispatchMode):
    """FLOPs of all operations by precision, and the peak of the bytes that they make.

    A storage is counted once, from the operation that makes it until it is freed.

    Attributes: flops (by `_precision`), live and peak (bytes).
    """

    def __init__(self, *there: Tensor) -> None:
        """there: tensors that are not counted."""
        super().__init__()
        self.flops = Counter[str]()
        self.known = {tensor.untyped_storage()._cdata for tensor in there}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if count := _flops_of(function.overloadpacket, args, kwargs or {}, result):
            self.flops[_precision(function.overloadpacket, args)] += count
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
                self.peak = max(self.peak, self.live)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _flops_of(operation: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """Attention's backward pass has twice the forward's products; scores made anew are not counted."""
    if operation is ATTENTION:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if operation is ATTENTION_BACKWARD:
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
        if function is nn.functional.scaled_dot_product_attention:
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
