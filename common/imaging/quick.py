"""The header of a regular file in a tenth of a millisecond; every file that is not regular is left to `header.scan`.

Of the files of one series almost all elements are equal, byte for byte. So the first is read by `header.scan`, and of
the others only the few elements that belong to a single slice are converted. What a header means is decided there,
never here: this file compares bytes, and gives up where anything is unusual.
"""

from __future__ import annotations

import os
import re
import stat
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from struct import Struct
from struct import error as StructError  # noqa: N812
from typing import NamedTuple

import numpy as np

from common.imaging.header import PHYSICAL, REPEATS, TAGS, Header, scan, scan_layout
from common.imaging.layout import Layout
from common.imaging.refusal import RefusalCode, Refused

_HEAD_BYTES = (2**14, 2**20)
"""How much of a file is searched for the pixels: first the small piece, then the large one."""
_MAX_DEPTH = 16
_KNOWN = 512
"""Series whose common elements are remembered."""
_EXACT = 2.0**24
"""Whole numbers up to this are exact in float32."""
_LARGEST = 1e30
"""Values beyond this, which no scanner gives, are left to the usual way."""
_UNDEFINED = 0xFFFFFFFF
_PIXEL_DATA = 0x7FE00010

_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_EXPLICIT = Struct("<HH2sH").unpack_from
_IMPLICIT = Struct("<HHL").unpack_from
_LENGTH = Struct("<L").unpack_from

_MODALITY_LUT = b"\x28\x00\x00\x30"
"""Where its element begins."""
_WANTED = frozenset((*TAGS, 0x00080005))
"""Elements that decide what a file is: also Specific Character Set, in which the others are written."""

_NATIVE = {b"1.2.840.10008.1.2": True, b"1.2.840.10008.1.2.1": False}
"""Transfer syntaxes of plain little endian pixels -> implicit VR."""
_BIG_ENDIAN, _DEFLATED = b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"

_SOP_UID, _TIME, _POSITION = 0x00080018, 0x00080032, 0x00200032
_INTERCEPT, _SLOPE = 0x00281052, 0x00281053
_OF_ONE_FILE = (RefusalCode.CORRUPT, RefusalCode.UNREADABLE, RefusalCode.MISSING_HEADER)
"""Refusals that may come from bytes that the files of a series do not share, such as an empty SOP Instance UID."""
_OWN = {_SOP_UID: b"UI", _TIME: b"TM", _POSITION: b"DS", _INTERCEPT: b"DS", _SLOPE: b"DS"}
"""Elements that may differ from slice to slice, and their VR."""
_UID = re.compile(rb"[0-9.]{1,64}\0?")
_CLOCK = re.compile(rb"(?:[0-9]{2,6}(?:\.[0-9]{1,6})?)? ?")
_DECIMAL = re.compile(rb" *[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)? *")


class Mark(NamedTuple):
    """What tells that a file is still the one that was read; the change time cannot be set by a program."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Mark:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the pixels of a slice lie in its file, and what makes values of them."""

    offset: int
    shape: tuple[int, int]
    dtype: str
    """As numpy names it, for example <i2."""
    bits: int
    """Bits Stored."""
    slope: float
    intercept: float
    padding: tuple[int, int] | None
    """Stored values from the first to the second were not measured."""
    codec: str = ""
    """Transfer Syntax UID of compressed pixels; empty: they are read as they lie."""

    @property
    def length(self) -> int:
        """Bytes of the stored values."""
        return self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize

    @property
    def exact(self) -> bool:
        """Whether float32 gives the values of float64: all whole numbers, and none too large."""
        largest = 2.0**self.bits * abs(self.slope) + abs(self.intercept)
        return self.slope.is_integer() and self.intercept.is_integer() and largest <= _EXACT


class Examined(NamedTuple):
    """What one file is."""

    result: Header | Refused
    plan: Plan | None
    """None: its pixels are read the usual way."""
    syntax: str
    """Transfer Syntax UID; empty where it was not found."""
    offset: int | None
    """Where the value of the Pixel Data element begins."""
    mark: Mark | None
    """None: the file cannot be reached, or changed while it was read."""


@dataclass
class Examiner:
    """Remembers what the files of a series have in common. Not for several threads at once."""

    _known: OrderedDict[tuple[object, ...], _Known] = field(default_factory=OrderedDict)

    def __call__(self, path: Path) -> Examined:
        """What `header.scan` says of the file, and where its pixels lie; never raises for what is in the file."""
        try:
            before = path.stat()
            regular = _regular(path, before)
        except OSError:
            return Examined(scan(path), None, "", None, None)
        result, plan, syntax, offset = self._read(path, regular)
        try:
            mark = Mark.of(path.stat())
        except OSError:
            mark = None
        return Examined(result, plan, syntax, offset, mark if mark == Mark.of(before) else None)

    def _read(self, path: Path, regular: _Regular | None) -> tuple[Header | Refused, Plan | None, str, int | None]:
        if regular is None:
            return scan(path), None, "", None
        syntax = regular.syntax.decode("ascii", "replace")
        key = (regular.syntax, regular.vr, regular.length, tuple(regular.own), *regular.shared)
        known = self._known.get(key)
        if known is None or not known.tells(regular):
            result, layout = scan_layout(path)
            plan = _plan(regular, result, layout) if isinstance(result, Header) and layout is not None else None
            if isinstance(result, Header) or result.code not in _OF_ONE_FILE:
                self._known[key] = _Known(result, plan, regular.left)
                if len(self._known) > _KNOWN:
                    self._known.popitem(last=False)
            return result, plan, syntax, regular.start
        self._known.move_to_end(key)
        like, plan = known.result, known.plan
        if isinstance(like, Refused):
            return replace(like, path=path), None, syntax, regular.start
        own = _own(regular, like)
        if own is None:
            return scan(path), None, syntax, regular.start
        header = replace(like, path=path, **own)  # type: ignore[arg-type]
        return header, None if plan is None else _moved(plan, regular, like), syntax, regular.start


class _Known(NamedTuple):
    """What one file of a series is."""

    result: Header | Refused
    plan: Plan | None
    left: int
    """Its bytes from the first of its pixels on."""

    def tells(self, regular: _Regular) -> bool:
        """Whether the other file gets the same verdict, as far as its length decides that."""
        if regular.length == _UNDEFINED:  # compressed: there are too few bytes or enough, and more do no harm
            fine = isinstance(self.result, Refused) or self.result.problem is None
            return fine and regular.left >= self.left
        return regular.left == self.left


class _Regular(NamedTuple):
    """The elements that count, each as its bytes from tag to the end of its value."""

    syntax: bytes
    shared: tuple[bytes, ...]
    own: dict[int, bytes]
    vr: bytes
    """Of the Pixel Data element; empty in implicit VR."""
    start: int
    """Of the pixels."""
    length: int
    """As declared."""
    left: int
    """What the file holds from `start` on."""

    @property
    def implicit(self) -> bool:
        return not self.vr


def _regular(path: Path, status: os.stat_result) -> _Regular | None:
    """The file's elements up to the pixels; None where it is not plainly regular DICOM with pixels."""
    if not stat.S_ISREG(status.st_mode):
        return None
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        for count in _HEAD_BYTES:
            head = os.pread(handle, count, 0)
            try:
                return _elements(head, status.st_size)
            except StructError:  # the piece ends before the pixels
                if len(head) < count:
                    return None
    finally:
        os.close(handle)
    return None


def _elements(head: bytes, size: int) -> _Regular | None:
    """Walks over the top level elements.

    Raises:
        struct.error: `head` ends before the pixels begin.
    """
    if head[128:132] != b"DICM" or _DEFLATED in head[:4096]:
        return None
    at, meta = 132, dict[int, bytes]()
    while True:
        group, element, vr, length = _EXPLICIT(head, at)
        if group != 2:
            break
        start = at + 8
        if vr in _LONG:
            (length,), start = _LENGTH(head, start), start + 4
        elif vr not in _SHORT:
            return None
        meta[element] = head[start : start + length]
        at = start + length
    syntax = meta.get(0x10, b"").rstrip(b"\0 ")
    if not _UID.fullmatch(syntax) or syntax == _BIG_ENDIAN:
        return None
    implicit = _NATIVE.get(syntax, False)
    if implicit == (vr in _SHORT or vr in _LONG):  # the data set is not in the syntax that the file meta says
        return None
    shared, own, last = [meta.get(2, b"")], dict[int, bytes](), 0x0007FFFF
    while True:
        if implicit:
            group, element, length = _IMPLICIT(head, at)
            start = at + 8
        else:
            group, element, vr, length = _EXPLICIT(head, at)
            start = at + 8
            if vr in _LONG:
                (length,), start = _LENGTH(head, start), start + 4
            elif vr not in _SHORT:
                return None
        tag = group << 16 | element
        if tag <= last:
            return None
        if tag >= 0x7FE00000:
            break
        if length == _UNDEFINED:
            if not (implicit or vr in (b"SQ", b"UN")):
                return None
            end = _end_of_items(head, start, implicit or vr == b"UN", 0)
            if end is None:
                return None
        else:
            end = start + length
        if tag in _OWN:
            own[tag] = head[at:end]
        elif tag in _WANTED:
            shared.append(head[at:end])
        at, last = end, tag
    if tag != _PIXEL_DATA or not (implicit or vr in (b"OB", b"OW")):
        return None
    if length != _UNDEFINED and start + length < size:  # something comes behind the pixels
        return None
    return _Regular(syntax, tuple(shared), own, b"" if implicit else vr, start, length, size - start)


def _end_of_items(head: bytes, at: int, implicit: bool, depth: int) -> int | None:
    """Where a sequence of undefined length ends; None if it is not well made."""
    while depth < _MAX_DEPTH:
        group, element, length = _IMPLICIT(head, at)
        at += 8
        if (group, element) == (0xFFFE, 0xE0DD):
            return at
        if (group, element) != (0xFFFE, 0xE000):
            return None
        inside = _end_of_item(head, at, implicit, depth, None if length == _UNDEFINED else at + length)
        if inside is None:
            return None
        at = inside
    return None


def _end_of_item(head: bytes, at: int, implicit: bool, depth: int, end: int | None) -> int | None:
    """Where an item ends: at `end`, or with its delimiter. The parser reads what is in it, and so refuses the file
    where it is not well made, also if nothing in it is needed.
    """
    while end is None or at < end:
        group, element, length = _IMPLICIT(head, at)
        if (group, element) == (0xFFFE, 0xE00D):
            return at + 8 if end is None else None
        nested = implicit
        start = at + 8
        if not implicit:
            _, _, vr, length = _EXPLICIT(head, at)
            if vr in _LONG:
                (length,), start = _LENGTH(head, start), start + 4
                nested = vr == b"UN"
            elif vr not in _SHORT:
                return None
        if group >= 0x7FE0:
            return None
        if length == _UNDEFINED:
            after = _end_of_items(head, start, nested, depth + 1)
            if after is None:
                return None
            at = after
        else:
            at = start + length
    return at if at == end else None


def _own(regular: _Regular, like: Header) -> dict[str, object] | None:
    """Fields of `Header` that belong to the slice; None if one is not written as the standard says."""
    fields: dict[str, object] = {}
    for tag, element in regular.own.items():
        if not regular.implicit and element[4:6] != _OWN[tag]:
            return None
        value = element[8:]
        if tag == _SOP_UID:
            if not _UID.fullmatch(value):
                return None
            fields["sop_uid"] = value.rstrip(b"\0").decode()
        elif tag == _POSITION:
            position_mm = _decimals(value)
            if position_mm is None or len(position_mm) != 3:
                return None
            fields["position_mm"] = position_mm
        elif tag == _TIME:
            if not _CLOCK.fullmatch(value):
                return None
            at = REPEATS.index("AcquisitionTime")
            fields["repeats"] = (*like.repeats[:at], value.strip().decode(), *like.repeats[at + 1 :])
    return fields


def _plan(regular: _Regular, header: Header, layout: Layout) -> Plan | None:
    """How to read the pixels without a parser; None where `pixels.decode` has more to do than one straight line."""
    codec = "" if regular.syntax in _NATIVE else layout.syntax
    if codec and not (regular.length == _UNDEFINED and regular.vr == b"OB"):
        return None
    grey = layout.samples == layout.frames == 1 and layout.photometric == "MONOCHROME2"
    table = any(element.startswith(_MODALITY_LUT) for element in regular.shared[1:])
    if not grey or table or layout.allocated > 16 or layout.beyond is not None:
        return None
    shape = layout.rows, layout.columns
    plan = Plan(0, shape, layout.dtype.str, layout.stored, 1.0, 0.0, layout.padding, codec)
    return _moved(plan, regular, header)


def _moved(plan: Plan, regular: _Regular, like: Header) -> Plan | None:
    """The plan for another slice of the same series."""
    if (_SLOPE in regular.own) != (_INTERCEPT in regular.own):
        return None
    if _SLOPE not in regular.own and like.modality in PHYSICAL:
        return None
    scale = [1.0, 0.0]
    for place, tag in enumerate((_SLOPE, _INTERCEPT)):
        if tag in regular.own:
            numbers = _decimals(regular.own[tag][8:])
            if numbers is None or len(numbers) != 1:
                return None
            scale[place] = numbers[0]
    slope, intercept = scale
    if slope == 0 or 2.0**plan.bits * abs(slope) + abs(intercept) > _LARGEST:
        return None
    # nothing may follow the pixels, and they may be followed by one byte to make them even
    even = regular.length - plan.length in (0, plan.length % 2)
    if not plan.codec and not (even and regular.left == regular.length):
        return None
    return replace(plan, offset=regular.start, slope=slope, intercept=intercept)


def _decimals(value: bytes) -> tuple[float, ...] | None:
    parts = value.split(b"\\")
    if not all(len(part) <= 16 and _DECIMAL.fullmatch(part) for part in parts):
        return None
    return tuple(float(part) for part in parts)
