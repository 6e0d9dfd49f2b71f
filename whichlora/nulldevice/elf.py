"""Read the names of the functions that a shared library offers and needs: the part of `nm -D` that a build wants."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SHT_DYNSYM = 11
_STT_NOTYPE, _STT_FUNC, _STT_GNU_IFUNC = 0, 2, 10
_SYMBOL = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size
_SECTION = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, address, offset, size, link, info, align, entry size


@dataclass(frozen=True, slots=True, kw_only=True)
class Symbols:
    """Names of the dynamic functions of one library."""

    defined: frozenset[str]
    undefined: frozenset[str]


def read_symbols(path: Path) -> Symbols:
    """Return the functions in a little-endian ELF64 library's dynamic symbol table; nothing for any other file."""
    with path.open("rb") as file:
        if file.read(6) != b"\x7fELF\x02\x01":
            return Symbols(defined=frozenset(), undefined=frozenset())
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
            functions = list(_functions(image))
    return Symbols(
        defined=frozenset(name for name, section in functions if section),
        undefined=frozenset(name for name, section in functions if not section),
    )


def _functions(image: mmap.mmap) -> Iterator[tuple[str, int]]:
    (table_at,) = struct.unpack_from("<Q", image, 40)
    entry_bytes, entries = struct.unpack_from("<HH", image, 58)
    sections = [_SECTION.unpack_from(image, table_at + i * entry_bytes) for i in range(entries)]
    for _, kind, _, _, offset, size, link, *_ in sections:
        if kind != _SHT_DYNSYM:
            continue
        strings_at = sections[link][4]
        for name, info, _, section, _, _ in _SYMBOL.iter_unpack(image[offset : offset + size]):
            if name and info & 15 in (_STT_NOTYPE, _STT_FUNC, _STT_GNU_IFUNC):
                start = strings_at + name
                yield image[start : image.find(b"\0", start)].decode("ascii", "replace"), section
