"""Conversations in the rows of files: recognized by their keys, checked, and as messages."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from milepost.text import blocks
from milepost.text.blocks import normalized
from milepost.text.errors import DataError, TextFieldError
from milepost.text.readers import ROWS, Piece, Reading, first_row, listed, suffix_of
from milepost.text.templates import render

Talk = list[dict[str, str]]  # messages: {"role": "system" | "user" | "assistant", "content": text}

TEXT: Final = ""  # the form of rows that are plain documents, and of files without rows
FORMS: Final[dict[str, tuple[str, ...]]] = {  # form -> the keys by which it is recognized, in this order
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
}
TOOLS: Final = ("tools", "functions")
MEDIA: Final = ("image", "images", "audio", "audios", "video", "videos")
INPUT: Final = "input"  # what an instruction is about
# Members of a message that are read, or refused for what they say.
MESSAGE: Final = ("role", "content", "weight", "tool_calls", "function_call")
OPTIONAL: Final = (INPUT, *TOOLS, *MEDIA)  # keys that a row may have besides
CHOSEN: Final = "chosen"  # the form of rows whose fields the user names
TURNS: Final = {"system": "user", "user": "assistant", "assistant": "user"}  # role -> the role that follows it


def form_of(paths: Iterable[Path], reading: Reading, note: Callable[[str], None] = lambda _: None) -> str:
    """Return the form of the rows of files, by the first row of the first that is not blank; TEXT if they are documents.

    A conversation that such rows hold beside a text goes to `note`. Raise DataError if other files among them have no rows.
    """
    paths = list(paths)
    with_rows = [path for path in paths if suffix_of(path.name) in ROWS]
    form = _form_of_first(with_rows, reading, note)
    if form == CHOSEN and not with_rows:
        note(f"{paths[0]}: plain text has no fields, so {' and '.join(_chosen(reading))} are not looked for")
        return TEXT
    if form == TEXT:
        return TEXT
    if others := [path for path in paths if path not in with_rows]:
        raise DataError(
            f"{others[0]} is plain text, but {listed([str(path) for path in with_rows[:1]])} holds conversations "
            f"({_keys(form, reading)}): train on the one or on the other"
        )
    return form


def _form_of_first(paths: list[Path], reading: Reading, note: Callable[[str], None]) -> str:
    if reading.verbatim:
        return TEXT  # versions that read so knew no conversations
    if reading.prompt_field is not None or reading.answer_field is not None:
        return CHOSEN
    if reading.text_field != Reading.text_field or not paths:
        return TEXT
    try:
        path, row = next(((path, row) for path in paths if (row := first_row(path)) is not None), (None, None))
    except DataError:  # reading the text reports it
        return TEXT
    if not isinstance(row, Mapping):
        return TEXT
    form = next((form for form, keys in FORMS.items() if all(key in row for key in keys)), TEXT)
    if reading.text_field not in row:
        return form
    if form != TEXT:
        also = ", ".join(FORMS[form])
        note(f"{path}: its rows have {reading.text_field}, which is read, and {also}, which are not: take the former out to train on answers")  # fmt: skip
    return TEXT


def _keys(form: str, reading: Reading) -> str:
    return ", ".join(_chosen(reading) if form == CHOSEN else FORMS[form])


def _chosen(reading: Reading) -> tuple[str, str]:
    return reading.prompt_field or "prompt", reading.answer_field or "completion"


def described(form: str, reading: Reading) -> str:
    """Return what is read as a conversation, in words."""
    keys = _keys(form, reading)
    return f"its rows are conversations ({keys})"


def conversations(path: Path, reading: Reading) -> Iterator[tuple[str, Talk]]:
    """Yield each conversation of a file with its place. Raise DataError naming the row that is not of the reading's form.

    Keys of rows and of messages that are not read go to the reading's `note`: one may be a system message, or what the
    assistant thinks.
    """
    keys = _chosen(reading) if reading.form == CHOSEN else FORMS[reading.form]
    known = {*keys, *TOOLS, *MEDIA, *([INPUT] if keys == FORMS["instruction"] else [])}
    others: dict[str, None] = {}  # members that are not read, of rows
    inside: dict[str, None] = {}  # and of messages
    for where, row in ROWS[suffix_of(path.name)](path, reading, (*keys, *OPTIONAL)):
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected an object with {', '.join(keys)}, found a {type(row).__name__}")
        _check_keys(row, keys, where, chosen=reading.form == CHOSEN)
        others.update(dict.fromkeys(key for key in map(str, row) if key not in known))
        if any(row.get(key) for key in TOOLS):
            raise DataError(f"{where}: has tools, which no template here writes: leave the row out")
        if media := next((key for key in MEDIA if row.get(key)), None):
            raise DataError(f"{where}: has {media}, and these models read text only: leave the row out")
        talk = _messages(row["messages"], where) if reading.form == "messages" else _pair(row, keys, where)
        _check_order(talk, where)
        if reading.form == "messages":
            inside.update(dict.fromkeys(_unread(row["messages"])))
        yield where, talk
    if inside:
        reading.note(f"{path}: members of its messages that are not read: {listed(list(inside))}")
    if others:
        reading.note(f"{path}: members of its rows that are not read: {listed(list(others))}")


def _unread(messages: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the members of messages that hold something and are not read."""
    for message in messages:
        yield from (str(key) for key, value in message.items() if key not in MESSAGE and value is not None)


def _check_keys(row: Mapping[str, Any], keys: tuple[str, ...], where: str, *, chosen: bool) -> None:
    """Raise DataError if a row lacks one of the keys; TextFieldError if it was the user who chose them."""
    lacking, has = [key for key in keys if key not in row], listed(list(map(str, row)))
    if lacking and chosen:
        raise TextFieldError(f"{where}: expected members {' and '.join(keys)}, found {has}")
    if lacking:
        remedy = "complete the row or leave it out"
        if any(row.keys() >= set(other) for other in FORMS.values()):
            remedy = "put each form into files of its own and mix them by weights (a.jsonl*1,b.jsonl*1)"
        raise DataError(f"{where}: has {has}, but not {', '.join(lacking)} as the first row: {remedy}")


def _pair(row: Mapping[str, Any], keys: tuple[str, ...], where: str) -> Talk:
    """Return the conversation of a question and its answer, with the `input` that an instruction may have."""
    question, answer = (_text(row[key], key, where) for key in keys)
    more = row.get(INPUT) if keys == FORMS["instruction"] else None
    if more is not None and _text(more, INPUT, where, empty=True).strip():
        question = f"{question}\n\n{normalized(more)}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _messages(value: Any, where: str) -> Talk:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages is {value!r:.60}: expected a list of messages, each with role and content")
    return [_message(message, number, where) for number, message in enumerate(value, 1)]


def _message(message: Any, number: int, where: str) -> dict[str, str]:
    where = f"{where}, message {number}"
    if not isinstance(message, Mapping) or "role" not in message:
        raise DataError(f"{where}: expected an object with role and content, found {message!r:.60}")
    role, content = message["role"], message.get("content")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise DataError(f"{where}: calls a tool, which no template here writes: leave the row out")
    if not isinstance(role, str) or role not in TURNS:
        raise DataError(f"{where}: its role is {role!r:.40}: expected system, user or assistant")
    if message.get("weight") not in (None, 1):  # as OpenAI's fine-tuning has it: 0 keeps an answer out of the loss
        problem = f"its weight is {message['weight']!r:.20}, and all answers count alike"
        raise DataError(f"{where}: {problem}: take the weight out, or leave the row out")
    if isinstance(content, list):
        raise DataError(f"{where}: its content is a list of parts, as of images: expected text")
    return {"role": role, "content": _text(content, "content", where)}


def _text(value: Any, key: str, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        remedy = "; messages go into one list, under the key messages" * isinstance(value, list)
        raise DataError(f"{where}: {key} is {value!r:.60}: expected text{remedy}")
    if re.search("[\ud800-\udfff]", value):
        raise DataError(f"{where}: {key} holds half of a surrogate pair, which is not a character")
    if not value.strip() and not empty:
        raise DataError(f"{where}: {key} is empty: fill it or leave the row out")
    return normalized(value)


def _check_order(talk: Talk, where: str) -> None:
    """Raise DataError unless user and assistant take turns, after a system message if there is one, and the assistant is last."""
    expected: tuple[str, ...] = ("system", "user")
    for number, message in enumerate(talk, 1):
        if message["role"] not in expected:
            wanted = " or ".join(expected)
            raise DataError(f"{where}, message {number}: comes from {message['role']}, expected {wanted}")
        expected = (TURNS[message["role"]],)
    if talk[-1]["role"] != "assistant":
        raise DataError(f"{where}: ends with a message of the {talk[-1]['role']}: expected an answer of the assistant")


def as_pieces(talks: Iterable[tuple[str, Talk]]) -> Iterator[Piece]:
    """Yield conversations as documents, in the plain template: their fingerprint, and what a tokenizer is trained on."""
    for _, talk in talks:
        text = render(talk, None)
        for start in range(0, len(text), blocks.BLOCK):
            yield text[start : start + blocks.BLOCK], start + blocks.BLOCK >= len(text)
