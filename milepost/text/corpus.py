"""Where training text comes from: a source string names files, and files are read as pieces of documents."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.text.addresses import masked
from milepost.text.conversations import Talk, as_pieces, conversations, described, form_of
from milepost.text.download import DOWNLOAD_LIMIT, fetch, open_https, tiny_shakespeare
from milepost.text.errors import DataError
from milepost.text.folders import Found, code_in, files_of, repeated
from milepost.text.hub import HUB, SCHEME, data_set, files_at
from milepost.text.prepared import Prepared, is_prepared, prepared_of
from milepost.text.readers import PLAIN, READERS, Piece, Reading, suffix_of, unpacked_name
from milepost.text.sources import Part, joined, parts_of


@dataclass(frozen=True)
class Corpus:
    """The files of a text: `source` as the user wrote it, without passwords, `name` safe for file names, `paths` in order.

    `reading` is how they are read, `skipped` tells what is left out, files of folders and globs and conversations beside a text, and what is read twice. A mixture has its sources
    in `parts`, with a weight for each. Files that hold ids and no text are `prepared`.
    """

    source: str
    name: str
    paths: tuple[Path, ...]
    reading: Reading = PLAIN
    skipped: tuple[str, ...] = ()
    parts: tuple["Corpus", ...] = ()
    weights: tuple[str, ...] = ()
    prepared: Prepared | None = None

    def pieces(self, note: Callable[[str], None] = lambda _: None) -> Iterator[Piece]:
        """Yield all text in order, as pieces; remarks on files go to `note`.

        Raise DataError naming file and position where a file cannot be read.
        """
        reading = dataclasses.replace(self.reading, note=note)
        if self.parts:
            for part in self.parts:
                yield from part.pieces(note)
        elif self.prepared:
            yield from self.prepared.pieces()
        elif reading.form:
            note(f"{self.source}: {described(reading.form, reading)}")
            yield from as_pieces(dataclasses.replace(self, reading=reading).conversations())
        else:
            for path in self.paths:
                yield from READERS[suffix_of(path.name)](path, reading)

    def conversations(self) -> Iterator[tuple[str, Talk]]:
        """Yield all conversations in order, each with its file and row. Raise DataError as `pieces` does."""
        for part in self.parts:
            yield from part.conversations()
        for path in () if self.parts else self.paths:
            yield from conversations(path, self.reading)


def open_corpus(
    source: str,
    *,
    data_dir: Path,
    cache_dir: Path | None = None,
    reading: Reading = PLAIN,
    max_download_bytes: int = DOWNLOAD_LIMIT,
    open_url: Callable[[str], Any] = open_https,
) -> Corpus:
    """Return the corpus that `source` names: a file, folder, glob, https URL or `tinyshakespeare`, or several joined by commas, with
    weights for a mixture; `code:` and a folder for its source code.

    Downloads are cached in `cache_dir/downloads/`, by default below `data_dir/.cache`. `open_url` opens a URL for reading. Raise DataError if a part of the
    source does not exist.
    """
    whole = os.path.lexists(os.path.expanduser(source))  # a file name may contain a comma
    parts = [Part("", source, "")] if whole else parts_of(source)
    shown = source if whole else masked(source)
    mixed = any(part.weight for part in parts)
    if mixed and (not all(part.weight for part in parts) or len(parts) < 2):
        bare = next(
            (f"{masked(part.place)} has no weight" for part in parts if not part.weight), "one source is no mixture"
        )
        raise DataError(f"{shown}: {bare}: give a weight to each of several sources, as in a.txt*3,b.txt*1, or to none")
    places = functools.partial(
        _found, reading=reading, data_dir=data_dir, cache_dir=cache_dir, max_bytes=max_download_bytes, open_url=open_url
    )
    found = list(map(places, parts))
    if any(part.place.startswith(SCHEME) for part in parts):  # they have their commits now
        shown = masked(joined(part for part, _ in found))
    if not mixed:
        return _corpus(shown, found, reading)
    return _mixture(
        shown, parts, [_corpus(masked(joined([each[0]._replace(weight="")])), [each], reading) for each in found]
    )


def _found(
    part: Part,
    *,
    reading: Reading,
    data_dir: Path,
    cache_dir: Path | None,
    max_bytes: int,
    open_url: Callable[[str], Any],
) -> tuple[Part, Found]:
    """Return a part of a source, with the commit of a data set of the hub, the files that it names, and lines on what is left out."""
    if part.kind:
        return part, code_in(part.place)
    if part.place == "tinyshakespeare":
        return part, ([tiny_shakespeare(data_dir, cache_dir=cache_dir, open_url=open_url)], [])
    if part.place.startswith(HUB):
        notes: list[str] = []
        pinned, files = files_at(part.place, cache_dir or data_dir / ".cache", notes.append)
        return part._replace(place=pinned), (files, [f"{pinned}: {len(files)} file{'s' * (len(files) > 1)}", *notes])
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", part.place):
        copy = fetch(part.place, data_dir=data_dir, cache_dir=cache_dir, max_bytes=max_bytes, open_url=open_url)
        return part, ([copy], [])
    return part, files_of(part.place, reading)


def _corpus(shown: str, found: list[tuple[Part, Found]], reading: Reading) -> Corpus:
    paths = tuple(path for _, (files, _) in found for path in files)
    if not paths:
        raise DataError(f"the data source {shown!r} names nothing: expected a file, folder, glob or https URL")
    notes = [line for _, (_, lines) in found for line in lines] + repeated(paths)
    form = form_of(paths, reading, notes.append)
    return Corpus(
        source=shown,
        name=_name([part for part, _ in found]),
        paths=paths,
        reading=dataclasses.replace(reading, form=form),
        skipped=tuple(notes),
        prepared=prepared_of(paths),
    )


def _mixture(shown: str, parts: list[Part], corpora: list[Corpus]) -> Corpus:
    """Return the mixture of sources. Raise DataError unless all are conversations or none is."""
    talks = [corpus.source for corpus in corpora if corpus.reading.form]
    plain = [corpus.source for corpus in corpora if not corpus.reading.form]
    if talks and plain:
        problem = f"{talks[0]} holds conversations, {plain[0]} is plain text"
        raise DataError(f"{problem}: mix texts with texts, or conversations with conversations")
    paths = tuple(path for corpus in corpora for path in corpus.paths)
    notes = [line for corpus in corpora for line in corpus.skipped]
    return Corpus(
        source=shown,
        name=_name(parts),
        paths=paths,
        reading=corpora[0].reading,
        skipped=tuple(dict.fromkeys([*notes, *repeated(paths)])),
        parts=tuple(corpora),
        weights=tuple(part.weight for part in parts),
    )


def _name(parts: list[Part]) -> str:
    return "_".join(_stem(masked(part.place)) for part in parts)[:40].strip("_")


def _stem(part: str) -> str:
    """Return a part of a source as [a-z0-9_]: the file's name without suffix, else the folder's name."""
    if part.startswith(SCHEME):
        part = data_set(part).repo
    path = Path(re.split("[?#]", part)[0] if "://" in part else os.path.abspath(os.path.expanduser(part)))
    base = unpacked_name(path.name)
    base = os.path.splitext(base)[0] if suffix_of(base) in READERS or is_prepared(base) else base
    words = (re.sub(r"[^a-z0-9]+", "_", word.lower()).strip("_") for word in (base, path.parent.name))
    return next(filter(None, words), "text")
