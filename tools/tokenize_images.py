"""Write the token ids of a whole data set, once, so that training reads them instead of running a teacher.

    deepspeed tools/tokenize_images.py --config mapet_ds/recipes/mapet_vitb16.yaml
        data.train=/data/imagenet/train tokenizer.path=/data/codebook.safetensors tokenizer.ids=/data/ids

torchrun and plain python start it too. All ranks compute ids, the first one writes them. The same command
goes on with a pass that was cut off, at any number of ranks. --check N computes the ids of N images anew and
says how many differ.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_inputs
from mapet_ds.config.sections import Config
from mapet_ds.data.stored_ids import NO_ID, IdsWriter, StoredIds, check_storable, settings_of
from mapet_ds.errors import ConfigError, DataError
from mapet_ds.launchers import ancestors, check_hostfile
from mapet_ds.terminal import answer, recipe_parser, refuse
from mapet_ds.training.command_line import check_tokenizer_file

if TYPE_CHECKING:
    from torch import Tensor

    from mapet_ds.data.index import Index
    from mapet_ds.launch import Ranks
    from mapet_ds.targets.tokenizer import Tokenizer

NUMERIC = ("teacher.precision",)
"""Settings that --check lets differ: what they do to the ids is what it measures."""


def check(config: Config, images: int) -> None:
    """Refuses settings whose ids can't be written, or compared where `images` is not 0.

    Raises:
        ConfigError: naming what to change.
    """
    check_hostfile(ancestors())
    check_inputs(config)
    if not config.tokenizer.ids:
        raise ConfigError("tokenizer.ids is empty: name the folder to write, tokenizer.ids=/data/ids.")
    check_storable(config)
    check_tokenizer_file(config.tokenizer)
    folder = Path(config.tokenizer.ids)
    if images < 0:
        raise ConfigError(f"--check {images}: a number of images is needed.")
    if images or (folder / "ids.json").exists():
        StoredIds(folder).check(config, NUMERIC if images else ())
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"tokenizer.ids = {folder} is something else, and not empty: name another folder.")
    else:
        IdsWriter.make_folder(folder)


def parse(argv: list[str]) -> tuple[Config, int]:
    """The checked settings, and N of --check or 0; a mistake ends the program before torch is imported."""
    parser = recipe_parser(__doc__)
    compared = "write nothing; compare N images of a finished folder"
    parser.add_argument("--check", type=int, default=0, metavar="N", help=compared)
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        check(config, arguments.check)
    except ConfigError as error:
        refuse(parser, error)
    return config, arguments.check


class Rows(NamedTuple):
    """The images and ids of one micro-batch of all ranks, in the order of the pass."""

    first: int
    """Place of the first one in the pass."""
    index: NDArray[np.int64]
    ids: NDArray[np.uint16]
    unreadable: dict[int, str]


def ids_of(images: Tensor, config: Config, tokenizer: Tokenizer) -> NDArray[np.uint16]:
    """[B, L] ids of images [B, 3, T, T]. The host waits for the GPU.

    Raises:
        ConfigError: as many ids, or such ids, as the settings don't allow.
    """
    ids = tokenizer(images).cpu().numpy()
    number, low, high = ids.shape[1], ids.min(), ids.max()
    if number != config.num_patches or not 0 <= low <= high < config.tokenizer.vocab_size:
        wanted = f"{config.num_patches} of 0 .. {config.tokenizer.vocab_size - 1} are wanted"
        raise ConfigError(f"The tokenizer gives {number} ids of {low} .. {high} for an image; {wanted}.")
    return ids.astype("<u2")


def tokenize(
    config: Config, index: Index, tokenizer: Tokenizer, ranks: Ranks, first: int, last: int, in_order: bool
) -> Iterator[Rows]:
    """Yields on rank 0 the ids of places `first` .. `last` - 1 of the index's order, or of the run's.

    Micro-batches are whole, from the one on that `first` lies in: which images share one does not depend on
    the ranks. Every rank must go through all of it; the others yield nothing. The host waits for the GPU.
    """
    from tqdm import tqdm

    from mapet_ds.data.loader import Loader

    per_step = config.train.micro_batch_size * ranks.world_size
    train = dataclasses.replace(config.train, global_batch_size=per_step)
    loader = Loader(
        dataclasses.replace(config, train=train), index, student=False, teacher=tokenizer.view,
        rank=ranks.rank, world_size=ranks.world_size, local_rank=ranks.local_rank,
        first_step=first // per_step, in_order=in_order,
    )  # fmt: skip
    silent = ranks.rank > 0 or not config.log.progress
    for step in tqdm(range(first // per_step, -(-last // per_step)), "ids", disable=silent, unit="batch"):
        batch = next(loader)
        assert batch.teacher_images is not None
        ids = ids_of(batch.teacher_images.to(ranks.device), config, tokenizer)
        pieces = ranks.gather_on_first((batch.index.numpy(), ids, dict(loader.new_bad())))
        if pieces:
            indices, rows, bad = zip(*pieces, strict=True)
            unreadable = {i: reason for part in bad for i, reason in part.items()}
            yield Rows(step * per_step, np.concatenate(indices), np.concatenate(rows), unreadable)
    loader.close()


def write(config: Config, ranks: Ranks) -> None:
    """Writes the folder tokenizer.ids. Every rank must call it.

    Raises:
        UserError: what the user can correct.
    """
    from mapet_ds.data.index import open_index
    from mapet_ds.data.range_cache import RangeCache
    from mapet_ds.targets.tokenizer import build_tokenizer

    data, folder = config.data.train, Path(config.tokenizer.ids)
    if (folder / "ids.json").exists():
        index = ranks.first_then_all(lambda: open_index(data, folder / "index", ranks.rank == 0))
        StoredIds(folder).check_data(data, index.fingerprint)
        if ranks.rank == 0:
            print(f"Nothing is left to do: {folder} is whole.")
        return
    cache = IdsWriter.make_folder(folder) / "index"
    ranges = RangeCache.of(config.data)
    index = ranks.first_then_all(lambda: open_index(data, cache, ranks.rank == 0, ranges))
    tokenizer = build_tokenizer(config, ranks.device)
    about = {"settings": settings_of(config), "identity": tokenizer.identity}
    about |= {"fingerprint": index.fingerprint}

    # Rank 0 writes, from the image on that an earlier pass came to.
    writer: IdsWriter | None = None

    def open_writer() -> int:
        nonlocal writer
        writer = IdsWriter(folder, about, len(index), config.num_patches)
        return writer.done

    began, start = ranks.from_first(open_writer), time.monotonic()
    if writer and began:
        print(f"Going on with {writer.partial} at image {began} of {len(index)}.", flush=True)
    for rows in tokenize(config, index, tokenizer, ranks, began, len(index), in_order=True):
        assert writer is not None
        add(writer, rows, config, index)
    if writer:
        writer.finish()
        rate = (len(index) - began) / (time.monotonic() - start)
        print(
            f"{folder}: {config.num_patches} ids each of {len(index)} images, {rate:.1f} images/s\n"
            f"{len(writer.unreadable)} images are unreadable and have no ids (ids.json lists them)"
        )


def add(writer: IdsWriter, rows: Rows, config: Config, index: Index) -> None:
    """Writes a micro-batch.

    Raises:
        DataError: the storage fails, or too many images are unreadable.
    """
    from mapet_ds.data.samples import check_bad

    # A row is an image's from its own place: one that stands in for an unreadable image has another place.
    rows.ids[rows.index != rows.first + np.arange(len(rows.index))] = NO_ID
    unreadable = {i: f"{index.path(i)}: {reason}" for i, reason in rows.unreadable.items()}
    try:
        writer.add(rows.first, rows.ids, unreadable)
    except OSError as error:
        done = f"{writer.done} images are done; the same command goes on from there"
        raise DataError(f"{writer.path} can't be written: {error}. {done}.") from error
    check_bad(config, index, [int(i) for i in writer.unreadable])


def compare(config: Config, ranks: Ranks, number: int) -> None:
    """Prints how many ids of the run's first `number` images differ from the stored ones when computed now.

    Every rank must call it.
    """
    from mapet_ds.data.index import open_index
    from mapet_ds.targets.tokenizer import build_tokenizer

    stored = StoredIds(config.tokenizer.ids)
    cache = stored.folder / "index"
    index = ranks.first_then_all(lambda: open_index(config.data.train, cache, ranks.rank == 0))
    stored.check_data(config.data.train, index.fingerprint)
    tokenizer = build_tokenizer(config, ranks.device)
    number, images, ids, differing = min(number, len(index)), 0, 0, 0
    for rows in tokenize(config, index, tokenizer, ranks, 0, number, in_order=False):
        wanted = number - rows.first
        changed = rows.ids[:wanted] != stored.rows[rows.index[:wanted]]
        images += int(changed.any(axis=1).sum())
        ids += changed.size
        differing += int(changed.sum())
    if ranks.rank == 0:
        share = f"{differing} of {ids} ids differ ({100 * differing / ids:.3g} %)"
        print(f"{share}, in {images} of {number} images.")


def tokenize_images(config: Config, number: int) -> None:
    """Writes the ids, or compares those of `number` images where it is not 0. Every rank must call it."""
    from mapet_ds.launch import init_distributed

    ranks = init_distributed()
    if number:
        compare(config, ranks, number)
    else:
        write(config, ranks)


if __name__ == "__main__":
    settings, images = parse(sys.argv[1:])
    sys.exit(answer(lambda: tokenize_images(settings, images)))
