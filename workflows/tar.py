"""Tar archives, member by member, with nothing taken on trust.

POSIX.1-2001 (pax), ustar, GNU and old headers (POSIX pax, "ustar Interchange Format"; GNU tar
manual, "Basic Tar Format").  The archive must end in its marker of two zero blocks, every header
must match its checksum, and nothing is decompressed on the way.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from workflows.files import DamagedError, ShardFile

BLOCK = 512
ZEROS = bytes(BLOCK)
EXTENSION_BYTES = 2**20
"""The most that a long name or a pax header may take."""
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
KINDS = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"5": "directory",
    b"6": "pipe",
    b"S": "sparse file",
}
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
EXTENSIONS = (b"L", b"K", b"x", b"X", b"g")


class Member(NamedTuple):
    """One entry of an archive."""

    name: str
    what: str
    """Kind of entry, in words."""
    size: int
    """Bytes of content, also where `data` was not kept."""
    data: bytes = b""


class Header(NamedTuple):
    """One block of 512 bytes, its checksum verified."""

    name: str
    size: int
    kind: bytes


def members(file: ShardFile, *, wanted: Callable[[str], bool], most: int) -> Iterator[Member]:
    """Every entry in order; content is kept of wanted plain files of at most `most` bytes.

    Raises:
        DamagedError: Where the archive breaks off or is not one.
    """
    extra: dict[str, str] = {}
    while (block := file.read(BLOCK)) != ZEROS:
        header = parsed(block, file.position)
        if header.kind in EXTENSIONS:
            extra |= extension(file, header)
            continue
        if "size" in extra:
            header = header._replace(size=whole_number(extra["size"].encode(), 10, file.position))
        name = extra.get("path", header.name)
        what = KINDS.get(header.kind, f"{header.kind!r} entry")
        if any(fact.startswith("GNU.sparse") for fact in extra):
            what = "sparse file"
        keep = what == "file" and header.size <= most and wanted(name)
        try:
            data = content(file, header, keep=keep)
        except DamagedError as error:
            raise DamagedError(str(error), member=name) from None
        yield Member(name, what, header.size, data)
        extra = {}
    check_end(file)


def parsed(block: bytes, end: int) -> Header:
    """The facts of a header block that ends at this byte."""
    if not block and end == 0:
        raise DamagedError("the file is empty")
    if len(block) < BLOCK or not sum_fits(block):
        packing = next((name for sign, name in PACKED.items() if block.startswith(sign)), "")
        if packing and end <= BLOCK:
            raise DamagedError(f"the archive is packed with {packing}; shards must be plain tars")
        if len(block) < BLOCK:
            raise DamagedError(f"no end-of-archive marker, cut at byte {end:,}")
        raise DamagedError(f"bad header at byte {end - BLOCK:,} (its checksum does not fit)")
    name, kind, size = block[:100].partition(b"\0")[0], block[156:157], block[124:136]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    if kind in (b"0", b"\0") and name.endswith(b"/"):
        kind = b"5"  # a directory in archives older than ustar
    if size[0] == 0x80:  # above 8 GiB, GNU tar and star write binary numbers
        return Header(readable(name), int.from_bytes(size[1:], "big"), kind)
    return Header(readable(name), whole_number(size.partition(b"\0")[0].strip() or b"0", 8, end), kind)


def sum_fits(block: bytes) -> bool:
    """Whether the checksum fits: all bytes summed, its own field as blanks; signed bytes in some old tars."""
    stored = block[148:156].partition(b"\0")[0].strip()
    if not stored.isdigit() or b"8" in stored or b"9" in stored:
        return False
    rest = block[:148] + block[156:]
    missing = sum(rest) + 8 * ord(" ") - int(stored, 8)
    return missing == 0 or missing == 256 * sum(byte > 127 for byte in rest)


def readable(name: bytes) -> str:
    """A name as text; bytes that are not UTF-8 are written out."""
    return name.decode("utf-8", "backslashreplace")


def whole_number(digits: bytes, base: int, end: int) -> int:
    """A number of a header that ends at this byte."""
    try:
        if not digits.isdigit() or len(digits) > 20:
            raise ValueError
        return int(digits, base)
    except ValueError:
        raise DamagedError(f"bad header before byte {end:,} ({digits[:40]!r} is not a number)") from None


def extension(file: ShardFile, header: Header) -> dict[str, str]:
    """What a long name or a pax header says of the next entry."""
    if header.size > EXTENSION_BYTES:
        raise DamagedError(f"a header of {header.size:,} bytes before byte {file.position:,}")
    text = content(file, header, keep=True)
    match header.kind:
        case b"L":
            return {"path": readable(text.rstrip(b"\0"))}
        case b"x" | b"X":
            return records(text, file.position)
        case _:
            return {}  # the target of a link, or facts about the whole archive


def records(text: bytes, end: int) -> dict[str, str]:
    """The records of a pax header: `length key=value` and a line feed."""
    found: dict[str, str] = {}
    text, place = text.rstrip(b"\0"), 0
    while place < len(text):
        blank = text.find(b" ", place, place + 21)
        length = text[place : blank if blank >= 0 else place + 21]
        last = place + whole_number(length, 10, end) - 1
        key, equals, value = text[place + len(length) + 1 : last].partition(b"=")
        if not equals or text[last : last + 1] != b"\n":
            raise DamagedError(f"bad pax header before byte {end:,}")
        found[readable(key)] = readable(value)
        place = last + 1
    return found


def content(file: ShardFile, header: Header, *, keep: bool) -> bytes:
    """What follows a header, with its padding passed over; b"" if it is not to be kept."""
    if header.kind in WITHOUT_DATA:
        return b""
    whole = -(-header.size // BLOCK) * BLOCK
    end = file.position + whole
    data = file.read(whole) if keep else b""
    skip(file, end - file.position)
    if file.position != end:
        raise DamagedError(f"{header.name!r:.200} is cut at byte {file.position:,}")
    return data[: header.size]


def skip(file: ShardFile, count: int) -> None:
    """Pass over bytes without keeping them."""
    while count > 0 and (passed := len(file.read(min(count, 2**20)))):
        count -= passed


def check_end(file: ShardFile) -> None:
    """After one block of zeros: another, then nothing but padding."""
    second = file.read(BLOCK)
    if second != ZEROS:
        raise DamagedError(f"a block of zeros at byte {file.position - BLOCK - len(second):,} is not the end")
    while rest := file.read(2**20):
        if rest.strip(b"\0"):
            raise DamagedError(f"data after the end-of-archive marker, before byte {file.position:,}")
