"""What a file or a member of a shard is, by its name and, where that says nothing, by its first bytes."""

from __future__ import annotations

import os
import re
from typing import Any

from mapet_ds.data.formats import content

SUFFIXES = set(b"jpg jpeg png webp bmp tif tiff gif".split())
"""Endings of the files that are samples unseen. GIF is among them so that it is reported as unreadable."""
PARTIAL = set(
    b"part partial tmp temp crdownload download opdownload aria2 filepart incomplete swp bak lock".split()
)
"""Endings of unfinished downloads, and of copies that a program makes while it works."""
ARCHIVES = set(b"tgz tbz tbz2 txz tzst gz bz2 xz zst lz4 zip 7z rar".split())
OTHERS = set(
    b"cls txt json jsonl xml csv tsv yaml yml html htm md log caption label labels index idx key url id list "
    b"lst md5 sha256 npy npz pt pth pkl pickle mat h5 hdf5 parquet arrow bin safetensors db sqlite mdb "
    b"tfrecord rec py pyc ipynb sh pdf doc docx mp4 avi mov mkv webm mp3 wav flac psd svg eps "
    b"cr2 cr3 nef nrw arw sr2 srf dng orf rw2 pef srw 3fr erf kdc dcr iiq mos raf".split()
)
"""Endings of what is never opened to see whether it is an image; the last line are the cameras' raw files."""
KEPT: dict[bytes, str] = {
    b"thumbs.db": "system files", b"desktop.ini": "system files", b"icon\r": "system files",
    b".ds_store": "system files", b"__macosx": "system folders", b"@eadir": "system folders",
    b"lost+found": "system folders", b"$recycle.bin": "system folders", b"#recycle": "system folders",
    b"system volume information": "system folders",
}  # fmt: skip
"""What a system keeps for itself: name in small letters -> kind."""
COMPANIONS = set(
    b"seg segm segmentation mask masks thumb thumbnail preview depth normal normals semantic instance "
    b"panoptic annotation ann gt edges alpha matte trimap overlay heatmap label labels".split()
)
"""Words between two dots that name a picture about a picture: a.seg.png beside a.jpg."""
PREVIEW = re.compile(rb"(preview|thumb|sample|example|grid|montage|collage|banner|logo|cover)s?\b.*", re.I)
BEGINNING = 32
"""Bytes from which `content` knows an image."""


def suffix(name: bytes) -> bytes:
    """The ending of a name after its last dot, in small letters; the whole name where there is none."""
    return name.rpartition(b".")[2].lower()


def text(name: bytes) -> str:
    """A name for the index, whatever the locale: UTF-8, and other bytes as surrogates."""
    return name.decode("utf-8", "surrogateescape")


def hidden(name: bytes) -> str | None:
    """Why a name is passed over wherever it stands: what a system or a program keeps for itself. Or None."""
    if kind := KEPT.get(name.lower()):
        return kind
    if not name.startswith(b"."):
        return None
    if name.startswith(b"._"):
        return "macOS's ._ files"
    return "system folders" if name.startswith(b".Trash") else "hidden files and folders"


def by_name(name: bytes) -> str | None:
    """What a file is by its name: "image", "shard", or the kind as which it is passed over.

    None where only its bytes can say it.
    """
    _, dot, ending = name.rpartition(b".")
    ending = ending.lower() if dot else b""
    if ending in SUFFIXES:
        return "image"
    if ending in PARTIAL or name.endswith(b"~"):
        return "partial downloads and backups"
    if ending == b"tar":
        return "shard"
    if ending in ARCHIVES:
        return "archives"
    return f".{text(ending)}" if ending in OTHERS else None


def by_content(name: bytes, beginning: bytes) -> str:
    """What a file is by its first bytes: "image", or the kind as which it is passed over."""
    kind = content(beginning)
    if kind in ("JPEG", "PNG", "WebP", "BMP", "TIFF"):
        return "image"
    if kind:
        return f"{kind}, which is not decoded"
    ending = suffix(name)
    return f".{text(ending)}" if b"." in name and ending.isalnum() and len(ending) < 9 else "other files"


def looked_at(path: bytes) -> str:
    """`by_content` of a file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe must not hold up the run
        try:
            return by_content(os.path.basename(path), os.pread(descriptor, BEGINNING, 0))
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"unreadable ({error.strerror})"


EXAMPLES = 3


class Findings:
    """What a listing passed over, and what it took and must say: kind -> count and the first examples."""

    def __init__(self) -> None:
        self.passed_over: dict[str, list[Any]] = {}
        self.noted: dict[str, list[Any]] = {}

    def pass_over(self, kind: str, example: bytes) -> None:
        _count(self.passed_over, kind, text(example), 1)

    def note(self, kind: str, example: str, count: int = 1) -> None:
        _count(self.noted, kind, example, count)


def _count(kinds: dict[str, list[Any]], kind: str, example: str, count: int) -> None:
    found = kinds.setdefault(kind, [0])
    found[0] += count
    if len(found) <= EXAMPLES:
        found.append(example)


def summary(kinds: dict[str, list[Any]], examples: int = 1) -> str:
    """Kinds with their counts and first examples on one line, the most frequent first."""
    parts = []
    for kind, (count, *found) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        parts.append(f"{count:,} {kind} (e.g. {', '.join(map(json_name, found[:examples]))})")
    return ", ".join(parts)


def json_name(name: str) -> str:
    """A name on one line that any terminal can show."""
    return name.encode("unicode_escape" if not name.isprintable() else "utf-8", "backslashreplace").decode()
