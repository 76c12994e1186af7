"""A vocabulary that comes with weights: byte-pair tokens of GPT-2's kind, by which GLIDE reads captions.

Two published files define it: `encoder.json` (symbol -> id) and `vocab.bpe` (which pairs of symbols join, in
order of priority).  They lie beside the weights in their bundle, under its seal.  A caption is lower-cased
and cut into pieces that keep the blank before them; text is not repaired, and no tokens open or close it.
The rest of the row is END, the last id, which no caption contains: a network that reads such tokens replaces
it by its learned padding vectors.

Sources: Radford et al. 2019 (GPT-2), section 2.2; Sennrich et al. 2016 (arXiv:1508.07909); the published
code of Nichol et al. 2022 (arXiv:2112.10741, GLIDE: lower case, cut, filled with the last id).
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import regex  # type: ignore[import-untyped]

from dd_core.text import letters_of_bytes, merged

ENCODER, MERGES = "encoder.json", "vocab.bpe"
LARGEST_BYTES = 1 << 25
"""Of either file, unpacked; the published ones have about a million and half a million."""
PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
LETTERS = letters_of_bytes()


class ByteVocabulary(NamedTuple):
    """The symbols, and the order in which pairs of them join."""

    ids: Mapping[str, int]
    ranks: Mapping[tuple[str, str], int]
    files: Mapping[str, bytes]
    """ENCODER and MERGES as published, unpacked."""

    @property
    def end(self) -> int:
        """END: the last id."""
        return len(self.ids) - 1

    def tokens(self, captions: Iterable[str], context_length: int) -> list[list[int]]:
        """The tokens of each caption, cut to the length or filled with END."""
        rows = (self.encoded(caption)[:context_length] for caption in captions)
        return [row + [self.end] * (context_length - len(row)) for row in rows]

    def encoded(self, caption: str) -> list[int]:
        """The tokens of a caption, neither cut nor filled."""
        return [token for piece in PIECES.findall(caption.lower()) for token in self.piece_tokens(piece)]

    def piece_tokens(self, piece: str) -> list[int]:
        """The tokens of one piece; a lone surrogate, which UTF-8 cannot encode, becomes a question mark."""
        word = [LETTERS[byte] for byte in piece.encode(errors="replace")]
        return [self.ids[symbol] for symbol in merged(word, self.ranks)]


def read_vocabulary(encoder: Path, merges: Path) -> ByteVocabulary:
    """The vocabulary of two files, each plain or gzip-compressed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file is damaged, or they do not belong together; the file and the entry are named.
    """
    files = {ENCODER: unpacked(encoder), MERGES: unpacked(merges)}
    ids, pairs = ids_in(files[ENCODER], encoder), pairs_in(files[MERGES], merges)
    for byte, letter in LETTERS.items():
        if letter not in ids:
            raise ValueError(f"{encoder}: it lacks {letter!r}, which stands for byte {byte}; fetch it again")
    known = set(LETTERS.values())
    for place, pair in enumerate(pairs):
        whole = "".join(pair)
        missing = next((f"{part!r} is not made before" for part in pair if part not in known), "")
        if missing or whole not in ids:
            missing = missing or f"{encoder} lacks {whole!r}"
            raise ValueError(f"{merges}: line {place + 2} joins {pair}, but {missing}; fetch both files anew")
        known.add(whole)
    more = sorted(ids.keys() - known, key=ids.__getitem__)
    if len(more) != 1 or ids[more[0]] != len(ids) - 1:
        raise ValueError(
            f"{encoder}: {len(more)} of its {len(ids)} entries are neither a byte nor joined by {merges}; "
            "there must be one, the last, which ends a text"
        )
    return ByteVocabulary(ids, {pair: rank for rank, pair in enumerate(pairs)}, files)


def unpacked(path: Path) -> bytes:
    """The content of a file, decompressed if it is gzip."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            content = (gzip.GzipFile(fileobj=file) if packed else file).read(LARGEST_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}; fetch it again") from None
    if len(content) > LARGEST_BYTES:
        raise ValueError(f"{path} has more than {LARGEST_BYTES:,} bytes; it is no file of a vocabulary")
    return content


def ids_in(content: bytes, path: Path) -> dict[str, int]:
    """Symbol -> id; n symbols must have the ids 0 to n - 1."""
    try:
        ids = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON: {error}") from None
    if not isinstance(ids, dict) or not all(type(value) is int for value in ids.values()):
        raise ValueError(f"{path}: a vocabulary is symbols with their ids, {{'a': 0, ...}}; this is not")
    if odd := sorted(set(ids.values()) ^ set(range(len(ids)))):
        raise ValueError(
            f"{path}: its {len(ids)} ids are not 0 to {len(ids) - 1}, each once: {odd[0]} is not as it should"
        )
    return ids


def pairs_in(content: bytes, path: Path) -> list[tuple[str, str]]:
    """The pairs in their order; the first line says the version."""
    try:
        first, *lines = content.decode().rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged or no UTF-8: {error}") from None
    if not first.startswith("#version"):
        raise ValueError(f"{path}: its first line is {first!r:.40}, not #version; it is no file of merges")
    pairs: dict[tuple[str, str], None] = {}
    for place, line in enumerate(lines):
        symbols = line.split()
        if len(symbols) != 2 or (pair := (symbols[0], symbols[1])) in pairs:
            raise ValueError(f"{path}: line {place + 2}, {line!r:.40}, is not two symbols, or is there twice")
        pairs[pair] = None
    return list(pairs)
