"""The tokenizer of a record: rebuilt, and as the files of a Hugging Face folder. Needs no torch."""

from collections.abc import Iterable
from typing import Any

from milepost.ckpt.record import EARLIER, Checkpoint, CheckpointError
from milepost.text import templates, tokenization, tokenizer_json


def build_tokenizer(record: Checkpoint) -> tokenization.Tokenizer:
    """Return the record's tokenizer; raise CheckpointError if it has none or more tokens than the model rows."""
    if record.tokenizer is None:
        raise CheckpointError(where_of(record), "carries no tokenizer", kind="lacking")
    try:
        tokenizer = tokenization.from_dict(record.tokenizer)
    except ValueError as error:
        problem = f"its tokenizer cannot be rebuilt ({error})"
        if record.written_by.startswith("another program"):
            remedy = "docs/models.md says which tokenizers are read: start from a model that has one of them"
            raise CheckpointError(where_of(record), problem, remedy, kind="not understood") from error
        raise CheckpointError(where_of(record), problem, EARLIER, kind="damaged") from error
    if record.tokenizer_sha256 not in (None, tokenizer.digest):
        problem = "the file is damaged: its tokenizer is not the one it was saved with"
        raise CheckpointError(where_of(record), problem, EARLIER, kind="damaged")
    rows = record.model_settings["vocab_size"]
    if tokenizer.vocab_size > rows:
        problem = f"its tokenizer has {tokenizer.vocab_size} tokens, but its model only {rows} rows"
        if record.written_by.startswith("another program"):
            remedy = "put the tokenizer there that was saved with the model, or resize the model's embedding to it and save both again"
            raise CheckpointError(where_of(record), problem, remedy, kind="refused")
        raise CheckpointError(where_of(record), problem, EARLIER, kind="damaged")
    return tokenizer


def chat_template(record: Checkpoint, *, begins: bool = False) -> str | None:
    """Return the model's chat template in Jinja, for other programs; None if it has none.

    The plain template needs a token that ends a turn. Without one there is no template: the other program would not stop. If
    `begins`, it writes the token that begins a text, as is usual in templates of transformers.
    """
    tokenizer = build_tokenizer(record)
    template = templates.template_of(record.data, tokenizer)
    if template is not None:
        return template or None
    end, by_id = templates.end_token(tokenizer), {i: text for text, i in tokenizer.special_tokens.items()}
    begin = by_id.get(tokenizer.begin_of_text, "") if begins and tokenizer.begin_of_text is not None else ""
    return templates.plain_jinja(end, begin=begin) if end else None


def tokenizer_files(record: Checkpoint) -> dict[str, Any]:
    """Return the tokenizer as the JSON files of a Hugging Face folder, by name; empty if there is no tokenizer."""
    if record.tokenizer is None:
        return {}
    tokenizer = build_tokenizer(record)
    try:
        values = tokenizer_json.tokenizers_json(tokenizer)
    except ValueError as error:
        raise CheckpointError(where_of(record), f"{error}", "choose another layout", kind="refused") from error
    config = tokenizer_json.tokenizer_config(tokenizer) | {"model_max_length": record.model_settings["block_size"]}
    template = chat_template(record, begins=True)
    return {
        "tokenizer.json": values,
        "tokenizer_config.json": config | ({"chat_template": template} if template else {}),
    }


def tokenizer_from_file(values: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json of a Hugging Face folder as a record holds it; another program's is read as BPE."""
    return tokenizer_json.from_tokenizers_json(values)


def tokenizer_from_parts(
    vocab: Any, merges: str, added: Any, special: Iterable[str], *, split: str | None = None
) -> dict[str, Any]:
    """Return vocab.json, merges.txt, added_tokens.json and their special tokens as a record holds a tokenizer."""
    return tokenizer_json.from_vocab_and_merges(vocab, merges, added, special, split=split)


def where_of(record: Checkpoint) -> str:
    """Return where the record is from, for a message."""
    return str(record.path or "checkpoint")
