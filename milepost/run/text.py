"""The training text of a run: read it, choose its tokenizer, and tokenize it."""

import dataclasses
import datetime
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor

from milepost import config
from milepost.ckpt import Checkpoint
from milepost.ckpt.saved_tokenizer import build_tokenizer
from milepost.config import Config, ConfigError
from milepost.places import DATA_FOLDER, cache_folder
from milepost.run.text_checks import (
    about_field,
    about_separator,
    about_size,
    check_ids,
    check_separator,
    check_turn_marks,
    refuse_weights,
    trained_on,
    without_effect_on_text,
)
from milepost.runtime.distributed import SINGLE, World
from milepost.runtime.progress import Log
from milepost.text import token_files, tokenization
from milepost.text.batches import Batches, largest_block_size, validation_windows
from milepost.text.blocks import normalized
from milepost.text.chunks import LongWordError
from milepost.text.corpus import Corpus, open_corpus
from milepost.text.errors import DataError, TextFieldError
from milepost.text.examples import Examples, ExampleSplit, prepare_examples
from milepost.text.hub import at_commit
from milepost.text.known import UNKNOWN_TEXT, Known, form_recorded, known_text, open_text
from milepost.text.mixtures import MixedBatches, MixedSplit, MixedTokens, mixed_split
from milepost.text.packing import PackedBatches, Packing, packed, validation_batches
from milepost.text.prepared import Vocabulary, validation_beside
from milepost.text.readers import PLAIN, Reading
from milepost.text.scan import Scan
from milepost.text.sources import with_places
from milepost.text.templates import chat_stops, dated, template_of
from milepost.text.token_arrays import Tokens
from milepost.text.tokenization.base import edge
from milepost.text.unknown import Mode, encoder_of, first_known
from models.model import Model

Split = token_files.TokenSplit | ExampleSplit | MixedSplit
CACHE_FOLDER = cache_folder(config.user_caches()) / "tokens"


@dataclass(frozen=True, kw_only=True)
class Text:
    """The training text: its fingerprint, and the tokens of both splits; of conversations also their template.

    `held_out` is the text for validation, if it is not a part of the same text.
    """

    corpus: Corpus
    scan: Scan
    split: Split
    validation_fraction: float
    held_out: tuple[Corpus, Scan] | None = None
    template: str | None = None  # None is the plain one
    answers: bool = False  # whether only tokens of answers count
    pack: bool = False  # whether several conversations share a window
    unknown: str | None = None  # what was done with characters that the vocabulary lacks; None: it has all

    def fingerprint(self) -> dict[str, Any]:
        """Return what a checkpoint records to recognize the text."""
        return {
            "source": self.corpus.source,
            "name": self.corpus.name,
            "sha256": self.scan.sha256,
            "characters": self.scan.characters,
            "validation_fraction": self.validation_fraction,
            **form_recorded(self.corpus),
            **(validation_recorded(*self.held_out) if self.held_out else {}),
            **({"unknown_characters": self.unknown} if self.unknown else {}),
            **({"template": self.template} if self.corpus.reading.form else {}),
            **(mixture_recorded(self.corpus, self.scan) if self.scan.parts else {}),
        }


def validation_recorded(corpus: Corpus, scanned: Scan) -> dict[str, Any]:
    """Return what a checkpoint records to recognize a text for validation."""
    return {"validation_source": corpus.source, "validation_sha256": scanned.sha256}


def mixture_recorded(corpus: Corpus, scanned: Scan) -> dict[str, Any]:
    """Return what a checkpoint records of the sources of a mixture, in their order."""
    return {"mixture": {"weights": list(corpus.weights), "sha256": [part.sha256 for part in scanned.parts]}}


def read_text(
    settings: Config, log: Log, world: World = SINGLE, *, record: Checkpoint | None = None
) -> tuple[Text, tokenization.Tokenizer]:
    """Return the training text and its tokenizer: the record's, or else that of the settings. Equal in every process."""
    known = known_text(record.data, record.tokenizer) if record else UNKNOWN_TEXT
    corpus, scanned = world.local_rank0_first(lambda: scan_text(settings, log, known))
    held_out = world.local_rank0_first(lambda: scan_validation(settings, log, known, corpus))
    for line in trained_on(*held_out, corpus, scanned) if held_out else ():
        log(line)
    for source, scan in [(corpus, scanned), *([held_out] if held_out else [])]:
        if len(set(world.all_gather(scan.sha256))) > 1:
            raise DataError(f"{source.source}: differs between machines; copy the same text to all of them")
    if record:
        tokenizer = build_tokenizer(record)
    else:
        scans = [scanned, *([held_out[1]] if held_out else [])]
        alphabet = "".join(sorted({character for each in scans for character in each.alphabet}))
        seen = dataclasses.replace(scanned, alphabet=alphabet, documents=max(each.documents for each in scans))
        made = world.on_rank0(lambda: new_tokenizer(settings, corpus, seen))
        described = world.broadcast(made.to_dict() if made is not None else {})
        tokenizer = made if made is not None else tokenization.from_dict(described)
        for line in about_size(tokenizer, settings):
            log(line)
    check_separator(settings.document_separator, tokenizer)
    template = template_of(record.data if record else {}, tokenizer) or None  # the plain one where there is none
    if "template" not in (record.data if record else {}):  # a new run; processes may begin on two days
        template = world.broadcast(dated(template, datetime.date.today())) if template else None
        check_turn_marks(corpus, tokenizer, template)
    for source, _ in [(corpus, scanned), *([held_out] if held_out else [])]:
        check_ids(source, tokenizer)
    tokenized = functools.partial(_tokenized, tokenizer=tokenizer, template=template, settings=settings, log=log)
    fraction = fraction_of(settings)
    split, unknown = world.local_rank0_first(lambda: tokenized(corpus, scanned, fraction=fraction))
    if held_out:
        given, _ = world.local_rank0_first(lambda: tokenized(*held_out, fraction=0.0))
        split = dataclasses.replace(split, validation=given.train)  # type: ignore[arg-type]
    _check_block_size(split, settings)
    for line in () if corpus.reading.form else without_effect_on_text(settings):
        log(line)
    return Text(
        corpus=corpus,
        scan=scanned,
        split=split,
        validation_fraction=fraction,
        held_out=held_out,
        unknown=unknown,
        template=template,
        answers=settings.loss_on == "answers",
        pack=settings.packing,
    ), tokenizer


def fraction_of(settings: Config) -> float:
    """Return the fraction of the training text that is held out: none if another text is for validation."""
    return 0.0 if settings.validation_data else settings.validation_fraction


def scan_validation(settings: Config, log: Log, known: Known, corpus: Corpus) -> tuple[Corpus, Scan] | None:
    """Return VALIDATION_DATA and its fingerprint, in the form of the training text `corpus`; None if it is not set.

    Raise DataError if one of them is conversations and the other is not.
    """
    if not settings.validation_data:
        return None
    in_form = Known(carriage_returns=known.carriage_returns, data_sets=known.data_sets)
    found = scan_source(settings.validation_data, log, reading=reading_of(settings), known=in_form)
    refuse_weights(found[0])
    if bool(found[0].reading.form) != bool(corpus.reading.form):
        talks, plain = (corpus, found[0]) if corpus.reading.form else (found[0], corpus)
        remedy = "train and validate on texts of one kind"
        raise DataError(f"{talks.source} holds conversations, {plain.source} does not: {remedy}")
    return found


def _tokenized(corpus: Corpus, scanned: Scan, **how: Any) -> tuple[Split, str | None]:
    """Return the tokens of a text or of all sources of a mixture, as `_source_tokenized` does."""
    if not corpus.parts:
        return _source_tokenized(corpus, scanned, **how)
    found = [_source_tokenized(*each, **how) for each in zip(corpus.parts, scanned.parts, strict=True)]
    return mixed_split([split for split, _ in found], corpus.weights), next((done for _, done in found if done), None)


def _source_tokenized(
    corpus: Corpus,
    scanned: Scan,
    *,
    tokenizer: tokenization.Tokenizer,
    template: str | None,
    fraction: float,
    settings: Config,
    log: Log,
) -> tuple[token_files.TokenSplit | ExampleSplit, str | None]:
    """Return the tokens, and what was done with characters that the vocabulary lacks; None if it has all."""
    mode = cast(Mode, settings.unknown_characters)
    place: dict[str, Any] = {"validation_fraction": fraction, "cache_dir": CACHE_FOLDER, "log": log}
    if corpus.prepared:
        return token_files.prepare_ids(corpus, corpus.prepared, scanned, **place), None
    try:
        encoder, remark = encoder_of(tokenizer, corpus, scanned, mode=mode, cache_dir=CACHE_FOLDER)
    except tokenization.UnknownCharacters as error:
        remedy = "set UNKNOWN_CHARACTERS=skip or replace, or train a new model with TOKENIZER=byte or bpe"
        raise DataError(f"{corpus.source}: {error}: {remedy}") from error
    if remark:
        _log_once(remark, log)
    if corpus.reading.form:
        examples = prepare_examples(corpus, scanned, encoder, template=template, **place)
        return examples, mode if remark else None
    return token_files.prepare(corpus, scanned, encoder, **place), mode if remark else None


def _check_block_size(split: Split, settings: Config) -> None:
    """Raise DataError if a part of a text has no window of BLOCK_SIZE tokens. Conversations are padded to it."""
    train, validation = parts_of(split.train), parts_of(split.validation)
    if isinstance(train[0], Examples):
        return
    block_size, validates = settings.block_size, settings.validation_data or settings.validation_fraction
    smallest, held_out = min(map(len, train)), min(map(len, validation))
    largest = largest_block_size(smallest, held_out if validates else 0)
    if block_size > largest:
        held = f"{smallest} tokens to train on, {held_out} to validate on"
        fits = f"set BLOCK_SIZE={largest} or less, " if largest > 0 else ""
        if settings.validation_fraction and not settings.validation_data and smallest + held_out > 2 * (block_size + 1):
            fits += f"set a {'larger' if held_out < smallest else 'smaller'} VALIDATION_FRACTION, "
        remedy = f"{fits}use more text, or train without validation (VALIDATION_FRACTION=0{', VALIDATION_DATA unset' * bool(settings.validation_data)})"
        which = "the smallest source" if len(train) > 1 else "this text"
        raise DataError(f"BLOCK_SIZE={block_size} is too long for {which} ({held}): {remedy}")


def parts_of(tokens: Tokens | Examples | MixedTokens) -> tuple[Tokens | Examples, ...]:
    """Return the tokens of each source of a mixture, or of the one source that there is."""
    return tokens.parts if isinstance(tokens, MixedTokens) else (tokens,)


def training_batches(
    text: Text, model: Model, settings: Config, log: Log, *, step: int, window: int, rows: slice
) -> Batches | PackedBatches | MixedBatches:
    """Return the batches of the training part from `step` on, whose data begin at `window`.

    Raise DataError if conversations to train on, or to validate on, have no answer within a window: an evaluation would find
    it only when it is due, after the steps before it.
    """
    for held_out in parts_of(text.split.validation):
        if isinstance(held_out, Examples) and len(held_out):
            packing_of(text, held_out, model, block_size=settings.block_size, part="validate")
    position: dict[str, Any] = {
        "batch_size": settings.batch_size, "accumulation": settings.gradient_accumulation_steps, "seed": settings.seed,
        "start_step": step, "start_window": window, "rows": rows,
    }  # fmt: skip
    batches: list[Batches | PackedBatches] = []
    for tokens in parts_of(text.split.train):
        if isinstance(tokens, Examples):
            packing = packing_of(text, tokens, model, block_size=settings.block_size)
            log(_about(text, packing, model))
            batches.append(PackedBatches(packing, positions=model.packs, **position))
        else:
            batches.append(Batches(tokens, block_size=settings.block_size, **position))
    if not isinstance(text.split, MixedSplit):
        return batches[0]
    mixed = MixedBatches(batches, text.split.cycle, **position)
    shares = [count / sum(text.split.cycle) for count in text.split.cycle]
    named = [f"{share:.1%} from {part.source}" for share, part in zip(shares, text.corpus.parts, strict=True)]
    log(f"mixture of windows: {', '.join(named)}")
    return mixed


def packing_of(
    text: Text, examples: Examples, model: Model, *, block_size: int, part: Literal["train", "validate"] = "train"
) -> Packing:
    """Return how conversations fill the model's windows: one each if the model cannot tell several apart."""
    return packed(examples, block_size=block_size, pack=text.pack and model.packs, answers=text.answers, part=part)


def _about(text: Text, packing: Packing, model: Model) -> str:
    """Return a line on how conversations become batches."""
    how = "packed into" if text.pack and model.packs else "one in each of"
    why = "" if model.packs or not text.pack else ", because this model cannot tell several in a window apart"
    parts = [
        f"{how} {packing.windows} windows of {packing.block_size} tokens, {packing.padding:.1%} padding{why}",
        f"{int(packing.counted.sum())} tokens count ({'answers' if text.answers else 'all'})",
        "plain template" if text.template is None else "the model's own chat template",
    ]
    parts += [f"{packing.cut} longer than a window, cut at the end"] * bool(packing.cut)
    parts += [f"{packing.left_out} left out, whose answer would be cut off"] * bool(packing.left_out)
    return f"conversations: {len(packing.used)}, {'; '.join(parts)}"


def validation_of(
    text: Text, model: Model, *, block_size: int, batch_size: int, steps: int
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the fixed batches of a validation: inputs, targets and, of packed conversations, positions, (B, T) each."""
    shares = shares_of(text)
    for tokens, share in zip(parts_of(text.split.validation), shares, strict=True):
        part = max(1, round(steps * share)) if steps else 0
        if isinstance(tokens, Examples):
            packing = packing_of(text, tokens, model, block_size=block_size, part="validate")
            yield from validation_batches(packing, batch_size=batch_size, steps=part, positions=model.packs)
        else:
            yield from validation_windows(tokens, block_size=block_size, batch_size=batch_size, steps=part)


def shares_of(text: Text) -> list[float]:
    """Return the share of each source of the validation text in a validation: by weight, as in training."""
    if not isinstance(text.split, MixedSplit) or text.held_out:
        return [1.0]
    return [count / sum(text.split.cycle) for count in text.split.cycle]


class SampleStart(NamedTuple):
    """What a sample during training continues, and the tokens and strings that end it."""

    ids: list[int]
    shown: bool  # whether they are part of the sample
    stop_ids: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()


def sample_start(text: Text, tokenizer: tokenization.Tokenizer) -> SampleStart:
    """Return what a sample continues: of conversations, the first question that is not trained on; else the end of a text, or
    where the tokenizer has none, a character of the text.
    """
    part = parts_of(text.split.validation if len(text.split.validation) else text.split.train)[0]
    if isinstance(part, Examples):
        stop_ids, stops = chat_stops(tokenizer, text.template)
        return SampleStart(part.first_question(), True, (*tokenizer.stop_ids, *stop_ids), stops)
    first = edge(tokenizer)
    if first is not None:
        return SampleStart([first], False)
    return SampleStart(tokenizer.encode(first_known(tokenizer, text.scan.alphabet)), True)


def with_validation_beside(settings: Config, log: Log) -> Config:
    """Return the settings, with the validation data that lie beside prepared training data, unless another text is named for it."""
    beside = validation_beside(settings.training_data_source)
    if not beside or settings.validation_data or settings.is_set("VALIDATION_FRACTION"):
        return settings
    log(f"{beside} is the validation text; set VALIDATION_FRACTION to hold out a part of the training text instead")
    return config.with_values(settings, {"VALIDATION_DATA": beside}, source="beside TRAINING_DATA_SOURCE")


def new_tokenizer(settings: Config, corpus: Corpus, scanned: Scan) -> tokenization.Tokenizer:
    """Return the tokenizer that the settings ask for; a BPE tokenizer is trained on the text."""
    if implied := next((part.prepared for part in corpus.parts or (corpus,) if part.prepared), None):
        return tokenizer_of_ids(implied.vocabulary, settings, corpus)
    kind = tokenization.choose(settings.tokenizer, alphabet=scanned.alphabet, pretrained=bool(settings.gpt2_model_name))
    alphabet, documents, vocab_size = scanned.alphabet, scanned.documents, settings.bpe_vocab_size
    try:
        return tokenization.build(kind, corpus.pieces(), alphabet=alphabet, documents=documents, vocab_size=vocab_size)
    except LongWordError as error:
        raise DataError(f"{corpus.source}: {error}") from error


def tokenizer_of_ids(vocabulary: Vocabulary, settings: Config, corpus: Corpus) -> tokenization.Tokenizer:
    """Return the tokenizer of prepared data. Raise ConfigError if the settings ask for another, DataError if only a model has it."""
    tokenizer, what = vocabulary.tokenizer(), f"{corpus.source} holds ids of {vocabulary.name}"
    if tokenizer is None:
        raise DataError(f"{what}: name a model that has them with INIT_FROM")
    if settings.tokenizer not in ("auto", tokenizer.kind):
        raise ConfigError([f"TOKENIZER={settings.tokenizer}: {what}, which are {tokenizer.kind}: unset it"])
    return tokenizer


def scan_text(settings: Config, log: Log, known: Known = UNKNOWN_TEXT) -> tuple[Corpus, Scan]:
    """Return TRAINING_DATA_SOURCE and its fingerprint, in the form in which it is the known text."""
    return scan_source(settings.training_data_source, log, reading=reading_of(settings), known=known)


def reading_of(settings: Config) -> Reading:
    """Return how files of the training text are read. Their line ends are normalized, so those of the separator are too."""
    return Reading(
        text_field=settings.text_field,
        prompt_field=settings.prompt_field,
        answer_field=settings.answer_field,
        separator=normalized(settings.document_separator or ""),
    )


@functools.lru_cache(maxsize=4)  # the log in the key makes every command read a changed text again
def scan_source(source: str, log: Log, *, reading: Reading = PLAIN, known: Known = UNKNOWN_TEXT) -> tuple[Corpus, Scan]:
    """Return a text source and its fingerprint, in the form in which it is the known text. Cached for the command."""
    try:
        corpus, scanned = open_text(
            lambda reading: open_source(with_places(source, lambda place: at_commit(place, known.data_sets)), reading),
            cache_dir=CACHE_FOLDER,
            reading=reading,
            known=known,
            log=log,
        )
    except TextFieldError as error:
        remedy = "set TEXT_FIELD to the field that holds the text, or of conversations PROMPT_FIELD and ANSWER_FIELD"
        raise DataError(f"{error}: {remedy}") from error
    about = (*about_field(corpus, reading), *about_separator(corpus, scanned, reading.separator))
    for line in (*corpus.skipped, *scanned.notes, *about):
        _log_once(line, log)
    return corpus, scanned


@functools.lru_cache(maxsize=64)
def _log_once(line: str, log: Log) -> None:
    log(line)


def open_source(source: str, reading: Reading = PLAIN) -> Corpus:
    """Return the files that a source names; downloads are cached."""
    return open_corpus(source, data_dir=DATA_FOLDER, cache_dir=CACHE_FOLDER.parent, reading=reading)
