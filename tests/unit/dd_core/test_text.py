"""Tokens are those of open_clip, token by token, and come without its import."""

import itertools
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dd_core import text

CORPUS = [
    "",
    " ",
    "a red circle above a small blue square",
    "It's what they're   saying:\tdon't!\n(100% true) #1, 3.14159 & more",
    "Caf\u00e9 \u2014 d\u00e9j\u00e0 vu, na\u00efve \u201cquotes\u201d \ufb01ne",
    "sch\u00c3\u00b6n &amp;amp; gut &lt;b&gt; &eacute;",
    "\u4e00\u5e45\u753b \u0440\u0438\u0441\u0443\u043d\u043e\u043a \u05e9\u05dc\u05d5\u05dd",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301\u0327 \u202eabc\u202c",
    "<start_of_text> in <END_OF_TEXT> the middle",
    "supercalifragilisticexpialidocious antidisestablishmentarianism xqzzjk",
    "word " * 200,
    "\x1b[31mred\x1b[0m \x07bell \x85 \u00a0 nbsp",
]


Published = Callable[..., list[list[int]]]


@pytest.fixture(scope="module")
def published() -> Published:
    reference = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    return lambda captions, length: reference(captions, context_length=length).tolist()


@pytest.mark.parametrize("length", [2, 8, 32, 77])
def test_a_corpus_of_every_kind_has_the_published_tokens(published: Published, length: int) -> None:
    assert text.tokens(CORPUS, length) == published(CORPUS, length)


@settings(max_examples=150, deadline=None, database=None)
@given(st.text(max_size=60) | st.text(st.characters(max_codepoint=127), max_size=60))
def test_any_text_has_the_published_tokens(published: Published, caption: str) -> None:
    assert text.tokens([caption], 24) == published([caption], 24)


def test_the_null_caption_is_the_empty_one() -> None:
    assert text.null_tokens(5) == text.tokens([""], 5)[0] == [text.START, text.END, 0, 0, 0]
    with pytest.raises(ValueError, match="context_length is 1, START and END need 2"):
        text.tokens(["a"], 1)


def test_every_text_fits_and_ends_with_end() -> None:
    for words, length in itertools.product((0, 1, 5, 30, 40), (2, 7, 32)):
        (row,) = text.tokens(["red " * words], length)
        assert (len(row), row[0]) == (length, text.START)
        assert row[min(words + 1, length - 1)] == text.END


def test_only_pieces_of_the_length_of_words_are_remembered(published: Published) -> None:
    text.remembered.cache_clear()
    caption = "red " + "q" * 33 + " " + "x" * 32 + " red"
    assert text.tokens([caption], 77) == published([caption], 77)
    assert text.remembered.cache_info().currsize == 2


def test_tokenizing_imports_neither_torch_nor_open_clip() -> None:
    code = "import sys; from dd_core import text; text.tokens(['a'], 8); "
    code += "print([m for m in ('torch', 'open_clip', 'ray') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
