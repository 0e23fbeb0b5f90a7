"""The least time that a chip needs for counted operations: each is bound by its products or by its bytes.

FLOPs and bytes are counted, rates are a chip's own. No product loses time to its shape, and no kernel waits
for another or for the host. Two things could beat the bound: a cache, for tensors so small that they stay in
it, and a compiler that computes something twice to save bytes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from mapet_ds.planning.tally import Operation, Piece

FORMS = ("eager", "compiled", "whole")
"""Each operation a kernel; the blocks compiled, as train.compile does; all of the step compiled as one."""
KINDS = ("products", "attention", "moves")


class Work(NamedTuple):
    """What a kernel computes and moves."""

    kind: str
    """`products`, `attention`, or `moves` for all that has neither."""
    part: str
    phase: str
    """As of an Operation."""
    precision: str
    flops: int
    bytes: int


class Rates(NamedTuple):
    """What a chip can do: FLOP/s by precision, and bytes/s of its memory."""

    flops: dict[str, float]
    memory: float

    def seconds(self, work: Work) -> float:
        compute = work.flops / self.flops[work.precision] if work.flops else 0.0
        return max(compute, work.bytes / self.memory)


class Gpu(NamedTuple):
    """NVIDIA's data sheet of the SXM module: no sparsity, one direction of NVLink."""

    name: str
    gib: float
    """Memory in GiB, as torch reports it."""
    bf16_tflops: float
    fp32_tflops: float
    memory_gbyte_s: float
    nvlink_gbyte_s: float
    share: float
    """Share of bf16_tflops that student and teacher attain. It is assumed."""
    measured_tflops: float = 0.0
    """What a large bf16 product attained on such a GPU; 0 where none was measured."""

    @property
    def product_tflops(self) -> float:
        """The most that bf16 products are known to attain."""
        return self.measured_tflops or self.bf16_tflops

    @property
    def rates(self) -> Rates:
        half, tf32 = 1e12 * self.product_tflops, 5e11 * self.product_tflops
        flops = {"half": half, "fp32": 1e12 * self.fp32_tflops, "tf32": tf32, "convolutions": tf32}
        return Rates(flops, 1e9 * self.memory_gbyte_s)


GPUS = {
    "a100-40": Gpu("A100", 39.4, 312, 19.5, 1555, 300, 0.30),
    "a100-80": Gpu("A100", 79.1, 312, 19.5, 2039, 300, 0.30),
    "h100": Gpu("H100", 79.1, 989, 66.9, 3350, 450, 0.20),
    "h200": Gpu("H200", 139.7, 989, 66.9, 4800, 450, 0.20, measured_tflops=790),
}


class Kernels(NamedTuple):
    """The kernels of a pass over a batch of images, and how often each is launched, by form.

    A smaller batch reads the weights more often an image, so a bound from this one holds for it as well.
    """

    images: int
    counts: dict[str, Counter[Work]]

    def seconds(self, form: str, rates: Rates, key: str = "kind") -> dict[str, float]:
        """The least seconds of an image by kind of work, or by another of its fields."""
        spent = defaultdict[str, float](float)
        for work, count in self.counts[form].items():
            spent[getattr(work, key)] += count * rates.seconds(work) / self.images
        return dict(spent)

    def launches(self, form: str) -> int:
        """Kernels of a pass."""
        return self.counts[form].total()


def kernels(operations: Sequence[Operation], images: int) -> Kernels:
    """The kernels of these operations, a pass over so many images, in each form."""
    return Kernels(images, {form: works(operations, form) for form in FORMS})


def works(operations: Sequence[Operation], form: str) -> Counter[Work]:
    """The kernels of these operations, in one of FORMS, and how often each is launched.

    Products and attention are kernels of their own. What else is in one graph becomes one kernel where one
    result leads to the next without a product in between. Such a kernel reads its operands once, and writes
    what others read.
    """
    counts, groups = Counter[Work](), _Groups()
    for operation in operations:
        graph = {"eager": 0, "compiled": operation.place.graph, "whole": 1}[form]
        kind = (
            "moves" if not operation.flops else "attention" if "attention" in operation.name else "products"
        )
        if graph and kind == "moves":
            groups.join(operation, graph)
        else:
            groups.alone(operation)
            place = operation.place.part, operation.phase
            counts[Work(kind, *place, operation.precision, operation.flops, operation.bytes)] += 1
    counts.update(groups.works())
    return counts


class _Member(NamedTuple):
    """What an operation must have in common with another to become one kernel with it, and its part."""

    level: int
    graph: int
    phase: str
    part: str


class _Groups:
    """Operations that become one kernel: of one graph, phase and level, where one reads what the other made.

    A storage's level is the number of kernels of their own between the step's beginning and it.
    """

    def __init__(self) -> None:
        self.level = defaultdict[int, int](int)
        self.owner = dict[int, int | None]()
        self.parents = list[int]()
        self.members = list[_Member]()
        self.reads = list[tuple[Piece, int | None, int | None]]()
        """A piece, the member that made it and the one that reads it; None is a kernel of its own."""
        self.made = dict[tuple[int, int], Piece]()
        self.free = set[int]()
        """Storages that a graph fills with a constant: whoever reads them makes them himself."""

    def find(self, member: int) -> int:
        """The first member of the group of one."""
        while self.parents[member] != member:
            member = self.parents[member]
        return member

    def alone(self, operation: Operation) -> None:
        """Notes an operation that is a kernel of its own."""
        level = 1 + max((self.level[piece.storage] for piece in operation.reads), default=0)
        self.reads += [(piece, self.owner.get(piece.storage), None) for piece in operation.reads]
        self._write(operation, level, None)

    def join(self, operation: Operation, graph: int) -> None:
        """Notes an operation that may join others of its graph."""
        if not operation.reads:
            self.free.update(piece.storage for piece in operation.writes)
            return
        level = max(self.level[piece.storage] for piece in operation.reads)
        member = len(self.members)
        self.parents.append(member)
        self.members.append(_Member(level, graph, operation.phase, operation.place.part))
        for piece in operation.reads:
            owner = self.owner.get(piece.storage)
            if owner is not None and self.members[owner][:3] == self.members[member][:3]:
                self.parents[self.find(member)] = self.find(owner)
            self.reads.append((piece, owner, member))
        self._write(operation, level, member)
        self.made |= {(piece.storage, member): piece for piece in operation.writes}

    def _write(self, operation: Operation, level: int, owner: int | None) -> None:
        for piece in operation.writes:
            self.level[piece.storage], self.owner[piece.storage] = level, owner
            self.free.discard(piece.storage)

    def works(self) -> Counter[Work]:
        """The groups as kernels."""
        groups = [self.find(member) for member in range(len(self.members))]
        taken, given, inside = defaultdict[int, set[Piece]](set), set[tuple[int, int]](), set[int]()
        for piece, owner, reader in self.reads:
            maker, taker = (None if member is None else groups[member] for member in (owner, reader))
            if maker is not None and maker == taker:
                inside.add(piece.storage)
                continue
            if maker is not None:
                given.add((piece.storage, maker))
            if taker is not None and piece.storage not in self.free:
                taken[taker].add(piece)

        # What a group makes is written if another reads it, or nobody has yet.
        written = defaultdict[int, dict[int, int]](dict)
        for (storage, member), piece in self.made.items():
            sizes = written[groups[member]]
            if (storage, groups[member]) in given or storage not in inside:
                sizes[storage] = max(piece.size, sizes.get(storage, 0))

        counts = Counter[Work]()
        for group in set(groups):
            moved = sum(piece.size for piece in taken[group]) + sum(written[group].values())
            counts[Work("moves", self.members[group].part, self.members[group].phase, "", 0, moved)] += 1
        return counts
