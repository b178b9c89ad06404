"""Multiple-choice benchmarks from files. HellaSwag, BLiMP and story cloze are read into one form."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.text.errors import DataError
from milepost.text.readers import PLAIN, ROWS, suffix_of

SUFFIXES = (".jsonl", ".csv")
BENCHMARK_LIMIT = 1 << 28  # characters of all items of a file; HellaSwag's 10,042 questions have 9 million
ITEM = 300  # as many characters take as much memory as an item without its texts

Row = Mapping[str, Any]  # the keys as `_plain` returns them


@dataclass(frozen=True)
class Item:
    """A question: which of `choices` continues `context`, after a space. Without context each choice is a whole text."""

    context: str
    choices: tuple[str, ...]
    answer: int  # index of the correct choice


@dataclass(frozen=True)
class Benchmark:
    """The items of a file, all of the same format."""

    path: Path
    format: str
    items: tuple[Item, ...]

    @property
    def name(self) -> str:
        """The file name without suffixes."""
        return self.path.name.split(".")[0]

    @property
    def alphabet(self) -> str:
        """The distinct characters of all texts, sorted."""
        texts = {char for item in self.items for text in (" ", item.context, *item.choices) for char in text}
        return "".join(sorted(texts))


def read_benchmark(path: Path) -> Benchmark:
    """Return the benchmark of a .jsonl or .csv file, also with .gz. Raise DataError naming the line that has no known format."""
    if suffix_of(path.name) not in SUFFIXES:
        raise DataError(f"{path}: benchmarks are read from {' and '.join(SUFFIXES)}, each also with .gz")
    items, formats, characters = [], set(), 0
    for where, values in ROWS[suffix_of(path.name)](path, PLAIN, ()):
        if not isinstance(values, dict):
            raise DataError(f"{where}: expected an object, found a {type(values).__name__}")
        row = {_plain(name): value for name, value in values.items() if isinstance(name, str)}
        kind = _format_of(row, where)
        formats.add(kind)
        if len(formats) > 1:
            raise DataError(
                f"{where} is of format {kind}, the lines before are not: put each format into a separate file"
            )
        items.append(FORMATS[kind][1](row, where))
        characters += ITEM + len(items[-1].context) + sum(map(len, items[-1].choices))
        if characters > BENCHMARK_LIMIT:  # all items are held in memory
            raise DataError(
                f"{where}: the items up to here exceed {BENCHMARK_LIMIT:,} characters: use part of the file"
            )
    if not items:
        raise DataError(f"{path} holds no item: expected one per line")
    return Benchmark(path=path, format=formats.pop(), items=tuple(items))


def _plain(name: str) -> str:
    """Return a name in lower case without underscores: published files differ in both."""
    return name.strip().lower().replace("_", "")


def _has(row: Row, names: Iterable[str]) -> bool:
    return all(_plain(name) in row for name in names)


def _format_of(row: Row, where: str) -> str:
    for kind, (names, _) in FORMATS.items():
        if _has(row, names):
            return kind
    expected = "; ".join(f"{kind} has {', '.join(names)}" for kind, (names, _) in FORMATS.items())
    raise DataError(f"{where} has {', '.join(list(row)[:10]) or 'nothing'}, which is no known format: {expected}")


# The formats


def _text(row: Row, name: str, where: str) -> str:
    value = row[_plain(name)]
    if not isinstance(value, str) or not value.strip() or re.search("[\ud800-\udfff]", value):
        raise DataError(f"{where}: {name} is {value!r:.60}: expected text")
    return value.strip()


def _answer(row: Row, name: str, where: str, *, first: int, count: int) -> int:
    """Return the index of the correct choice. The file counts from `first`, as a number or as digits."""
    value = row[_plain(name)]
    digits = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch("[0-9]", digits) or not 0 <= int(digits) - first < count:
        raise DataError(
            f"{where}: {name} is {value!r:.60}: expected {first} to {first + count - 1} (a test split may come without answers)"
        )
    return int(digits) - first


def _hellaswag(row: Row, where: str) -> Item:
    """Return the item as lm-evaluation-harness 0.4 builds it (lm_eval/tasks/hellaswag): activity, colon, context; else `ctx` only."""
    endings = row["endings"]
    if not isinstance(endings, list) or not 2 <= len(endings) <= 10:
        raise DataError(f"{where}: endings is {endings!r:.60}: expected a list of 2 to 10 texts")
    if _has(row, ("activity_label", "ctx_a", "ctx_b")):
        first, second = (str(row[name] or "") for name in ("ctxa", "ctxb"))
        context = f"{row['activitylabel']}: {first} {second.capitalize()}"
    elif "ctx" in row:
        context = _text(row, "ctx", where)
    else:
        raise DataError(f"{where} has no ctx: expected the text that the endings continue")
    choices = tuple(_cleaned(_text({"ending": ending}, "ending", where), "ending", where) for ending in endings)
    answer = _answer(row, "label", where, first=0, count=len(choices))
    return Item(context=_cleaned(context, "ctx", where), choices=choices, answer=answer)


def _cleaned(text: str, name: str, where: str) -> str:
    """Return a HellaSwag text without WikiHow's markup in brackets. Raise DataError if nothing else is left."""
    cleaned = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    if not cleaned.strip():
        raise DataError(f"{where}: {name} is {text!r:.60}: nothing of it is left without the markup in brackets")
    return cleaned


def _minimal_pair(row: Row, where: str) -> Item:
    pair = _text(row, "sentence_good", where), _text(row, "sentence_bad", where)
    return Item(context="", choices=pair, answer=0)


def _story(row: Row, where: str) -> Item:
    """Return the item of four sentences and two endings (Mostafazadeh et al. 2016, "A corpus and cloze evaluation for deeper
    understanding of commonsense stories")."""
    names = next((pair for pair in QUIZZES if _has(row, pair)), None)
    if names is None:
        raise DataError(f"{where} has no endings: expected {' or '.join(', '.join(pair) for pair in QUIZZES)}")
    context = " ".join(_text(row, name, where) for name in SENTENCES)
    choices = tuple(_text(row, name, where) for name in names)
    return Item(context=context, choices=choices, answer=_answer(row, "AnswerRightEnding", where, first=1, count=2))


SENTENCES = tuple(f"InputSentence{number}" for number in (1, 2, 3, 4))
QUIZZES = tuple((f"{word}1", f"{word}2") for word in ("RandomFifthSentenceQuiz", "sentence_quiz"))
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row, str], Item]]] = {
    "hellaswag": (("endings", "label"), _hellaswag),
    "blimp": (("sentence_good", "sentence_bad"), _minimal_pair),
    "storycloze": ((*SENTENCES, "AnswerRightEnding"), _story),
}
