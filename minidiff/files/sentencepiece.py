"""Reading SentencePiece's own file, ``spiece.model``, and its character map.

The file is a protocol buffer (``ModelProto`` of sentencepiece_model.proto); the map
inside it is a double-array trie (Aoe 1989) over UTF-8 bytes, followed by the strings
that replace its keys. Kudo and Richardson 2018, section 3.
"""

import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import regex

from minidiff.files.disk import LONGEST_TABLE, read_bytes

_UNIGRAM = 1
MOST_PIECES = 500_000  # T5 has 32,000
LONGEST_REPLACEMENT = 256  # bytes that one character becomes; T5's longest has 33


class Piece(NamedTuple):
    """An entry of the vocabulary: its text and its log-probability."""

    text: str
    score: float


def read_model(path: str | Path) -> tuple[list[Piece], bytes]:
    """Return the pieces of a ``spiece.model`` in order of id, and its character map.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds another model than Unigram.
    """
    data = read_bytes(path, LONGEST_TABLE)
    try:
        pieces, charsmap, kind = _parse_model(data)
    except (LookupError, TypeError, AttributeError, struct.error, ValueError) as error:
        raise ValueError(f"{path} is not a readable spiece.model: {error}") from error
    if kind != _UNIGRAM or not pieces:
        raise ValueError(
            f"{path}: expected a Unigram model (type 1) with pieces, found type {kind} "
            f"with {len(pieces)} pieces"
        )
    return pieces, charsmap


def _parse_model(data: bytes) -> tuple[list[Piece], bytes, int]:
    pieces: list[Piece] = []
    charsmap, kind = b"", _UNIGRAM
    for field, value in _fields(data):
        if field == 1:  # repeated SentencePiece: 1 = piece, 2 = score
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            pieces.append(Piece(piece[1].decode("utf-8"), score))
            if len(pieces) > MOST_PIECES:
                raise ValueError(f"more than {MOST_PIECES:,} pieces")
        elif field == 2:  # TrainerSpec: 3 = model_type
            kind = dict(_fields(value)).get(3, _UNIGRAM)
        elif field == 3:  # NormalizerSpec: 2 = precompiled_charsmap
            charsmap = dict(_fields(value)).get(2, b"")
    return pieces, charsmap, kind


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protocol buffer message, one level deep.

    A value is an integer or bytes, as the file has it.
    """
    at, value = 0, 0  # type: int, int | bytes
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
        else:
            if key & 7 == 2:
                size, at = _varint(data, at)
            elif key & 7 in (1, 5):
                size = 8 if key & 7 == 1 else 4
            else:
                raise ValueError(f"unknown wire type {key & 7} at byte {at}")
            if at + size > len(data):
                raise ValueError(f"the file ends inside a field at byte {at}")
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Read an integer of 7 bits a byte, lowest first; return it and the next place."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"an integer of more than 64 bits before byte {at}")


class CharacterMap:
    """The normaliser of a SentencePiece model: replaces characters, mostly by NFKC.

    Layout of ``data``: the trie's size in bytes (uint32), the trie (uint32 units), the
    replacements, each ended by a zero byte. A unit holds a label (bits 0-7), whether a
    value follows (bit 8) and the distance to its children (bits 9-30).
    """

    def __init__(self, data: bytes) -> None:
        try:
            (size,) = struct.unpack_from("<I", data)
            self.units = struct.unpack_from(f"<{size // 4}I", data, 4)
        except (struct.error, TypeError) as error:
            raise ValueError(f"precompiled_charsmap is cut short: {error}") from error
        if not self.units:
            raise ValueError("precompiled_charsmap is empty")
        self.data, self.replacements = data, data[4 + size :]
        self._cached = lru_cache(maxsize=65_536)(self._replace)

    def __call__(self, text: str) -> str:
        """Normalise ``text``, one grapheme (what a reader calls a character) a time."""
        try:
            return "".join(map(self._cached, regex.findall(r"\X", text)))
        except (IndexError, ValueError) as error:  # places outside the data
            raise ValueError(f"precompiled_charsmap is damaged: {error}") from None

    def _replace(self, grapheme: str) -> str:
        if len(grapheme.encode()) < 6:
            whole = self._lookup(grapheme)
            if whole is not None:
                return whole
        parts = ((char, self._lookup(char)) for char in grapheme)
        return "".join(char if new is None else new for char, new in parts)

    def _lookup(self, text: str) -> str | None:
        """Find the SHORTEST key that ``text`` begins with; what follows it is lost.

        A quirk of the reference that ids depend on, as is the limit of six bytes above.
        """
        node = self._children(0, self.units[0])
        for byte in text.encode():
            node ^= byte
            if byte == 0 or node >= len(self.units):
                return None
            unit = self.units[node]
            if unit & 0x800000FF != byte:
                return None
            node = self._children(node, unit)
            if unit >> 8 & 1:
                start = self.units[node] & 0x7FFFFFFF
                last = start + LONGEST_REPLACEMENT
                end = self.replacements.index(b"\0", start, last)
                return self.replacements[start:end].decode("utf-8")
        return None

    @staticmethod
    def _children(node: int, unit: int) -> int:
        return node ^ (unit >> 10) << ((unit & 512) >> 6)


def case_folding() -> bytes:
    """A character map that makes the capitals A to Z small.

    In the trie the root's children stand at 256 + their byte, and what they hold, the
    places of "a", "b", … among the replacements, behind them.
    """
    units = [0] * 512
    units[0] = 256 << 10
    for number in range(26):
        byte, leaf = ord("A") + number, 384 + number
        units[256 + byte] = ((256 + byte) ^ leaf) << 10 | 1 << 8 | byte
        units[leaf] = 1 << 31 | 2 * number
    letters = b"".join(bytes([ord("a") + i, 0]) for i in range(26))
    return struct.pack("<I512I", 4 * len(units), *units) + letters
