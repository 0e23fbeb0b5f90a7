"""EXIF as DALI may see it: the orientation alone, in a block that is whole.

DALI 2.4.0 follows the offsets in EXIF without a look at where they lead: some damaged ones end the process
(PNG, TIFF), and others make it overlook an orientation that Pillow reads (JPEG). So both go by what Pillow
reads.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator

from mapet_ds.data.formats import exif_orientation


def orientation_alone(data: bytes) -> bytes:
    """The same image, of whose EXIF only the orientation is left. `data` has passed `inspect`.

    A TIFF stays as it is, because its tags are what its pixels are found by; `inspect` looks at them.
    """
    if data.startswith(b"RIFF"):  # which tells its length; what follows is none of it
        data = data[: 8 + int.from_bytes(data[4:8], "little")]
    find, wrap = next(both for magic, both in CONTAINERS.items() if data.startswith(magic))
    if not (found := list(find(data))):
        return data
    tag = struct.pack(">HHIHH", 0x112, 3, 1, exif_orientation(data), 0)
    block = wrap(b"MM\0*" + struct.pack(">IH", 8, 1) + tag + bytes(4))
    ends = itertools.pairwise([(0, 0), *found, (len(data), len(data))])
    rest = [data[end:start] for (_, end), (start, _) in ends]
    whole = rest[0] + block + b"".join(rest[1:])
    if data.startswith(b"RIFF"):
        whole = whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:]
    return whole


def _in_jpeg(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of each segment of EXIF before the first scan."""
    at = 2
    while (marker := data[at + 1]) != 0xDA:
        end = at + 1 if marker == 0xFF else at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker == 0xE1 and data[at + 4 : at + 8] == b"Exif":
            yield at, end
        at = end


def _in_png(data: bytes) -> Iterator[tuple[int, int]]:
    at, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"eXIf":
            yield at, at + 12 + length
        at += 12 + length


def _in_webp(data: bytes) -> Iterator[tuple[int, int]]:
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        end = min(at + 8 + length + length % 2, len(data))
        if kind == b"EXIF":
            yield at, end
        at = end


def _for_jpeg(block: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block


def _for_png(block: bytes) -> bytes:
    chunk = b"eXIf" + block
    return struct.pack(">I", len(block)) + chunk + struct.pack(">I", zlib.crc32(chunk))


def _for_webp(block: bytes) -> bytes:
    return b"EXIF" + struct.pack("<I", len(block)) + block


CONTAINERS = {
    b"\xff\xd8": (_in_jpeg, _for_jpeg),
    b"\x89PNG": (_in_png, _for_png),
    b"RIFF": (_in_webp, _for_webp),
    b"": (lambda _: iter(()), bytes),
}
"""First bytes of a format -> what finds EXIF in it, and what wraps a block of EXIF for it."""
