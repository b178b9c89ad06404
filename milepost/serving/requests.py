"""What a request asks for: its JSON checked field by field, as data. Unknown fields are refused, as OpenAI does."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from milepost.serving.faults import invalid
from milepost.text.templates import Message

MOST_TEXTS: Final = 128  # after each prompt
MOST_PROMPTS: Final = 2048
MOST_IN_ALL: Final = 2048  # prompts times texts of each
MOST_STOPS: Final = 16
MOST_TOKENS: Final = 1 << 20
MOST_LOGPROBS: Final = 20
MAX_SEED: Final = 2**63 - 1
ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

Prompt = str | list[int]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request: prompts to continue, or messages to answer. `sampling` has the fields of Sampling that it sets.

    `logprobs` is how many of the likeliest tokens to list beside each token; None for no log-probabilities.
    """

    model: str | None
    prompts: list[Prompt]
    messages: list[Message] | None
    sampling: Mapping[str, Any]
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    include_usage: bool = False


class Field(NamedTuple):
    """A field of a request: whether a value is valid, and what is expected."""

    valid: Callable[[Any], bool]
    expected: str


def _is_whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high and math.isfinite(value)


def is_text(value: Any) -> bool:
    """Return whether the value is a string of characters; JSON can write halves of surrogate pairs."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _whole(low: int, high: int) -> Field:
    return Field(lambda value: _is_whole(value, low, high), f"a whole number from {low} to {high}")


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return len(texts) <= MOST_STOPS and all(is_text(text) and text for text in texts)


def _only(value: Any, shown: str) -> Field:
    return Field(
        lambda given: given == value and type(given) is type(value), f"{shown}, as nothing else is offered here"
    )


BOOLEAN = Field(lambda value: isinstance(value, bool), "true or false")
ANYTHING = Field(lambda value: True, "")
SHARED: Final[dict[str, Field]] = {
    "model": Field(lambda value: isinstance(value, str), "the name of a model"),
    "max_tokens": _whole(0, MOST_TOKENS),
    "temperature": Field(lambda value: _is_number(value, 0, 1e6), "a number from 0"),
    "top_p": Field(lambda value: _is_number(value, 0, 1) and value > 0, "a number above 0 and at most 1"),
    "top_k": _whole(0, MAX_SEED),
    "repetition_penalty": Field(lambda value: _is_number(value, 1e-6, 1e6), "a number above 0, with 1 for off"),
    "stop": Field(_is_stop, f"a string that is not empty, or up to {MOST_STOPS} of them"),
    "n": _whole(1, MOST_TEXTS),
    "seed": _whole(0, MAX_SEED),
    "stream": BOOLEAN,
    "stream_options": Field(
        lambda value: isinstance(value, dict) and value.keys() <= {"include_usage", "include_obfuscation"},
        "an object with include_usage",
    ),
    "presence_penalty": Field(lambda value: value == 0, "0: repetition_penalty is what is offered here"),
    "frequency_penalty": Field(lambda value: value == 0, "0: repetition_penalty is what is offered here"),
    "logit_bias": _only({}, "no bias"),
    "user": ANYTHING,  # of these, nothing depends on the value
    "metadata": ANYTHING,
    "safety_identifier": ANYTHING,
    "prompt_cache_key": ANYTHING,
    "service_tier": ANYTHING,
}  # fmt: skip
COMPLETION: Final[dict[str, Field]] = SHARED | {
    "prompt": Field(lambda value: True, "a string, token ids, or a list of these"),
    "echo": BOOLEAN,
    "logprobs": _whole(0, MOST_LOGPROBS),
    "best_of": Field(lambda value: type(value) is int, "n"),
    "suffix": _only("", "no suffix"),
}
CHAT: Final[dict[str, Field]] = SHARED | {
    "messages": Field(lambda value: isinstance(value, list), "a list of messages"),
    "max_completion_tokens": _whole(0, MOST_TOKENS),
    "logprobs": BOOLEAN,
    "top_logprobs": _whole(0, MOST_LOGPROBS),
    "response_format": _only({"type": "text"}, 'the type "text"'),
    "tools": _only([], "no tools"),
    "tool_choice": _only("none", '"none"'),
    "functions": _only([], "no functions"),
    "function_call": _only("none", '"none"'),
    "parallel_tool_calls": BOOLEAN,
    "modalities": _only(["text"], '["text"]'),
    "store": _only(False, "false"),
}


def completion(body: Any) -> Asked:
    """Return what the body of /v1/completions asks for; raise ApiError."""
    given = checked(body, COMPLETION)
    if given.get("best_of", given.get("n", 1)) != given.get("n", 1):
        raise invalid("best_of: expected the value of n, as nothing else is offered here", "best_of")
    several = prompts(given.get("prompt", ""))
    _check_count(len(several), given.get("n", 1))
    return Asked(
        prompts=several,
        messages=None,
        echo=given.get("echo", False),
        logprobs=given.get("logprobs"),
        **_shared(given, "max_tokens"),
    )


def chat(body: Any) -> Asked:
    """Return what the body of /v1/chat/completions asks for; raise ApiError."""
    given = checked(body, CHAT)
    if "messages" not in given:
        raise invalid("messages is missing: expected a list of messages", "messages")
    top = given.get("top_logprobs")
    if top is not None and not given.get("logprobs"):
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    limit = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    return Asked(
        prompts=[],
        messages=messages(given["messages"]),
        logprobs=(top or 0) if given.get("logprobs") else None,
        **_shared(given, limit),
    )


def checked(body: Any, fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the fields of a body that are set, all valid; raise ApiError. null counts as not set."""
    if not isinstance(body, dict):
        raise invalid("the body is not a JSON object")
    for name in body.keys() - fields.keys():
        raise invalid(f"Unrecognized request argument supplied: {name!r:.80}", str(name)[:80])
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if not fields[name].valid(value):
            raise invalid(f"{name}={value!r:.80}: expected {fields[name].expected}", name)
    return given


def _shared(given: Mapping[str, Any], limit: str) -> dict[str, Any]:
    """Return the fields of Asked that both kinds of request have."""
    sampling = {name: given[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty") if name in given}
    if limit in given:
        sampling["max_new_tokens"] = given[limit]
    if "stop" in given:
        sampling["stop"] = (given["stop"],) if isinstance(given["stop"], str) else tuple(given["stop"])
    if "stream_options" in given and not given.get("stream"):
        raise invalid("stream_options needs stream: true", "stream_options")
    return {
        "model": given.get("model"),
        "sampling": sampling,
        "n": given.get("n", 1),
        "seed": given.get("seed"),
        "stream": given.get("stream", False),
        "include_usage": bool(given.get("stream_options", {}).get("include_usage")),
    }


def prompts(value: Any) -> list[Prompt]:
    """Return the prompts of a completion: of a string, of token ids, or of a list of these; raise ApiError."""
    several = value if isinstance(value, list) and value and not _is_ids(value) else [value]
    if len(several) > MOST_PROMPTS:
        raise invalid(f"prompt has {len(several)} parts: expected at most {MOST_PROMPTS}", "prompt")
    if value == [] or not all(is_text(each) or (_is_ids(each) and each) for each in several):
        raise invalid("prompt: expected a string of valid characters, token ids, or a list of these", "prompt")
    return several


def _check_count(count: int, n: int) -> None:
    """Raise ApiError if `n` texts after each of so many prompts are more than a request may have."""
    if count * n > MOST_IN_ALL:
        problem = f"{count} prompts with n={n} are {count * n} texts"
        raise invalid(f"{problem}: expected at most {MOST_IN_ALL}; send several requests", "n")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each <= MAX_SEED for each in value)


def messages(value: list[Any]) -> list[Message]:
    """Return the messages of a conversation, each with its content as one text; raise ApiError.

    null counts as not set: clients send the message of a reply back with all of its members.
    """
    if not value:
        raise invalid("messages is empty: expected at least one message", "messages")
    return [_message(each, f"messages.{number}") for number, each in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    given = {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else None
    if given is None or given.keys() - {"role", "content", "name"}:
        raise invalid(f"{where}: expected an object with role and content", where)
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(f"{where}.role={role!r:.40}: expected {', '.join(ROLES)}", f"{where}.role")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(isinstance(part, dict) and part.get("type") == "text" and is_text(part.get("text")) for part in parts):
        problem = "a string, or parts of type text; images, sounds and files are not read"
        raise invalid(f"{where}.content: expected {problem}", f"{where}.content")
    return {"role": ROLES[role], "content": "".join(str(part["text"]) for part in parts)}
