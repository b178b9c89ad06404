"""Conversations as token ids, by a chat template: the plain one of this project, or a model's own in Jinja.

A message is {"role": "system" | "user" | "assistant", "content": text}. A special token that a template writes becomes its id;
the same characters in a message are ordinary text. The plain template, which works with every tokenizer, is

    User:
    What is a wren?<end>
    Assistant:
    A small bird.<end>

where <end> is the tokenizer's end of text, or the characters `<|end|>` if it has none. In a message these get a space after
the `<`, so nobody can end another's turn.

A template of Jinja is rendered as transformers renders it, in a sandbox. It is self-contained: `with_tokens` puts the names of
tokens that transformers passes to it (bos_token) at its beginning, and `dated` the date that it writes.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from milepost.lazy import np
from milepost.text.errors import DataError
from milepost.text.tokenization.base import Tokenizer

Message = Mapping[str, str]

ROLES: Final = {"system": "System", "user": "User", "assistant": "Assistant"}
PLAIN_END: Final = "<|end|>"
NO_TEMPLATE: Final = ""  # the messages are one text that the model continues
SAFE_JINJA: Final = (3, 1, 6)
DATE: Final = re.compile(r"\{# date: (\d{4}-\d\d-\d\d) #\}")  # at the beginning of a template
PRIVATE: Final = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # private code points


class Span(NamedTuple):
    """A part of a rendered conversation: text or one special token, and whether an assistant writes it."""

    text: str
    special: bool
    answer: bool


class TemplateError(DataError):
    """A chat template cannot render a conversation."""


# ---------------------------------------------------------------------------------------------------------------------
# What chat programs and training call.


def template_of(data: Mapping[str, Any], tokenizer: Tokenizer) -> str | None:
    """Return the chat template of a model: the one in `data`, the record of its training text, which names it if that was
    conversations (None is the plain template); else its tokenizer's, else NO_TEMPLATE.
    """
    template = data.get("template", tokenizer.chat_template or NO_TEMPLATE)
    return template if template is None or isinstance(template, str) else NO_TEMPLATE


def chat_ids(messages: Sequence[Message], tokenizer: Tokenizer, template: str | None, *, answer: bool) -> list[int]:
    """Return the ids of a conversation; with `answer`, up to where the assistant's next message begins.

    `template` is Jinja, or None for the plain template. Raise TemplateError if the template refuses the conversation,
    UnknownCharacters if the vocabulary lacks a character of it.
    """
    ids, _ = example(messages, tokenizer, template, answer=answer)
    return ids.tolist()


def example(
    messages: Sequence[Message], tokenizer: Tokenizer, template: str | None, *, answer: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a conversation, uint32 (N,), and which of them an assistant writes, bool (N,).

    Raise as `chat_ids` does.
    """
    specials = tokenizer.special_tokens
    after: Literal["nothing", "text", "special"] = "nothing"
    begin = tokenizer.begin_of_text if template is None else None  # a template of Jinja writes it itself
    ids = [np.array([i for i in [begin] if i is not None], np.uint32)]
    answers = [np.zeros(len(ids[0]), bool)]
    for span in spans(messages, template, specials, end=end_token(tokenizer), answer=answer):
        if span.special:
            part = np.array([specials[span.text]], np.uint32)
        else:
            part = tokenizer.encode_part(span.text, after=after)
        after = "special" if span.special else "text" if span.text else after
        ids.append(part.astype(np.uint32))
        answers.append(np.full(len(part), span.answer))
    return np.concatenate(ids), np.concatenate(answers)


def chat_stops(tokenizer: Tokenizer, template: str | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the ids and the strings at which an answer ends, besides the tokenizer's own stop_ids.

    They are read off a short conversation, with a system message if the template demands one; none if it takes neither.
    """
    if template is None:
        return (), (() if end_token(tokenizer) else (PLAIN_END,))
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for messages in (talk, [{"role": "system", "content": "c"}, *talk]):
        with contextlib.suppress(TemplateError):
            found = [span for span in spans(messages, template, tokenizer.special_tokens) if span.answer]
            return ((tokenizer.special_tokens[found[-1].text],) if found and found[-1].special else ()), ()
    return (), ()


def render(messages: Sequence[Message], template: str | None, *, answer: bool = False, end: str = PLAIN_END) -> str:
    """Return a conversation as text, as transformers' apply_chat_template does for a template of Jinja.

    Raise TemplateError if the template is broken or refuses the conversation.
    """
    if template is None:
        head = f"{ROLES['assistant']}:\n" if answer else ""
        return "".join(span.text for span in _plain_spans(messages, end, special=False)) + head
    return _rendered(template, messages, answer=answer)


def end_token(tokenizer: Tokenizer) -> str | None:
    """Return the text of the special token that ends a text; None if the tokenizer has none."""
    by_id = {i: text for text, i in tokenizer.special_tokens.items()}
    return None if tokenizer.end_of_text is None else by_id.get(tokenizer.end_of_text)


def turn_marks(tokenizer: Tokenizer) -> str:
    """Return the characters with which the plain template marks questions, answers and the end of each."""
    heads = "".join(f"{ROLES[role]}:\n" for role in ("user", "assistant"))
    return heads if end_token(tokenizer) else heads + PLAIN_END


def plain_jinja(end: str, *, begin: str = "") -> str:
    """Return the plain template in Jinja, for other programs; the special token `end` ends a turn, `begin` comes before all."""
    turn = "names[message['role']] + ':\\n' + message['content'] + " + json.dumps(end) + " + '\\n'"
    return (
        f"{{%- set names = {json.dumps(ROLES)} -%}}"
        f"{f'{{{{ {json.dumps(begin)} }}}}' if begin else ''}"
        f"{{%- for message in messages -%}}{{{{ {turn} }}}}{{%- endfor -%}}"
        "{%- if add_generation_prompt -%}{{ names['assistant'] + ':\\n' }}{%- endif -%}"
    )


def with_tokens(template: str, tokens: Mapping[str, str]) -> str:
    """Return a template that defines the names of tokens itself, such as bos_token."""
    heads = [f"{{%- set {name} = {json.dumps(text)} %}}" for name, text in sorted(tokens.items()) if name in template]
    first = "\n" if heads and template.startswith("\n") else ""  # the first line end after a statement is dropped
    return "".join(heads) + first + template


def dated(template: str, day: datetime.date) -> str:
    """Return a template that writes this date on any day, if it would write that of its rendering (`strftime_now`).

    A run that resumes on another day trains on the same tokens then. To other programs the date is a comment.
    """
    if "strftime_now" not in template or DATE.match(template):
        return template
    first = "\n" if template.startswith("\n") else ""  # the first line end after a comment is dropped
    return f"{{# date: {day.isoformat()} #}}{first}{template}"


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a conversation.


def spans(
    messages: Sequence[Message],
    template: str | None,
    specials: Iterable[str],
    *,
    end: str | None = None,
    answer: bool = False,
) -> Iterator[Span]:
    """Yield the parts of a conversation. `end` is the special token that ends a turn of the plain template, if there is one."""
    if template is not None:
        yield from _jinja_spans(messages, template, list(specials), answer=answer)
        return
    yield from _plain_spans(messages, end or PLAIN_END, special=end is not None)
    if answer:
        yield Span(f"{ROLES['assistant']}:\n", False, False)


def _plain_spans(messages: Sequence[Message], end: str, *, special: bool) -> Iterator[Span]:
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise TemplateError(f"the plain template has no role {role!r:.40}: expected {', '.join(ROLES)}")
        by_assistant = role == "assistant"
        yield Span(f"{ROLES[role]}:\n", False, False)
        yield Span(content if special else without_end(content), False, by_assistant)
        yield Span(end, special, by_assistant)
        yield Span("\n", False, False)


def without_end(content: str) -> str:
    """Return a message in which nothing reads as the end of a turn of the plain template; different messages stay different."""
    return re.sub(r"<( *)\|end\|>", r"< \1|end|>", content)


def _jinja_spans(messages: Sequence[Message], template: str, specials: list[str], *, answer: bool) -> Iterator[Span]:
    hidden, shown = _hidden(messages, specials)
    whole = _rendered(template, hidden, answer=answer)
    pattern = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    found = [(match.start(), match.end()) for match in re.finditer(pattern, whole)] if specials else []
    answers = list(_answers(hidden, template, whole, found))
    edges = sorted({0, len(whole), *(edge for pair in (*found, *answers) for edge in pair)})
    tokens = set(found)
    for start, stop in itertools.pairwise(edges):
        by_assistant = any(first <= start < last for first, last in answers)
        text, special = whole[start:stop], (start, stop) in tokens
        yield Span(text if special else text.translate(shown), special, by_assistant)


def _hidden(messages: Sequence[Message], specials: list[str]) -> tuple[list[dict[str, str]], dict[int, str]]:
    """Return the messages with a private character for each special token in them, and the table that undoes it.

    Raise TemplateError if the messages leave too few private characters free.
    """
    contents = "".join(message["content"] for message in messages)
    there = [token for token in sorted(specials, key=len, reverse=True) if token in contents]
    taken = set(contents)
    free = (code for code in itertools.chain(*PRIVATE) if chr(code) not in taken)
    codes = dict(zip(there, free, strict=False))
    if len(codes) < len(there):
        raise TemplateError(
            "a message holds every private character of Unicode, so its special tokens cannot be told apart"
        )
    hidden = []
    for message in messages:
        content = message["content"]
        for token, code in codes.items():
            content = content.replace(token, chr(code))
        hidden.append({"role": message["role"], "content": content})
    return hidden, {code: token for token, code in codes.items()}


def _answers(
    messages: Sequence[Message], template: str, whole: str, specials: list[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Yield where each message of an assistant begins and ends in the rendered conversation.

    It begins where the template would let the assistant begin, and ends with the first special token after the message, or
    with the message if the template writes none. What the template writes before the message, as one does that begins no
    answer itself, is part of it: the model has to write that too.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    heads = [_rendered(template, messages[:number], answer=True) for number in turns]
    for number, (head, following) in zip(turns, itertools.pairwise([*heads, whole]), strict=True):
        content, begin = messages[number]["content"].strip(), len(head)
        found = whole.find(content, begin, len(following))  # not there if the template changes it
        after = found + len(content) if found >= 0 else begin
        stop = next((last for first, last in specials if first >= after), None)
        if stop is None:
            tail = whole if number + 1 == len(messages) else _rendered(template, messages[: number + 1], answer=False)
            stop = len(tail) if whole.startswith(tail) else None
        if stop is None or not whole.startswith(head):
            raise TemplateError(
                "the chat template changes earlier messages when later ones follow, so its answers cannot be found"
            )
        if (begin, stop) in specials and found < 0 and head == _rendered(template, messages[:number], answer=False):
            raise TemplateError("the chat template begins no answer and changes the message, so it cannot be found")
        yield begin, stop


# ---------------------------------------------------------------------------------------------------------------------
# Jinja, as transformers sets it up.


def _rendered(template: str, messages: Sequence[Message], *, answer: bool) -> str:
    """Return the text of the conversation. Raise TemplateError for whatever the template does wrong."""
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        return str(_compiled(template).render(messages=plain, tools=None, documents=None, add_generation_prompt=answer))
    except TemplateError:
        raise
    except Exception as error:  # a template can raise anything
        raise TemplateError(f"the chat template cannot render the conversation ({error!s:.300})") from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """Return a template in the sandbox that transformers uses for it, from which no Python object can be reached."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < SAFE_JINJA:
        raise TemplateError("chat templates need jinja2 3.1.6 or newer, whose sandbox holds: pip install -U jinja2")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    found = DATE.match(template)
    date = datetime.datetime.fromisoformat(found[1]) if found else None
    environment.globals["strftime_now"] = lambda form: (date or datetime.datetime.now()).strftime(form)
    return environment.from_string(template)


def _generation_tag() -> Any:
    """Return an extension for `{% generation %}`, with which some templates mark answers: its content is rendered as it is."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation


def _raise(message: str) -> None:
    raise TemplateError(f"the chat template refuses the conversation: {message!s:.300}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
