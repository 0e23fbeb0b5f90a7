"""Small images of every kind for the tests, good and bad, made in memory."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms


def picture(width: int = 160, height: int = 120, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Soft random colours with an edge, so that resizing and chroma matter."""
    noise = np.random.default_rng(seed).random((6, 8, 4)) * 255
    image = Image.fromarray(noise.astype(np.uint8), "RGBA").resize((width, height), Image.Resampling.BICUBIC)
    image.paste((250, 30, 10, 128), (width // 3, height // 4, width // 2, height // 2))
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png16(values: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG; Pillow itself writes none in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def rotated(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def without_adobe(jpeg: bytes) -> bytes:
    """A JPEG without Adobe's marker, so that the values of its CMYK are not inverted."""
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + struct.unpack_from(">H", jpeg, at + 2)[0] :]


def profile() -> bytes:
    """A colour profile that changes every pixel, if it is used."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()


def exif_thumbnail(jpeg: bytes) -> bytes:
    """A JPEG with another whole JPEG, end marker and all, in its APP1 segment."""
    inner = b"Exif\0\0" + encode(picture(40, 30), "JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(inner) + 2) + inner + jpeg[2:]


def good_images() -> dict[str, bytes]:
    """Name to bytes of what must be read as Pillow reads it."""
    colour, grey = picture(), picture(mode="L")
    sixteen = np.asarray(picture(mode="RGBA")).astype(np.uint16) * 251 + 97
    jpeg = encode(colour, "JPEG", quality=90)
    return {
        "jpeg.jpg": jpeg,
        "jpeg444.jpg": encode(colour, "JPEG", quality=95, subsampling=0),
        "progressive.jpg": encode(colour, "JPEG", progressive=True),
        "grey.jpg": encode(grey, "JPEG"),
        "cmyk.jpg": encode(picture(mode="CMYK"), "JPEG"),
        "exif.jpg": encode(colour, "JPEG", exif=rotated()),
        "thumbnail.jpg": exif_thumbnail(jpeg),
        "trailing.jpg": jpeg + b"\xff\xda junk after the end" * 9,
        "one_pixel.jpg": encode(picture(1, 1), "JPEG"),
        "one_row.jpg": encode(picture(300, 1), "JPEG"),
        "colour.png": encode(colour, "PNG"),
        "rgba.png": encode(picture(mode="RGBA"), "PNG"),
        "grey.png": encode(grey, "PNG"),
        "grey_alpha.png": encode(picture(mode="LA"), "PNG"),
        "palette.png": encode(picture(mode="P"), "PNG"),
        "bilevel.png": encode(picture(mode="1"), "PNG"),
        "grey16.png": png16(sixteen[..., 0], 0),
        "colour16.png": png16(sixteen[..., :3], 2),
        "exif.png": encode(colour, "PNG", exif=rotated()),
        "lossy.webp": encode(colour, "WEBP"),
        "lossless.webp": encode(colour, "WEBP", lossless=True),
        "rgba.webp": encode(picture(mode="RGBA"), "WEBP"),
        "exif.webp": encode(colour, "WEBP", exif=rotated()),
        "colour.bmp": encode(colour, "BMP"),
        "grey.bmp": encode(grey, "BMP"),
        "palette.bmp": encode(picture(mode="P"), "BMP"),
        "colour.tif": encode(colour, "TIFF"),
        "lzw.tiff": encode(colour, "TIFF", compression="tiff_lzw"),
        "grey.tif": encode(grey, "TIFF"),
        "grey16.tif": encode(Image.fromarray(sixteen[..., 0]), "TIFF"),
        "grey16_big.tif": encode(Image.fromarray(sixteen[..., 0]).convert("I;16B"), "TIFF"),
        "cmyk.tif": encode(picture(mode="CMYK"), "TIFF"),
        "exif.tif": encode(colour, "TIFF", exif=rotated(3)),
        "cmyk_no_marker.jpg": without_adobe(encode(picture(mode="CMYK"), "JPEG")),
        "profile.jpg": encode(colour, "JPEG", icc_profile=profile()),
        "palette_alpha.png": encode(picture(mode="P"), "PNG", transparency=3),
        "colour_key.png": encode(colour, "PNG", transparency=(1, 2, 3)),
        "grey_alpha16.png": png16(sixteen[..., [0, 3]], 4),
        "jpeg_named.png": jpeg,
    }


def as_rgb(data: bytes) -> Image.Image:
    """What a sample must look like: Pillow's RGB, 16-bit values over 257, orientation ignored."""
    kind = data[24:26] if data.startswith(b"\x89PNG") else b""
    if kind in (b"\x10\x02", b"\x10\x04"):  # Pillow would cut 16-bit colour to its high bytes
        channels = 3 if kind[1] == 2 else 2
        width, height = struct.unpack_from(">II", data, 16)
        raw = np.frombuffer(zlib.decompress(data[41:-16]), np.uint8).reshape(height, -1)[:, 1:]
        wide = np.ascontiguousarray(raw).view(">u2").reshape(height, width, channels)
        narrow = np.round(wide / 257).astype(np.uint8)
        return Image.fromarray(narrow if channels == 3 else narrow[..., 0]).convert("RGB")
    image = Image.open(io.BytesIO(data))
    if image.format == "TIFF":
        image.getexif()[274] = 1
    if image.mode == "CMYK" and b"Adobe" not in data and image.format == "JPEG":
        return ImageChops.invert(image).convert("RGB")
    if image.mode.startswith("I"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def bad_by_structure() -> dict[str, bytes]:
    """Name to bytes of what the structure check must refuse."""
    jpeg, png = encode(picture(), "JPEG"), encode(picture(), "PNG")
    webp, bmp = encode(picture(), "WEBP"), encode(picture(), "BMP")
    tiff, frame = encode(picture(), "TIFF"), jpeg.index(b"\xff\xc0")
    data_length = struct.unpack(">I", png[33:37])[0]
    return {
        "empty.jpg": b"",
        "zeros.jpg": bytes(5000),
        "page.jpg": b"<html><body>404 not found</body></html>" * 20,
        "half.jpg": jpeg[: len(jpeg) // 2],
        "most.jpg": jpeg[: len(jpeg) * 9 // 10],
        "no_end.jpg": jpeg[:-2],
        "thumbnail_half.jpg": exif_thumbnail(jpeg)[: -len(jpeg) // 3],
        "progressive_half.jpg": (lambda data: data[: len(data) // 2])(
            encode(picture(), "JPEG", progressive=True)
        ),
        "header.jpg": jpeg[: frame + 8],
        "no_height.jpg": _patched(jpeg, frame + 5, b"\0\0"),
        "bits12.jpg": _patched(jpeg, frame + 4, b"\x0c"),
        "lossless.jpg": _patched(jpeg, frame + 1, b"\xc3"),
        "huge.jpg": _patched(jpeg, frame + 5, b"\xff\xff\xff\xff"),
        "half.png": png[: len(png) // 2],
        "no_end.png": png[:-12],
        "checksum.png": _patched(png, 41 + data_length, b"\0\0\0\0"),
        "half.webp": webp[: len(webp) // 2],
        "half.bmp": bmp[: len(bmp) // 2],
        "half.tif": tiff[: len(tiff) // 2],
        "float.tif": encode(picture(mode="F"), "TIFF"),
        "animation.gif": encode(picture(mode="P"), "GIF"),
        "gif_named.jpg": encode(picture(mode="P"), "GIF"),
    }


def bad_by_decoding() -> dict[str, bytes]:
    """Name to bytes of what only the decoder can refuse."""
    jpeg, webp = encode(picture(), "JPEG"), encode(picture(), "WEBP")
    return {
        "no_tables.jpg": jpeg.replace(b"\xff\xdb", b"\xff\xe9"),
        "bad_tables.jpg": _patched(jpeg, jpeg.index(b"\xff\xc4") + 5, b"\xff" * 16),
        "damaged.webp": _patched(webp, len(webp) // 2, bytes([webp[len(webp) // 2] ^ 0xFF])),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def photos(number: int, classes: int = 3) -> dict[str, bytes]:
    """Labelled JPEGs of various sizes, as `class_0/image_000.jpg` and so on."""
    return {
        f"class_{i % classes}/image_{i:03d}.jpg": encode(
            picture(90 + 7 * (i % 11), 80 + 9 * (i % 7), seed=i), "JPEG"
        )
        for i in range(number)
    }
