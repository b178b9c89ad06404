"""What every layout has: a name, and the places of its files. The three mechanisms add reading, checking and writing.

A checkpoint is a folder, or a few files side by side that share a stem. Either becomes visible in one rename.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from milepost.ckpt.manifest import matches
from milepost.ckpt.record import Checkpoint, CheckpointError, Json


class ListedTensor(NamedTuple):
    """A tensor as a file's header lists it; `part` is "weights" or "optimizer",
    `dtype` is in the words of safetensors.
    """

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout(ABC):
    """A way to put a record into files, declared as data.

    Raises ValueError if a trait that it needs is not declared.
    """

    name: str
    # A folder: the files in it, as glob patterns, in the order in which a manifest lists them.
    members: tuple[str, ...] = ()
    # Further files in it that belong to it, such as another program's, and hold no tensor of its model.
    others: tuple[str, ...] = ()
    # Files side by side instead: the ends of their names in order of appearance; the last makes a checkpoint visible.
    suffixes: tuple[str, ...] = ()
    primary: str = ""  # the suffix of the file that stands for the checkpoint; empty: the last
    # Documented names that repeat from run to run, with {step} and {prefix}: written into a folder of the run's own.
    run_stem: str = ""
    # Leave a file to the layout of its folder, if that is a checkpoint that the file is part of.
    yields_to_folder: bool = False

    # A file in its folder that another rank wrote, as a pattern whose group is the rank.
    of_rank: str = ""

    writable = False  # whether the mechanism has `write`

    def __post_init__(self) -> None:
        """Check the traits that every layout needs."""
        self.require(name=self.name)
        if bool(self.members) == bool(self.suffixes):
            raise ValueError(
                f"layout {self.name}: declare `members` of a folder or `suffixes` of files, one of the two"
            )
        if self.primary and self.primary not in self.suffixes:
            raise ValueError(f"layout {self.name}: `primary` is {self.primary!r}, expected one of {self.suffixes}")

    def rank_of(self, file: Path) -> int:
        """Return the rank of the process that wrote a file of a checkpoint: 0 unless the layout says another."""
        found = re.fullmatch(self.of_rank, file.name)
        return int(found[1]) if found else 0

    def require(self, **traits: object) -> None:
        """Raise ValueError naming the first of `traits` that is not declared."""
        for trait, value in traits.items():
            if not value:
                raise ValueError(f"layout {self.name or '(unnamed)'}: `{trait}` is not declared")

    @property
    def marker_sets(self) -> tuple[tuple[str, ...], ...]:
        """Sets of files, any of which makes a folder one of this layout; empty if other rules decide."""
        return ()

    @property
    def is_folder(self) -> bool:
        """Whether a checkpoint is a folder, rather than files side by side."""
        return not self.suffixes

    # -----------------------------------------------------------------------------------------------------------------
    # Places.

    def locate(self, path: Path, member: str) -> Path:
        """Return the file `member`, a name in the folder or a suffix, of the checkpoint that `path` belongs to."""
        return path / member if self.is_folder else path.with_name(self.stem(path) + member)

    def stem(self, path: Path) -> str:
        """Return the name of `path` without the suffix of this layout."""
        return path.name.removesuffix(self.suffix(path))

    def suffix(self, path: Path) -> str:
        """Return the longest suffix of this layout that the name of `path` ends with; empty if there is none."""
        longest_first = sorted(self.suffixes, key=len, reverse=True)
        return next((suffix for suffix in longest_first if path.name.endswith(suffix)), "")

    def targets(self, folder: Path, stem: str) -> list[Path]:
        """Return the paths that `write` gives a checkpoint of this stem, the one that makes it visible last."""
        return [folder / f"{stem}{suffix}" for suffix in self.suffixes or ("",)]

    def primary_file(self, path: Path) -> Path | None:
        """Return the path under which the checkpoint that `path` belongs to is listed;
        None if it is not visible yet.
        """
        if self.is_folder or len(self.suffixes) == 1:
            return path
        visible = self.locate(path, self.suffixes[-1]).is_file()
        return self.locate(path, self.primary or self.suffixes[-1]) if visible else None

    def missing(self, path: Path) -> str:
        """Return the name of the file whose absence keeps the checkpoint that `path` belongs to from being visible."""
        return f"{self.stem(path)}{self.suffixes[-1]}"

    def files(self, path: Path) -> list[Path]:
        """Return the files, or the one folder, of the checkpoint, the one that makes it visible last."""
        if self.is_folder or len(self.suffixes) == 1:
            return [path]
        return [file for suffix in self.suffixes if (file := self.locate(path, suffix)).is_file()]

    def optimizer_file(self, path: Path) -> Path | None:
        """Return the file whose removal leaves a checkpoint that only generates; None if there is no such file."""
        return None

    def parts_of(self, primary: Path, folder: Path) -> list[Path]:
        """Return the visible files in `folder` that are proven to be of the same save as the hidden `primary`, the last
        file of a save or a removal that was killed.
        """
        return []

    def owns(self, path: Path, inside: Path) -> bool:
        """Whether the folder `path` is a checkpoint of this layout, and `inside` is one of its files or folders."""
        if not self.is_folder or path not in inside.parents or not self.detect(path):
            return False
        place = inside.relative_to(path).as_posix()
        return matches(place, (*self.members, *self.others)) or any(
            member.startswith(f"{place}/") for member in self.members
        )

    def holds_other_files(self, path: Path) -> bool:
        """Whether the checkpoint is a folder that also holds files which no save writes."""
        if not path.is_dir():
            return False
        files = (file for file in path.rglob("*") if not file.is_dir() and file.name[0] != ".")  # no .DS_Store
        names = (file.relative_to(path).as_posix() for file in files)
        return not all(matches(name, self.members) for name in names)

    # -----------------------------------------------------------------------------------------------------------------
    # Contents, by each mechanism.

    @abstractmethod
    def detect(self, path: Path) -> bool:
        """Whether `path` is for this layout to read, or to refuse with a reason.

        The first layout in the registry wins.
        """

    @abstractmethod
    def read_metadata(self, path: Path) -> dict[str, Json]:
        """Return the record's metadata without reading tensors; raise CheckpointError."""

    @abstractmethod
    def read(self, path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
        """Return the record; raise CheckpointError.

        `optimizer=False` leaves the optimizer's tensors unread; `verify=True` first compares every checksum.
        """

    @abstractmethod
    def problems(self, path: Path) -> list[CheckpointError]:
        """Return what is wrong with the bytes of the checkpoint; empty if nothing is."""

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Write the record under the names `targets(folder, stem)`; return its primary file.

        The caller holds the folder's lock.
        Raises CheckpointError for what the layout cannot hold, OSError if the disk fails; nothing new is left then.
        """
        raise NotImplementedError(f"{self.name} is read only")

    def listed_tensors(self, path: Path) -> list[ListedTensor] | None:
        """Return the tensors if an index of the checkpoint lists them; None if each file lists its own."""
        return None

    def is_optimizer_file(self, path: Path, file: Path) -> bool:
        """Whether `file`, of the checkpoint at `path`, holds the optimizer's state and no weights."""
        return file == self.optimizer_file(path)


def raise_first(problems: Sequence[CheckpointError]) -> None:
    """Raise the first problem, if there is any."""
    for problem in problems:
        raise problem


def is_there(path: Path) -> bool:
    """Whether something has the name `path`: also a link to nothing, which is then refused as damaged."""
    return os.path.lexists(path)
