"""The layouts with a manifest: a JSON file, written last, that lists the other files with their sizes and sha256.

One mechanism for all: what differs from layout to layout is data, and a few hooks.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from milepost.ckpt import archive
from milepost.ckpt.layouts.base import Layout, ListedTensor, is_there, raise_first
from milepost.ckpt.manifest import (
    check_finished,
    file_problems,
    is_regular,
    matches,
    read_json,
    read_manifest,
    sha256,
    write_manifest,
)  # fmt: skip
from milepost.ckpt.record import (
    EARLIER,
    Checkpoint,
    CheckpointError,
    Json,
    from_metadata,
    note_missing_optimizer,
    without_optimizer,
)
from milepost.ckpt.tensors import (
    checked_tensors,
    optimizer_groups,
    optimizer_state,
    optimizer_tensors,
    read_safetensors,
    write_safetensors,
)
from milepost.files import NewFile, new_folder, new_group, write_json, written
from milepost.lazy import Tensor
from milepost.paths import is_real_file

Locate = Callable[[str], Path]
Made = dict[str, NewFile | dict[str, Json]]


class TensorFiles(Protocol):
    """How named tensors lie in one or several files of a checkpoint; names are those in its folder."""

    @property
    def pattern(self) -> str:
        """A glob that its files match, and no other file of the checkpoint."""

    @property
    def single(self) -> bool:
        """Whether it is one file, named `pattern`, whose removal leaves the rest of the checkpoint intact."""

    def write(self, locate: Locate, tensors: Mapping[str, Tensor]) -> Made:
        """Write the tensors; return the new files by name."""

    def read(self, locate: Locate, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the tensors in the files of these names, mapped; raise CheckpointError."""


@dataclass(frozen=True)
class Safetensors:
    """All tensors in one safetensors file."""

    pattern: str
    single: bool = True

    def write(self, locate: Locate, tensors: Mapping[str, Tensor]) -> Made:
        """Write the file."""
        return {self.pattern: write_safetensors(locate(self.pattern), tensors)}

    def read(self, locate: Locate, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the tensors of the file, mapped."""
        return read_safetensors(locate(self.pattern))


@dataclass(frozen=True)
class TorchFile:
    """One torch archive: a bare state dict. Of the optimizer, torch's own nested form, groups included."""

    pattern: str
    single: bool = True

    def write(self, locate: Locate, tensors: Mapping[str, Any]) -> Made:
        """Write the archive."""
        with written(locate(self.pattern), hashed=True) as file:
            archive.dump(tensors, file)
        return {self.pattern: file}

    def read(self, locate: Locate, names: Sequence[str]) -> dict[str, Any]:
        """Return the pickled dict, its tensors mapped."""
        return archive.load(locate(self.pattern))[0]


class Reader(Protocol):
    """Reads another program's checkpoint that has our shape but no manifest; the verbs are those of `Layout`."""

    def read_metadata(self, path: Path) -> dict[str, Json]: ...

    def read(self, path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint: ...

    def problems(self, path: Path) -> list[CheckpointError]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ManifestLayout(Layout):
    """A layout whose manifest, written last, lists every other file."""

    manifest: str = ""  # the file that makes the checkpoint visible: a name in the folder, or a suffix
    weights: TensorFiles | None = None
    adapters: TensorFiles | None = None  # instead of `weights`, for a record that holds adapters only
    optimizer: TensorFiles | None = None
    # Extra files for people and other programs: name -> JSON value. `head` is what the manifest begins with.
    extra: Callable[[Checkpoint], Mapping[str, Json]] = lambda record: {}
    head: Callable[[Checkpoint], Mapping[str, Json]] = lambda record: {}
    optional: tuple[str, ...] = ()  # files that may be missing besides the optimizer's
    editable: tuple[str, ...] = ()  # files that people may edit: neither size nor bytes are compared
    markers: tuple[tuple[str, ...], ...] = ()  # sets of files, any of which identifies a folder; default: the manifest
    remedy: str = EARLIER  # for damage
    foreign: Reader | None = None  # reads a checkpoint without a manifest, which is another program's
    foreign_optimizers: tuple[str, ...] = ()  # names of the optimizer's file in such a folder
    why_no_manifest: str = "it was copied in part"  # what to report where nothing reads it
    # Hooks, where a layout truly differs.
    claims: Callable[[Path], bool] | None = None  # instead of `markers`
    to_disk: Callable[[Checkpoint], Mapping[str, Tensor]] = lambda record: record.model_state
    check_manifest: Callable[[Path, Mapping[str, Any]], None] = lambda path, manifest: None
    check_record: Callable[[Path, Checkpoint], None] = lambda path, record: None  # with what the extra files say
    check_bytes: Callable[[Path, Mapping[str, Any]], list[CheckpointError]] = lambda path, manifest: []
    # Instead of what `weights` and `optimizer` do: write all tensors, read the weights, read the optimizer's state.
    write_tensors: Callable[[Checkpoint, Path], Made] | None = None
    load_weights: Callable[[Path, Mapping[str, Any]], dict[str, Tensor]] | None = None
    load_optimizer: Callable[[Path, Mapping[str, Any]], dict[str, Any]] | None = None
    list_tensors: Callable[[Path, Mapping[str, Any]], list[ListedTensor]] | None = None

    writable = True

    def __post_init__(self) -> None:
        """Check that nothing is undeclared that reading and writing need."""
        self.require(name=self.name, manifest=self.manifest)
        super().__post_init__()
        if self.write_tensors is None:
            self.require(weights=self.weights, optimizer=self.optimizer)
        else:
            self.require(load_weights=self.load_weights, load_optimizer=self.load_optimizer)
        if self.suffixes and self.manifest != self.suffixes[-1]:
            raise ValueError(
                f"layout {self.name}: `manifest` is not the last of `suffixes`, which makes a checkpoint visible"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Which files.

    @property
    def marker_sets(self) -> tuple[tuple[str, ...], ...]:
        """The declared markers, or else the manifest."""
        return (self.markers or ((self.manifest,),)) if self.is_folder and self.claims is None else ()

    def detect(self, path: Path) -> bool:
        """Whether `path` has the marker files, or is a file beside a manifest."""
        if self.claims is not None:
            return self.claims(path)
        if self.is_folder:
            return any(all(is_regular(path / name) for name in names) for names in self.marker_sets)
        if path.is_dir() or not path.name.endswith(self.suffixes):
            return False
        manifest = self.locate(path, self.manifest)
        if not manifest.is_file():
            return False
        try:
            return "files" in read_json(manifest)
        except CheckpointError:
            return not archive.is_archive(manifest)  # damaged: for this layout to refuse

    def parts_of(self, primary: Path, folder: Path) -> list[Path]:
        """Return the visible files in `folder` whose size and sha256 `primary`, a manifest, lists."""
        if self.is_folder or not primary.name.endswith(self.manifest) or not is_real_file(primary):
            return []
        try:
            manifest = read_manifest(primary)
            entries = {} if manifest["problem"] else manifest["files"]
            parts = [self.locate(folder / primary.name, suffix) for suffix in self.suffixes[:-1]]
            return [part for part in parts if is_real_file(part) and _is_entry(part, entries.get(part.name))]
        except (CheckpointError, OSError):
            return []

    def optimizer_file(self, path: Path) -> Path | None:
        """Return the optimizer's file, if it has a file of its own."""
        return self.locate(path, self.optimizer.pattern) if self.optimizer and self.optimizer.single else None

    def is_optimizer_file(self, path: Path, file: Path) -> bool:
        """Whether the optimizer's pattern, or the name in another program's folder, matches `file`."""
        patterns = [*([self.optimizer.pattern] if self.optimizer else []), *self.foreign_optimizers]
        name = file.relative_to(path).as_posix() if self.is_folder else self.suffix(file)
        return matches(name, patterns)

    def _weights_of(self, parts: Sequence[str]) -> TensorFiles | None:
        return self.adapters if self.adapters and "adapters" in parts else self.weights

    def _manifest(self, path: Path) -> dict[str, Any]:
        """Return the manifest, its files under their names in the folder or their suffixes; raise CheckpointError."""
        file = self.locate(path, self.manifest)
        if not is_there(file):
            problem = f"has no {file.name}, which is written last: {self.why_no_manifest}"
            raise CheckpointError(path, problem, EARLIER, kind="lacking")
        manifest = read_manifest(file)
        if not self.is_folder:  # all files may have been renamed since
            listed = manifest["files"].items()
            manifest["files"] = {self.suffix(Path(name)): entry for name, entry in listed}
        self.check_manifest(path, manifest)
        return manifest

    # -----------------------------------------------------------------------------------------------------------------
    # Reading.

    def _foreign_reader(self, path: Path) -> Reader | None:
        """Return what reads the checkpoint of another program at `path`; None if it has a manifest of ours.

        Raise CheckpointError if it is unfinished.
        """
        check_finished(path if self.is_folder else self.locate(path, self.manifest))
        return None if is_there(self.locate(path, self.manifest)) else self.foreign

    def read_metadata(self, path: Path) -> dict[str, Json]:
        """Return the manifest's metadata, after comparing the sizes of its files."""
        if foreign := self._foreign_reader(path):
            return foreign.read_metadata(path)
        manifest = self._manifest(path)
        raise_first(self._file_problems(path, manifest))
        values = manifest["metadata"]
        gone = (file := self.optimizer_file(path)) is not None and not is_regular(file)
        return without_optimizer(values) if gone else values

    def read(self, path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
        """Return the record. Without its optimizer's file it only generates, with a note."""
        if foreign := self._foreign_reader(path):
            return foreign.read(path, optimizer=optimizer, verify=verify)
        manifest = self._manifest(path)
        bad = self._file_problems(path, manifest, hashed=verify, begins=self._read_patterns(manifest, optimizer))
        unneeded = None if optimizer else self.optimizer_file(path)
        raise_first([problem for problem in bad if problem.path != unneeded])
        notes = [f"{problem}; the rest is whole and is used without it" for problem in bad]
        if verify:
            raise_first(self.check_bytes(path, manifest))
        record = from_metadata(
            manifest["metadata"],
            model_state=self._read_weights(path, manifest),
            optimizer_state=None,
            where=str(self.locate(path, self.manifest)),
        )
        record.notes += notes
        self.check_record(path, record)
        self._read_optimizer(path, manifest, record, wanted=optimizer)
        record.path, record.layout = self.primary_file(path), self.name
        return record

    def _read_patterns(self, manifest: Mapping[str, Any], optimizer: bool) -> list[str]:
        """Return patterns for the tensor files that will be read: only their first bytes are worth checking."""
        if self.write_tensors is not None:
            return ["*"]
        weights = self._weights_of(manifest["metadata"].get("parts", ()))
        return [files.pattern for files in (weights, self.optimizer if optimizer else None) if files is not None]

    def _file_problems(
        self, path: Path, manifest: Mapping[str, Any], *, hashed: bool = False, begins: Sequence[str] = ()
    ) -> list[CheckpointError]:
        bound = {name: entry for name, entry in manifest["files"].items() if name not in self.editable}
        separable = [self.optimizer.pattern] if self.optimizer and self.optimizer.single else []
        return file_problems(
            partial(self.locate, path),
            {**manifest, "files": bound},
            hashed=hashed,
            begins=begins,
            optional=[*separable, *self.optional],
            remedy=self.remedy,
        )

    def _names(self, manifest: Mapping[str, Any], files: TensorFiles) -> list[str]:
        return [name for name in manifest["files"] if matches(name, [files.pattern])]

    def _read_weights(self, path: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
        if self.load_weights is not None:
            return self.load_weights(path, manifest)
        files = self._weights_of(manifest["metadata"].get("parts", ()))
        assert files is not None
        tensors = files.read(partial(self.locate, path), self._names(manifest, files))
        return checked_tensors(tensors, str(self.locate(path, files.pattern) if files.single else path))

    def _read_optimizer(self, path: Path, manifest: Mapping[str, Any], record: Checkpoint, *, wanted: bool) -> None:
        """Give `record` its optimizer's state if `wanted`; note that its file is missing."""
        file = self.optimizer_file(path)
        if file is not None and not is_regular(file):
            note_missing_optimizer(record, file)
        elif not wanted or "optimizer" not in record.parts:
            return
        elif self.load_optimizer is not None:
            record.optimizer_state = self.load_optimizer(path, manifest)
        elif self.optimizer is not None:
            tensors = self.optimizer.read(partial(self.locate, path), self._names(manifest, self.optimizer))
            if not self._nested:
                tensors = optimizer_state(tensors, manifest["optimizer_groups"], str(file or path))
            record.optimizer_state = tensors

    def problems(self, path: Path) -> list[CheckpointError]:
        """Compare every byte with the manifest's sha256."""
        try:
            if foreign := self._foreign_reader(path):
                return foreign.problems(path)
            manifest = self._manifest(path)
            return self._file_problems(path, manifest, hashed=True) or self.check_bytes(path, manifest)
        except CheckpointError as error:
            return [error]

    def listed_tensors(self, path: Path) -> list[ListedTensor] | None:
        """Return the tensors of the index, in a layout that has one."""
        return None if self.list_tensors is None else self.list_tensors(path, self._manifest(path))

    # -----------------------------------------------------------------------------------------------------------------
    # Writing.

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Write all files into a hidden folder, the manifest last, and reveal them."""
        weights = self.to_disk(record)
        with self._hidden(folder, stem, full=record.optimizer_state is not None) as hidden:
            locate = partial(self._locate_new, hidden, stem)
            if self.write_tensors is not None:
                made = self.write_tensors(record, hidden)
            else:
                made = self._write_separately(record, weights, locate)
            made |= {name: write_json(locate(name), value) for name, value in self.extra(record).items()}
            order = {name: self._rank(name) for name in made}
            listed = {
                locate(name).relative_to(hidden).as_posix(): made[name] for name in sorted(made, key=order.__getitem__)
            }
            write_manifest(locate(self.manifest), record, listed, first=self.head(record), groups=self._groups(record))
        return self.primary_file(self.targets(folder, stem)[-1]) or folder / stem

    def _hidden(self, folder: Path, stem: str, *, full: bool) -> contextlib.AbstractContextManager[Path]:
        """Return the context manager that reveals a hidden folder, or the files in one, when its block ends."""
        if self.is_folder:
            return new_folder(folder / stem)
        absent = [] if full or self.optimizer is None else [self.optimizer.pattern]
        return new_group(folder, [f"{stem}{suffix}" for suffix in self.suffixes if suffix not in absent])

    def _locate_new(self, hidden: Path, stem: str, name: str) -> Path:
        path = hidden / name if self.is_folder else hidden / f"{stem}{name}"
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
        return path

    def _write_separately(self, record: Checkpoint, weights: Mapping[str, Tensor], locate: Locate) -> Made:
        files = self._weights_of(record.parts)
        assert files is not None
        made = files.write(locate, weights)
        if record.optimizer_state is not None and self.optimizer is not None:
            state = record.optimizer_state
            made |= self.optimizer.write(locate, state if self._nested else optimizer_tensors(state))
        return made

    @property
    def _nested(self) -> bool:
        """Whether the optimizer's file holds its groups too."""
        return isinstance(self.optimizer, TorchFile)

    def _groups(self, record: Checkpoint) -> list[Json] | None:
        return None if record.optimizer_state is None or self._nested else optimizer_groups(record.optimizer_state)

    def _rank(self, name: str) -> int:
        """Return the place of a file in the manifest: that of the first member, or suffix, that it matches."""
        patterns = self.members or self.suffixes
        return next((rank for rank, pattern in enumerate(patterns) if matches(name, [pattern])), len(patterns))


def format_line(text: str) -> Callable[[Checkpoint], Mapping[str, Json]]:
    """Return a `head` that only says whose file it is."""
    return lambda record: {"format": text}


def _is_entry(part: Path, entry: dict[str, Json] | None) -> bool:
    return entry is not None and part.stat().st_size == entry["size"] and sha256(part) == entry["sha256"]
