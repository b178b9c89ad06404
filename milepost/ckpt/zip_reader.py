"""Locate the members of a torch archive, and refuse every zip file that two readers could interpret differently.

torch writes uncompressed members without gaps, each after its own header, then the central directory, then the end
records. Anything else (gaps, overlaps, headers that disagree, names that differ only in case) could hide a second
archive from a checker, so such a file is not read at all.
"""

import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from io import BufferedReader
from typing import NamedTuple

PICKLE = "data.pkl"
MEMBERS_LIMIT = 100_000  # one per tensor; a pickle of more exceeds its own limit
DIRECTORY_LIMIT = 64 * 2**20  # bytes of the central directory
CHUNK = 2**18  # bytes of a read, which fit into the CPU cache

END, END64, LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
ENTRY, LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
DESCRIPTORS = {form.size: form for form in (struct.Struct("<4s3L"), struct.Struct("<4sL2Q"))}
ENDS = END.size + LOCATOR64.size + END64.size
SHORT, LONG = 0xFFFF, 0xFFFFFFFF  # the value is in the zip64 record instead
EXTRA = 128  # bytes of the extra field of a local header, which aligns the bytes behind it to 64, at most
ZIP64 = 1  # the extra field that holds those values
TORCHSCRIPT = "a TorchScript program, which is never run"
ENCRYPTED, DESCRIBED, UTF8 = 0x1, 0x8, 0x800  # flags; DESCRIBED: sizes and CRC follow the bytes


class NotAnArchive(ValueError):
    """The file has no zip end record: it is truncated or of another kind."""


class OddArchive(ValueError):
    """A zip file that torch does not write; the text completes the sentence "it is ..."."""


class DamagedArchive(OddArchive):
    """A zip file of torch's that is damaged."""


class Member(NamedTuple):
    """Offset, size in bytes and CRC-32 of a member."""

    start: int
    size: int
    crc: int


class _Entry(NamedTuple):
    """An entry of the central directory; `offset` is the offset of the local header."""

    raw: bytes
    flags: int
    crc: int
    size: int
    packed: int
    offset: int


def read_members(file: BufferedReader) -> tuple[str, dict[str, Member]]:
    """Return the archive's folder and its members by their names in it.

    Raise NotAnArchive if the end record is missing, OddArchive for anything that torch does not write, OSError.
    """
    size = os.fstat(file.fileno()).st_size
    count, start, end = _directory(file, size)
    entries = _entries(_bytes_at(file, start, end - start), count, start)
    names = [_name(entry.raw) for entry in entries]
    folder = _folder(names)
    placed = sorted(zip(entries, names, strict=True), key=lambda pair: pair[0].offset)
    if placed[0][0].offset:
        raise DamagedArchive("damaged: it does not begin with its archive")
    ends = [entry.offset for entry, _ in placed[1:]] + [start]
    members = {name: _member(file, entry, stop) for (entry, name), stop in zip(placed, ends, strict=True)}
    return folder, {name.removeprefix(f"{folder}/"): member for name, member in members.items()}


def directory_start(file: BufferedReader) -> int:
    """Return where the directory begins, by the end records alone; raise as `read_members` does."""
    return _directory(file, os.fstat(file.fileno()).st_size)[1]


def outline(file: BufferedReader) -> list[tuple[int, int]]:
    """Return begin and end of what lies before the directory, without the bytes of tensors, by the directory alone.

    Raise as `read_members` does.
    """
    count, start, end = _directory(file, os.fstat(file.fileno()).st_size)
    entries = sorted(_entries(_bytes_at(file, start, end - start), count, start), key=lambda entry: entry.offset)
    spans = []
    for entry, stop in zip(entries, [*(entry.offset for entry in entries[1:]), start], strict=True):
        begin = entry.offset
        if b"/data/" in entry.raw:
            spans.append((begin, min(stop, begin + LOCAL.size + len(entry.raw) + EXTRA)))
            begin = max(begin, stop - max(DESCRIPTORS))
        spans.append((begin, stop))
    return spans


def bytes_of(file: BufferedReader, member: Member) -> bytes | None:
    """Return the bytes of a member; None if its CRC-32 does not match."""
    data = _bytes_at(file, member.start, member.size)
    return data if zlib.crc32(data) == member.crc else None


def damaged(file: BufferedReader, members: Mapping[str, Member]) -> str | None:
    """Return the name of the first member whose CRC-32 does not match; None if all match."""
    buffer = memoryview(bytearray(CHUNK))
    for name, member in members.items():
        file.seek(member.start)
        crc, left = 0, member.size
        while left and (read := file.readinto(buffer[: min(CHUNK, left)])):
            crc, left = zlib.crc32(buffer[:read], crc), left - read
        if left or crc != member.crc:
            return name
    return None


def _bytes_at(file: BufferedReader, start: int, size: int) -> bytes:
    file.seek(start)
    data = file.read(size)
    if len(data) != size:
        raise NotAnArchive("it ends before its members do")
    return data


# ---------------------------------------------------------------------------------------------------------------------
# The directory


def _directory(file: BufferedReader, size: int) -> tuple[int, int, int]:
    """Return the number of entries of the central directory, its start and its end."""
    tail = _bytes_at(file, max(0, size - ENDS), min(size, ENDS))
    if len(tail) < END.size or not tail[-END.size :].startswith(b"PK\x05\x06"):
        raise NotAnArchive("no zip directory at its end")
    _, disk, other_disk, here, count, length, start, comment = END.unpack(tail[-END.size :])
    end = size - END.size
    if comment or disk or other_disk:
        raise DamagedArchive("damaged: its end record is not one that torch writes")
    if tail[-END.size - LOCATOR64.size :].startswith(b"PK\x06\x07"):
        end = size - ENDS
        here, count, length, start = _long_end(tail, end, (here, count, length, start))
    elif SHORT in (here, count) or LONG in (length, start):
        raise DamagedArchive("damaged: its zip64 end record is missing")
    if here != count:
        raise DamagedArchive("damaged: its end record counts its members twice and differently")
    if start + length < end:
        raise DamagedArchive("damaged: it does not begin with its archive")
    if start + length > end:
        raise NotAnArchive("bytes are missing in it")
    if count > MEMBERS_LIMIT or length > DIRECTORY_LIMIT:
        raise OddArchive(f"not a checkpoint: it has {count} members, expected at most {MEMBERS_LIMIT}")
    return count, start, end


def _long_end(tail: bytes, end: int, short: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return the four numbers of the zip64 end record after checking its place and the short end record against it."""
    if len(tail) < ENDS or not tail.startswith(b"PK\x06\x06"):
        raise DamagedArchive("damaged: its zip64 end record is not where it belongs")
    _, length, _, _, disk, other_disk, *long = END64.unpack_from(tail)
    _, locator_disk, place, disks = LOCATOR64.unpack_from(tail, END64.size)
    pairs = zip(short, long, (SHORT, SHORT, LONG, LONG), strict=True)
    agree = all(value in (long_value, limit) for value, long_value, limit in pairs)
    if length != END64.size - 12 or disk or other_disk or locator_disk or disks != 1 or place != end or not agree:
        raise DamagedArchive("damaged: its two end records disagree")
    return long[0], long[1], long[2], long[3]


def _entries(data: bytes, count: int, start: int) -> list[_Entry]:
    """Return the entries of the central directory, which begins at `start`, after all members."""
    entries, at = [], 0
    while at < len(data):
        entry, at = _entry(data, at)
        entries.append(entry)
    if len(entries) != count:
        raise DamagedArchive("damaged: its end record counts another number of members")
    if sum(max(entry.size, entry.packed) for entry in entries) > start:
        raise DamagedArchive("damaged: its members claim more bytes than it holds")
    if odd := [entry.raw for entry in entries if entry.size != entry.packed]:
        raise DamagedArchive(f"damaged: the member {_text(odd[0])!r:.80} has two sizes")
    return entries


def _entry(data: bytes, at: int) -> tuple[_Entry, int]:
    """Return the entry at `at`, and the offset of the next."""
    fields = ENTRY.unpack_from(data, at) if at + ENTRY.size <= len(data) else (b"",)
    if fields[0] != b"PK\x01\x02":
        raise DamagedArchive("damaged: its directory is incomplete")
    _, _, _, flags, method, _, _, crc, packed, size, named, extra, comment, disk, _, _, offset = fields
    begin = at + ENTRY.size
    raw, end = data[begin : begin + named], begin + named + extra
    if method and b"/code/" in raw:  # torch compresses the code of such a program, and nothing else
        raise OddArchive(TORCHSCRIPT)
    if method or flags & ENCRYPTED:
        raise OddArchive(f"not a checkpoint: the member {_text(raw)!r:.80} is compressed or encrypted")
    if comment or disk or flags & ~(DESCRIBED | UTF8) or end > len(data):
        raise DamagedArchive(f"damaged: the directory's entry of {_text(raw)!r:.80} is not one that torch writes")
    size, packed, offset = _long_values(data[begin + named : end], (size, packed, offset), raw)
    return _Entry(raw, flags, crc, size, packed, offset), end


def _long_values(extra: bytes, values: tuple[int, ...], raw: bytes) -> list[int]:
    """Return `values` with those that are LONG replaced by the values of the zip64 field, in order."""
    found, at = [], 0
    while at < len(extra):
        kind, length = struct.unpack_from("<2H", extra, at) if at + 4 <= len(extra) else (0, SHORT)
        if at + 4 + length > len(extra):
            raise DamagedArchive(f"damaged: the extra field of {_text(raw)!r:.80} is incomplete")
        if kind == ZIP64:
            found.append(extra[at + 4 : at + 4 + length])
        at += 4 + length
    wanted = values.count(LONG)
    if not found and not wanted:
        return list(values)
    if len(found) != 1 or len(found[0]) != 8 * wanted:
        raise DamagedArchive(f"damaged: the zip64 field of {_text(raw)!r:.80} does not fit its entry")
    numbers = iter(struct.unpack(f"<{wanted}Q", found[0]))
    return [next(numbers) if value == LONG else value for value in values]


# ---------------------------------------------------------------------------------------------------------------------
# Names and members


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="backslashreplace")


def _name(raw: bytes) -> str:
    """Return the name. Only the folder, which an old torch named after the file, may hold non-ASCII characters."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedArchive(f"damaged: {_text(raw)!r:.80} is not a member name") from error
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise OddArchive(f"not a checkpoint: the member {name!r:.80} points outside the archive")
    if "\\" in name or "\0" in name or not "/".join(parts[1:]).isascii():
        raise DamagedArchive(f"damaged: {name!r:.80} is not a member name that torch writes")
    return name


def _folder(names: Sequence[str]) -> str:
    """Return the folder that holds all members."""
    folded = [name.casefold() for name in names]
    if len(set(folded)) != len(folded):  # readers differ in which of two such names they take
        raise DamagedArchive("damaged: two members of its archive have one name")
    if any(name.endswith("/constants.pkl") for name in folded):
        raise OddArchive(TORCHSCRIPT)
    pickles = [name for name in names if name.casefold().endswith(f"/{PICKLE}")]
    if len(pickles) != 1:
        raise OddArchive("not a checkpoint: a zip archive without torch's data.pkl, or with more than one")
    folder, _, rest = pickles[0].partition("/")
    strays = [name for name in names if not name.startswith(f"{folder}/") or name.endswith("/")]
    if strays or rest != PICKLE:
        stray = (strays or pickles)[0]
        raise OddArchive(f"not a checkpoint: the member {stray!r:.80} does not lie in the archive's one folder")
    return folder


def _member(file: BufferedReader, entry: _Entry, stop: int) -> Member:
    """Return the member whose local header, bytes and descriptor fill the file from the entry's offset to `stop`."""
    odd = DamagedArchive(f"damaged: the two headers of {_text(entry.raw)!r:.80} disagree, or bytes lie between members")
    if stop - entry.offset < LOCAL.size + len(entry.raw) + entry.size:
        raise odd
    header = _bytes_at(file, entry.offset, LOCAL.size + len(entry.raw))
    mark, _, flags, method, _, _, crc, packed, size, named, extra = LOCAL.unpack_from(header)
    if mark != b"PK\x03\x04" or flags != entry.flags or method or named != len(entry.raw):
        raise odd
    if header[LOCAL.size :] != entry.raw or stop - entry.offset < len(header) + extra + entry.size:
        raise odd
    if LONG in (size, packed):
        long = _bytes_at(file, entry.offset + len(header), extra)
        size, packed = _long_values(long, (size, packed), entry.raw)
    described = flags & DESCRIBED
    for value, true in ((crc, entry.crc), (size, entry.size), (packed, entry.size)):
        if value != true and not (described and value == 0):
            raise odd
    start = entry.offset + len(header) + extra
    left = stop - start - entry.size
    if left if not described else left not in DESCRIPTORS:
        raise odd
    descriptor = (b"PK\x07\x08", entry.crc, entry.size, entry.size)
    if described and DESCRIPTORS[left].unpack(_bytes_at(file, start + entry.size, left)) != descriptor:
        raise odd
    return Member(start, entry.size, entry.crc)
