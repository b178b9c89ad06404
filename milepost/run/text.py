"""The training text of a run: read it, choose its tokenizer, and tokenize it."""

import functools
from dataclasses import dataclass
from typing import Any

from milepost import config
from milepost.config import Config
from milepost.places import DATA_FOLDER, cache_folder
from milepost.runtime.distributed import SINGLE, World
from milepost.runtime.progress import Log
from milepost.text import token_files, tokenization
from milepost.text.batches import largest_block_size
from milepost.text.corpus import Corpus, open_corpus
from milepost.text.errors import DataError
from milepost.text.scan import Scan, cached_scan

CACHE_FOLDER = cache_folder(config.user_caches()) / "tokens"


@dataclass(frozen=True, kw_only=True)
class Text:
    """The training text: its fingerprint, and the tokens of both splits."""

    corpus: Corpus
    scan: Scan
    split: token_files.TokenSplit
    validation_fraction: float

    def fingerprint(self) -> dict[str, Any]:
        """Return what a checkpoint records to recognize the text."""
        return {
            "source": self.corpus.source,
            "name": self.corpus.name,
            "sha256": self.scan.sha256,
            "characters": self.scan.characters,
            "validation_fraction": self.validation_fraction,
        }


def read_text(
    settings: Config, log: Log, world: World = SINGLE, *, tokenizer: tokenization.Tokenizer | None
) -> tuple[Text, tokenization.Tokenizer]:
    """Return the training text and its tokenizer: `tokenizer`, or else that of the settings. Equal in every process."""
    corpus, scanned = world.local_rank0_first(lambda: scan_source(settings.training_data_source, log))
    if len(set(world.all_gather(scanned.sha256))) > 1:
        raise DataError(f"{settings.training_data_source}: differs between machines; copy the same text to all of them")
    if tokenizer is None:
        made = world.on_rank0(lambda: new_tokenizer(settings, corpus, scanned))
        described = world.broadcast(made.to_dict() if made is not None else {})
        tokenizer = made if made is not None else tokenization.from_dict(described)
    fraction, block_size = settings.validation_fraction, settings.block_size
    try:
        tokenizer.encode(scanned.alphabet)  # first, so that the message lists every unknown character
        split = world.local_rank0_first(
            lambda: token_files.prepare(
                corpus, scanned, tokenizer, validation_fraction=fraction, cache_dir=CACHE_FOLDER, log=log
            )
        )
    except tokenization.UnknownCharacters as error:
        raise DataError(f"{settings.training_data_source}: {error}") from error
    largest = largest_block_size(len(split.train), len(split.validation) if fraction else 0)
    if block_size > largest:
        held = f"{len(split.train)} tokens to train on, {len(split.validation)} to validate on"
        fits = f"set BLOCK_SIZE={largest} or less, " if largest > 0 else ""
        remedy = f"{fits}use more text, or train without validation (VALIDATION_FRACTION=0)"
        raise DataError(f"BLOCK_SIZE={block_size} is too long for this text ({held}): {remedy}")
    return Text(corpus=corpus, scan=scanned, split=split, validation_fraction=fraction), tokenizer


def new_tokenizer(settings: Config, corpus: Corpus, scanned: Scan) -> tokenization.Tokenizer:
    """Return the tokenizer that the settings ask for; a BPE tokenizer is trained on the text."""
    kind = tokenization.choose(settings.tokenizer, alphabet=scanned.alphabet, pretrained=bool(settings.gpt2_model_name))
    return tokenization.build(
        kind,
        corpus.pieces(),
        alphabet=scanned.alphabet,
        documents=scanned.documents,
        vocab_size=settings.bpe_vocab_size,
    )


@functools.lru_cache(maxsize=2)  # the log in the key makes every command read a changed text again
def scan_source(source: str, log: Log) -> tuple[Corpus, Scan]:
    """Return a text source and its fingerprint. Cached for the command."""
    corpus = open_source(source)
    return corpus, cached_scan(corpus, cache_dir=CACHE_FOLDER, log=log)


def open_source(source: str) -> Corpus:
    """Return the files that a source names; downloads are cached."""
    return open_corpus(source, data_dir=DATA_FOLDER, cache_dir=CACHE_FOLDER.parent)
