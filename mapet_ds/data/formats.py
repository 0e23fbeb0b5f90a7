"""The one rule, on every device, for whether bytes are an image that can be decoded, and of which size.

It looks at the structure only. The loader finds the images that pass it and still can't be decoded: there
DALI's CPU decoder is the judge.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

from PIL import ExifTags, Image, TiffImagePlugin

MAX_PIXELS = 200_000_000
SIDEWAYS = (5, 6, 7, 8)
"""EXIF's orientations whose width is that of the upright image's height."""
RATIONALS = {0x11A: 1, 0x11B: 1, 0x13E: 2, 0x13F: 6, 0x211: 3, 0x214: 6}
"""TIFF's tags that DALI takes for an offset of so many fractions, whatever their type says."""
TEXTS = {0x10E, 0x10F, 0x110, 0x131, 0x132, 0x8298}
JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
TIFF_MODES = {"RGB", "RGBA", "L", "P", "CMYK", "YCbCr", "I;16", "I;16B"}
TIFF_STRIPS_OR_TILES = (
    (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS),
    (TiffImagePlugin.STRIPBYTECOUNTS, TiffImagePlugin.TILEBYTECOUNTS),
)


class BadImage(Exception):
    """Raised for one unreadable image, with the reason. The image is skipped, counted and listed."""


def inspect(data: bytes, upright: bool = False) -> tuple[int, int]:
    """Reads (width, height) in pixels from the structure of an encoded image. No pixel is decoded.

    Takes JPEG (8 bits, Huffman or arithmetic, baseline or progressive), PNG, WebP, BMP and TIFF, as far as
    both DALI and Pillow decode them to the same RGB. The data must reach to the end marker, and PNG's
    checksums must be right.

    upright: whether the image is turned as EXIF's orientation says; False: its pixels stay as stored.

    Raises:
        BadImage: the image is damaged, cut off, of another kind, or has more than MAX_PIXELS.
    """
    parsers = [parse for magic, parse in PARSERS.items() if data.startswith(magic)]
    if not parsers:
        start = content(data) or f"{len(data)} bytes that begin with {data[:8]!r}"
        raise BadImage(f"neither JPEG, PNG, WebP, BMP nor TIFF: {start}")
    try:
        width, height = parsers[0](data)
    except (struct.error, IndexError) as error:
        raise BadImage("cut off") from error
    if width < 1 or height < 1:
        raise BadImage(f"{width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, more than the {MAX_PIXELS} that are decoded")
    return (height, width) if upright and exif_orientation(data) in SIDEWAYS else (width, height)


def exif_orientation(data: bytes) -> int:
    """EXIF's orientation of an image whose structure is whole: 1 to 8, and 1 where it says nothing valid.

    DALI is given the same (orientation.py). Neither looks into XMP.

    Raises:
        BadImage: Pillow opens no image of so many pixels.
    """
    tags: Any = Image.Exif()
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            if b"eXIf" in data:  # a PNG's may follow its pixels
                image.load()
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                tags = image.tag_v2
            else:
                tags.load(image.info.get("exif"))
            orientation = tags.get(ExifTags.Base.Orientation)
    except Image.DecompressionBombError as error:
        raise BadImage(f"its EXIF can't be read: {error}") from error
    except (OSError, SyntaxError, ValueError, struct.error):
        return 1
    return orientation if orientation in range(1, 9) else 1


def content(beginning: bytes) -> str | None:
    """Names the format of an image from its first 32 bytes; None for what is no image.

    A BMP must have a header of a known length, because two letters alone begin many a text.
    """
    if beginning.startswith(b"BM"):
        known = beginning[6:10] == bytes(4) and beginning[14:18] in BMP_HEADERS
        return "BMP" if known else None
    if beginning[4:8] == b"ftyp":
        return ISO_BRANDS.get(beginning[8:12])
    if beginning.startswith(b"RIFF"):
        return "WebP" if beginning[8:12] == b"WEBP" else None
    return next((name for magic, name in MAGIC.items() if beginning.startswith(magic)), None)


def smallest_jpeg() -> bytes:
    """Encodes a black JPEG of one pixel."""
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "JPEG")
    return stream.getvalue()


def _inspect_jpeg(data: bytes) -> tuple[int, int]:
    size, at = None, 2
    while True:
        if data[at] != 0xFF:
            raise BadImage("JPEG segments out of step")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xDA:
            break
        if marker == 0xD9:
            raise BadImage("JPEG without a scan")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width = struct.unpack_from(">BHH", data, at + 4)
            if marker not in JPEG_FRAMES or bits != 8:
                raise BadImage(f"JPEG of a kind that is not decoded (SOF{marker - 0xC0}, {bits} bits)")
            size = width, height
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    if size is None:
        raise BadImage("JPEG scan before its frame header")
    # Scans escape 0xFF, so the marker is none of their bytes; a thumbnail's end stands before them.
    if data.rfind(b"\xff\xd9", at) < 0:
        raise BadImage("JPEG cut off: no end marker after its scans")
    return size


def _inspect_png(data: bytes) -> tuple[int, int]:
    at, kinds = 8, set()
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if zlib.crc32(memoryview(data)[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise BadImage(f"PNG checksum of {kind!r} is wrong")
        kinds.add(kind)
        if kind == b"IEND":
            break
        at = end + 4
    if data[12:16] != b"IHDR" or b"IDAT" not in kinds:
        raise BadImage("PNG without header or pixels")
    return struct.unpack_from(">II", data, 16)


def _inspect_webp(data: bytes) -> tuple[int, int]:
    size, form, kind = struct.unpack_from("<4xI4s4s", data)
    if form != b"WEBP":
        raise BadImage(f"RIFF of form {form!r}, not WebP")
    if len(data) < size + 8:
        raise BadImage(f"WebP cut off: {len(data)} of {size + 8} bytes")
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _inspect_bmp(data: bytes) -> tuple[int, int]:
    start, header, width, height, _, bits, packing = struct.unpack_from("<IIiiHHI", data, 10)
    if header < 40 or packing not in (0, 3):
        raise BadImage(f"BMP of a kind that is not decoded (header {header}, packing {packing})")
    if len(data) < start + (width * bits + 31) // 32 * 4 * abs(height):
        raise BadImage("BMP cut off")
    return width, abs(height)


def _inspect_tiff(data: bytes) -> tuple[int, int]:
    _check_tags(data)
    try:
        file = io.BytesIO(data)
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=("TIFF",)) as image:
            assert isinstance(image, TiffImagePlugin.TiffImageFile)
            if image.mode not in TIFF_MODES:
                raise BadImage(f"TIFF of a kind that is not decoded ({image.mode})")
            tags = image.tag_v2
            starts, lengths = (tags.get(a) or tags[b] for a, b in TIFF_STRIPS_OR_TILES)
            if max(start + length for start, length in zip(starts, lengths, strict=True)) > len(data):
                raise BadImage("TIFF cut off")
            return tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, Image.DecompressionBombError) as error:
        raise BadImage(f"TIFF header: {error}") from error


def _check_tags(data: bytes) -> None:
    """Refuses a TIFF whose tags repeat or lie outside it: DALI 2.4.0 would end the process."""
    order = "<" if data.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        tags = [struct.unpack_from(f"{order}HHII", data, start + 2 + 12 * i) for i in range(count)]
    except struct.error as error:
        raise BadImage("TIFF cut off") from error
    if len({tag for tag, *_ in tags}) < count:
        raise BadImage("TIFF with a tag that is there twice")
    for tag, _, length, offset in tags:
        size = 8 * RATIONALS[tag] if tag in RATIONALS else length if tag in TEXTS and length > 4 else 0
        if size and offset + size > len(data):
            raise BadImage(f"TIFF's tag {tag} lies outside it")


PARSERS = {
    b"\xff\xd8": _inspect_jpeg, b"\x89PNG\r\n\x1a\n": _inspect_png, b"RIFF": _inspect_webp,
    b"BM": _inspect_bmp, b"II*\0": _inspect_tiff, b"MM\0*": _inspect_tiff,
}  # fmt: skip
MAGIC = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"GIF8": "GIF",
    b"II+\0": "BigTIFF", b"MM\0+": "BigTIFF", b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL",
    b"8BPS": "Photoshop", b"DDS ": "DDS", b"v/1\x01": "OpenEXR", b"qoif": "QOI",
}  # fmt: skip
ISO_BRANDS = {
    b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"heim": "HEIC",
    b"heis": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC",
}  # fmt: skip
BMP_HEADERS = {struct.pack("<I", length) for length in (12, 40, 52, 56, 64, 108, 124)}
