"""GPT-2's kind of tokens, by a small vocabulary learned here: as by hand, and nothing lost."""

import gzip
import json
import unicodedata
from collections import Counter
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dd_core.vocabulary import ENCODER, MERGES, ByteVocabulary, read_vocabulary

CORPUS = "a red circle above a blue square, it's there; they're 12 or 123: don't caf\u00e9 \u4e00\u5e45 " * 2
BLANKS = {
    *range(9, 14),
    32,
    0x85,
    0xA0,
    0x1680,
    *range(0x2000, 0x200B),
    0x2028,
    0x2029,
    0x202F,
    0x205F,
    0x3000,
}
"""White space as Unicode has it."""
SHORT = ("s", "t", "re", "ve", "m", "ll", "d")
Pair = tuple[bytes, bytes]


def kind(sign: str) -> str:
    major = unicodedata.category(sign)[0]
    return " " if ord(sign) in BLANKS else major if major in "LN" else "."


def pieces(text: str) -> list[str]:
    """A text cut by hand: runs of one kind with the blank before them, short forms, other blanks."""
    found, at = [], 0
    while at < len(text):
        end = at + next((1 + len(s) for s in SHORT if text.startswith("'" + s, at)), 0)
        if end == at:
            first = at + (text[at] == " " and at + 1 < len(text) and kind(text[at + 1]) != " ")
            end = first
            while end < len(text) and kind(text[end]) == kind(text[first]):
                end += 1
            if kind(text[first]) == " " and end < len(text) and end - at > 1:
                end -= 1  # the last blank belongs to what follows
        found.append(text[at:end])
        at = end
    return found


def joined(word: list[bytes], pair: Pair) -> list[bytes]:
    done: list[bytes] = []
    for symbol in word:
        if done and (done[-1], symbol) == pair:
            done[-1] = b"".join(pair)
        else:
            done.append(symbol)
    return done


def learned(count: int = 120) -> list[Pair]:
    """The pairs that are most frequent in the corpus, one after the other."""
    words = [[bytes([byte]) for byte in piece.encode()] for piece in pieces(CORPUS)]
    pairs: list[Pair] = []
    for _ in range(count):
        known = {b"".join(pair) for pair in pairs}
        counts = Counter(p for word in words for p in pairwise(word) if b"".join(p) not in known)
        if not counts:
            break
        pairs.append(max(counts, key=lambda pair: (counts[pair], pair)))
        words = [joined(word, pairs[-1]) for word in words]
    return pairs


PAIRS = learned()


def letters() -> dict[int, str]:
    """Byte -> letter, as the published files write it: what cannot be seen comes after U+0100, in order."""
    seen = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + place) for place, b in enumerate(hidden)}


def written(directory: Path, count: int = len(PAIRS)) -> tuple[Path, Path]:
    """The two files of a vocabulary of so many pairs, those beyond the learned ones of any two bytes."""
    table = letters()
    more = (pair for pair in product([bytes([b]) for b in range(256)], repeat=2) if pair not in PAIRS)
    pairs = [*PAIRS, *more][:count]
    lines = [" ".join("".join(table[b] for b in part) for part in pair) for pair in pairs]
    names = [*table.values(), *(line.replace(" ", "") for line in lines), "<|endoftext|>"]
    encoder, merges = directory / ENCODER, directory / MERGES
    encoder.write_text(json.dumps({name: place for place, name in enumerate(names)}))
    merges.write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    return encoder, merges


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> ByteVocabulary:
    return read_vocabulary(*written(tmp_path_factory.mktemp("vocabulary")))


def by_hand(caption: str) -> list[bytes]:
    """The symbols of a caption: every pair joined wherever it stands, in the order of the pairs."""
    found: list[bytes] = []
    for piece in pieces(caption.lower()):
        word = [bytes([byte]) for byte in piece.encode()]
        for pair in PAIRS:
            word = joined(word, pair)
        found += word
    return found


TEXTS = st.text(st.characters(exclude_categories=("Cn", "Cs")), max_size=40) | st.text(
    st.sampled_from("a redcilbuqsthy'1 2,.\n\té\u4e00"), max_size=40
)


@settings(max_examples=150, deadline=None, database=None)
@given(TEXTS)
def test_any_text_has_the_symbols_found_by_hand_and_none_of_it_is_lost(
    vocabulary: ByteVocabulary, caption: str
) -> None:
    symbols = {at: symbol for symbol, at in vocabulary.ids.items()}
    back = {letter: byte for byte, letter in letters().items()}
    found = [bytes(back[letter] for letter in symbols[at]) for at in vocabulary.encoded(caption)]
    assert found == by_hand(caption)
    assert b"".join(found) == caption.lower().encode()


def test_a_caption_is_cut_or_filled_with_end_which_no_caption_holds(vocabulary: ByteVocabulary) -> None:
    short, long, none, end = vocabulary.tokens(["A red", "a red " * 9, "", "<|endoftext|>"], 8)
    assert short == vocabulary.encoded("a RED") + [vocabulary.end] * (8 - len(vocabulary.encoded("a red")))
    assert long == vocabulary.encoded("a red " * 9)[:8]
    assert none == [vocabulary.end] * 8
    assert vocabulary.end == len(vocabulary.ids) - 1
    assert vocabulary.end not in end
    assert vocabulary.encoded("a\ud800") == vocabulary.encoded("a?")


def test_packed_files_are_the_same_vocabulary(vocabulary: ByteVocabulary, tmp_path: Path) -> None:
    packed = []
    for path in written(tmp_path):
        packed.append(path.with_name(path.name + ".gz"))
        packed[-1].write_bytes(gzip.compress(path.read_bytes()))
    assert read_vocabulary(*packed) == vocabulary


def without(name: str) -> Callable[[dict[str, int]], dict[str, int]]:
    """The entries but one, counted anew."""
    return lambda ids: {left: place for place, left in enumerate(one for one in ids if one != name)}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda ids: ids | {"red": 1.5}, r"encoder.json: a vocabulary is symbols with their ids"),
        (lambda ids: ids | {"more": 9_999}, r"encoder.json: its \d+ ids are not 0 to \d+, each once: \d+"),
        (without("A"), "encoder.json: it lacks 'A', which stands for byte 65"),
        (without("re"), r"vocab.bpe: line .* joins \('r', 'e'\), but .*encoder.json lacks 're'"),
        (without("<|endoftext|>"), "encoder.json: 0 of its .* entries are neither a byte nor joined"),
        (lambda ids: ids | {"more": len(ids)}, "encoder.json: 2 of its .* there must be one, the last"),
    ],
)
def test_entries_that_are_not_whole_are_refused_with_their_file(
    damage: Callable[[dict[str, int]], dict[str, int]], said: str, tmp_path: Path
) -> None:
    encoder, merges = written(tmp_path)
    encoder.write_text(json.dumps(damage(json.loads(encoder.read_text()))))
    with pytest.raises(ValueError, match=said):
        read_vocabulary(encoder, merges)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (ENCODER, lambda content: content[:-9], "encoder.json is damaged or no JSON"),
        (ENCODER, lambda content: gzip.compress(content)[:-9], "encoder.json is damaged: .*; fetch it again"),
        (MERGES, lambda content: content[3:], "vocab.bpe: its first line is"),
        (MERGES, lambda content: content + b"\xff", "vocab.bpe is damaged or no UTF-8"),
        (MERGES, lambda content: content + b"lonely\n", r"vocab.bpe: line \d+, 'lonely', is not two symbols"),
        (MERGES, lambda content: content + b"r e\n", "vocab.bpe: line .* 'r e', .* or is there twice"),
        (MERGES, lambda content: content + b"zz z\n", "vocab.bpe: line .* but 'zz' is not made before"),
    ],
)
def test_a_file_that_is_damaged_is_refused_by_its_name(
    name: str, damage: Callable[[bytes], bytes], said: str, tmp_path: Path
) -> None:
    files = written(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=said):
        read_vocabulary(*files)
