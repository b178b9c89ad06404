"""Read where the members of a torch archive lie, and refuse every zip file that two readers could understand differently.

torch writes one shape of zip file: uncompressed members without a gap between them, each behind its own header, then the central
directory, then the end records. Whatever deviates from it (gaps, overlaps, headers that disagree, names equal but for their case)
could hide a second archive from a checker, so nothing of such a file is read.
"""

import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from io import BufferedReader
from typing import NamedTuple

PICKLE = "data.pkl"
MEMBERS_LIMIT = 100_000  # a tensor each; the pickle of so many is larger than any that is read
DIRECTORY_LIMIT = 64 * 2**20  # bytes of the central directory
CHUNK = 2**18  # bytes of a read that stay in the processor's cache

END, END64, LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
ENTRY, LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
DESCRIPTORS = {each.size: each for each in (struct.Struct("<4s3L"), struct.Struct("<4sL2Q"))}
ENDS = END.size + LOCATOR64.size + END64.size
SHORT, LONG = 0xFFFF, 0xFFFFFFFF  # in a field whose value is in the zip64 record instead
ZIP64 = 1  # the extra field that holds those values
ENCRYPTED, DESCRIBED, UTF8 = 0x1, 0x8, 0x800  # flags; DESCRIBED: sizes and CRC follow the bytes


class NotAnArchive(ValueError):
    """The file does not end as a zip file does: it is cut short or of another kind."""


class OddArchive(ValueError):
    """A zip file that torch would not write so; the text completes the sentence "it is ..."."""


class Member(NamedTuple):
    """Where the bytes of a member lie in the file, and their CRC-32."""

    start: int
    size: int
    crc: int


class _Entry(NamedTuple):
    """A member as the central directory describes it; `offset` is that of its local header."""

    raw: bytes
    flags: int
    crc: int
    size: int
    packed: int
    offset: int


def read_members(file: BufferedReader) -> tuple[str, dict[str, Member]]:
    """The archive's folder and its members by their names in it.

    Raises NotAnArchive for a file without a sound end, OddArchive for anything that torch does not write, OSError.
    """
    size = os.fstat(file.fileno()).st_size
    count, start, end = _directory(file, size)
    entries = _entries(_bytes_at(file, start, end - start), count, start)
    names = [_name(entry.raw) for entry in entries]
    folder = _folder(names)
    placed = sorted(zip(entries, names, strict=True), key=lambda pair: pair[0].offset)
    if placed[0][0].offset:
        raise OddArchive("damaged: it does not begin with its archive")
    ends = [entry.offset for entry, _ in placed[1:]] + [start]
    members = {name: _member(file, entry, stop) for (entry, name), stop in zip(placed, ends, strict=True)}
    return folder, {name.removeprefix(f"{folder}/"): member for name, member in members.items()}


def bytes_of(file: BufferedReader, member: Member) -> bytes | None:
    """The bytes of a member; None if they do not agree with its CRC-32."""
    data = _bytes_at(file, member.start, member.size)
    return data if zlib.crc32(data) == member.crc else None


def damaged(file: BufferedReader, members: Mapping[str, Member]) -> str | None:
    """The name of the first member whose bytes do not agree with its CRC-32."""
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
    """How many entries the central directory has, where it begins, and where it ends."""
    tail = _bytes_at(file, max(0, size - ENDS), min(size, ENDS))
    if len(tail) < END.size or not tail[-END.size :].startswith(b"PK\x05\x06"):
        raise NotAnArchive("no zip directory at its end")
    _, disk, other_disk, here, count, length, start, comment = END.unpack(tail[-END.size :])
    end = size - END.size
    if comment or disk or other_disk:
        raise OddArchive("damaged: its end record is not one that torch writes")
    if tail[-END.size - LOCATOR64.size :].startswith(b"PK\x06\x07"):
        end = size - ENDS
        here, count, length, start = _long_end(tail, end, (here, count, length, start))
    elif SHORT in (here, count) or LONG in (length, start):
        raise OddArchive("damaged: its zip64 end record is missing")
    if here != count:
        raise OddArchive("damaged: its end record counts its members twice and differently")
    if start + length < end:
        raise OddArchive("damaged: it does not begin with its archive")
    if start + length > end:
        raise NotAnArchive("bytes are missing in it")
    if count > MEMBERS_LIMIT or length > DIRECTORY_LIMIT:
        raise OddArchive(f"no checkpoint: it has {count} members, expected at most {MEMBERS_LIMIT}")
    return count, start, end


def _long_end(tail: bytes, end: int, short: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The four numbers of the zip64 end record, which must be where its locator says and agree with the short ones."""
    if len(tail) < ENDS or not tail.startswith(b"PK\x06\x06"):
        raise OddArchive("damaged: its zip64 end record is not where it belongs")
    _, length, _, _, disk, other_disk, *long = END64.unpack_from(tail)
    _, locator_disk, place, disks = LOCATOR64.unpack_from(tail, END64.size)
    agree = all(
        one in (other, limit) for one, other, limit in zip(short, long, (SHORT, SHORT, LONG, LONG), strict=True)
    )
    if length != END64.size - 12 or disk or other_disk or locator_disk or disks != 1 or place != end or not agree:
        raise OddArchive("damaged: its two end records disagree")
    return long[0], long[1], long[2], long[3]


def _entries(data: bytes, count: int, start: int) -> list[_Entry]:
    """The entries of the central directory, which lies at `start` behind all members."""
    entries, at = [], 0
    while at < len(data):
        entry, at = _entry(data, at)
        entries.append(entry)
    if len(entries) != count:
        raise OddArchive("damaged: its end record counts another number of members")
    if sum(max(entry.size, entry.packed) for entry in entries) > start:
        raise OddArchive("damaged: its members claim more bytes than it holds")
    if odd := [entry.raw for entry in entries if entry.size != entry.packed]:
        raise OddArchive(f"damaged: the member {_text(odd[0])!r:.80} has two sizes")
    return entries


def _entry(data: bytes, at: int) -> tuple[_Entry, int]:
    """The entry at `at`, and where the next begins."""
    fields = ENTRY.unpack_from(data, at) if at + ENTRY.size <= len(data) else (b"",)
    if fields[0] != b"PK\x01\x02":
        raise OddArchive("damaged: its directory is not whole")
    _, _, _, flags, method, _, _, crc, packed, size, named, extra, comment, disk, _, _, offset = fields
    begin = at + ENTRY.size
    raw, end = data[begin : begin + named], begin + named + extra
    if method or flags & ENCRYPTED:
        raise OddArchive(f"no checkpoint: the member {_text(raw)!r:.80} is compressed or encrypted")
    if comment or disk or flags & ~(DESCRIBED | UTF8) or end > len(data):
        raise OddArchive(f"damaged: the directory's entry of {_text(raw)!r:.80} is not one that torch writes")
    size, packed, offset = _long_values(data[begin + named : end], (size, packed, offset), raw)
    return _Entry(raw, flags, crc, size, packed, offset), end


def _long_values(extra: bytes, values: tuple[int, ...], raw: bytes) -> list[int]:
    """`values`, those that are LONG replaced by the zip64 field's in their order; a zip64 field holds nothing else."""
    found, at = [], 0
    while at < len(extra):
        kind, length = struct.unpack_from("<2H", extra, at) if at + 4 <= len(extra) else (0, SHORT)
        if at + 4 + length > len(extra):
            raise OddArchive(f"damaged: the extra field of {_text(raw)!r:.80} is not whole")
        if kind == ZIP64:
            found.append(extra[at + 4 : at + 4 + length])
        at += 4 + length
    wanted = values.count(LONG)
    if not found and not wanted:
        return list(values)
    if len(found) != 1 or len(found[0]) != 8 * wanted:
        raise OddArchive(f"damaged: the zip64 field of {_text(raw)!r:.80} does not fit its entry")
    numbers = iter(struct.unpack(f"<{wanted}Q", found[0]))
    return [next(numbers) if value == LONG else value for value in values]


# ---------------------------------------------------------------------------------------------------------------------
# Names and members


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="backslashreplace")


def _name(raw: bytes) -> str:
    """The name in UTF-8. Only the folder, named after the file by an old torch, may have other letters than ASCII's."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OddArchive(f"damaged: {_text(raw)!r:.80} is no name of a member") from error
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise OddArchive(f"no checkpoint: the member {name!r:.80} points outside the archive")
    if "\\" in name or "\0" in name or not "/".join(parts[1:]).isascii():
        raise OddArchive(f"damaged: {name!r:.80} is no name that torch gives a member")
    return name


def _folder(names: Sequence[str]) -> str:
    """The one folder that all members lie in."""
    folded = [name.casefold() for name in names]
    if len(set(folded)) != len(folded):  # of two names that differ in their case only, each reader would take another
        raise OddArchive("damaged: two members of its archive have one name")
    if any(name.endswith("/constants.pkl") for name in folded):
        raise OddArchive("a TorchScript program, which is never run")
    pickles = [name for name in names if name.casefold().endswith(f"/{PICKLE}")]
    if len(pickles) != 1:
        raise OddArchive("no checkpoint: a zip archive without torch's data.pkl, or with more than one")
    folder, _, rest = pickles[0].partition("/")
    strays = [name for name in names if not name.startswith(f"{folder}/") or name.endswith("/")]
    if strays or rest != PICKLE:
        stray = (strays or pickles)[0]
        raise OddArchive(f"no checkpoint: the member {stray!r:.80} does not lie in the archive's one folder")
    return folder


def _member(file: BufferedReader, entry: _Entry, stop: int) -> Member:
    """The member whose local header, bytes and descriptor fill the file from the entry's offset to `stop`."""
    odd = OddArchive(f"damaged: the two headers of {_text(entry.raw)!r:.80} disagree, or bytes lie between members")
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
