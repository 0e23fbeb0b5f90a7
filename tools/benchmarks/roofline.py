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

from mapet_ds.config.sections import Config
from mapet_ds.planning.counting import modules

RANGE = "part of a step: "
BACKWARD = "autograd::engine::evaluate_function"
COLLECTIVES = ("c10d::", "gloo:", "nccl:", "record_param_comms")
REST, HEAD, GRADIENTS, UNEXPLAINED = "norms and rest", "head and loss", "gradients", "unexplained"


def in_backward() -> bool:
    return torch._C._current_autograd_node() is not None


class Parts:
    """The parts of a step, by name, that operations belong to.

    In the forward pass it is the innermost one that is entered: a module that `watching` has named. In the
    backward pass it is the part that made the node, found by autograd's sequence number.
    """

    def __init__(self) -> None:
        self.open: list[tuple[str, record_function]] = []
        self.marks: list[tuple[int, str]] = []

    def enter(self, name: str) -> None:
        # What is made anew there belongs to the node that asks for it, and may end before the module does.
        if in_backward():
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
        """The part of a node of the backward pass.

        Nodes that only add up a parameter's gradient have no number of a forward pass: GRADIENTS.
        """
        place = bisect.bisect_right(self.marks, sequence_nr, key=lambda mark: mark[0])
        return self.marks[place - 1][1] if 0 <= sequence_nr < self.marks[-1][0] else GRADIENTS

    def of_event(self, event: Any) -> str | None:
        """The part of an event of the profiler's; None outside of a step, where other threads work."""
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
    def watching(self, objective: Any) -> Iterator[None]:
        """Name the calls of an objective's modules; what follows the ViT's final norm is head and loss."""
        vit, named = objective.vit, [(objective, REST), (objective.vit.patch_embed, "patch_embed")]
        for block in (module for module in objective.modules() if isinstance(module, Block)):
            attention: Any = block.attn
            named += [(attention, "attention"), (attention.qkv, "qkv"), (attention.proj, "proj")]
            named.append((block.mlp, "mlp"))
        handles = [vit.norm.register_forward_hook(lambda *_: self.enter(HEAD))]
        handles.append(objective.register_forward_hook(lambda *_: self.leave()))  # of the head
        for module, name in named:
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

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        free = ("empty", "new_empty", "_unsafe_view")
        if function.is_view or function.overloadpacket.__name__.startswith(free):
            return result
        known = [argument.alias_info for argument in function._schema.arguments]
        written = [arg for arg, alias in zip(args, known) if alias and alias.is_write]
        moved = [x for x in tree_leaves((args, kwargs, written or result)) if isinstance(x, Tensor)]
        node: Any = torch._C._current_autograd_node()
        part = self.parts.now() if node is None else self.parts.of_node(node._sequence_nr())
        for x in moved:
            self.bytes[part] += min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
        return result


def flops_by_part(config: Config) -> dict[str, float]:
    """FLOPs of a step by part, of the student on one image.

    torch.compile makes a block one piece, whose part is REST.
    """
    counts, flops = modules(config), {}
    ends = {"patch_embed": ".patch_embed", "qkv": ".qkv", "proj": ".attn.proj", "mlp": ".mlp"}
    for part, end in (ends | {"attention": ".attn"}).items():
        flops[part] = sum(count for name, count in counts.items() if name.endswith(end))
    flops["attention"] -= flops["qkv"] + flops["proj"]
    head, embedding = counts["Global"] - sum(flops.values()), flops.pop("patch_embed")
    blocks = {REST: sum(flops.values())} if config.train.compile else flops
    return {"patch_embed": embedding, HEAD: head, **blocks}


def breakdown(
    objective: nn.Module,
    step: Callable[[Parts], Any],
    flops: dict[str, float],
    peak: float,
    device: torch.device,
    repeats: int,
    count_bytes: bool = True,
    trace: Path | None = None,
) -> Figures:
    """Seconds, FLOPs and bytes of a step by part, and what bounds each.

    step: does a step and names what is not the objective's forward and backward.
    flops: of a step, by part.
    peak: FLOP/s of matrix products.
    trace: a file for all events of the profiled steps.
    The seconds are torch.profiler's, of kernels on a GPU and of operations on a CPU. `unexplained` is the
    step's wall clock less its parts: Python, launches, waiting. It is negative where kernels overlap.
    """
    parts, spent = Parts(), Counter[str]()
    traffic = Traffic(parts)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")

    def whole() -> None:
        with parts(UNEXPLAINED):
            step(parts)

    # Take the bytes of one step, unless torch.compile has made it one piece, and the seconds of others.
    with parts.watching(objective):
        if count_bytes:
            with traffic:
                whole()
        with profile(activities=kinds) as profiler:
            seconds = timed(device, repeatedly, whole, repeats)[0] / repeats
    if trace:
        profiler.export_chrome_trace(str(trace))

    # Sum up by part.
    clock = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for event in profiler.events() or ():
        if event.device_type == torch.autograd.DeviceType.CPU and (name := parts.of_event(event)):
            spent[name] += getattr(event, clock) / 1e6 / repeats
    spent.pop(UNEXPLAINED, None)
    speed = bandwidth(device)
    found = {}
    for name, value in spent.most_common():
        if value:
            found[name] = {"seconds": value, "share": value / seconds}
            found[name] |= bounds(flops.get(name, 0), traffic.bytes[name], value, peak, speed)
    left = seconds - sum(spent.values())
    return {"seconds": seconds, "parts": found, UNEXPLAINED: left / seconds, "bandwidth_gbyte_s": speed / 1e9}


def bounds(flops: float, moved: float, seconds: float, peak: float, speed: float) -> Figures:
    """A part's place under the roof: its share of the matrix products' rate, and of the tighter bound."""
    compute, memory = flops / peak, moved / speed
    return {
        "gflop": flops / 1e9, "gbyte": moved / 1e9, "flop_per_byte": flops / moved if moved else None,
        "tflops": flops / seconds / 1e12, "share_of_ceiling": compute / seconds,
        "bound": None if not flops and not moved else "compute" if compute > memory else "memory",
        "share_of_bound": max(compute, memory) / seconds,
    }  # fmt: skip


def show(found: Figures, peak: float, plot: Path | None) -> None:
    """Prints the table on stderr, and draws the picture where one is asked for."""
    form = "{:<16}{:>10}{:>8}{:>11}{:>9}{:>9}{:>10}{:>9}  {}".format
    row = "{seconds:.4f} {share:.1%} {gflop:.1f} {gbyte:.2f} {intensity:.1f} {gflops:.1f} "
    row += "{share_of_ceiling:.0%}"
    lines = [form("part", "seconds", "share", "GFLOP", "GB", "FLOP/B", "GFLOP/s", "of peak", "bound")]
    for name, part in found["parts"].items():
        more = {"intensity": part["flop_per_byte"] or 0, "gflops": 1e3 * part["tflops"]}
        lines.append(form(name, *row.format(**part, **more).split(), part["bound"] or "-"))
    lines.append(form(UNEXPLAINED, "", f"{found[UNEXPLAINED]:.1%}", *[""] * 6).rstrip())
    print("\n".join(lines), file=sys.stderr)
    if plot:
        draw_roofline(found, peak, plot)


def draw_roofline(found: Figures, peak: float, path: Path) -> None:
    """Draws the parts' shares of the step, and their rates over their intensities under the roof."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(12, 5), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    shares, roof = axes
    parts, speed = found["parts"], 1e9 * found["bandwidth_gbyte_s"]
    bars = {name: part["share"] for name, part in parts.items()} | {UNEXPLAINED: found[UNEXPLAINED]}
    shares.barh(list(bars), [100 * share for share in bars.values()])
    shares.invert_yaxis()
    shares.set(xlabel="% of the step", title=f"{found['seconds']:.3g} s a step")

    # The roof bends where memory and matrix products bound a part alike.
    placed = {name: part for name, part in parts.items() if part["flop_per_byte"]}
    bend, right = peak / speed, [2 * part["flop_per_byte"] for part in placed.values()]
    roof.loglog([bend / 30, bend, max([10 * bend, *right])], [peak / 30, peak, peak], color="black")
    for name, part in placed.items():
        place = part["flop_per_byte"], 1e12 * part["tflops"]
        roof.scatter(*place, s=20 + 1000 * part["share"], alpha=0.6)
        roof.annotate(name, place)
    roof.set(xlabel="FLOP per byte", ylabel="FLOP/s", title="under the measured ceiling and copy bandwidth")
    figure.savefig(path)
