"""Where a step's time goes: by part, beside what the chip's matrix products and memory allow."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.measuring import Figures, bandwidth, repeatedly, timed
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from mapet_ds.config.sections import Config
from mapet_ds.planning.counting import modules
from mapet_ds.planning.parts import HEAD, REST, UNEXPLAINED, Parts, in_backward
from mapet_ds.planning.tally import Tally

RANGE = "part of a step: "
BACKWARD = "autograd::engine::evaluate_function"
COLLECTIVES = ("c10d::", "gloo:", "nccl:", "record_param_comms")


class Ranges(Parts):
    """The parts of a step, each a range that the profiler sees."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[record_function] = []

    def enter(self, name: str, graph: bool = False) -> None:
        if not in_backward():
            self.ranges.append(record_function(RANGE + name))
            self.ranges[-1].__enter__()
        super().enter(name, graph)

    def leave(self) -> None:
        if not in_backward():
            self.ranges.pop().__exit__(None, None, None)
        super().leave()

    def of_event(self, event: Any) -> str | None:
        """The part of an event of the profiler's; None outside of a step, where other threads work."""
        while event is not None:
            if event.name.startswith(RANGE):
                return event.name.removeprefix(RANGE)
            if event.name.startswith(COLLECTIVES):
                return "comm"
            if event.name.startswith(BACKWARD):
                return self.of_node(event.sequence_nr).part
            event = event.cpu_parent
        return None


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
    parts, spent, moved = Ranges(), Counter[str](), Counter[str]()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")

    def whole() -> None:
        with parts(UNEXPLAINED):
            step(parts)

    # Take the bytes of one step, unless torch.compile has made it one piece, and the seconds of others.
    with parts.watching(objective):
        if count_bytes:
            with Tally(parts=parts) as tally:
                whole()
            for operation in tally.operations:
                moved[operation.place.part] += operation.bytes
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
            found[name] |= bounds(flops.get(name, 0), moved[name], value, peak, speed)
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
