"""Captions as numbers: the byte-pair tokens that CLIP models read.

The same tokens as open_clip's SimpleTokenizer (Radford et al. 2021, arXiv 2103.00020, section 2.4;
byte-pair merges of Sennrich et al. 2016, arXiv 1508.07909), computed without importing torch or
open_clip, so that a data worker starts in milliseconds; only the list of merges that open_clip
ships is read.
"""

import functools
import gzip
import html
import importlib.util
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import ftfy
import regex  # type: ignore[import-untyped]

START, END = 49406, 49407
"""Open and close every caption; what follows END is zeros."""
MERGES = 49152 - 256 - 2
LONGEST_REMEMBERED = 32
"""Characters of the longest piece that is cached: longer ones do not recur, but would fill the cache."""
PLAIN = re.compile(r"[ -%'-~\t\n]*")
"""Printable ASCII without '&': the text repairs below leave it as it is."""
PIECES = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


class Vocabulary(NamedTuple):
    """What tokens there are and which pairs of symbols join first."""

    ids: Mapping[str, int]
    ranks: Mapping[tuple[str, str], int]
    letters: tuple[str, ...]
    """The printable stand-in of each of the 256 bytes."""


def tokens(captions: Iterable[str], context_length: int) -> list[list[int]]:
    """START, the caption, END, zeros; a caption that is too long is cut and closed with END.

    Args:
        captions: Any texts; repaired, unescaped and lower-cased as open_clip does.
        context_length: Length of every row, at least 2.

    Raises:
        ValueError: If `context_length` has no room for START and END.
    """
    if context_length < 2:
        raise ValueError(f"context_length is {context_length}, START and END need 2")
    return [padded(encoded(caption), context_length) for caption in captions]


def too_long(caption: str, context_length: int) -> bool:
    """Whether a caption is cut at this length, so that its last tokens are lost."""
    return len(encoded(caption)) > context_length - 2  # without START and END


def null_tokens(context_length: int) -> list[int]:
    """The empty caption: what guidance compares with, and what replaces dropped captions."""
    return padded([], context_length)


def padded(ids: list[int], context_length: int) -> list[int]:
    """The tokens between START and END, cut to the length or filled with zeros."""
    row = [START, *ids[: context_length - 2], END]
    return row + [0] * (context_length - len(row))


def encoded(caption: str) -> list[int]:
    """The tokens of a caption, without START, END and zeros."""
    return [token for piece in PIECES.findall(cleaned(caption)) for token in piece_tokens(piece)]


def cleaned(caption: str) -> str:
    """Broken encodings repaired, entities unescaped, white space single, lower case."""
    if not PLAIN.fullmatch(caption):
        caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(caption.split()).lower()


def is_empty(caption: str) -> bool:
    """Whether a caption says nothing: it has no tokens, as blanks, or entities of blanks, have none."""
    return not cleaned(caption)


def piece_tokens(piece: str) -> tuple[int, ...]:
    """The tokens of one word, digit or run of signs; cached up to LONGEST_REMEMBERED characters."""
    return remembered(piece) if len(piece) <= LONGEST_REMEMBERED else joined_tokens(piece)


@functools.lru_cache(maxsize=65_536)
def remembered(piece: str) -> tuple[int, ...]:
    """`joined_tokens`, cached."""
    return joined_tokens(piece)


def joined_tokens(piece: str) -> tuple[int, ...]:
    """The tokens of a piece: neighbouring symbols are joined, lowest rank first."""
    vocabulary = loaded()
    if piece in {"<start_of_text>", "<end_of_text>"}:
        return (vocabulary.ids[piece],)
    word = [vocabulary.letters[byte] for byte in piece.encode()]
    word[-1] += "</w>"
    return tuple(vocabulary.ids[symbol] for symbol in merged(word, vocabulary.ranks))


def merged(word: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Neighbours joined, those of the lowest rank first, until no pair left has a rank."""
    while len(word) > 1:
        best = min(itertools.pairwise(word), key=lambda pair: ranks.get(pair, math.inf))
        if best not in ranks:
            break
        word = joined(word, best)
    return word


def joined(word: list[str], pair: tuple[str, str]) -> list[str]:
    """The word with every occurrence of the pair, from the left, joined to one symbol."""
    result: list[str] = []
    place = 0
    while place < len(word):
        if tuple(word[place : place + 2]) == pair:
            result.append(pair[0] + pair[1])
            place += 2
        else:
            result.append(word[place])
            place += 1
    return result


@functools.cache
def loaded() -> Vocabulary:
    """The vocabulary from the file of merges inside the open_clip distribution (not imported).

    Raises:
        RuntimeError: If open_clip is not installed.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise RuntimeError("the vocabulary comes with open_clip: pip install open-clip-torch")
    lines = gzip.decompress((Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes())
    merges = [tuple(line.split()) for line in lines.decode().split("\n")[1 : MERGES + 1]]
    letters = letters_of_bytes()
    symbols = list(letters.values())
    names = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(merge) for merge in merges)]
    ids = {name: n for n, name in enumerate([*names, "<start_of_text>", "<end_of_text>"])}
    ranks = {(first, second): n for n, (first, second) in enumerate(merges)}
    return Vocabulary(ids, ranks, tuple(letters[byte] for byte in range(256)))


def letters_of_bytes() -> dict[int, str]:
    """Byte -> its printable stand-in, in the order of their tokens (GPT-2's, which CLIP took over)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
