"""Corpus: English sentences that come along with scikit-learn and Python, and tokens to write them in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Literal

from unbatch.errors import MissingExtra, UnbatchError

TokenizerName = Literal["word", "byte-pair"]
PADDING, UNKNOWN = 0, 1  # numbers of the two tokens that stand for no text
FEWEST_WORDS, MOST_LETTERS = 4, 240  # of a sentence
LEAST_PROSE = 0.93  # share of a sentence that is letters, spaces and plain punctuation
TOPICS = {  # of Python's own help: what a class is called, and the topics that it is made of
    "statements": ("compound", "assignment", "import", "raise", "try"),
    "types": ("types", "typesseq", "typesmapping", "bltin-null-object"),
    "methods": ("specialnames", "customization", "attribute-access"),
    "strings": ("string-methods", "formatstrings", "strings"),
    "debugger": ("debugger",),
}
DATA_SETS = "data sets"  # the class of scikit-learn's descriptions of its data sets

_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*|\d+|\S")
_CLOSING = frozenset(".,;:!?)]}%")
_MARKUP = re.compile(r"\s*(\.\.|:|\||=|-{3}|\*{3}|>>>|\+|-)")


@cache
def sentences() -> Mapping[str, Sequence[str]]:
    """The corpus: by class, its sentences in their order, none of them twice.

    Descriptions of data sets from scikit-learn, and five parts of Python's own help (`pydoc_data.topics`).

    >>> min(len(held) for held in sentences().values()) > 30, "data sets" in sentences()
    (True, True)
    """
    from pydoc_data.topics import topics

    found = {
        name: [s for key in keys if key in topics for s in prose(topics[key])] for name, keys in TOPICS.items()
    } | {DATA_SETS: [s for text in _descriptions() for s in prose(text)]}
    seen = set[str]()
    return {name: [s for s in held if s not in seen and not seen.add(s)] for name, held in found.items()}  # type: ignore[func-returns-value]


def _descriptions() -> list[str]:
    try:
        folder = distribution("scikit-learn").locate_file("sklearn/datasets/descr")  # importing it would take a second
    except PackageNotFoundError:
        raise MissingExtra.of("the case text", "scikit-learn", "text") from None
    from pathlib import Path

    return [path.read_text(encoding="utf-8") for path in sorted(Path(str(folder)).glob("*.rst"))]


def prose(text: str) -> list[str]:
    """The whole sentences of a text with markup, without its headings, tables, lists and code.

    >>> prose("Title\\n=====\\n\\nThe first *sentence* of two\\nlines. And this is the second one.\\n\\n>>> x = 1\\n")
    ['The first sentence of two lines.', 'And this is the second one.']
    """
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if any(_MARKUP.match(line) for line in lines):
            continue
        words = re.sub(r"\s+", " ", re.sub(r"[*`|\"]+", "", " ".join(lines))).strip()
        found += [part for part in re.split(r"(?<=[.!?]) +(?=[A-Z])", words) if _is_sentence(part)]
    return found


def _is_sentence(words: str) -> bool:
    whole = words[:1].isupper() and words[-1:] in ".!?" and len(words) <= MOST_LETTERS
    plain = sum(c.isalpha() or c in " ,.'’-" for c in words) >= LEAST_PROSE * len(words)
    return whole and plain and len(re.findall(r"[A-Za-z]+", words)) >= FEWEST_WORDS


@dataclass(frozen=True)
class Tokenizer:
    """How a text is written in tokens: the vocabulary as it stands in a text, and each text's numbers."""

    vocabulary: tuple[str, ...]  # by number; the spaces before a token are part of it
    frequency: tuple[float, ...]  # how often each occurs in the corpus
    written: Mapping[str, tuple[int, ...]]  # the corpus's sentences as numbers


@cache
def tokenizer(kind: TokenizerName, size: int) -> Tokenizer:
    """A tokenizer of at most `size` tokens, made of the corpus: 0 is padding, 1 what is in no vocabulary.

    "word": its most frequent words in small letters, and punctuation; "byte-pair": runs of bytes (Sennrich, Haddow, Birch,
    2016, over bytes as in GPT-2), by the package tokenizers, which loses nothing.
    Raises MissingExtra: that package is not installed. UnbatchError: byte pairs in fewer tokens than bytes.

    >>> held = tokenizer("word", 3000)
    >>> held.vocabulary[:3], len(held.written) == len({text for texts in sentences().values() for text in texts})
    (('', ' [unknown]', ' the'), True)
    """
    texts = [s for held in sentences().values() for s in held]
    return _of_words(texts, size) if kind == "word" else _of_byte_pairs(texts, size)


def _of_words(texts: Sequence[str], size: int) -> Tokenizer:
    split = {text: _WORD.findall(text.lower()) for text in texts}
    counts = Counter(word for words in split.values() for word in words)
    kept = sorted(counts, key=lambda word: (-counts[word], word))[: size - 2]
    number = {word: i for i, word in enumerate(kept, 2)}
    pieces = ["", " [unknown]", *(word if word in _CLOSING else f" {word}" for word in kept)]
    written = {text: tuple(number.get(word, UNKNOWN) for word in words) for text, words in split.items()}
    return _counted(pieces, written)


def _of_byte_pairs(texts: Sequence[str], size: int) -> Tokenizer:
    if find_spec("tokenizers") is None:
        raise MissingExtra.of("the byte-pair tokenizer", "tokenizers", "text")
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + 3:
        raise UnbatchError(f"vocabulary={size} leaves no pair of bytes; give at least {len(alphabet) + 3}.")
    made = Trained(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["[padding]", "[unknown]"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    pieces = ["", " [unknown]", *(made.decode([i]) for i in range(2, made.get_vocab_size()))]
    return _counted(pieces, {text: tuple(made.encode(text).ids) for text in texts})


def _counted(pieces: Sequence[str], written: Mapping[str, tuple[int, ...]]) -> Tokenizer:
    counts = Counter(number for numbers in written.values() for number in numbers)
    total = sum(counts.values())
    return Tokenizer(tuple(pieces), tuple(counts[i] / total for i in range(len(pieces))), written)
