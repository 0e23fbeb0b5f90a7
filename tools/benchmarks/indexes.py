"""What a data set of many images costs beside its reading: time, memory, and the order of its reads."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from benchmarks.measuring import ALONE, Figures, circumstances, settings, summary
from PIL import Image

from mapet_ds.config.sections import Config
from mapet_ds.data.index import Index, open_index
from mapet_ds.data.index_files import write_index
from mapet_ds.data.listing import Member
from mapet_ds.data.samples import SampleSource
from mapet_ds.draws import SampleOrder

SMALL = b"\xff\xd8\xff" + bytes(5000)
"""Stands for an image where none is decoded."""
LOOKUPS, FEW, LATE, WINDOW = 10_000, 1000, 10_000_000, 65_536
"""Images looked up; images of the small data set; a late step; samples read one after the other."""
LISTINGS = 5
"""How often a data set of a thousandth of the images is listed."""


def memory(process: int | str = "self") -> Figures:
    """MiB of a process: its own, which can't be shared or dropped, and its share of all that it maps.

    The page cache is part of what it maps.
    """
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return {"own_mib": kib["Anonymous"] / 1024, "pss_mib": kib["Pss"] / 1024}


def write(folder: Path, images: int) -> None:
    """Writes a data set whose index has so many samples, each with a name, over a shard's one image."""
    folder.mkdir()
    picture = io.BytesIO()
    Image.effect_noise((320, 240), 50).convert("RGB").save(picture, "JPEG")
    with tarfile.open(folder / "only.tar", "w") as shard:
        header = tarfile.TarInfo("image.jpg")
        header.size = picture.tell()
        shard.addfile(header, io.BytesIO(picture.getvalue()))

    def members() -> Iterator[Member]:
        for i in range(images):
            name = b"shard-%06d.tar/%012d.jpg" % divmod(i, 10_000)
            yield Member(name, 0, tarfile.BLOCKSIZE, header.size, i % 1000)

    write_index(folder / "index", str(folder), members(), [b"only.tar"], [])


def write_listed(folder: Path, images: int) -> None:
    """Writes so many images as files of a hundred folders, and as members of four shards with labels."""
    for i in range(images):
        path = folder / "folders" / f"{i % 100}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(SMALL)
    (folder / "shards").mkdir()
    for number in range(4):
        with tarfile.open(folder / "shards" / f"{number}.tar", "w", format=tarfile.GNU_FORMAT) as shard:
            for i in range(number, images, 4):
                for name, data in ((f"{i:06d}.jpg", SMALL), (f"{i:06d}.cls", b"%d" % (i % 100))):
                    header = tarfile.TarInfo(name)
                    header.size = len(data)
                    shard.addfile(header, io.BytesIO(data))


def bare_listing(folder: Path) -> None:
    """What any listing must do: look at each file, or read each header."""
    for path in sorted(folder.rglob("*")):
        path.stat()
        if path.suffix == ".tar":
            with tarfile.open(path, "r:") as shard:
                sum(member.size for member in shard)


def listing_figures(scratch: Path, images: int, repeats: int) -> Figures:
    """CPU microseconds an image: of a first start's listing, of a bare one, of a later start's comparison."""
    write_listed(scratch, images)
    found: dict[str, Figures] = {}
    for data in (scratch / "folders", scratch / "shards"):
        spans = dict[str, list[float]](first=[], bare=[], again=[])
        for path in (data, *data.iterdir()):
            os.utime(path, (1e9, 1e9))  # data is older than a run
        for repeat in range(repeats):
            opened = functools.partial(open_index, str(data), scratch / f"index_{data.name}_{repeat}")
            works = {"first": opened, "bare": functools.partial(bare_listing, data), "again": opened}
            for name, work in works.items():
                start = time.process_time()
                work()
                spans[name].append(1e6 * (time.process_time() - start) / images)
        found[data.name] = {name: summary(values) for name, values in spans.items()}
    return found


def first_batch(config: Config, index: Index, step: int) -> Figures:
    """Seconds to the first micro-batch from a step on, and the memory of the rank and of its workers then."""
    from mapet_ds.data.loader import Loader

    start = time.perf_counter()
    loader = Loader(config, index, student=True, teacher=None, **ALONE, first_step=step)
    with contextlib.closing(loader):
        next(loader)
        seconds = time.perf_counter() - start
        workers = [memory(child.pid) for child in psutil.Process().children()]
        return {"seconds": seconds, "rank": memory(), "workers": workers}


def order_figures(config: Config, index: Index, repeats: int) -> Figures:
    """Time of a micro-batch's draws, and the mean number of samples of a window that lie side by side."""
    source = SampleSource(config, index, 0, 1)
    order = SampleOrder(len(index), config.seed, config.data.shuffle_window)
    draws_ms, stretches = [], []
    for repeat in range(repeats):
        start = time.perf_counter()
        source.passed_over(repeat, 0, 1)
        draws_ms.append(1000 * (time.perf_counter() - start))
        first = repeat * WINDOW % len(index)
        indices = np.sort(order.epoch_places(0, np.arange(first, min(first + WINDOW, len(index)))))
        stretches.append(len(indices) / (1 + np.count_nonzero(np.diff(indices) > 1)))
    return {"draws_ms": summary(draws_ms), "samples_side_by_side": summary(stretches)}


def measure_index(arguments: argparse.Namespace) -> Figures:
    """Figures of an index of --images, beside those of a small one."""
    config, found = settings(arguments, "data.crop=random", "data.color_jitter=0"), Figures()
    with tempfile.TemporaryDirectory() as scratch:
        few, many = Path(scratch) / "few", Path(scratch) / "many"
        write(few, FEW)
        found["before"] = memory()

        @contextlib.contextmanager
        def part(name: str) -> Iterator[None]:
            start = time.perf_counter()
            yield
            found[name] = {"seconds": time.perf_counter() - start} | memory()

        # The index alone.
        with part("write"):
            write(many, arguments.images)
        with part("open"):
            index = open_index(str(many), many)
        some = np.random.default_rng(0).integers(0, len(index), LOOKUPS).tolist()
        with part("look_up_10000"):
            for i in some:
                _ = index.path(i), index.label(i)

        # The listing of a data set that has no index.
        (listed := Path(scratch) / "listed").mkdir()
        found["listing_us"] = listing_figures(listed, max(arguments.images // 1000, 100), LISTINGS)

        # The loader's start and its order.
        small = open_index(str(few), few)
        first_batch(config, small, 0)  # DALI's own memory, and the page cache
        found["first_batch_of_few"] = first_batch(config, small, 0)
        found["first_batch"] = {step: first_batch(config, index, step) for step in (0, LATE)}
        for window in (0, WINDOW):
            data = dataclasses.replace(config.data, shuffle_window=window)
            windowed = dataclasses.replace(config, data=data)
            found[f"order_window_{window}"] = order_figures(windowed, index, arguments.repeats)
    return circumstances(config, arguments) | {"images": arguments.images} | found
