"""Tars of every form, whole and damaged: their samples are those of a slow reader, or an error says where."""

import io
import os
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapet_ds.data.kinds import Findings, by_content, by_name, hidden
from mapet_ds.data.shards import read_shard
from mapet_ds.errors import DataError

EXAMPLES = int(os.environ.get("TAR_EXAMPLES", "60"))
BLOCK = 512


class Damaged(Exception):
    pass


def numbers(field: bytes) -> int:
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def records(data: bytes) -> dict[bytes, bytes]:
    """The records of a PAX header, which must fill it."""
    values = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or not 0 < int(length) <= len(data):
            raise Damaged
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        keyword, equals, value = record.partition(b"=")
        if not equals or not keyword or not value.endswith(b"\n"):
            raise Damaged
        values[keyword] = value[:-1]
    return values


def slow_reader(data: bytes) -> list[tuple[bytes, bytes, int, int]]:
    """(name, type, offset, length) of every member, block by block; any byte out of place is an error."""
    members, at, more = [], 0, {}
    while at < len(data):
        header = data[at : at + BLOCK]
        if len(header) < BLOCK:
            raise Damaged
        if not any(header):
            if any(data[at:]) or more:
                raise Damaged
            return members
        blank = header[:148] + b" " * 8 + header[156:]
        try:
            if numbers(header[148:156]) not in (sum(blank), sum(byte - 256 * (byte > 127) for byte in blank)):
                raise Damaged
            size = numbers(header[124:136])
        except ValueError as error:
            raise Damaged from error
        name, kind = header[:100].split(b"\0")[0], header[156:157]
        if header[257:262] == b"ustar" and header[345] and header[257:263] == b"ustar\0":
            name = header[345:500].split(b"\0")[0] + b"/" + name
        content = data[at + BLOCK : at + BLOCK + size]
        end = at + BLOCK + -(-size // BLOCK) * BLOCK
        if kind in b"xLK" and kind != b"":
            if end > len(data):
                raise Damaged
            more |= records(content) if kind == b"x" else {kind: content.split(b"\0")[0]}
        else:
            name = more.get(b"path", more.get(b"L", name))
            if kind in b"125" and kind != b"":
                size, end = 0, at + BLOCK
            if end > len(data):
                raise Damaged
            members.append((name, kind, at + BLOCK, size))
            more = {}
        at = end
    if more:
        raise Damaged
    return members


def is_hidden(name: bytes) -> bool:
    return any(hidden(part) for part in name.split(b"/") if part.strip(b"."))


WORDS = st.text("abcdefgz0123456789éß字_- ", min_size=1, max_size=12)
LONG = st.builds(lambda word, times: (word * times)[:230], WORDS, st.integers(1, 40))
ENDINGS = st.sampled_from([".jpg", ".JPEG", ".png", ".cls", ".txt", ".jfif", "", ".tmp", ".bin2"])


@st.composite
def tars(draw) -> tuple[bytes, int]:
    """A tar in one of tarfile's formats, and the number of its images, each with a key of its own."""
    form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for number in range(draw(st.integers(1, 8))):
            stem = f"{number}_{draw(WORDS if form == tarfile.USTAR_FORMAT else LONG)}"
            folder = draw(st.sampled_from(["", "a/", "./", "v1.0/b/"]))
            name = folder + stem + draw(ENDINGS)
            if draw(st.booleans()) and draw(st.booleans()):
                header = tarfile.TarInfo(folder + stem)
                header.type = tarfile.DIRTYPE
                archive.addfile(header)
                continue
            header = tarfile.TarInfo(name)
            content = (b"\xff\xd8\xff" if draw(st.booleans()) else b"") + bytes(draw(st.integers(0, 1500)))
            content = b"%d" % number if name.endswith(".cls") else content
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return stream.getvalue()


@st.composite
def damaged(draw) -> bytes:
    """A tar with bytes changed, zeroed, cut off, put in or repeated somewhere."""
    data = bytearray(draw(tars()))
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, max(len(data.rstrip(b"\0")), 1)))
        if draw(st.booleans()):
            at -= at % BLOCK
        match draw(st.sampled_from(["flip", "zeros", "cut", "insert", "again"])):
            case "flip" if at < len(data):
                data[at] ^= draw(st.integers(1, 255))
            case "zeros":
                length = draw(st.sampled_from([1, 100, BLOCK, 3 * BLOCK]))
                data[at : at + length] = bytes(len(data[at : at + length]))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=600))
            case "again":
                data += bytes(data)
    return bytes(data)


def read(data: bytes):
    """The pictures of a tar and what was found; or None and the error's sentence."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "some.tar")
        path.write_bytes(data)
        findings = Findings()
        try:
            return read_shard(os.fsencode(path), b"some.tar", findings), findings
        except DataError as error:
            return None, str(error)


@settings(max_examples=EXAMPLES, deadline=None)
@given(tars())
def test_a_whole_tar_gives_what_the_slow_reader_gives(data):
    pictures, _ = read(data)
    expected = []
    for name, kind, offset, length in slow_reader(data):
        content = data[offset : offset + min(length, 32)]
        image = (by_name(name) or by_content(name, content)) == "image"
        if image and kind in b"0\0" and not is_hidden(name):
            expected.append((name, offset, length))
    assert [picture[:3] for picture in pictures] == expected


@settings(max_examples=3 * EXAMPLES, deadline=None)
@given(damaged())
def test_a_damaged_tar_loses_no_member_in_silence(data):
    try:
        members = slow_reader(data)
    except Damaged:
        members = None
    pictures, findings = read(data)
    if pictures is None:
        assert "some.tar" in findings
        return
    assert members is not None, "it was read although a byte is out of place"
    places = {(offset, length) for _, _, offset, length in members}
    assert {picture[1:3] for picture in pictures} <= places
    labels = sum(
        by_name(name) == ".cls" and not is_hidden(name) for name, kind, *_ in members if kind != b"5"
    )
    counted = sum(count for count, *_ in findings.passed_over.values())
    assert len(pictures) + counted + labels == sum(kind != b"5" for _, kind, *_ in members)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_block_of_a_tar_matters(tmp_path, form):
    """A byte of each header, name or record changed, one after the other."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for number in range(3):
            header = tarfile.TarInfo(f"{number}/{'é' * 80}.jpg")
            header.size = 600
            archive.addfile(header, io.BytesIO(b"\xff\xd8\xff" + bytes(597)))
    data, refused = stream.getvalue(), 0
    for at in range(0, len(data.rstrip(b"\0")), 61):
        changed = data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :]
        pictures, findings = read(changed)
        assert "some.tar" in findings if pictures is None else len(pictures) + len(findings.passed_over) == 3
        refused += pictures is None
    assert refused > 20
