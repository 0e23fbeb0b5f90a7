"""EXIF that DALI may see, and damaged EXIF, which ended the process."""

import io
import struct
import zlib

import images
import numpy as np
import pytest
from PIL import ExifTags, Image

from mapet_ds.data.formats import BadImage, exif_orientation, inspect
from mapet_ds.data.loader import check_decodes
from mapet_ds.data.orientation import orientation_alone

FAR = 0x7FFFFF00
"""An offset that no file reaches."""
DAMAGED_EXIF = {
    "resolution": [(0x112, 3, 1, 6 << 16), (0x11A, 5, 1, FAR)],
    "date": [(0x112, 3, 1, 6 << 16), (0x132, 2, 20, FAR)],
    "length": [(0x10F, 2, FAR, 8), (0x112, 3, 1, 6 << 16)],
    "type": [(0x112, 3, 1, 6 << 16), (0x11B, 0xFFFF, 1, FAR)],
}
"""Tags whose offsets DALI 2.4.0 follows out of PNG, and which hide an orientation from it in JPEG."""


@pytest.mark.parametrize("name", DAMAGED_EXIF)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_neither_ends_the_process_nor_hides_the_orientation(kind, name):
    tags = b"".join(struct.pack(">HHII", *tag) for tag in DAMAGED_EXIF[name])
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(DAMAGED_EXIF[name])) + tags + bytes(4)
    data = images.encode(images.picture(160, 120), kind, exif=exif) + b"trailing"
    assert exif_orientation(data) == 6
    alone = orientation_alone(data)
    assert struct.pack(">I", FAR) not in alone and orientation_alone(alone) == alone
    with Image.open(io.BytesIO(alone)) as image:
        assert image.getexif() == {ExifTags.Base.Orientation: 6}
        whole = Image.open(io.BytesIO(data))
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(whole.convert("RGB")))
    check_decodes(data, upright=True)


def test_an_image_without_exif_is_handed_on_as_it_is():
    for data in images.good_images().values():
        if b"xif" not in data and b"XIF" not in data:
            assert orientation_alone(data) == data


def test_an_image_too_large_for_its_exif_to_be_read_is_unreadable():
    """A PNG of few bytes, of more pixels than Pillow opens and fewer than MAX_PIXELS."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", 14_000, 14_000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    assert inspect(data) == (14_000, 14_000)
    with pytest.raises(BadImage, match=r"its EXIF can't be read: Image size \(196000000 pixels\)"):
        inspect(data, upright=True)


def test_a_tiff_whose_tags_can_not_be_is_unreadable():
    """DALI 2.4.0 ends the process by these."""
    good = images.encode(images.picture(), "TIFF", exif=images.rotated())
    start = struct.unpack_from("<I", good, 4)[0] + 2
    (count,) = struct.unpack_from("<H", good, start - 2)
    tags = [good[start + 12 * i : start + 12 * i + 12] for i in range(count)]
    place = next(i for i, tag in enumerate(tags) if tag[:2] == struct.pack("<H", 0x116))
    for new, words in (
        (struct.pack("<HHII", 0x100, 4, 1, 72), "a tag that is there twice"),
        (struct.pack("<HHII", 0x132, 2, 20, FAR), "TIFF's tag 306 lies outside it"),
    ):
        bad = good[: start + 12 * place] + new + good[start + 12 * place + 12 :]
        for upright in (False, True):
            with pytest.raises(BadImage, match=words):
                inspect(bad, upright)
