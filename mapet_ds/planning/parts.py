"""Which part of a step an operation belongs to, in the forward and in the backward pass."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from mapet_ds.blocks import RelativeBlock, StreamBlock
from mapet_ds.vit import Graph

REST, HEAD, GRADIENTS, UNEXPLAINED = "norms and rest", "head and loss", "gradients", "unexplained"


class Place(NamedTuple):
    """Where an operation is in a step."""

    part: str
    graph: int = 0
    """Number of the call of a block that torch.compile makes one graph; 0 is outside of all."""


def in_backward() -> bool:
    return torch._C._current_autograd_node() is not None


class Parts:
    """The parts of a step, by name, that operations belong to.

    In the forward pass it is the innermost one that is entered: a module that `watching` has named. In the
    backward pass it is the part that made the node, found by autograd's sequence number.
    """

    def __init__(self) -> None:
        self.open: list[Place] = []
        self.marks: list[tuple[int, Place]] = []
        self.graphs = 0

    def enter(self, name: str, graph: bool = False) -> None:
        """graph: what follows until `leave` is a graph of its own, unless it lies in one already."""
        # What is made anew there belongs to the node that asks for it, and may end before the module does.
        if in_backward():
            return
        number = self.now().graph
        if graph and not number:
            self.graphs += 1
            number = self.graphs
        self.open.append(Place(name, number))
        self._mark()

    def leave(self) -> None:
        if in_backward():
            return
        self.open.pop()
        self._mark()

    def _mark(self) -> None:
        self.marks.append((torch.autograd._get_sequence_nr(), self.now()))

    def now(self) -> Place:
        return self.open[-1] if self.open else Place(UNEXPLAINED)

    def of_node(self, sequence_nr: int) -> Place:
        """The place of a node of the backward pass.

        Nodes that only add up a parameter's gradient have no number of a forward pass: GRADIENTS.
        """
        place = bisect.bisect_right(self.marks, sequence_nr, key=lambda mark: mark[0])
        known = self.marks and 0 <= sequence_nr < self.marks[-1][0]
        return self.marks[place - 1][1] if known else Place(GRADIENTS)

    def here(self) -> Place:
        """The place of the operation that is being dispatched."""
        node: Any = torch._C._current_autograd_node()
        return self.now() if node is None else self.of_node(node._sequence_nr())

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.enter(name)
        yield
        self.leave()

    @contextlib.contextmanager
    def inside(self, named: Iterable[tuple[nn.Module, str, bool]]) -> Iterator[None]:
        """Names the calls of modules; True makes a call a graph."""
        handles = []
        for module, *place in named:
            handles.append(module.register_forward_pre_hook(lambda *_, place=place: self.enter(*place)))
            handles.append(module.register_forward_hook(lambda *_: self.leave()))
        yield
        for handle in handles:
            handle.remove()

    @contextlib.contextmanager
    def watching(self, objective: Any) -> Iterator[None]:
        """Names the calls of an objective's modules; what follows the ViT's final norm is head and loss."""
        named = [(objective, REST, False), (objective.vit.patch_embed, "patch_embed", False)]
        blocks = (StreamBlock, RelativeBlock)
        for block in (module for module in objective.modules() if isinstance(module, blocks)):
            attention: Any = block.attn
            named += [(block, REST, True), (attention, "attention", False), (attention.qkv, "qkv", False)]
            named += [(attention.proj, "proj", False), (block.mlp, "mlp", False)]
        named += [(module, HEAD, True) for module in objective.modules() if isinstance(module, Graph)]
        handles = [objective.vit.norm.register_forward_hook(lambda *_: self.enter(HEAD))]
        handles.append(objective.register_forward_hook(lambda *_: self.leave()))  # of the head
        with self.inside(named):
            yield
        for handle in handles:
            handle.remove()
