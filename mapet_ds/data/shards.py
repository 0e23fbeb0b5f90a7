"""The samples of a tar shard: where their bytes lie, and their labels, by WebDataset's names.

Members of one sample share a key: their path up to the first dot of the last part. Names with dots of their
own (IMG_2020.01.02.jpg) don't fit it. Then the key reaches to the last dot, where each image has its own
`.cls`, or no label is at stake. What could be read either way is refused.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mapet_ds.data.kinds import BEGINNING, Findings, by_content, by_name, hidden, suffix, text
from mapet_ds.errors import DataError

MAX_LABEL = 1_000_000
TOO_LONG = 4096
"""Bytes of a `.cls` that are read."""
SHORT = 64
"""Bytes of another text beside an image that is looked at for a label, in order to say it."""
NUMBERED = re.compile(rb"\d")
MAIN_WORDS = {b"", b"image", b"img", b"rgb", b"photo", b"input"}
"""Words before the ending that name the picture of a sample among several."""
LABEL_KEYS = ("label", "cls", "class", "class_id", "class_name", "target")
LINKS = 16
"""Links that are followed one after the other."""


class Picture(NamedTuple):
    """An image in a shard."""

    name: bytes
    offset: int
    length: int
    label: int | str | None
    """A number, the name of a class, or None."""


class _Found(NamedTuple):
    """What a pass over a shard's headers gives."""

    images: list[tuple[bytes, int, int]]
    """Name, offset and length."""
    labels: dict[bytes, int | str | None]
    """Name without `.cls` -> label."""
    stems: dict[bytes, str]
    """Names, without their endings, of what lies beside the images -> a label that should be in a `.cls`."""


def parse_label(data: bytes) -> int | str | None:
    """Reads the content of a `.cls`: a whole number, also as JSON or with spaces, or the name of a class.

    None for anything else: a number below 0, above MAX_LABEL or with a fraction, several lines or numbers.
    """
    try:
        content = data.decode("utf-8-sig").strip("\0 \t\r\n")
        if content[:1] in ("{", "[", '"'):
            value = json.loads(content)
            if isinstance(value, dict):
                value = next((value[key] for key in LABEL_KEYS if key in value), None)
            elif isinstance(value, list):
                value = value[0] if len(value) == 1 else None
            content = (
                "" if isinstance(value, bool) or not isinstance(value, int | str) else str(value).strip()
            )
    except (ValueError, RecursionError):
        return None
    whole, _, zeros = content.removeprefix("+").partition(".")
    if whole.isdecimal() and not zeros.strip("0"):
        return int(whole) if len(whole.lstrip("0")) < 8 and int(whole) < MAX_LABEL else None
    try:
        float(content)
        return None
    except ValueError:
        named = content.isprintable() and any(map(str.isalpha, content)) and len(content) < 256
        return content if named else None


def _headers(path: bytes, file: BinaryIO, findings: Findings) -> Iterator[tarfile.TarInfo]:
    """Yields every member of a tar. A tar that does not end as tars end is refused, naming the place.

    Raises:
        DataError: a header is damaged or cut off, or something stands behind the end.
    """
    archive: Any = None  # its `members` and `offset` have no type
    size, name = os.fstat(file.fileno()).st_size, os.fsdecode(path)
    if size == 0:
        raise DataError(f"The shard {name} is empty (0 bytes): fetch it again, or take it away.")
    try:
        archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        at = 0
        while (member := archive.next()) is not None:
            if member.size < 0 or archive.offset <= at:
                raise tarfile.ReadError(f"member of {member.size} bytes")
            at = archive.offset
            _check_records(file, member)
            yield member
            archive.members = []  # tarfile would keep every header
        _check_end(name, file, archive.offset, findings)
    except (tarfile.TarError, OSError, ValueError, LookupError, OverflowError, MemoryError) as error:
        where = f" at byte {archive.offset:,} of {size:,}" if archive and archive.offset else ""
        raise DataError(
            f"The shard {name} can't be read as an uncompressed tar{where}: {error}. Unpack a compressed "
            "one, fetch a damaged one again, or take it away."
        ) from error


def _check_records(file: BinaryIO, member: tarfile.TarInfo) -> None:
    """Refuses damaged records of a PAX header: they have no checksum, and tarfile leaves out the rest."""
    at = member.offset
    while at + tarfile.BLOCKSIZE < member.offset_data:
        header = os.pread(file.fileno(), tarfile.BLOCKSIZE, at)
        if header[156] not in b"xgLK":  # an old sparse member's table
            return
        size = int(header[124:136].strip(b" \0") or b"0", 8)
        records = os.pread(file.fileno(), size, at + tarfile.BLOCKSIZE)
        while header[156] in b"xg" and records:
            length, _, rest = records.partition(b" ")
            if not length.isdigit() or b"=" not in rest or records[int(length) - 1 : int(length)] != b"\n":
                raise tarfile.ReadError(f"a damaged PAX header at byte {at:,}")
            records = records[int(length) :]
        at += tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


def _check_end(name: str, file: BinaryIO, at: int, findings: Findings) -> None:
    """Refuses a tar whose members end at `at` before its bytes do: tarfile takes a bad header for it."""
    file.seek(at)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        findings.note("shards without an end mark, which may have been cut off", name)
    elif len(block) < tarfile.BLOCKSIZE:
        raise DataError(f"The shard {name} is cut off in the header at byte {at:,}: fetch it again.")
    elif any(block):
        raise DataError(
            f"The shard {name} has a damaged header at byte {at:,}: what follows would be lost. Fetch it "
            "again, or save what is whole with `tar --ignore-zeros -xf` and pack that anew."
        )
    while block:
        if any(block):
            behind = file.tell() - len(block)
            raise DataError(
                f"The shard {name} goes on behind its end: zeros at byte {at:,}, more data in the block at "
                f"byte {behind:,}. It is damaged, or two tars one after the other: fetch it again, or unpack "
                "it with `tar --ignore-zeros -xf` and pack that anew."
            )
        block = file.read(1 << 20)


def read_shard(path: bytes, name: bytes, findings: Findings) -> list[Picture]:
    """Lists the images of a shard in the order of its members. Labels may stand before or after them.

    name: the shard's name for what is said about it.

    Raises:
        DataError: the tar is damaged, its names can be read in two ways, or an image is stored sparse.
    """
    try:
        with Path(os.fsdecode(path)).open("rb") as file:
            found = _look(path, name, file, findings)
    except OSError as error:
        raise DataError(f"The shard {os.fsdecode(path)} can't be read: {error.strerror}.") from error
    pictures = list(_settled(os.fsdecode(path), name, found, findings))
    if not pictures:
        findings.note("shards without an image", text(name))
    return pictures


def _look(path: bytes, shard: bytes, file: BinaryIO, findings: Findings) -> _Found:
    """Goes over the headers of a shard once."""
    found, links = _Found([], {}, {}), list[tuple[int, bytes, tarfile.TarInfo]]()
    places: dict[str, tuple[int, int]] = {}
    for member in _headers(path, file, findings):
        name = member.name.encode("utf-8", "surrogateescape")
        kind, place = _hidden(name), (member.offset_data, member.size)
        if member.isdir() or (kind is None and (member.issym() or member.islnk())):
            if not member.isdir():
                links.append((len(found.images), name, member))
            continue
        if kind is None and not member.isreg():
            kind = "members that are no files"
        elif member.isreg():
            places[posixpath.normpath(member.name)] = place
        if kind is None:
            kind = by_name(name) or by_content(name, _beginning(file, place, BEGINNING))
        if kind == "image" and member.issparse():
            raise DataError(
                f"{os.fsdecode(path)}: the member {member.name} is stored sparse. Pack the shard again "
                "without tar's --sparse."
            )
        if kind == "image":
            found.images.append((name, *place))
        elif kind == ".cls":
            _add_label(found, shard, name, _beginning(file, place, TOO_LONG), findings)
        else:
            findings.pass_over(kind, shard + b"/" + name)
            if kind.startswith("."):
                data = _beginning(file, place, SHORT) if member.size < SHORT else b""
                plain = isinstance(parse_label(data), int)
                found.stems[_stem(name)] = f"{text(shard)}/{text(name)}: {text(data)!r}" if plain else ""
    _follow(found, links, places, shard, file, findings)
    return found


def _beginning(file: BinaryIO, place: tuple[int, int], most: int) -> bytes:
    return os.pread(file.fileno(), min(place[1], most), place[0])


def _hidden(name: bytes) -> str | None:
    """Why a member is passed over for any part of its path. Or None."""
    return next(filter(None, (hidden(part) for part in name.split(b"/") if part.strip(b"."))), None)


def _add_label(found: _Found, shard: bytes, name: bytes, data: bytes, findings: Findings) -> None:
    """Notes the label that a `.cls` holds, or that it can't be read."""
    label, where = parse_label(data), f"{text(shard)}/{text(name)}"
    if label is None:
        findings.note("labels that can't be read", f"{where}: {data[:40].decode('utf-8', 'replace')!r}")
    stem = _stem(name)
    if found.labels.get(stem, label) != label:
        raise DataError(f"{where} is there twice, with different labels. Pack the shard again.")
    found.labels[stem] = label


def _follow(
    found: _Found, links: list[tuple[int, bytes, tarfile.TarInfo]], places: dict[str, tuple[int, int]],
    shard: bytes, file: BinaryIO, findings: Findings,
) -> None:  # fmt: skip
    """Adds the links to images and labels of the same shard, each at its place; others are passed over."""
    targets = {posixpath.normpath(member.name): _target(member) for _, _, member in links}
    for place, name, member in reversed(links):
        target = _target(member)
        for _ in range(LINKS):
            target = target if target in places else targets.get(target, target)
        kind = by_name(name) or by_name(target.encode("utf-8", "surrogateescape")) or "other files"
        if kind in ("image", ".cls") and target not in places:
            kind = "links to what is not in their shard"
        if kind == "image":
            found.images.insert(place, (name, *places[target]))
        elif kind == ".cls":
            _add_label(found, shard, name, _beginning(file, places[target], TOO_LONG), findings)
        else:
            findings.pass_over(kind, shard + b"/" + name)


def _target(link: tarfile.TarInfo) -> str:
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))


def _stem(name: bytes) -> bytes:
    """A name without its ending."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + (last.rpartition(b".")[0] or last)


def _key(name: bytes) -> bytes:
    """WebDataset's key: the path of a member up to the first dot of its last part."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.partition(b".")[0]


def _settled(path: str, shard: bytes, found: _Found, findings: Findings) -> Iterator[Picture]:
    """Yields the images with their labels, and passes over pictures that belong to another."""
    groups: dict[bytes, list[bytes]] = {}
    for name, _, _ in found.images:
        groups.setdefault(_key(name), []).append(name)
    labels: dict[bytes, list[bytes]] = {}
    for stem in found.labels:
        labels.setdefault(_key(stem), []).append(stem)
    settled: dict[bytes, dict[bytes, bytes | None]] = {}
    for name, offset, length in found.images:
        key = _key(name)
        if key not in settled:
            settled[key] = _assign(path, groups[key], labels.get(key, []), found, findings)
        if name in settled[key]:
            stem = settled[key][name]
            if stem is None and (elsewhere := found.stems.get(_stem(name))):
                findings.note("labels in other files than .cls, which are not read", elsewhere)
            yield Picture(name, offset, length, None if stem is None else found.labels[stem])
        else:
            word = _stem(name).rpartition(b".")[2] + b"." + suffix(name)
            findings.pass_over(f"pictures beside an image (.{text(word)})", shard + b"/" + name)


def _assign(
    path: str, images: list[bytes], labels: list[bytes], found: _Found, findings: Findings
) -> dict[bytes, bytes | None]:
    """Gives, for each of the images of one key that is a sample, whose `.cls` is its label.

    labels: the names, without `.cls`, of the labels of the same key.
    """
    key, names = _key(images[0]), list(dict.fromkeys(images))
    if len(names) < len(images):
        findings.note("names that stand twice in a shard, each a sample", f"{path}: {text(images[0])}")
    stems = {name: _stem(name) for name in names}
    if len(names) == 1:
        if not labels or stems[names[0]] in labels:
            return {names[0]: stems[names[0]] if labels else None}
        if len(labels) == 1 and not NUMBERED.search(labels[0][len(key) :]):
            return {names[0]: labels[0]}

    # The convention: one picture of the sample, and others about it, each with a word.
    words = {name: stem[len(key) + 1 :] for name, stem in stems.items()}
    main = [name for name in names if words[name].lower() in MAIN_WORDS]
    others = [name for name in names if name not in main]
    about = not any(NUMBERED.search(words[name]) or stems[name] in labels for name in others)
    if len(main) == 1 and others and about:
        return _assign(path, main, labels, found, findings)

    # Names with dots: each has what lies beside it, or all are numbered and none has.
    beside = {*found.labels, *found.stems}
    whole = all(stem in beside for stem in stems.values()) and {*labels} <= {*stems.values()}
    numbered = all(NUMBERED.search(words[name]) for name in names if words[name] or labels)
    if len({*stems.values()}) == len(names) > 1 and (whole or (numbered and labels in ([], [key]))):
        findings.note("names with dots, each whole up to the last one", f"{path}: {text(names[0])}")
        shared = key if labels == [key] else None
        return {name: stem if stem in labels else shared for name, stem in stems.items()}
    shown = ", ".join(map(text, [*names[:3], *(label + b".cls" for label in labels[:2])]))
    raise DataError(
        f"{path}: {shown} share the key '{text(key)}' (up to the first dot): they are one sample, or several "
        "with dots in their names. Give each sample a name of its own without dots, and pictures about it a "
        "word (0.jpg, 0.cls, 0.mask.png); tools/make_shards.py packs the images of an unpacked folder so."
    )
