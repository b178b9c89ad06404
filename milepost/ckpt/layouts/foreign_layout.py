"""The layouts of other programs, read only: a layout recognises the files, and `ckpt/foreign` translates them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milepost.ckpt import archive
from milepost.ckpt.foreign.importing import adopted, adopted_metadata
from milepost.ckpt.layouts.base import Layout, raise_first
from milepost.ckpt.record import Checkpoint, CheckpointError, Json

# Returns the program's own keys at a path, with the optimizer's state or without it.
Content = Callable[[Path, bool], Mapping[Any, Any]]


def archive_content(path: Path, optimizer: bool) -> Mapping[Any, Any]:
    """Return the keys of the torch archive at `path`, its tensors mapped."""
    return archive.load(path)[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignReader:
    """Reads another program's checkpoint: its own file, or a folder in the shape of a layout without a manifest."""

    layout: str  # the name to record
    content: Content = archive_content
    # The file beside which a config.json and a tokenizer may lie.
    source: Callable[[Path], Path] = lambda path: path
    optimizer_file: str = ""  # in a folder, the file that holds only the optimizer's state
    checksums: Callable[[Path], list[CheckpointError]] | None = archive.verify  # None: the format has none
    note: Callable[[Path], str | None] = lambda path: None  # on what is missing from the checkpoint

    def read_metadata(self, path: Path) -> dict[str, Json]:
        """Return the metadata that the checkpoint translates to, its tensors mapped."""
        return adopted_metadata(self.source(path), self.content(path, True), layout=self.layout)

    def read(self, path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
        """Return the record that the checkpoint translates to; raise CheckpointError if it cannot be translated."""
        if verify and self.checksums:
            unneeded = path / self.optimizer_file if self.optimizer_file and not optimizer else None
            raise_first([problem for problem in self.checksums(path) if problem.path != unneeded])
        record = adopted(self.source(path), self.content(path, optimizer), layout=self.layout, optimizer=optimizer)
        record.path = path if path.is_dir() else self.source(path)
        record.notes += [note] if (note := self.note(path)) else []
        return record

    def problems(self, path: Path) -> list[CheckpointError]:
        """Compare the bytes with their checksums; in a format without any, check that the file can be translated."""
        if self.checksums:
            return self.checksums(path)
        try:
            self.read(path)
        except CheckpointError as error:
            return [error]
        return []


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignLayout(Layout):
    """Another program's files, identified by the strings in an archive's pickle, or by `claims`."""

    suffixes: tuple[str, ...] = ("",)  # one file of any name
    keys: Callable[[frozenset[str]], bool] | None = None
    claims: Callable[[Path], bool] | None = None
    alone: Callable[[Path], bool] = lambda path: False  # whether the primary file is a checkpoint without the others
    beside: Mapping[str, str] = field(default_factory=dict)  # by its name, the other file of a checkpoint of that name
    optimizers: tuple[str, ...] = ()  # names of files that hold an optimizer's state and no weights
    reader: ForeignReader | None = None

    def __post_init__(self) -> None:
        """Check that something identifies the files, and something reads them."""
        super().__post_init__()
        self.require(keys=self.keys or self.claims, reader=self.reader)

    def _reader(self) -> ForeignReader:
        assert self.reader is not None
        return self.reader

    def primary_file(self, path: Path) -> Path | None:
        """Return the path under which the checkpoint that `path` belongs to is listed; None if it is not visible yet."""
        return self.locate(path, self.primary) if self.primary and self.alone(path) else super().primary_file(path)

    def missing(self, path: Path) -> str:
        """Return the name of the file whose absence keeps the checkpoint from being visible."""
        return self.beside.get(path.name) or super().missing(path)

    def is_optimizer_file(self, path: Path, file: Path) -> bool:
        """Whether `file` has the name of an optimizer's file."""
        return file.name in self.optimizers

    def detect(self, path: Path) -> bool:
        """Whether `path` is this program's, by what is inside."""
        return self.claims(path) if self.claims else self.keys is not None and self.keys(archive.pickle_strings(path))

    def read_metadata(self, path: Path) -> dict[str, Json]:
        """Return the metadata that the checkpoint translates to."""
        return self._reader().read_metadata(path)

    def read(self, path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
        """Return the record that the checkpoint translates to."""
        return self._reader().read(path, optimizer=optimizer, verify=verify)

    def problems(self, path: Path) -> list[CheckpointError]:
        """Compare the bytes with their checksums, if the format has any."""
        return self._reader().problems(path)


def torch_archive(name: str, keys: Callable[[frozenset[str]], bool]) -> ForeignLayout:
    """Return the layout of a program's single torch archive, identified by the strings in its pickle."""
    return ForeignLayout(name=name, keys=keys, reader=ForeignReader(layout=name))
