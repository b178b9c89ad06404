"""A conversation as the tokens that a model reads: its messages, the oldest dropped where the context is full."""

from collections.abc import Callable, Sequence

from milepost.text.templates import NO_TEMPLATE, Message, chat_ids, chat_stops
from milepost.text.tokenization.base import Tokenizer


def message_ids(messages: Sequence[Message], tokenizer: Tokenizer, template: str | None) -> list[int]:
    """Return the tokens of the messages up to where the answer begins.

    `template` is Jinja, None for the plain template, or NO_TEMPLATE. Raise TemplateError if it refuses the messages.
    """
    if template == NO_TEMPLATE:
        return tokenizer.encode_whole(continued(messages))
    return chat_ids(messages, tokenizer, template, answer=True)


def answer_stops(tokenizer: Tokenizer, template: str | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the ids and the strings at which an answer ends, besides the tokenizer's own stop_ids."""
    return ((), ()) if template == NO_TEMPLATE else chat_stops(tokenizer, template)


def continued(messages: Sequence[Message]) -> str:
    """Return the messages as one text for a model without a chat template: each answer directly continues what precedes it.

    What follows an answer begins on a new line.
    """
    text = ""
    for before, message in zip([None, *messages], messages, strict=False):
        if before is not None and before["role"] == "assistant" and not text.endswith("\n"):
            text += "\n"
        text += message["content"]
    return text


def turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Return the messages in groups that begin with one of the user; what precedes the first stands in a group of its own."""
    groups: list[list[Message]] = []
    for message in messages:
        if message["role"] == "user" or not groups:
            groups.append([])
        groups[-1].append(message)
    return groups


def fitted(
    messages: Sequence[Message], encode: Callable[[Sequence[Message]], list[int]], *, room: int
) -> tuple[list[int], int]:
    """Return the tokens of the latest messages that fit into `room` tokens, and how many of the oldest turns were dropped.

    A system message at the beginning stays. The last turn stays whole even if it alone does not fit.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    groups = turns(messages[len(system) :])
    dropped = 0
    while True:
        ids = encode([*system, *(message for group in groups[dropped:] for message in group)])
        if len(ids) <= room or dropped >= len(groups) - 1:
            return ids, dropped
        dropped += 1
