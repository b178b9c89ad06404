"""Replies in OpenAI's form: pure functions from pieces of text to JSON values."""

import codecs
import json
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from milepost.serving.catalogue import Served
from milepost.serving.pieces import Piece, Score


class Usage(NamedTuple):
    """The tokens of a request. `kept` of the prompts were not read anew."""

    prompt: int
    generated: int
    kept: int

    @property
    def body(self) -> dict[str, Any]:
        """The usage as a JSON value."""
        total = self.prompt + self.generated
        counts = {"prompt_tokens": self.prompt, "completion_tokens": self.generated, "total_tokens": total}
        return {**counts, "prompt_tokens_details": {"cached_tokens": self.kept}}


class Head(NamedTuple):
    """What all parts of a reply share. `chat` is whether it answers messages."""

    chat: bool
    name: str
    fields: dict[str, Any]


def new_head(served: Served, *, chat: bool) -> Head:
    """Return the head of a reply that begins now."""
    ident = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
    fields = {"id": ident, "created": int(time.time()), "model": served.name, "system_fingerprint": served.fingerprint}
    return Head(chat, "chat.completion" if chat else "text_completion", fields)


def as_json(value: Any) -> bytes:
    """Return a value as JSON in UTF-8, on one line. Halves of surrogate pairs, which UTF-8 has not, are escaped, as JSON does it too."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace")


def event(value: Any) -> bytes:
    """Return a value as a server-sent event."""
    return b"data: " + as_json(value) + b"\n\n"


def whole(head: Head, pieces: Sequence[Piece], *, scored: bool, usage: Usage) -> dict[str, Any]:
    """Return the reply with all texts."""
    by_choice: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_choice.setdefault(piece.choice, []).append(piece)
    choices = [_choice(head, index, own, scored=scored) for index, own in sorted(by_choice.items())]
    return {**head.fields, "object": head.name, "choices": choices, "usage": usage.body}


def _choice(head: Head, index: int, own: Sequence[Piece], *, scored: bool) -> dict[str, Any]:
    """Return text number `index` of a reply, of its own pieces."""
    text = "".join(piece.text for piece in own)
    content: dict[str, Any] = {"text": text}
    if head.chat:
        content = {"message": {"role": "assistant", "content": text, "refusal": None}}
    scores = (score for piece in own for score in piece.scores)
    logprobs = logprobs_of(head, scores, Offsets()) if scored else None
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": own[-1].finish or None}


class Chunks:
    """The parts of a reply that streams."""

    def __init__(self, head: Head, *, scored: bool, include_usage: bool) -> None:
        self._head, self._scored = head, scored
        self._fields = {**head.fields, "object": f"{head.name}.chunk" if head.chat else head.name}
        self._more: dict[str, Any] = {"usage": None} if include_usage else {}
        self._offsets: dict[int, Offsets] = {}

    def of(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the chunks for a piece: none if it brings nothing to show."""
        first = piece.choice not in self._offsets
        offsets = self._offsets.setdefault(piece.choice, Offsets())
        logprobs = logprobs_of(self._head, piece.scores, offsets) if self._scored and piece.scores else None
        if self._head.chat and first:
            yield self._chunk(piece.choice, {"delta": {"role": "assistant", "content": ""}})
        if piece.text or logprobs:
            yield self._chunk(piece.choice, self._content(piece.text), logprobs)
        if piece.finish:
            last: dict[str, Any] = {"delta": {}} if self._head.chat else {"text": ""}
            yield self._chunk(piece.choice, last, finish=piece.finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """Return the last chunk of a stream that includes the usage."""
        return {**self._fields, "choices": [], "usage": usage.body}

    def _content(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self._head.chat else {"text": text}

    def _chunk(
        self, index: int, content: dict[str, Any], logprobs: dict[str, Any] | None = None, *, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        return {**self._fields, "choices": [choice], **self._more}


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities


class Offsets:
    """Where in a text, in characters, each token begins."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def next(self, token: bytes) -> int:
        """Return where the token begins."""
        start = self._length
        self._length += len(self._utf8.decode(token))
        return start


def token_text(token: bytes) -> str:
    """Return a token as text; one that is no whole characters as `bytes:` and its bytes in hex, as OpenAI does."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def logprobs_of(head: Head, scores: Iterable[Score], offsets: Offsets) -> dict[str, Any]:
    """Return the log-probabilities in the form of the reply."""
    scores = list(scores)
    if head.chat:
        content = [_with_bytes(s.token, s.logprob) | {"top_logprobs": [_with_bytes(*t) for t in s.top]} for s in scores]
        return {"content": content, "refusal": None}
    top = [None if s.logprob is None else {token_text(token): value for token, value in s.top} for s in scores]
    return {
        "tokens": [token_text(score.token) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": top,
        "text_offset": [offsets.next(score.token) for score in scores],
    }


def _with_bytes(token: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": token_text(token), "logprob": logprob, "bytes": list(token)}
