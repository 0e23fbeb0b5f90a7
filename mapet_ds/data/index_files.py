"""The files of an index: samples of a fixed size, their paths end to end, and what was said of them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mapet_ds.data.kinds import SUFFIXES, summary, text
from mapet_ds.data.listing import Listing, Member, described
from mapet_ds.errors import DataError
from mapet_ds.files import whole_folder

SAMPLE = np.dtype([("file", "<u4"), ("offset", "<u8"), ("length", "<u8"), ("label", "<i4")])
STATE = "state.json"
"""The file of what would show that the data set has changed since it was listed."""


def write_index(
    folder: Path, root: str, members: Iterable[Member], shards: list[bytes], classes: list[str],
    listing: Listing | None = None,
) -> None:  # fmt: skip
    """Writes the index of these samples, which lie below `root`, into `folder`, whole or not at all.

    No sample is held in memory. `shards` and `classes` are read after the last sample, because `members` may
    fill them. Without classes, their names are those that the listing found, or their numbers.

    Raises:
        DataError: there is no sample.
    """
    digest = hashlib.sha256()
    kinds = {"samples": SAMPLE, "path_ends": np.dtype("<u8")}
    with whole_folder(folder) as written:
        # The samples go to plain files as they come, of unknown number.
        raw = {name: written / f"{name}.raw" for name in kinds}
        end, last_label, unlabelled, unlabelled_path = 0, -1, 0, b""
        with (
            open(written / "paths.bin", "wb") as paths,
            raw["samples"].open("wb") as samples,
            raw["path_ends"].open("wb") as ends,
        ):
            for member in members:
                end += paths.write(member.path)
                ends.write(struct.pack("<Q", end))
                samples.write(struct.pack("<IQQi", *member[1:]))
                digest.update(member.path + b"\0" + struct.pack("<Q", member.length))
                last_label = max(last_label, member.label)
                if member.label == -1:
                    unlabelled, unlabelled_path = unlabelled + 1, unlabelled_path or member.path
        if not end:
            raise DataError(_nothing(root, listing))

        # NumPy's headers hold the number.
        numbers = list(map(str, range(last_label + 1))) if shards else []
        if listing:
            numbers, places = listing.classes.settled()
            _name_labels(np.memmap(raw["samples"], SAMPLE, "r+"), np.array(places, np.int32))
            if unlabelled and numbers:
                listing.findings.note("images without a label", text(unlabelled_path), unlabelled)
            if listing.classes.names and listing.classes.last >= 0:
                kind = "classes by name beside classes by number"
                listing.findings.note(kind, f"{numbers[0]}, {numbers[-1]}", len(listing.classes.names))
        for name, path in raw.items():
            np.save(written / f"{name}.npy", np.memmap(path, kinds[name], "r"))
            path.unlink()
        description = {
            "root": "." if folder.parent == Path(root) else root,
            "fingerprint": digest.hexdigest(),
            "classes": classes or numbers,
            "shards": [text(shard) for shard in shards],
        }
        if listing:
            description |= described(listing)
            (written / STATE).write_text(json.dumps(listing.state))
        (written / "index.json").write_text(json.dumps(description, indent=1))


def write_part(whole: Path, places: NDArray[np.int64], folder: Path) -> None:
    """Writes the index of these samples of the index in `whole` into `folder`, whole or not at all.

    Classes keep their numbers. The fingerprint is that of these samples.
    """
    samples, ends = (np.load(whole / f"{name}.npy", mmap_mode="r") for name in ("samples", "path_ends"))
    paths, taken = np.memmap(whole / "paths.bin", mode="r"), samples[places]
    starts = [int(ends[i - 1]) if i else 0 for i in places.tolist()]
    names = [paths[start : int(end)].tobytes() for start, end in zip(starts, ends[places])]
    digest = hashlib.sha256()
    for name, length in zip(names, taken["length"].tolist()):
        digest.update(name + b"\0" + struct.pack("<Q", length))
    description = json.loads((whole / "index.json").read_text())
    with whole_folder(folder) as written:
        np.save(written / "samples.npy", taken)
        np.save(written / "path_ends.npy", np.cumsum(list(map(len, names))).astype("<u8"))
        (written / "paths.bin").write_bytes(b"".join(names))
        part = json.dumps(description | {"fingerprint": digest.hexdigest()}, indent=1)
        (written / "index.json").write_text(part)


def _name_labels(samples: NDArray[np.void], places: NDArray[np.int32]) -> None:
    """Replaces the numbers of names as they came by the places of the names in their order."""
    for start in range(0, len(samples) if len(places) else 0, 1 << 20):
        labels = samples["label"][start : start + (1 << 20)]
        named = labels < -1
        labels[named] = places[-2 - labels[named]]


def _nothing(root: str, listing: Listing | None) -> str:
    """The sentence about a place without samples."""
    endings = ", ".join("." + suffix.decode() for suffix in sorted(SUFFIXES))
    passed = listing.findings.passed_over if listing else {}
    named = ", ".join(path for path, _ in listing.sources[:3]) if listing else root
    if ".parquet" in passed:
        return (
            f"{named} holds no image, but {passed['.parquet'][0]} Parquet files, where no image can be read "
            f"without its neighbours. tools/make_shards.py {named} SHARDS packs them; then train on SHARDS."
        )
    return (
        f"{named} holds no image: looked in it and below for {endings}, for other files whose first "
        f"bytes are an image's, and for .tar shards.{f' Passed over: {summary(passed)}.' if passed else ''}"
    )
