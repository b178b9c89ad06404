"""The tokenizer of a folder of transformers, and the tokens with which its files end a text."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from milepost.ckpt.foreign.importing import CONFIG, TOKENIZER, tokenizer_beside
from milepost.ckpt.foreign.tokenizer import Choice
from milepost.ckpt.manifest import JSON_LIMIT, is_regular, read_json, refuse_pointer, unreadable
from milepost.ckpt.record import CheckpointError, Json
from milepost.ckpt.saved_tokenizer import tokenizer_from_file, tokenizer_from_parts
from milepost.files import read_steadily
from milepost.text.meta_pickle import META
from milepost.text.templates import with_tokens
from milepost.text.tokenization.library import FROM_LIBRARY, vocabulary

GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
VOCAB, MERGES, ADDED, SPECIAL = "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"
CHAT = "chat_template.jinja"  # newer versions write it beside tokenizer_config.json
TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")  # that transformers passes to a template
END_OF_TEXT = "<|endoftext|>"
ENDS = ((GENERATION, "eos_token_id"), (CONFIG, "eos_token_id"), (TOKENIZER_CONFIG, "eos_token"), (SPECIAL, "eos_token"))


def read_tokenizer(path: Path, vocab_size: int) -> Choice:
    """Return the folder's tokenizer as JSON values, and a note on what was chosen or passed over; it may be empty.

    Raise CheckpointError if its files are damaged or incomplete, or its config puts a space before each text.
    """
    if is_regular(path / TOKENIZER):
        return _completed(path, tokenizer_from_file(read_json(path / TOKENIZER)))
    if is_regular(path / VOCAB) and is_regular(path / MERGES):
        return _completed(path, _tokenizer_of_two_files(path))
    halves = [name for name in (VOCAB, MERGES) if is_regular(path / name)]
    if halves and not is_regular(path / META):
        problem = f"has {halves[0]} without {VOCAB if halves[0] == MERGES else MERGES}, and no {TOKENIZER}"
        raise CheckpointError(path, problem, "copy or download the tokenizer's files again", kind="lacking")
    return tokenizer_beside(path, vocab_size)


def tokenizer_over(base: dict[str, Json] | None, path: Path, vocab_size: int) -> Choice:
    """Return the tokenizer in the folder of an adapter, else that of its base, and a note.

    Generation stops at the tokens that end the base's texts, too, and a template that the folder lacks is the base's.
    """
    if not any(is_regular(path / name) for name in (TOKENIZER, VOCAB)):
        return base, ""
    own, note = read_tokenizer(path, vocab_size)
    if own and base and own["kind"] == base["kind"] and own["kind"] in FROM_LIBRARY:
        ends = [end for end in dict.fromkeys([*_ends_of(base), *_ends_of(own)]) if end in _added(own)]
        template = {"chat_template": base["chat_template"]} if "chat_template" in base else {}
        own = template | {name: value for name, value in own.items() if name not in ("end", "stops")} | _fields(ends)
    differs = f"{path}: its own tokenizer and template are used, not those of its base" if own != base else ""
    return own, "; ".join(filter(None, (differs, note)))


def _ends_of(tokenizer: dict[str, Json]) -> list[str]:
    return [tokenizer.get("end", END_OF_TEXT), *tokenizer.get("stops", [])]


def _completed(path: Path, tokenizer: dict[str, Json]) -> Choice:
    """Return the tokenizer with the folder's chat template and the tokens that end a text, and a note on what is passed over."""
    _check_prefix_space(path, tokenizer)
    template = _chat_template(path)
    holds = tokenizer["kind"] in FROM_LIBRARY
    completed, note = _with_ends(path, tokenizer | ({"chat_template": template} if template and holds else {}))
    if template and not holds:
        lost = f"{path}: its chat template is passed over, which a {tokenizer['kind']} tokenizer cannot hold"
        note = "; ".join(filter(None, (lost, note)))
    return completed, note


def _check_prefix_space(path: Path, tokenizer: dict[str, Json]) -> None:
    """Raise CheckpointError if transformers puts a space before each text, by its config and not by tokenizer.json."""
    byte_level = tokenizer["kind"] in ("gpt2", "bpe") and _class_of(path).startswith(("gpt2", "qwen"))
    if byte_level and _value(path, TOKENIZER_CONFIG, "add_prefix_space") is True:
        problem = "add_prefix_space is True: such tokenizers are not read, and without the space the tokens are others"
        remedy = "set it to false there if the model was trained without the space"
        raise CheckpointError(path / TOKENIZER_CONFIG, problem, remedy, kind="not understood")


def _class_of(path: Path) -> str:
    """Return the class of the folder's tokenizer, which follows from the model where it is not recorded, in small letters."""
    return f"{_value(path, TOKENIZER_CONFIG, 'tokenizer_class') or _value(path, CONFIG, 'model_type')}".lower()


def _chat_template(path: Path) -> str | None:
    """Return the folder's chat template, with the tokens that it names; None if there is none."""
    values = read_json(path / TOKENIZER_CONFIG) if is_regular(path / TOKENIZER_CONFIG) else {}
    template = values.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    if is_regular(path / CHAT):
        template = _text_of(path / CHAT)
    if not isinstance(template, str):
        return None
    tokens = {name: next(iter(_flat([values.get(name)])), None) for name in TOKEN_NAMES}
    texts = {name: token for name, token in tokens.items() if isinstance(token, str)}
    return with_tokens(template, texts)


def _text_of(path: Path) -> str:
    """Return a file of UTF-8 of at most JSON_LIMIT bytes. Raise CheckpointError if it is none."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            problem = f"is larger than {JSON_LIMIT} bytes, expected a short text"
            raise CheckpointError(path, problem, kind="not understood")
        return read_steadily(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def _with_ends(path: Path, tokenizer: dict[str, Json]) -> Choice:
    """Return the tokenizer with the tokens that end a text.

    The first file of ENDS that names a token decides: an id outside the vocabulary is a default that nobody chose.
    """
    for file, key in ENDS:
        values = [value for value in _flat([_value(path, file, key)]) if _exists(value, tokenizer)]
        if not values:
            continue
        ends = [name for name in (_special(value, tokenizer) for value in values) if name is not None]
        note = ""
        if len(ends) < len(values):
            note = (
                f"{path / file}: its {key} {values} names a token that is not special; generation does not stop at it"
            )
        return tokenizer | _fields(ends), note
    return tokenizer, ""


def _fields(ends: list[str]) -> dict[str, Json]:
    """Return the fields of a tokenizer for these tokens, none for what it has without them."""
    first = {"end": ends[0]} if ends and ends[0] != END_OF_TEXT else {}
    return first | ({"stops": ends[1:]} if ends[1:] else {})


def _value(path: Path, file: str, key: str) -> Json:
    return read_json(path / file).get(key) if is_regular(path / file) else None


def _exists(value: Json, tokenizer: dict[str, Json]) -> bool:
    """Whether a value is the id or the text of a token."""
    if type(value) not in (int, str):
        return False
    if tokenizer["kind"] not in FROM_LIBRARY:
        rows = {"gpt2": 50257, "byte": 256}.get(tokenizer["kind"], len(tokenizer.get("chars", ())))
        return type(value) is int and 0 <= value < rows
    model = tokenizer["tokenizer"].get("model")
    known = vocabulary(model) if isinstance(model, dict) else {}
    return value in known or value in known.values() or _special(value, tokenizer) is not None


def _special(value: Json, tokenizer: dict[str, Json]) -> str | None:
    """Return the text of the special token that is meant by an id or a text."""
    if tokenizer["kind"] not in FROM_LIBRARY:
        return END_OF_TEXT if (tokenizer["kind"], value) == ("gpt2", 50256) else None
    return next((text for text, i in _added(tokenizer).items() if value in (i, text)), None)


def _added(tokenizer: dict[str, Json]) -> dict[str, Json]:
    """Return the added tokens of a tokenizer.json and their ids; none for what is not a token, which building it refuses."""
    added = tokenizer["tokenizer"].get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return {token["content"]: token.get("id") for token in tokens if isinstance(token.get("content"), str)}


def _tokenizer_of_two_files(path: Path) -> dict[str, Json]:
    """Return the tokenizer of vocab.json and merges.txt, as GPT-2 and early fine-tunes have it, and Qwen2."""
    added = read_json(path / ADDED) if is_regular(path / ADDED) else {}
    roles = read_json(path / SPECIAL) if is_regular(path / SPECIAL) else {}
    merges = _text_of(path / MERGES)
    refuse_pointer(merges[:32].encode(), path / MERGES)
    names = [name for name in _flat(roles.values()) if isinstance(name, str)]
    qwen = "qwen" in f"{_class_of(path)} {_value(path, CONFIG, 'model_type')}"
    return tokenizer_from_parts(read_json(path / VOCAB), merges, added, names, split="Qwen2" if qwen else None)


def _flat(roles: Iterable[Json]) -> Iterator[Json]:
    """Yield the tokens of values that are a token, a list of tokens, or a token with its properties."""
    for role in roles:
        for each in role if isinstance(role, list) else [role]:
            yield each["content"] if isinstance(each, dict) and "content" in each else each
