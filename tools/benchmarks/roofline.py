"""Where a step's time goes: by part, beside what the chip's matrix products and memory allow."""

from __future__ import annotations

import bisect
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.measuring import Figures, bandwidth, repeatedly, timed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mapet_ds.config import Config
from mapet_ds.planning.counting import modules

RANGE = "part of a step: "
BACKWARD = "autograd::engine::evaluate_function"
COLLECTIVES = ("c10d::", "gloo:", "nccl:", "record_param_comms")
REST, HEAD, GRADIENTS, UNEXPLAINED = "norms and rest", "head and loss", "gradients", "unexplained"


def in_backward() -> bool:
    return torch._C._current_autograd_node() is not None


class Parts:
    """Which part of a step an operation belongs to. In the forward pass: of the modules being called, the innermost that has
    a name here. In the backward pass: the part that made the node, found by autograd's sequence number."""

    def __init__(self) -> None:
        self.open: list[tuple[str, record_function]] = []
        self.marks: list[tuple[int, str]] = []

    def enter(self, name: str) -> None:
        if in_backward():  # what is made anew there belongs to the node that asks for it, and may end before the module does
            return
        self.open.append((name, record_function(RANGE + name)))
        self.open[-1][1].__enter__()
        self._mark()

    def leave(self) -> None:
        if in_backward():
            return
        self.open.pop()[1].__exit__(None, None, None)
        self._mark()

    def _mark(self) -> None:
        self.marks.append((torch.autograd._get_sequence_nr(), self.now()))

    def now(self) -> str:
        return self.open[-1][0] if self.open else UNEXPLAINED

    def of_node(self, sequence_nr: int) -> str:
        """Of a node of the backward pass; those that only add up a parameter's gradient have no number of a forward pass."""
        place = bisect.bisect_right(self.marks, sequence_nr, key=lambda mark: mark[0])
        return self.marks[place - 1][1] if 0 <= sequence_nr < self.marks[-1][0] else GRADIENTS

    def of_event(self, event: Any) -> str | None:
        """Of the profiler's; None outside of a step, where other threads work."""
        while event is not None:
            if event.name.startswith(RANGE):
                return event.name.removeprefix(RANGE)
            if event.name.startswith(COLLECTIVES):
                return "comm"
            if event.name.startswith(BACKWARD):
                return self.of_node(event.sequence_nr)
            event = event.cpu_parent
        return None

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.enter(name)
        yield
        self.leave()

    @contextlib.contextmanager
    def watching(self, objective: nn.Module) -> Iterator[None]:
        """Name its modules' calls; what follows the ViT's final norm is head and loss."""
        vit, named = objective.vit, [(objective, REST)]
        for block in (module for module in objective.modules() if isinstance(module, Block)):
            attention = block.attn
            named += [(attention, "attention"), (attention.qkv, "qkv"), (attention.proj, "proj"), (block.mlp, "mlp")]
        handles = [vit.norm.register_forward_hook(lambda *_: self.enter(HEAD))]
        handles.append(objective.register_forward_hook(lambda *_: self.leave()))  # of the head
        for module, name in [*named, (vit.patch_embed, "patch_embed")]:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.enter(name)))
            handles.append(module.register_forward_hook(lambda *_: self.leave()))
        yield
        for handle in handles:
            handle.remove()


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, each its whole operands and results: what no cache keeps."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts, self.bytes = parts, Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.is_view or function.overloadpacket.__name__.startswith(("empty", "new_empty", "_unsafe_view")):
            return result
        node = torch._C._current_autograd_node()
        changed = [arg for arg, known in zip(args, function._schema.arguments) if known.alias_info and known.alias_info.is_write]
        moved = [x for x in tree_leaves((args, kwargs, changed or result)) if isinstance(x, Tensor)]
        part = self.parts.now() if node is None else self.parts.of_node(node._sequence_nr())
        self.bytes[part] += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in moved)
        return result


def flops_by_part(config: Config) -> dict[str, float]:
    """Of the student on one image; torch.compile makes a block one piece, named `norms and rest` here."""
    counts = modules(config)
    ends = {"patch_embed": ".patch_embed", "qkv": ".qkv", "proj": ".attn.proj", "mlp": ".mlp", "attention": ".attn"}
    flops = {part: sum(count for name, count in counts.items() if name.endswith(end)) for part, end in ends.items()}
    flops["attention"] -= flops["qkv"] + flops["proj"]
    head = counts["Global"] - sum(flops.values())
    embedding = flops.pop("patch_embed")
    return {"patch_embed": embedding, HEAD: head} | ({REST: sum(flops.values())} if config.train.compile else flops)


def breakdown(
    objective: nn.Module, step: Callable[[Parts], Any], flops: dict[str, float], peak: float, device: torch.device, repeats: int,
    count_bytes: bool = True,
) -> Figures:
    """By part: seconds a step in torch.profiler (kernels' on a GPU, operations' on a CPU), FLOPs, bytes, and what bounds it.

    step: does one, naming what is not the objective's forward and backward; flops: of a step by part; peak: FLOP/s of matrix
    products. `unexplained` is the step's wall clock less its parts: Python, launches, waiting; less than nothing where kernels
    overlap.
    """
    parts, spent = Parts(), Counter[str]()
    traffic = Traffic(parts)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")

    def whole() -> None:
        with parts(UNEXPLAINED):
            step(parts)

    with parts.watching(objective):
        if count_bytes:  # not what torch.compile has made one piece
            with traffic:
                whole()
        with profile(activities=kinds) as profiler:
            seconds = timed(device, repeatedly, whole, repeats)[0] / repeats
    clock = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU and (name := parts.of_event(event)):
            spent[name] += getattr(event, clock) / 1e6 / repeats
    spent.pop(UNEXPLAINED, None)
    speed = bandwidth(device)
    found = {
        name: {"seconds": value, "share": value / seconds} | bounds(flops.get(name, 0), traffic.bytes[name], value, peak, speed)
        for name, value in spent.most_common() if value
    }  # fmt: skip
    left = seconds - sum(spent.values())
    return {"seconds": seconds, "parts": found, UNEXPLAINED: left / seconds, "bandwidth_gbyte_s": speed / 1e9}


def bounds(flops: float, moved: float, seconds: float, peak: float, speed: float) -> Figures:
    """A part's place under the roof: what it attains of the matrix products' rate, and of the tighter of the two bounds."""
    compute, memory = flops / peak, moved / speed
    return {
        "gflop": flops / 1e9, "gbyte": moved / 1e9, "flop_per_byte": flops / moved if moved else None,
        "tflops": flops / seconds / 1e12, "share_of_ceiling": compute / seconds,
        "bound": None if not flops and not moved else "compute" if compute > memory else "memory",
        "share_of_bound": max(compute, memory) / seconds,
    }  # fmt: skip


def show(found: Figures, peak: float, plot: Path | None) -> None:
    """The table on stderr, and the picture."""
    form = "{:<16}{:>10}{:>8}{:>11}{:>9}{:>9}{:>10}{:>9}  {}".format
    print(form("part", "seconds", "share", "GFLOP", "GB", "FLOP/B", "GFLOP/s", "of peak", "bound"), file=sys.stderr)
    for name, part in found["parts"].items():
        figures = [f"{part['seconds']:.4f}", f"{part['share']:.1%}", f"{part['gflop']:.1f}", f"{part['gbyte']:.2f}"]
        figures += [f"{part['flop_per_byte'] or 0:.1f}", f"{1e3 * part['tflops']:.1f}", f"{part['share_of_ceiling']:.0%}"]
        print(form(name, *figures, part["bound"] or "-"), file=sys.stderr)
    print(form(UNEXPLAINED, "", f"{found[UNEXPLAINED]:.1%}", *[""] * 6).rstrip(), file=sys.stderr)
    if plot:
        draw_roofline(found, peak, plot)


def draw_roofline(found: Figures, peak: float, path: Path) -> None:
    """Left: the parts' share of the step; right: their rate over their intensity, under what the chip can do."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(12, 5), layout="constrained")
    shares, roof = figure.subplots(1, 2)
    parts, speed = found["parts"], 1e9 * found["bandwidth_gbyte_s"]
    bars = {name: part["share"] for name, part in parts.items()} | {UNEXPLAINED: found[UNEXPLAINED]}
    shares.barh(list(bars), [100 * share for share in bars.values()])
    shares.invert_yaxis()
    shares.set(xlabel="% of the step", title=f"{found['seconds']:.3g} s a step")
    placed = {name: part for name, part in parts.items() if part["flop_per_byte"]}
    ends = [peak / speed / 30, max([peak / speed * 10, *(2 * part["flop_per_byte"] for part in placed.values())])]
    roof.loglog([ends[0], peak / speed, ends[1]], [ends[0] * speed, peak, peak], color="black")
    for name, part in placed.items():
        roof.scatter(part["flop_per_byte"], 1e12 * part["tflops"], s=20 + 1000 * part["share"], alpha=0.6)
        roof.annotate(name, (part["flop_per_byte"], 1e12 * part["tflops"]))
    roof.set(xlabel="FLOP per byte", ylabel="FLOP/s", title="under the measured ceiling and copy bandwidth")
    figure.savefig(path)
