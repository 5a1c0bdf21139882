"""Segment logs: their bytes on the disk, what a full disk leaves, and what a damaged record is."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from arbor_core.storage.segment_log import DamagedRecordError, RecordFormat, SegmentLog, headers, records, segments

PLAIN, CHECKED = RecordFormat(), RecordFormat("qQ", checked=True)


def write(log: SegmentLog, *payloads: bytes) -> list[int]:
    return log.append([PLAIN.header(payload) + payload for payload in payloads])


def payloads(folder: Path) -> list[bytes]:
    return [payload for _, path in segments(folder) for _, payload in records(path, PLAIN)]


def test_the_bytes_of_a_header() -> None:
    fields = struct.pack("<IIqQ", 3, zlib.crc32(b"abc"), -1, 1 << 63)
    assert CHECKED.header(b"abc", -1, 1 << 63) == fields + struct.pack("<I", zlib.crc32(fields))
    assert PLAIN.header(b"abc") == struct.pack("<II", 3, zlib.crc32(b"abc"))


def test_segments_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    log = SegmentLog("test", tmp_path)
    for number in range(1, 12):
        write(log, b"%d" % number)
        log.rotate(number)
    assert payloads(tmp_path) == [b"%d" % number for number in range(1, 12)]
    assert SegmentLog("test", tmp_path).number == 11
    assert SegmentLog("padded", tmp_path / "padded", digits=4).path(7).name == "0007.log"


def test_a_disk_without_room_for_a_segment_leaves_the_one_before_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = SegmentLog("test", tmp_path)
    write(log, b"one")

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space"):
            log.rotate(1)
    write(log, b"two")
    assert payloads(tmp_path) == [b"one", b"two"]
    assert [number for number, _ in segments(tmp_path)] == [0]


def test_nothing_is_left_of_records_that_cannot_be_committed(tmp_path: Path) -> None:
    log = SegmentLog("test", tmp_path)
    write(log, b"one")

    def fail(size: int) -> None:
        assert size == log.path(0).stat().st_size
        raise OSError("Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        log.append([PLAIN.header(b"two") + b"two"], fail)
    assert log.path(0).stat().st_size == log.size
    assert payloads(tmp_path) == [b"one"]


@pytest.mark.parametrize("kept", [1, PLAIN.header_bytes, PLAIN.header_bytes + 2])
def test_a_torn_tail_ends_a_segment(tmp_path: Path, kept: int) -> None:
    log = SegmentLog("test", tmp_path)
    (end,) = write(log, b"one")
    with log.path(0).open("ab") as file:
        file.write((PLAIN.header(b"two") + b"two")[:kept])
    assert payloads(tmp_path) == [b"one"]
    assert [header.end for header in headers(log.path(0), PLAIN)] == [end]
    again = SegmentLog("test", tmp_path)
    again.cut_tail(end)
    write(again, b"three")
    assert payloads(tmp_path) == [b"one", b"three"]


@pytest.mark.parametrize(("at", "reason"), [(0, "no record begins"), (CHECKED.header_bytes, "checksum")])
def test_a_damaged_record_is_named(tmp_path: Path, at: int, reason: str) -> None:
    log = SegmentLog("test", tmp_path)
    start, _ = log.append([CHECKED.header(payload, 0, 0) + payload for payload in (b"one", b"two")])
    content = bytearray(log.path(0).read_bytes())
    content[start + at] ^= 1
    log.path(0).write_bytes(content)
    found = records(log.path(0), CHECKED)
    assert next(found)[1] == b"one"
    with pytest.raises(DamagedRecordError, match=reason) as caught:
        next(found)
    assert caught.value.start == start
