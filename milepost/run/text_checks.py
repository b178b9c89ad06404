"""What does not fit a training text: lines for the log, and errors."""

from milepost.config import Config, ConfigError
from milepost.text import tokenization
from milepost.text.corpus import Corpus
from milepost.text.errors import DataError
from milepost.text.readers import PLAIN, ROWS, SEPARABLE, Reading, listed, suffix_of
from milepost.text.scan import Scan
from milepost.text.stamps import in_both
from milepost.text.templates import turn_marks
from milepost.text.tokenization.library import FROM_LIBRARY
from milepost.text.unknown import unknown_characters


def check_turn_marks(corpus: Corpus, tokenizer: tokenization.Tokenizer, template: str | None) -> None:
    """Raise DataError if conversations are to be learned with a vocabulary that cannot write what marks their turns: skipped or
    replaced, these characters would leave a model that can neither be asked nor end an answer.
    """
    marks = turn_marks(tokenizer) if corpus.reading.form and template is None else ""
    if lacking := unknown_characters(tokenizer, marks):
        unknown = tokenization.UnknownCharacters(lacking, tokenizer.vocab_size)
        remedy = "train a new model on these conversations, or start from weights with a byte, bpe or gpt2 tokenizer"
        raise DataError(f"{corpus.source}: {unknown}, and the plain template marks turns with them: {remedy}")


def about_size(tokenizer: tokenization.Tokenizer, settings: Config) -> list[str]:
    """Return a line on a trained vocabulary that has another size than the one that was set."""
    asked, size = settings.bpe_vocab_size, tokenizer.vocab_size
    if tokenizer.kind not in FROM_LIBRARY or not settings.is_set("BPE_VOCAB_SIZE") or size == asked:
        return []
    reason = "no other pair of tokens occurs twice in the text" if size < asked else "this kind has no fewer"
    return [
        f"BPE_VOCAB_SIZE={asked} ({settings.sources['BPE_VOCAB_SIZE']}): the vocabulary has {size} tokens, because {reason}"
    ]


def without_effect_on_text(settings: Config) -> list[str]:
    """Return a line on each setting of conversations that is set for a text that has none."""
    values = [("LOSS_ON", "all", settings.loss_on == "all"), ("PACKING", "false", not settings.packing)]
    return [
        f"{name}={value} ({settings.sources[name]}): no effect on a text without conversations"
        for name, value, holds in values
        if holds and settings.is_set(name)
    ]


def trained_on(held_out: Corpus, its_scan: Scan, corpus: Corpus, scanned: Scan) -> list[str]:
    """Return a line if the text for validation, or files of it, are trained on."""
    effect = "the validation loss does not show overfitting"
    if its_scan.sha256 == scanned.sha256:
        return [f"{held_out.source} is the training text: {effect}"]
    if files := in_both(held_out.paths, corpus.paths):
        return [f"{held_out.source}: in the training text too: {listed(list(map(str, files)))}: {effect} of them"]
    return []


def refuse_weights(corpus: Corpus) -> None:
    """Raise DataError if a text is a mixture where nothing is drawn from it: to validate on, to evaluate on."""
    if corpus.weights:
        raise DataError(f"{corpus.source} has weights, which only training follows: leave them out")


def check_separator(separator: str | None, tokenizer: tokenization.Tokenizer) -> None:
    """Raise ConfigError if documents are to be separated by a token that the tokenizer lacks."""
    if separator and tokenizer.end_of_text is None:
        problem = f"the {tokenizer.kind} tokenizer has no end-of-text token to put in its place"
        remedy = "train a new model with TOKENIZER=bpe or gpt2, or unset it"
        raise ConfigError([f"DOCUMENT_SEPARATOR={in_a_line(separator)}: {problem}: {remedy}"])


def check_ids(corpus: Corpus, tokenizer: tokenization.Tokenizer) -> None:
    """Raise DataError if prepared data have ids of other tokens than the tokenizer's."""
    for part in corpus.parts or (corpus,):
        if part.prepared and not part.prepared.vocabulary.is_of(tokenizer):
            own = f"a {tokenizer.kind} tokenizer of {tokenizer.vocab_size}"
            remedy = "use the text that they were made of, or a model with these tokens"
            raise DataError(
                f"{part.source} holds ids of {part.prepared.vocabulary.name}, the model has {own}: {remedy}"
            )


def about_field(corpus: Corpus, reading: Reading) -> list[str]:
    """Return a line on a TEXT_FIELD that no file of the text has fields for."""
    if reading.text_field == PLAIN.text_field or any(suffix_of(path.name) in ROWS for path in corpus.paths):
        return []
    return [f"TEXT_FIELD={reading.text_field}: no effect on {corpus.source}, only in {', '.join(ROWS)} files"]


def about_separator(corpus: Corpus, scanned: Scan, separator: str) -> list[str]:
    """Return a line on what a separator does in a text, if there is one."""
    if not separator or corpus.prepared:
        return []
    shown = in_a_line(separator)
    if not any(suffix_of(path.name) in SEPARABLE for path in corpus.paths):
        return [f"DOCUMENT_SEPARATOR={shown}: no effect on {corpus.source}, only in {' and '.join(SEPARABLE)} files"]
    if scanned.documents <= len(corpus.paths):
        return [f"{corpus.source}: DOCUMENT_SEPARATOR={shown} separates no documents: each file is one"]
    return [f"{corpus.source}: {scanned.documents:,} documents with {shown} between them"]


def in_a_line(separator: str) -> str:
    """Return a separator for a message, in which its line ends begin no line."""
    return separator if separator.isprintable() else repr(separator)
