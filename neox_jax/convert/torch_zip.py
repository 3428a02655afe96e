"""The zip of PyTorch's .bin and .pt files: a folder of stored members, read strictly and written as torch does."""

import contextlib
import dataclasses
import itertools
import struct
import zipfile
import zlib
from collections.abc import Callable

from neox_jax.convert.byte_reader import CHUNK_BYTES, ByteReader, RawBytes, show_name

MAX_MEMBERS, MAX_DIRECTORY_BYTES = 1 << 16, 16 << 20
ALIGNMENT, WIDE_BYTES = 64, 1 << 30  # a written member of more bytes has zip64 sizes
RESAVE = "re-save it with torch >= 1.6: torch.save(torch.load(OLD), NEW)"

_LOCAL, _CENTRAL, _END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")
_END64, _LOCATOR = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_DAMAGED = "is cut short, damaged or no file of torch.save's; download it again"


class Member(ByteReader):
    """Reads of a member's bytes, from its own first. At the first read, of however little, all of it is compared with
    its checksum, once; a checksum of 0 is none, where torch was told to compute none."""

    def __init__(self, reader: ByteReader, name: str, start: int, num_bytes: int, crc: int):
        self.name, self.start, self.num_bytes = name, start, num_bytes
        self.path, self.first = reader.path, reader.first + start
        self._reader, self._crc, self._is_checked = reader, crc, crc == 0

    def refuse(self, why: str):
        self._reader.refuse(f"member {show_name(self.name)} {why}")

    def raw(self, start: int, num_bytes: int) -> RawBytes:
        found = super().raw(start, num_bytes)
        return dataclasses.replace(found, stream=self._stream) if num_bytes == self.num_bytes > 0 else found

    def _stream(self) -> tuple[Callable[[int, memoryview], None], list]:
        def read(start: int, out: memoryview) -> None:
            self._reader.read_into(self.start + start, out)

        return read, [] if self._is_checked else [_Check(self)]

    def read_into(self, start: int, out) -> None:
        self.check_bounds(start, len(out))
        is_whole = len(out) == self.num_bytes
        if not self._is_checked:
            self._check(memoryview(out) if is_whole else None)
            if is_whole:
                return
        self._reader.read_into(self.start + start, out)

    def _check(self, out: memoryview | None) -> None:
        """Reads all of it, in pieces, into `out` if that is given. Two threads may both do so."""
        buffer = memoryview(bytearray(min(CHUNK_BYTES, self.num_bytes))) if out is None else out
        crc = 0
        for start in range(0, self.num_bytes, CHUNK_BYTES):
            first, num_bytes = 0 if out is None else start, min(CHUNK_BYTES, self.num_bytes - start)
            part = buffer[first : first + num_bytes]
            self._reader.read_into(self.start + start, part)
            crc = zlib.crc32(part, crc)
        self.compare(crc)

    def compare(self, crc: int) -> None:
        """Raises: InputError if this is not the checksum of its bytes."""
        if crc != self._crc:
            self.refuse("is damaged (its checksum differs); download it again")
        self._is_checked = True


class _Check:
    """The checksum of a member whose bytes are given one after the other; compared at the last."""

    def __init__(self, member: Member):
        self._member, self._crc, self._left = member, 0, member.num_bytes

    def update(self, data: memoryview) -> None:
        self._crc, self._left = zlib.crc32(data, self._crc), self._left - len(data)
        if self._left == 0:
            self._member.compare(self._crc)


def read_directory(reader: ByteReader) -> tuple[str, dict[str, Member]]:
    """The folder that everything in the zip is in, and its members by full name.

    Stricter than zip: no comment, nothing before or after, between directory and end nothing, nothing compressed,
    encrypted, overlapping or twice. zipfile would read more kinds of damage, and raise more kinds of exceptions.
    """
    refuse = reader.refuse
    magic = bytes(reader.read(0, min(4, reader.num_bytes)))
    if not magic:
        refuse("is empty; download it again")
    if magic[:1] == b"\x80":
        refuse(f"is in the format from before torch 1.6, which is not read here; {RESAVE}")
    if magic != b"PK\x03\x04":
        refuse(f"starts with {magic!r}, wanted a zip file of torch.save's; if it is from before torch 1.6, {RESAVE}")
    num_members, start, num_bytes = _read_end(reader)
    if num_members > MAX_MEMBERS or num_bytes > MAX_DIRECTORY_BYTES:
        refuse(f"has {num_members} members in {num_bytes} bytes of directory; wanted at most {MAX_MEMBERS}")
    directory = bytes(reader.read(start, num_bytes))
    members, headers, root, position = {}, [], None, 0
    for _ in range(num_members):
        if position + _CENTRAL.size > num_bytes:
            refuse(_DAMAGED)
        fields = _CENTRAL.unpack_from(directory, position)
        sig, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, comment_size, disk, _, _, at = fields
        position += _CENTRAL.size
        raw_name = directory[position : position + name_size]
        extra = directory[position + name_size : position + name_size + extra_size]
        position += name_size + extra_size + comment_size
        if sig != b"PK\x01\x02" or position > num_bytes:
            refuse(_DAMAGED)
        name = _check_name(raw_name, refuse)
        size, packed, at = _widen([size, packed, at], extra, refuse)
        if flags & ~0x0808 or disk:  # those two: sizes follow the data, names are UTF-8
            refuse(f"member {show_name(name)} is encrypted or otherwise unusual (flags {flags:#x}); {RESAVE}")
        if method or packed != size:
            refuse(f"member {show_name(name)} is compressed; torch.save stores only: unpack and re-save it with torch")
        if name in members:
            refuse(f"member {show_name(name)} is there twice; get the file from somebody you trust")
        folder = name.split("/", 1)[0]
        if "/" not in name or folder != (root or folder):
            refuse(f"member {show_name(name)} is not in the one folder that torch.save makes; {RESAVE}")
        root = folder
        first = _find_data(reader, raw_name, at, size, packed, flags, start)
        members[name] = Member(reader, name, first, size, crc)
        headers.append((at, first + size, name))
    if position != num_bytes or not members:
        refuse(_DAMAGED)
    headers.sort()
    for (_, end, name), (after, _, other) in itertools.pairwise(headers):
        if end > after:
            refuse(f"members {show_name(name)} and {show_name(other)} overlap; get the file from somebody you trust")
    return root, members


def _read_end(reader: ByteReader) -> tuple[int, int, int]:
    """(number of members, start and size of the directory) from the last bytes, plain or zip64."""
    refuse, end_at = reader.refuse, reader.num_bytes - _END.size
    if end_at < 0:
        refuse(_DAMAGED)
    sig, disk, other_disk, here, count, num_bytes, start, comment = _END.unpack(reader.read(end_at, _END.size))
    if sig != b"PK\x05\x06" or comment or disk or other_disk or here != count:
        refuse(_DAMAGED)
    plain, full = (count, num_bytes, start), (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    locator_at = end_at - _LOCATOR.size
    if locator_at >= 0:
        sig, disk, end64_at, num_disks = _LOCATOR.unpack(reader.read(locator_at, _LOCATOR.size))
        if sig == b"PK\x06\x07":
            end_at = locator_at - _END64.size
            if disk or num_disks != 1 or end_at < 0 or end64_at != end_at:
                refuse(_DAMAGED)
            fields = _END64.unpack(reader.read(end_at, _END64.size))
            sig, size, _, _, disk, other_disk, here, count, num_bytes, start = fields
            wide = (count, num_bytes, start)
            agree = all(a in (b, limit) for a, b, limit in zip(plain, wide, full, strict=True))
            if sig != b"PK\x06\x06" or size != _END64.size - 12 or disk or other_disk or here != count or not agree:
                refuse(_DAMAGED)
    if start + num_bytes != end_at:
        refuse(_DAMAGED)
    return count, start, num_bytes


def _check_name(raw: bytes, refuse) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = ""
    parts = name.split("/")
    drive = name[1:2] == ":"
    if not name.isprintable() or drive or "\\" in name or any(part in ("", ".", "..") for part in parts):
        refuse(f"a member is called {raw[:80]!r}, wanted a relative path without '..'; do not trust this file")
    return name


def _widen(fields: list[int], extra: bytes, refuse) -> list[int]:
    """Replaces fields that are full by those of the zip64 extra field, in its order."""
    if 0xFFFFFFFF not in fields:
        return fields
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        body = extra[position + 4 : position + 4 + size]
        if kind == 1 and len(body) == size:
            wide = [value for (value,) in struct.iter_unpack("<Q", body[: size // 8 * 8])]
            if fields.count(0xFFFFFFFF) <= len(wide):
                return [wide.pop(0) if field == 0xFFFFFFFF else field for field in fields]
        position += 4 + size
    return refuse(_DAMAGED)


def _find_data(reader, raw_name: bytes, at: int, size: int, packed: int, flags: int, limit: int) -> int:
    """Where a member's data starts, which its local header says; all of it lies before `limit`."""
    if at + _LOCAL.size + len(raw_name) > limit:
        reader.refuse(_DAMAGED)
    header = reader.read(at, _LOCAL.size + len(raw_name))
    sig, _, local_flags, method, _, _, _, local_packed, local_size, name_size, extra_size = _LOCAL.unpack_from(header)
    first = at + _LOCAL.size + name_size + extra_size
    if sig != b"PK\x03\x04" or local_flags != flags or method or name_size != len(raw_name) or first + size > limit:
        reader.refuse(_DAMAGED)
    later = (0, 0xFFFFFFFF) if flags & 8 else (0xFFFFFFFF,)
    if (local_packed != packed and local_packed not in later) or (local_size != size and local_size not in later):
        reader.refuse(_DAMAGED)
    if header[_LOCAL.size :] != raw_name:
        reader.refuse(f"a member is called {raw_name[:80]!r} in one place and not in another; do not trust this file")
    return first


class ZipWriter:
    """Writes stored members one after the other, in one folder as torch's, into something with a `write`; checksums
    stand behind the members, as in torch's."""

    def __init__(self, file):
        self._archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)

    def __enter__(self) -> "ZipWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        with contextlib.suppress(*([] if kind is None else [Exception])):  # of an end that nobody will look at
            self._archive.close()

    @contextlib.contextmanager
    def member(self, name: str, num_bytes: int):
        """Something with a `write`, for that many bytes. They start at a multiple of ALIGNMENT, by padding as torch's.

        Raises: ValueError where others have been written.
        """
        info = zipfile.ZipInfo(f"archive/{name}")  # with zip's first date, 1980: equal trees give equal files
        info.file_size = num_bytes
        wide = num_bytes > WIDE_BYTES
        start = self._archive.fp.tell() + _LOCAL.size + len(info.filename) + 20 * wide + 4
        num_padding = -start % ALIGNMENT
        info.extra = b"FB" + struct.pack("<H", num_padding) + b"Z" * num_padding
        with self._archive.open(info, "w", force_zip64=wide) as member:
            yield member
        if info.file_size != num_bytes:
            raise ValueError(f"{name} got {info.file_size} bytes, wanted {num_bytes}")
