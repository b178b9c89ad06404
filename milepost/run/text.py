"""The training text of a run: read it, choose its tokenizer, and tokenize it."""

import functools
from dataclasses import dataclass
from typing import Any, cast

from milepost import config
from milepost.ckpt import Checkpoint
from milepost.ckpt.restore import build_tokenizer
from milepost.config import Config, ConfigError
from milepost.places import DATA_FOLDER, cache_folder
from milepost.runtime.distributed import SINGLE, World
from milepost.runtime.progress import Log
from milepost.text import token_files, tokenization
from milepost.text.batches import largest_block_size
from milepost.text.chunks import LongWordError
from milepost.text.corpus import Corpus, open_corpus
from milepost.text.errors import DataError, TextFieldError
from milepost.text.known import NORMALIZED, UNKNOWN_TEXT, Known, known_text, open_text
from milepost.text.readers import PLAIN, Reading
from milepost.text.scan import Scan
from milepost.text.unknown import Mode, encoder_of

CACHE_FOLDER = cache_folder(config.user_caches()) / "tokens"


@dataclass(frozen=True, kw_only=True)
class Text:
    """The training text: its fingerprint, and the tokens of both splits."""

    corpus: Corpus
    scan: Scan
    split: token_files.TokenSplit
    validation_fraction: float
    unknown: str | None = None  # what was done with characters that the vocabulary lacks; None: it has all

    def fingerprint(self) -> dict[str, Any]:
        """Return what a checkpoint records to recognize the text."""
        return {
            "source": self.corpus.source,
            "name": self.corpus.name,
            "sha256": self.scan.sha256,
            "characters": self.scan.characters,
            "validation_fraction": self.validation_fraction,
            **({} if self.corpus.reading.verbatim else NORMALIZED),
            **({"unknown_characters": self.unknown} if self.unknown else {}),
        }


def read_text(
    settings: Config, log: Log, world: World = SINGLE, *, record: Checkpoint | None = None
) -> tuple[Text, tokenization.Tokenizer]:
    """Return the training text and its tokenizer: the record's, or else that of the settings. Equal in every process."""
    known = known_text(record.data, record.tokenizer) if record else UNKNOWN_TEXT
    corpus, scanned = world.local_rank0_first(lambda: scan_text(settings, log, known))
    if len(set(world.all_gather(scanned.sha256))) > 1:
        raise DataError(f"{corpus.source}: differs between machines; copy the same text to all of them")
    if record:
        tokenizer = build_tokenizer(record)
    else:
        made = world.on_rank0(lambda: new_tokenizer(settings, corpus, scanned))
        described = world.broadcast(made.to_dict() if made is not None else {})
        tokenizer = made if made is not None else tokenization.from_dict(described)
    check_separator(settings.document_separator, tokenizer)
    fraction, block_size = settings.validation_fraction, settings.block_size
    mode = cast(Mode, settings.unknown_characters)
    try:
        encoder, remark = world.local_rank0_first(
            lambda: encoder_of(tokenizer, corpus, scanned, mode=mode, cache_dir=CACHE_FOLDER)
        )
        split = world.local_rank0_first(
            lambda: token_files.prepare(
                corpus, scanned, encoder, validation_fraction=fraction, cache_dir=CACHE_FOLDER, log=log
            )
        )
    except tokenization.UnknownCharacters as error:
        remedy = "set UNKNOWN_CHARACTERS=skip or replace, or train a new model with TOKENIZER=byte or bpe"
        raise DataError(f"{corpus.source}: {error}: {remedy}") from error
    if remark:
        log(remark)
    largest = largest_block_size(len(split.train), len(split.validation) if fraction else 0)
    if block_size > largest:
        held = f"{len(split.train)} tokens to train on, {len(split.validation)} to validate on"
        fits = f"set BLOCK_SIZE={largest} or less, " if largest > 0 else ""
        remedy = f"{fits}use more text, or train without validation (VALIDATION_FRACTION=0)"
        raise DataError(f"BLOCK_SIZE={block_size} is too long for this text ({held}): {remedy}")
    text = Text(
        corpus=corpus, scan=scanned, split=split, validation_fraction=fraction, unknown=mode if remark else None
    )
    return text, tokenizer


def check_separator(separator: str | None, tokenizer: tokenization.Tokenizer) -> None:
    """Raise ConfigError if documents are to be separated by a token that the tokenizer lacks."""
    if separator and tokenizer.end_of_text is None:
        problem = f"the {tokenizer.kind} tokenizer has no end-of-text token to put in its place"
        remedy = "train a new model with TOKENIZER=bpe or gpt2, or unset it"
        raise ConfigError([f"DOCUMENT_SEPARATOR={separator}: {problem}: {remedy}"])


def new_tokenizer(settings: Config, corpus: Corpus, scanned: Scan) -> tokenization.Tokenizer:
    """Return the tokenizer that the settings ask for; a BPE tokenizer is trained on the text."""
    kind = tokenization.choose(settings.tokenizer, alphabet=scanned.alphabet, pretrained=bool(settings.gpt2_model_name))
    alphabet, documents, vocab_size = scanned.alphabet, scanned.documents, settings.bpe_vocab_size
    try:
        return tokenization.build(kind, corpus.pieces(), alphabet=alphabet, documents=documents, vocab_size=vocab_size)
    except LongWordError as error:
        raise DataError(f"{corpus.source}: {error}") from error


def scan_text(settings: Config, log: Log, known: Known = UNKNOWN_TEXT) -> tuple[Corpus, Scan]:
    """Return TRAINING_DATA_SOURCE and its fingerprint, in the form in which it is the known text."""
    return scan_source(
        settings.training_data_source,
        log,
        text_field=settings.text_field,
        separator=settings.document_separator or "",
        known=known,
    )


@functools.lru_cache(maxsize=4)  # the log in the key makes every command read a changed text again
def scan_source(
    source: str, log: Log, *, text_field: str = "text", separator: str = "", known: Known = UNKNOWN_TEXT
) -> tuple[Corpus, Scan]:
    """Return a text source and its fingerprint, in the form in which it is the known text. Cached for the command."""
    try:
        corpus, scanned = open_text(
            lambda reading: open_source(source, reading),
            cache_dir=CACHE_FOLDER,
            text_field=text_field,
            separator=separator,
            known=known,
            log=log,
        )
    except TextFieldError as error:
        raise DataError(f"{error}: set TEXT_FIELD to the name of the field that holds the text") from error
    found = [f"{corpus.source}: {scanned.documents:,} documents with {separator} between them"] if separator else []
    for line in (*corpus.skipped, *scanned.notes, *found):
        _log_once(line, log)
    return corpus, scanned


@functools.lru_cache(maxsize=64)
def _log_once(line: str, log: Log) -> None:
    log(line)


def open_source(source: str, reading: Reading = PLAIN) -> Corpus:
    """Return the files that a source names; downloads are cached."""
    return open_corpus(source, data_dir=DATA_FOLDER, cache_dir=CACHE_FOLDER.parent, reading=reading)
