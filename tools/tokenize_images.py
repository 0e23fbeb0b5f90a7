"""Write the token ids of a whole data set, once, so that training reads them instead of running a teacher.

    deepspeed tools/tokenize_images.py --config mapet_ds/recipes/mapet_vitb16.yaml
        data.train=/data/imagenet/train tokenizer.path=/data/codebook.safetensors tokenizer.ids=/data/ids

torchrun and plain python start it too. All ranks compute ids, the first one writes them. The same command goes on with a pass
that was cut off, at any number of ranks. --check N computes the ids of N images anew and says how many differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mapet_ds.config.recipe import load_config
from mapet_ds.config.rules import check_inputs
from mapet_ds.config.sections import Config
from mapet_ds.data.stored_ids import NO_ID, IdsWriter, StoredIds, check_storable, settings_of
from mapet_ds.errors import ConfigError
from mapet_ds.launchers import ancestors, check_hostfile
from mapet_ds.training.command_line import check_tokenizer_file, refuse

if TYPE_CHECKING:
    from mapet_ds.data.index import Index
    from mapet_ds.launch import Ranks
    from mapet_ds.targets.tokenizer import Tokenizer

NUMERIC = ("teacher.precision",)
"""Settings that --check lets differ: what they do to the ids is what it measures."""


def parse(argv: list[str]) -> tuple[Config, int]:
    """The settings and N of --check, 0 without."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="a recipe, e.g. mapet_ds/recipes/mapet_vitb16.yaml"
    )
    parser.add_argument(
        "--check",
        type=int,
        default=0,
        metavar="N",
        help="write nothing; compare N images of a finished folder",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=value", help="settings that replace the recipe's"
    )
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        check_hostfile(ancestors())
        check_inputs(config)
        if not config.tokenizer.ids:
            raise ConfigError("tokenizer.ids is empty: name the folder to write, tokenizer.ids=/data/ids.")
        check_storable(config)
        check_tokenizer_file(config.tokenizer)
        folder = Path(config.tokenizer.ids)
        if arguments.check < 0:
            raise ConfigError(f"--check {arguments.check}: a number of images is needed.")
        if arguments.check or (folder / "ids.json").exists():
            StoredIds(folder).check(config, NUMERIC if arguments.check else ())
        elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ConfigError(
                f"tokenizer.ids = {folder} is something else, and not empty: name another folder."
            )
        else:
            IdsWriter.make_folder(folder)
        return config, arguments.check
    except ConfigError as error:
        refuse(parser, error)


class Rows(NamedTuple):
    """The images and ids of one micro-batch of all ranks, in the order of the pass."""

    first: int
    """Place of the first one in the pass."""
    index: NDArray[np.int64]
    ids: NDArray[np.uint16]
    unreadable: dict[int, str]


def tokenize(
    config: Config, index: Index, tokenizer: Tokenizer, ranks: Ranks, first: int, last: int, in_order: bool
) -> Iterator[Rows]:
    """The ids of places `first` .. `last` - 1 of the index's order, or of the run's; on rank 0: elsewhere it yields nothing.

    Whole micro-batches, from the one on that `first` lies in: which images share one does not depend on the ranks. Every rank
    must go through all of it; the host waits for the GPU.
    """
    import torch.distributed as dist
    from tqdm import tqdm

    from mapet_ds.data.loader import Loader

    per_step = config.train.micro_batch_size * ranks.world_size
    train = dataclasses.replace(config.train, global_batch_size=per_step)
    loader = Loader(
        dataclasses.replace(config, train=train), index, student=False, teacher=tokenizer.view, rank=ranks.rank,
        world_size=ranks.world_size, local_rank=ranks.local_rank, first_step=first // per_step, in_order=in_order,
    )  # fmt: skip
    silent = ranks.rank > 0 or not config.log.progress
    for step in tqdm(range(first // per_step, -(-last // per_step)), "ids", disable=silent, unit="batch"):
        batch = next(loader)
        ids = tokenizer(batch.teacher_images.to(ranks.device)).cpu().numpy()
        if (
            ids.shape[1] != config.num_patches
            or not 0 <= ids.min() <= ids.max() < config.tokenizer.vocab_size
        ):
            raise ConfigError(
                f"The tokenizer gives {ids.shape[1]} ids of {ids.min()} .. {ids.max()} for an image; {config.num_patches} of "
                f"0 .. {config.tokenizer.vocab_size - 1} are wanted."
            )
        pieces: Any = [None] * ranks.world_size if ranks.rank == 0 else None
        dist.gather_object(
            (batch.index.numpy(), ids.astype("<u2"), dict(loader.new_bad())), pieces, group=ranks.control
        )
        if pieces:
            indices, rows, found = zip(*pieces, strict=True)
            unreadable = {i: reason for bad in found for i, reason in bad.items()}
            yield Rows(step * per_step, np.concatenate(indices), np.concatenate(rows), unreadable)
    loader.close()


def write(config: Config, ranks: Ranks) -> None:
    """Write the folder tokenizer.ids. Every rank must call it.

    Raises:
        ConfigError, DataError: what the user can correct.
    """
    import torch.distributed as dist

    from mapet_ds.data.index import open_index
    from mapet_ds.data.samples import allowed_bad, too_many_bad
    from mapet_ds.errors import DataError
    from mapet_ds.targets.tokenizer import build_tokenizer

    folder = Path(config.tokenizer.ids)
    if (folder / "ids.json").exists():
        index = ranks.first_then_all(lambda: open_index(config.data.train, folder / "index"))
        StoredIds(folder).check_data(config.data.train, index.fingerprint)
        if ranks.rank == 0:
            print(f"Nothing is left to do: {folder} is whole.")
        return
    index = ranks.first_then_all(
        lambda: open_index(config.data.train, IdsWriter.make_folder(folder) / "index")
    )
    tokenizer = build_tokenizer(config, ranks.device)
    about = {
        "settings": settings_of(config),
        "identity": tokenizer.identity,
        "fingerprint": index.fingerprint,
    }
    writer = IdsWriter(folder, about, len(index), config.num_patches) if ranks.rank == 0 else None
    place = [writer.done if writer else 0]
    dist.broadcast_object_list(place, src=0, group=ranks.control)
    began, start = place[0], time.monotonic()
    if writer and began:
        print(f"Going on with {writer.partial} at image {began} of {len(index)}.", flush=True)
    for rows in tokenize(config, index, tokenizer, ranks, began, len(index), in_order=True):
        # A row is an image's from its own place: one that stands in for an unreadable image comes again, or was there.
        rows.ids[rows.index != rows.first + np.arange(len(rows.index))] = NO_ID
        unreadable = {i: f"{index.path(i)}: {reason}" for i, reason in rows.unreadable.items()}
        try:
            writer.add(rows.first, rows.ids, unreadable)
        except OSError as error:
            raise DataError(
                f"{writer.path} can't be written: {error}. {writer.done} images are done; the same command goes on from there."
            ) from error
        if len(writer.unreadable) > allowed_bad(config, index):
            raise too_many_bad(config, index, [int(i) for i in writer.unreadable])
    if writer:
        writer.finish()
        rate = (len(index) - began) / (time.monotonic() - start)
        print(
            f"{folder}: {config.num_patches} ids each of {len(index)} images, {rate:.1f} images/s\n"
            f"{len(writer.unreadable)} images are unreadable and have no ids (ids.json lists them)"
        )


def compare(config: Config, ranks: Ranks, number: int) -> None:
    """Print how many ids of the run's first `number` images, computed now, differ from the stored ones. Every rank must call it."""
    from mapet_ds.data.index import open_index
    from mapet_ds.targets.tokenizer import build_tokenizer

    stored = StoredIds(config.tokenizer.ids)
    index = ranks.first_then_all(lambda: open_index(config.data.train, stored.folder / "index"))
    stored.check_data(config.data.train, index.fingerprint)
    tokenizer = build_tokenizer(config, ranks.device)
    number, images, ids, differing = min(number, len(index)), 0, 0, 0
    for rows in tokenize(config, index, tokenizer, ranks, 0, number, in_order=False):
        changed = rows.ids[: number - rows.first] != stored.rows[rows.index[: number - rows.first]]
        images, ids, differing = (
            images + int(changed.any(axis=1).sum()),
            ids + changed.size,
            differing + int(changed.sum()),
        )
    if ranks.rank == 0:
        print(
            f"{differing} of {ids} ids differ ({100 * differing / ids:.3g} %), in {images} of {number} images."
        )


def main() -> int:
    config, number = parse(sys.argv[1:])
    from mapet_ds.errors import DataError
    from mapet_ds.launch import init_distributed

    try:
        ranks = init_distributed()
        if number:
            compare(config, ranks, number)
        else:
            write(config, ranks)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
