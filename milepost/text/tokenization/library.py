"""What the tokenizers that come as a tokenizer.json have in common: the tokens around a text, and the chat template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from milepost.text.tokenization.base import END_OF_TEXT, Tokenizer

FROM_LIBRARY: Final = ("bpe", "sentencepiece")  # the kinds of such tokenizers


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, from its JSON. Subclasses check the JSON and encode.

    `end` is the special token that ends a text, if it has another name than `<|endoftext|>`; `stops` are further tokens at
    which generation stops, and `chat_template` is that of milepost.text.templates. The post-processor names the token that
    begins a text.
    """

    def __init__(
        self,
        tokenizer: Mapping[str, Any],
        end: str | None = None,
        stops: Sequence[str] = (),
        chat_template: str | None = None,
    ) -> None:
        text = self.check(tokenizer)
        self._json = json.loads(text)
        self._tokenizer = built(self._json, self.kind)
        ids = self._tokenizer.get_vocab()
        check_ids(stated_ids(self._json), ids, self.kind)
        self.vocab_size = self._tokenizer.get_vocab_size()
        self._added = {token["content"] for token in self._json["added_tokens"]}
        if not isinstance(stops, list | tuple):
            raise ValueError(f"the {self.kind} tokenizer's stops must be a list of tokens")
        for token in (*([] if end is None else [end]), *stops):
            if token not in self._added:
                raise ValueError(
                    f"the {self.kind} tokenizer ends texts with {token!r}, which is not one of its added tokens"
                )
        self._end, self._stops, self.end_token = end, tuple(stops), end or END_OF_TEXT
        self.end_of_text = self._tokenizer.token_to_id(self.end_token)
        self._chat_template = chat_template if isinstance(chat_template, str) else None
        self._special = {
            token["content"]: token["id"] for token in self._json["added_tokens"] if token.get("special") is True
        }
        self.begin_token = next(iter(tokens_before(self._json.get("post_processor")) or []), None)
        self.begin_of_text = None if self.begin_token is None else self._special.get(self.begin_token)
        if self._tokenizer.encode("").ids != [i for i in [self.begin_of_text] if i is not None]:
            raise ValueError(
                f"the {self.kind} tokenizer begins texts with {self.begin_token!r}, which is not one of its special tokens"
            )

    @staticmethod
    def check(tokenizer: object) -> str:
        """Return the JSON as text. Raise ValueError unless it describes a tokenizer of this kind that loses nothing."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        values = (saved.get("tokenizer"), saved.get("end"), saved.get("stops", ()), saved.get("chat_template"))
        return cls(*values)  # type: ignore[arg-type]  # `check` refuses what is not a mapping

    def to_dict(self) -> dict[str, Any]:
        end = {} if self._end is None else {"end": self._end}
        stops = {"stops": list(self._stops)} if self._stops else {}
        chat = {"chat_template": self._chat_template} if self._chat_template else {}
        return {"kind": self.kind, "tokenizer": json.loads(json.dumps(self._json)), **end, **stops, **chat}

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    @property
    def chat_template(self) -> str | None:
        return self._chat_template

    @property
    def stop_ids(self) -> tuple[int, ...]:
        further = (self._tokenizer.token_to_id(token) for token in self._stops)
        return (*super().stop_ids, *(i for i in further if i is not None))


def built(spec: Mapping[str, Any], kind: str) -> Any:
    """Return the library's tokenizer, to which special tokens in a text are ordinary text. Raise ValueError if it refuses."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"the {kind} tokenizer cannot be built: {error}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens of the JSON of a model and their ids; empty if it is not a vocabulary."""
    vocab = model.get("vocab")
    if isinstance(vocab, Mapping):
        return dict(vocab)
    if not isinstance(vocab, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in vocab):
        return {}
    return {token: i for i, (token, _) in enumerate(vocab) if isinstance(token, str)}  # Unigram: pairs with a score


def stated_ids(spec: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens of a tokenizer.json and their ids, the added tokens included."""
    return vocabulary(spec["model"]) | {token["content"]: token["id"] for token in spec["added_tokens"]}


def check_ids(stated: Mapping[str, int], ids: Mapping[str, int], kind: str) -> None:
    """Raise ValueError if the file's ids are not the library's, which numbers added tokens itself, after the vocabulary."""
    for token, i in stated.items():
        if ids.get(token) != i:
            raise ValueError(
                f"the {kind} tokenizer gives {token!r} the id {i}, expected {ids.get(token)}: added tokens follow the vocabulary"
            )


def as_json(spec: object, kind: str) -> str:
    """Return `spec` as JSON text. Raise ValueError if it does not consist of JSON values."""
    try:
        return json.dumps(spec)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the {kind} tokenizer does not consist of JSON values: {type(error).__name__}") from None


def section(top: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a part of a tokenizer.json; one of no known type if it is not an object."""
    part = top.get(name)
    return part if isinstance(part, dict) else {} if part is None else {"type": "?"}


def tokens_before(post_processor: object) -> list[str] | None:
    """Return the tokens that a post-processor puts before a text: none or one. None if it does anything else."""
    whole = {"type": "ByteLevel"} if post_processor is None else post_processor
    parts = whole.get("processors") if isinstance(whole, dict) and whole.get("type") == "Sequence" else [whole]
    if not isinstance(parts, list):
        return None
    tokens: list[str] = []
    for part in parts:
        before = _before_template(part) if isinstance(part, dict) else None
        if before is None:
            return None
        tokens += before
    return tokens if len(tokens) <= 1 else None


def _before_template(part: Mapping[str, Any]) -> list[str] | None:
    """Return the tokens before a text in a TemplateProcessing, none in a ByteLevel; None for several, or any after the text."""
    if part.get("type") == "ByteLevel":
        return []
    items = part.get("single") if part.get("type") == "TemplateProcessing" else None
    if not isinstance(items, list) or not all(isinstance(item, dict) and len(item) == 1 for item in items):
        return None
    kinds = [next(iter(item)) for item in items]
    if kinds not in (["Sequence"], ["SpecialToken", "Sequence"]):
        return None
    if len(kinds) == 1:
        return []
    name = section(items[0], "SpecialToken").get("id")
    known = section(part.get("special_tokens") or {}, str(name)).get("tokens")
    return known if isinstance(known, list) and len(known) == 1 and isinstance(known[0], str) else None
