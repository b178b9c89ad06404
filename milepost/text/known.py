"""Open a text in the form in which a checkpoint knows it.

Text is read with normalized line ends. Versions before that read it as it is, and their checkpoints recorded no form: their
text is first read verbatim, so that it has the recorded sha256 and the same tokens, carriage returns included. Likewise, versions
before parquet passed over files of other types in a folder, and their checkpoints recorded no `file_types`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from milepost.text.corpus import Corpus
from milepost.text.errors import DataError
from milepost.text.hub import SCHEME
from milepost.text.readers import PLAIN, Reading, is_first_type
from milepost.text.scan import Scan, cached_scan
from milepost.text.sources import parts_of

# What the fingerprint of a text says besides: unless it was read verbatim, and where it has files of later types.
NORMALIZED: Final = {"text_form": "normalized"}
LATER_TYPES: Final = {"file_types": 2}


@dataclass(frozen=True)
class Known:
    """What a checkpoint knows of its text: the sha256, whether it was read verbatim, whether its vocabulary has "\\r", whether it
    has files of a type that the first versions did not read, and the addresses of data sets of the hub, with their commits.
    """

    sha256: str | None = None
    verbatim: bool = False
    carriage_returns: bool = False
    later_types: bool = False
    data_sets: tuple[str, ...] = ()


UNKNOWN_TEXT: Final = Known()


def known_text(data: Mapping[str, Any], tokenizer: Mapping[str, Any] | None) -> Known:
    """Return what the fingerprint `data` and the tokenizer of a checkpoint say about its text."""
    sha256 = data.get("sha256")
    verbatim = sha256 is not None and not NORMALIZED.items() <= data.items()
    sources = [part.place for name in ("source", "validation_source") for part in parts_of(str(data.get(name, "")))]
    data_sets = tuple(place for place in sources if place.startswith(SCHEME))
    return Known(sha256, verbatim, has_carriage_returns(tokenizer), LATER_TYPES.items() <= data.items(), data_sets)


def form_recorded(corpus: Corpus) -> dict[str, Any]:
    """Return what the fingerprint of a text records of the form in which it was read."""
    first = all(is_first_type(path.name) for path in corpus.paths)
    return ({} if corpus.reading.verbatim else NORMALIZED) | ({} if first else LATER_TYPES)


def has_carriage_returns(tokenizer: Mapping[str, Any] | None) -> bool:
    """Return whether a char vocabulary has "\\r": text for its model is then left as it is."""
    return "\r" in (tokenizer or {}).get("chars", ())


def open_text(
    open_as: Callable[[Reading], Corpus],
    *,
    cache_dir: Path,
    reading: Reading = PLAIN,
    known: Known = UNKNOWN_TEXT,
    log: Callable[[str], None] | None = None,
) -> tuple[Corpus, Scan]:
    """Return the text that `open_as` opens and its scan, in the form in which it has the known sha256.

    A text that has it in no form is another text: it is normalized, or verbatim if the vocabulary has "\\r". Raise DataError
    if the text cannot be read.
    """

    def opened(*, verbatim: bool, first_types: bool = False) -> tuple[Corpus, Scan]:
        corpus = open_as(dataclasses.replace(reading, verbatim=verbatim, first_types=first_types))
        return corpus, cached_scan(corpus, cache_dir=cache_dir, log=log)

    earlier = known.sha256 is not None and not known.later_types
    for verbatim in (True, False) if known.verbatim else (known.carriage_returns,) if earlier else ():
        try:
            found = opened(verbatim=verbatim, first_types=True)
        except DataError:  # the last attempt below reports it
            continue
        if found[1].sha256 == known.sha256:
            return found
    return opened(verbatim=known.carriage_returns)
